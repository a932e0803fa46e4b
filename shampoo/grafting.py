"""The methods whose step length Shampoo can borrow (algorithm.md 2.1), as a table.

All ten are one formula, ``D = m / (sqrt(v / correction) + eps)``, with some of its parts left out.
The arithmetic is :func:`shampoo.kernels.reference.ops.graft_moments_`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo.ops import Number


def weight_of(beta: Number) -> Number:
    """``1 - beta``, or 1 in a plain sum, which is what ``beta = 1`` means."""
    if isinstance(beta, Tensor):
        return torch.where(beta < 1.0, 1.0 - beta, 1.0)
    return 1.0 if beta == 1.0 else 1.0 - beta


def correction_of(beta: Number, step: Number) -> Number:
    """``1 - beta^step``, the sum of all weights so far; 1 for a plain sum, which has no bias."""
    if isinstance(beta, Tensor):
        return torch.where(beta < 1.0, 1.0 - beta**step, 1.0)
    return 1.0 if beta == 1.0 else 1.0 - beta**step


@dataclass(frozen=True)
class Grafting:
    """Which parts of the formula a grafted method has."""

    second_moment: bool = False  # has v at all
    plain_sum: bool = False  # v adds up, whatever grafting_beta2 is
    bias_corrected: bool = False  # v is divided by 1 - beta^t
    normalized: bool = False  # v takes the gradient of each block scaled to norm 1
    layerwise: bool = False  # the direction is rescaled to the norm of the whole parameter


GRAFTING = {
    "none": Grafting(),
    "sgd": Grafting(),
    "adagrad": Grafting(second_moment=True, plain_sum=True),
    "rmsprop": Grafting(second_moment=True),
    "adam": Grafting(second_moment=True, bias_corrected=True),
    "adagrad_normalized": Grafting(second_moment=True, plain_sum=True, normalized=True),
    "rmsprop_normalized": Grafting(second_moment=True, normalized=True),
    "adam_normalized": Grafting(second_moment=True, bias_corrected=True, normalized=True),
    "lars": Grafting(layerwise=True),
    "lamb": Grafting(second_moment=True, bias_corrected=True, layerwise=True),
}


# AdaGrad's formula, of what borrows none of them: by ``betas[1]``, its correction, and ``eps``.
_OWN = Grafting(second_moment=True)


def grafting_of(name: str, borrows: bool) -> Grafting:
    """The parts of the formula that move tensors of a group.

    Args:
        name: the group's ``grafting``.
        borrows: whether what moves them borrows its step length, as their kind declares.
    """
    return GRAFTING[name] if borrows else _OWN


class SecondMoment(NamedTuple):
    """How ``exp_avg_sq`` moves and enters the direction at one step.

    ``v <- beta v + weight g^2``, then ``sqrt(v / correction) + eps``.
    """

    beta: Number
    weight: Number
    correction: Number
    eps: float
    normalized: bool = False
    corrected: bool = False  # whether ``correction`` depends on the step

    def correction_at(self, step: Number) -> Number:
        """``correction`` at another step."""
        return correction_of(self.beta, step) if self.corrected else 1.0
