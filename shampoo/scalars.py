"""The numbers of one step of one arena, on the host or, for a step that a graph replays, not."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo.averages import Number
from shampoo.grafting import SecondMoment
from shampoo.hyperparameters import Hyperparameters
from shampoo.layout import ADAGRAD, FACTORED


@dataclass(frozen=True)
class Scalars:
    """What moves an arena in one step, in the words of :class:`Hyperparameters`."""

    sign: Number  # of the gradient
    coupled_decay: Number  # weight decay that joins the gradient
    decay: Number  # decoupled weight decay
    lr: Number
    momentum: Number
    beta1: Number
    correction1: Number
    beta2: Number
    factor_weight: Number
    correction2: Number
    moment: SecondMoment
    step: Number
    started: bool | Tensor  # whether roots are used: from ``start_preconditioning_step`` on
    accepted: Tensor | None = None  # 0-d bool; None where the host has already decided

    @classmethod
    def of(cls, hyper: Hyperparameters, rule: str, step: Number) -> "Scalars":
        """The numbers of ``step``, counted from 1; tensors where it or a hyper-parameter is one."""
        is_adagrad = rule == ADAGRAD
        start = hyper.start_preconditioning_step
        return cls(
            sign=-1.0 if hyper.maximize else 1.0,
            coupled_decay=hyper.coupled_decay,
            decay=hyper.decoupled_decay,
            lr=hyper.lr,
            momentum=hyper.momentum,
            beta1=hyper.beta1,
            correction1=hyper.correction1(step),
            beta2=hyper.beta2,
            factor_weight=hyper.factor_weight,
            correction2=hyper.correction2(step),
            moment=hyper.diagonal_moment(step) if is_adagrad else hyper.grafting_moment(step),
            step=step if isinstance(step, Tensor) else float(step),
            started=rule == FACTORED and start < math.inf and step >= start,
        )

    def gate(self, values: Tensor) -> Tensor:
        """``values`` if the step is accepted, zeros if not."""
        return values if self.accepted is None else torch.where(self.accepted, values, 0.0)
