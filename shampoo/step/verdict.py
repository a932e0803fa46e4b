"""The verdict on a step: whether its gradients are fit for it, heard at once or in the next one.

Where a device decides, the host does not wait for it. The step is computed whether it is taken or
not, and what it would change is gated (:class:`shampoo.scalars.Gate`); the host counts it as taken.
In the next step, before anything else, it hears what has become of it and takes its count back if
need be: the roots that are due and the bias corrections go by the steps that were taken. That is an
iteration later. The letter leaves as the first thing in a step, so that a host that is so far ahead
as to wait for it has asked for roots, directions, a forward and a backward pass since: the device
does not run out of work.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from shampoo.blocks.pattern_cache import Pattern, PatternCache
from shampoo.distributed.distributor import StepInputs
from shampoo.distributed.shard_regions import local_tensor
from shampoo.hyperparameters import Hyperparameters
from shampoo.ops.transit import Letter, is_near
from shampoo.scalars import Gate
from shampoo.step.block_plan import BlockPlan
from shampoo.step.param_plan import PlannedParam


def unfit(plan: BlockPlan, there: Sequence[int], reaches: Sequence[float]) -> list[PlannedParam]:
    """The parameters whose gradients are not finite, or too large to square.

    Args:
        there: the parameters that have a gradient.
        reaches: of each of these, what no element of its gradient exceeds.
    """
    limits = plan.square_limits
    return [
        plan.members[index]
        for index, reach in zip(there, reaches, strict=True)
        if not reach < limits[index]
    ]


def complaint_of(bad: Sequence[PlannedParam], hyper: Sequence[Hyperparameters], count: int) -> str:
    """Why a step cannot be taken.

    Args:
        bad: the parameters of :func:`unfit`, at least one.
        hyper: of the groups.
        count: how many parameters have a gradient.
    """
    decay = hyper[bad[0].group].coupled_decay
    added = f", with the weight_decay={decay} that is added to it," if decay != 0.0 else ""
    return (
        f"the gradient of {bad[0].name}{added} is not finite, or too large to square"
        f" ({len(bad)} of {count} gradients are)"
    )


@dataclass
class _Sent:
    """A step whose verdict is on its way."""

    hyper: Sequence[Hyperparameters]
    present: Pattern
    there: Sequence[int]
    counts: list[Tensor]  # by arena, before the step
    letter: Letter  # [1 or 2, there] float64: reaches and, of a first step, magnitudes


class LateVerdicts:
    """Decides on a device whether steps are taken; the host hears of each in the next.

    Args:
        plan: of the optimizer; :meth:`suit` it.

    Attributes:
        gate: what turns the numbers of a step into those of one that may not be taken.
    """

    def __init__(self, plan: BlockPlan) -> None:
        self._plan = plan
        self._device = plan.arenas[0].device
        self._limits: PatternCache[Tensor] = PatternCache()
        self._sent: _Sent | None = None
        self.gate = Gate(self._device)

    @staticmethod
    def suit(plan: BlockPlan) -> bool:
        """Whether one process steps alone, on one device, which the host would have to wait for."""
        devices = {arena.device for arena in plan.arenas}
        is_far = len(devices) == 1 and not is_near(*devices)
        is_alone = is_far and plan.stepping_ranks.is_alone
        return is_alone and not isinstance(local_tensor(plan.planned[0]), FakeTensor)

    def accept(
        self, inputs: StepInputs, there: Sequence[int], magnitudes: Tensor, reaches: Tensor
    ) -> Tensor:
        """Whether these gradients make a step, 0-d bool: all fit, and not an inert first one.

        Args:
            there: the parameters that have a gradient.
            magnitudes: of these gradients, [there] float64.
            reaches: the same, with what coupled decay adds.
        """
        plan = self._plan

        def limits_of(_: Pattern) -> Tensor:
            limits = [plan.square_limits[index] for index in there]
            on_host = torch.tensor(limits, dtype=torch.float64, device="cpu")
            return on_host.to(self._device, non_blocking=True)

        accepted = (reaches < self._limits.get(inputs.present, limits_of)).all()
        told = reaches
        if plan.step == 0:
            accepted = accepted & (magnitudes > 0.0).any()
            told = torch.stack((reaches, magnitudes))
        counts = [arena.steps.clone() for arena in plan.arenas]
        self._sent = _Sent(inputs.hyper, inputs.present, there, counts, Letter(told))
        return accepted

    def settle(self) -> str:
        """Hears what has become of the last step, and takes back the count of one not taken.

        Returns:
            Why it was skipped; empty if it was not, or if there is nothing to hear.
        """
        sent, self._sent = self._sent, None
        if sent is None:
            return ""
        reaches, *magnitudes = sent.letter.read().view(-1, len(sent.there)).tolist()
        bad = unfit(self._plan, sent.there, reaches)
        is_inert = bool(magnitudes) and not any(magnitudes[0])
        if bad or is_inert:
            self._take_back(sent)
        return complaint_of(bad, sent.hyper, len(sent.there)) if bad else ""

    def _take_back(self, sent: _Sent) -> None:
        for arena, before in zip(self._plan.arenas, sent.counts, strict=True):
            here = torch.tensor([sent.present[member] for member in arena.first], device="cpu")
            # What somebody has written there since is not what the step has counted.
            is_counted = arena.steps == before + here
            arena.steps.copy_(torch.where(is_counted, before, arena.steps))
