"""The numbers of one step of one arena: on the host, or where only the device knows them."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo.blocks.declared import Kind
from shampoo.grafting import SecondMoment, correction_of
from shampoo.hyperparameters import Hyperparameters
from shampoo.ops import Number


@dataclass(frozen=True)
class Counted:
    """What depends on how many steps a parameter has taken, where the parameters differ in it.

    Attributes:
        numbers: [5, members] float64: ``correction1``, ``correction_ahead``, ``correction2``, that
            of the second moment, the count itself.
        started: [members] bool, whether roots are used; one bool for all who have a gradient.
    """

    numbers: Tensor
    started: bool | Tensor

    @classmethod
    def of(
        cls,
        hyper: Hyperparameters,
        kind: Kind,
        counts: Sequence[int],
        distinct: Collection[int],
        moment: SecondMoment,
        device: torch.device,
    ) -> "Counted":
        """The numbers of every parameter with a gradient, by the same arithmetic as those of all.

        Args:
            counts: [members].
            distinct: the counts of those with a gradient, from 1.
            moment: at any step.
        """
        known = list(distinct)
        is_corrected = hyper.bias_correction
        first = [correction_of(hyper.beta1, n) if is_corrected else 1.0 for n in known]
        each = [
            first,
            [ahead_of(hyper, correction) for correction in first],
            [correction_of(hyper.beta2, n) if is_corrected else 1.0 for n in known],
            [moment.correction_at(count) for count in known],
            known,
        ]
        numbers = torch.tensor(each, dtype=torch.float64, device="cpu")
        columns = {count: column for column, count in enumerate(known)}
        # One that has no gradient is not looked at: any column does.
        chosen = torch.tensor([columns.get(count, 0) for count in counts], device="cpu")
        flags = [has_started(hyper, kind, count) for count in known]
        started: bool | Tensor = all(flags)
        if not started and any(flags):
            started = torch.tensor(flags, device="cpu")[chosen].to(device, non_blocking=True)
        return cls(numbers.index_select(1, chosen).to(device, non_blocking=True), started)


def ahead_of(hyper: Hyperparameters, correction: Number) -> Number:
    """The correction of the first average a step later: ``1 - beta1^(t + 1)``, or 1 without any."""
    return 1.0 - hyper.beta1 * (1.0 - correction)


def has_started(hyper: Hyperparameters, kind: Kind, step: Number) -> bool | Tensor:
    """Whether directions of a kind are used at a step, of blocks that are ready."""
    start = hyper.start_preconditioning_step
    return kind.preconditions and start < math.inf and step >= start


class Scalars(NamedTuple):
    """What moves an arena in one step, in the words of :class:`Hyperparameters`."""

    sign: Number  # of the gradient
    coupled_decay: Number  # weight decay that joins the gradient
    decay: Number  # decoupled weight decay
    lr: Number
    momentum: Number
    beta1: Number
    correction1: Number
    correction_ahead: Number  # that of the average as it will be
    beta2: Number
    factor_weight: Number
    correction2: Number
    moment: SecondMoment
    step: Number
    started: bool | Tensor  # whether ready blocks go their own way: from the start of that on
    accepted: Tensor | None = None  # 0-d bool; None where the host has already decided
    counted: Counted | None = None  # of every parameter, where they differ

    @classmethod
    def of(cls, hyper: Hyperparameters, kind: Kind, step: Number) -> "Scalars":
        """The numbers of ``step``, counted from 1; tensors where it or a hyper-parameter is one."""
        moment = hyper.grafting_moment if kind.borrows else hyper.diagonal_moment
        if moment.corrected:
            moment = moment._replace(correction=correction_of(moment.beta, step))
        is_corrected = hyper.bias_correction
        correction1 = correction_of(hyper.beta1, step) if is_corrected else 1.0  # 2.3
        return cls(
            sign=-1.0 if hyper.maximize else 1.0,
            coupled_decay=hyper.coupled_decay,
            decay=hyper.decoupled_decay,
            lr=hyper.lr,
            momentum=hyper.momentum,
            beta1=hyper.beta1,
            correction1=correction1,
            correction_ahead=ahead_of(hyper, correction1),
            beta2=hyper.beta2,
            factor_weight=hyper.factor_weight,
            correction2=correction_of(hyper.beta2, step) if is_corrected else 1.0,
            moment=moment,
            step=step if isinstance(step, Tensor) else float(step),
            started=has_started(hyper, kind, step),
        )

    @classmethod
    def of_counts(
        cls,
        hyper: Hyperparameters,
        kind: Kind,
        counts: Sequence[int],
        distinct: Collection[int],
        device: torch.device,
    ) -> "Scalars":
        """The numbers of a step of parameters that have taken ``counts`` steps, this one included.

        Args:
            counts: [members].
            distinct: the counts of those that have a gradient, at least one.
        """
        plain = cls.of(hyper, kind, next(iter(distinct)))
        if len(distinct) == 1:
            return plain
        counted = Counted.of(hyper, kind, counts, distinct, plain.moment, device)
        return plain._replace(counted=counted)

    def at(self, param_index: Tensor) -> "Scalars":
        """The numbers of some blocks, each of which may have its own.

        Args:
            param_index: [R], of every block the parameter, by its place in the arena.
        """
        if self.counted is None:
            return self
        numbers = self.counted.numbers.index_select(1, param_index)
        first, ahead, second, moment, step = numbers.unbind()
        started = self.counted.started
        return self._replace(
            correction1=first,
            correction_ahead=ahead,
            correction2=second,
            moment=self.moment._replace(correction=moment),
            step=step,
            started=started[param_index] if isinstance(started, Tensor) else started,
            counted=None,
        )

    def gate(self, values: Tensor) -> Tensor:
        """``values`` if the step is accepted, zeros if not."""
        return values if self.accepted is None else torch.where(self.accepted, values, 0.0)


# What moves something that stays, and what it becomes in a step that is not taken: the gradient is
# zero, averages keep what they have, weights stay. Bias corrections move nothing, but ops that take
# one of their numbers from the device take all of them there.
_NEUTRAL = {
    "sign": 0.0,
    "coupled_decay": 0.0,
    "decay": 0.0,
    "lr": 0.0,
    "momentum": 1.0,
    "beta1": 1.0,
    "correction1": 1.0,
    "correction_ahead": 1.0,
    "beta2": 1.0,
    "factor_weight": 0.0,
}
_NEUTRAL_MOMENT = {"beta": 1.0, "weight": 0.0, "correction": 1.0}


class Gate:
    """Turns the numbers of a step into those of one that is taken only if a device says so.

    A step that is not taken is computed all the same, and changes nothing.

    Args:
        device: of the parameters.
    """

    def __init__(self, device: torch.device) -> None:
        neutral = [*_NEUTRAL.values(), *_NEUTRAL_MOMENT.values()]
        on_host = torch.tensor(neutral, dtype=torch.float64, device="cpu")
        self._neutral = on_host.to(device, non_blocking=True)
        self._zero = torch.zeros((), dtype=torch.float64, device=device)

    def apply(self, plain: Sequence[Scalars], accepted: Tensor) -> list[Scalars]:
        """The numbers that move something, as 0-d float64 tensors on the device.

        Args:
            plain: of all arenas that move, on the host; a number may be such a tensor already.
            accepted: 0-d bool, whether the step is taken.
        """
        numbers: list[Number] = []
        for each in plain:
            numbers += [getattr(each, name) for name in _NEUTRAL]
            numbers += [getattr(each.moment, name) for name in _NEUTRAL_MOMENT]
        # Those of the host go into the arguments of a launch: a copy could not be captured.
        host = [float(number) for number in numbers if not isinstance(number, Tensor)]
        moved_in = iter(torch._foreach_add([self._zero] * len(host), host) if host else ())
        tensors = [n if isinstance(n, Tensor) else next(moved_in) for n in numbers]
        table = torch.stack(tensors).view(len(plain), -1)
        rows = torch.where(accepted, table, self._neutral).unbind()
        return [_gated(*pair, accepted) for pair in zip(plain, rows, strict=True)]


def _gated(plain: Scalars, row: Tensor, accepted: Tensor) -> Scalars:
    numbers = row.unbind()
    moved: dict[str, Any] = dict(zip(_NEUTRAL, numbers, strict=False))
    moment: dict[str, Any] = dict(zip(_NEUTRAL_MOMENT, numbers[len(_NEUTRAL) :], strict=True))
    return plain._replace(**moved, moment=plain.moment._replace(**moment), accepted=accepted)
