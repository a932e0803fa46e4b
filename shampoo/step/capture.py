"""What an optimizer with ``capturable=True`` keeps on the device, so that graphs can replay a step.

A graph repeats kernels; nothing that the host knows moves with it. So learning rates and betas may
be tensors, steps are counted on the device, and it is decided there whether gradients are fit for a
step. One that is not is still computed: with a gradient of zeros, betas of 1 and weights of 0 it
changes nothing. What is left to the host is the schedule of refreshes, by the count of steps that
it has asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from shampoo.blocks.pattern_cache import Pattern, PatternCache
from shampoo.blocks.segments import ActiveBlocks
from shampoo.blocks.stacks import Arena
from shampoo.hyperparameters import Hyperparameters
from shampoo.scalars import Counted, Gate, Scalars
from shampoo.step.block_plan import BlockPlan
from shampoo.step.gradients import largest_magnitudes, with_decay


def is_capturing() -> bool:
    """Whether work is being recorded into a CUDA graph instead of being done."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_health(optimizer: Optimizer) -> None:
    """torch's own: refuses to be captured without ``capturable=True``, warns if it never is."""
    check = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    if check is None:  # before torch 2.13
        check = optimizer._cuda_graph_capture_health_check
    check()


def is_capturable(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether a step of these groups can be captured.

    Raises:
        ValueError: if only some of them are: a step is skipped for all of them or for none.
    """
    flags = {bool(group["capturable"]) for group in groups}
    if len(flags) > 1:
        raise ValueError(
            "Invalid capturable=True in some parameter groups only. Must be the same in all of"
            " them: pass it to the constructor."
        )
    return True in flags


def check_warm(is_warm: bool) -> None:
    """Raises RuntimeError if a step is captured that would first have to make memory or tables."""
    if is_capturing() and not is_warm:
        raise RuntimeError(
            "Shampoo cannot capture a step of a kind that it has not taken yet: state and tables"
            " are made in the first one. Before the capture, take a step on a side stream with the"
            " same parameters having gradients."
        )


def coming_refresh(plan: BlockPlan, values: Sequence[Hyperparameters]) -> tuple[Hashable, ...]:
    """For every arena the phase that its next step refreshes, None without a refresh.

    A tuple of them where parameters differ in how many steps they have taken.
    """
    return tuple(_coming_phase(plan, arena, values[arena.group]) for arena in plan.arenas)


def _coming_phase(plan: BlockPlan, arena: Arena, hyper: Hyperparameters) -> Hashable:
    refreshed = arena.refreshed_stacks()
    if not refreshed:
        return None
    counts = arena.counts()
    # Of parameters that had a gradient: a graph repeats a step in which the same ones have.
    moving = [
        count
        for member, count in zip(arena.first, counts, strict=True)
        if not plan.present or plan.present[member]
    ]
    phases = [hyper.due_phase(count + 1) for count in moving]
    if len(set(phases)) > 1:
        return tuple(phases)
    phase = phases[0] if phases else None
    return phase if any(phase in stack.phase.tolist() for stack in refreshed) else None


class DeviceState:
    """The decisions and counts of one plan that stay on the device.

    Args:
        plan: whose arenas are capturable.

    Raises:
        ValueError: if its parameters lie on several devices, or other ranks must step alike.
    """

    def __init__(self, plan: BlockPlan) -> None:
        if not plan.stepping_ranks.is_alone:
            raise ValueError(
                f"Invalid capturable=True where {plan.stepping_ranks.size} ranks step together."
                " Must be False: they agree on the host before each step. Or, for parameters that"
                " are not DTensors, pass num_trainers_per_group=1 and check_replicas_every=0."
            )
        devices = sorted({str(arena.device) for arena in plan.arenas})
        if len(devices) > 1:
            raise ValueError(
                f"Invalid capturable=True for parameters on {', '.join(devices)}. Must be on one"
                " device, as a graph is: make an optimizer for each."
            )
        self.device = plan.arenas[0].device
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.is_skipped = torch.zeros((), dtype=torch.bool, device=self.device)  # the last one
        self._has_stepped = torch.zeros((), dtype=torch.bool, device=self.device)
        self.settle(plan)
        self._gate = Gate(self.device)
        self._limits: PatternCache[Tensor] = PatternCache()
        # Never dropped, since a graph may read it: what was captured, of which the others keep only
        # the latest.
        self._captured: list[object] = []

    def settle(self, plan: BlockPlan) -> None:
        """Takes in what others have written into the counts of steps."""
        taken = [arena.taken.max() > 0 for arena in plan.arenas]
        self._has_stepped.copy_(torch.stack(taken).any())  # in place: a graph may read it

    def accept(
        self,
        plan: BlockPlan,
        grads: Sequence[Tensor | None],
        params: Sequence[Tensor],
        hyper: Sequence[Hyperparameters],
    ) -> Tensor:
        """Whether these gradients make a step, 0-d bool: all fit, and not an inert first one.

        If one of them is not fit, the step is counted as skipped.

        Raises:
            RuntimeError: if a step is captured whose like has not been taken before.
            ValueError: if ``lr`` or a beta is a tensor elsewhere.
        """
        for values in hyper:
            self._check_devices(values)
        pattern = tuple(grad is not None for grad in grads)
        check_warm(pattern in self._limits)

        def limits_of(pattern: Pattern) -> Tensor:
            limits = list(itertools.compress(plan.square_limits, pattern))
            on_host = torch.tensor(limits, dtype=torch.float64, device="cpu")
            return on_host.to(self.device, non_blocking=True)

        limits = self._limits.get(pattern, limits_of)
        magnitudes = largest_magnitudes([grad for grad in grads if grad is not None])
        there = [place for place, grad in enumerate(grads) if grad is not None]
        decays = [hyper[plan.members[place].group].coupled_decay for place in there]
        reach = with_decay(magnitudes, [params[place] for place in there], decays)
        is_fit = (reach < limits).all()
        accepted = is_fit & (self._has_stepped | (magnitudes > 0.0).any())
        torch.logical_not(is_fit, out=self.is_skipped)
        self.skipped += self.is_skipped
        self._has_stepped |= accepted
        return accepted

    def _check_devices(self, hyper: Hyperparameters) -> None:
        for name, number in (
            ("lr", hyper.lr),
            ("betas[0]", hyper.beta1),
            ("betas[1]", hyper.beta2),
        ):
            if isinstance(number, Tensor) and number.device != self.device:
                raise ValueError(
                    f"Invalid {name} on {number.device}. Must be on {self.device}, as the"
                    " parameters are: a graph cannot follow it elsewhere."
                )

    def keep(self, actives: Sequence[ActiveBlocks], squares: Sequence[Tensor | None]) -> None:
        """Keeps what a step that is being captured works on as long as this lives.

        Args:
            actives: the blocks that move, by arena.
            squares: what LARS and LAMB add up, by arena.
        """
        if is_capturing():
            self._captured.append((actives, squares, self._limits.latest))

    def scalars(self, hyper: Hyperparameters, active: ActiveBlocks, accepted: Tensor) -> Scalars:
        """Counts a step of an arena; its numbers, float64 on the device, 0-d or by parameter."""
        arena = active.arena
        is_whole = all(active.present)
        arena.taken += accepted if is_whole else active.is_here & accepted
        # Which of the steps that the host has asked for were taken, it cannot see: every parameter
        # has numbers of its own, so that a graph stays right whatever has happened in between.
        counted = _counted(hyper, arena, accepted)
        plain = Scalars.of(hyper, arena.kind, 1)._replace(counted=counted)
        return self._gate.apply([plain], accepted)[0]


def _counted(hyper: Hyperparameters, arena: Arena, accepted: Tensor) -> Counted:
    """The numbers of parameters that may have taken different numbers of steps."""
    # One that has taken no step has nothing to correct. Not whole vectors, which torch raises to
    # powers by another function than what is left over at their end.
    steps = torch.stack((arena.taken, arena.taken), dim=-1).clamp_(min=1).double()[:, 0]
    plain = Scalars.of(hyper, arena.kind, steps)
    one = torch.ones_like(steps)
    numbers = [
        torch.where(accepted, one * number, 1.0)
        for number in (
            plain.correction1,
            plain.correction_ahead,
            plain.correction2,
            plain.moment.correction,
        )
    ]
    return Counted(torch.stack([*numbers, steps]), plain.started)
