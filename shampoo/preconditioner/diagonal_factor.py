"""A mode that keeps only the diagonal of its factor: a vector, whose root is made afresh."""

import torch
from torch import Tensor

from shampoo import ops
from shampoo.blocks.declared import ModeState
from shampoo.kernels.reference.norms import elementwise_power
from shampoo.ops import Number

STATE = (ModeState("factor", lambda d: (d,), moves_every_step=True),)

NUMBERS = 3  # that move for each element of a block: squares summed, then scaled


def diagonal_root(
    factor: Tensor, exponent: float, correction: Number, eps: float, relative_eps: float
) -> Tensor:
    """``(a / c2 + ridge)^(-1/p)`` of diagonal factors, by the ridge of full ones.

    Args:
        factor: [B, d].
        exponent: ``-1/p``.
        correction: ``c2``, for all or [B].
        eps: absolute ridge.
        relative_eps: relative ridge.
    """
    if isinstance(correction, Tensor):
        correction = correction.to(factor.dtype).view(-1, 1)
    diagonal = factor / correction
    largest = diagonal.amax(1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)  # keeps the fourth powers in range
    squares, fourth_powers = (diagonal / unit).square(), torch.zeros_like(unit)
    # Not torch's sum, whose order depends on the batch and on the number of threads.
    ops.gram_ema_([fourth_powers], [squares[:, None]], [0], 0.0, 1.0)
    norm = unit * fourth_powers.sqrt().sqrt()
    ridge = (relative_eps * norm).clamp_min(eps)
    damped = diagonal + ridge
    return torch.where(damped > 0, elementwise_power(damped, exponent), 0.0)
