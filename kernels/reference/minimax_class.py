"""Roots of a size class: matrices of several sizes in one stack, as one iteration takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo.kernels.reference.minimax import minimax_root_


def minimax_class_root_(
    root: Tensor,
    ridge: Tensor,
    factor: Tensor,
    sizes: Tensor,
    p: int,
    eps: float,
    relative_eps: float,
    schedule: Sequence[float],
) -> None:
    """:func:`minimax_root_` of the upper left ``sizes[b]`` rows and columns of every matrix.

    What is beyond them in a factor is zero, which changes neither the norm of a matrix nor the
    block of its root that is asked for: the iteration keeps the blocks apart.

    Args:
        root: [B, n, n] in the dtype of ``factor``, written up to the sizes; what is beyond stays.
        ridge: [B] float64, written.
        factor: [B, n, n] float32 or float64, symmetric, zero beyond the sizes, read only.
        sizes: [B] int32, from 1 to n: the side of each matrix.
        p: The root, an integer.
        eps: Absolute ridge.
        relative_eps: Relative ridge; the schedule must reach down to it.
        schedule: c0, c1, c2, b, d of every step, one after another.

    """
    whole = torch.empty_like(root)
    minimax_root_(whole, ridge, factor, p, eps, relative_eps, schedule)
    inside = within(sizes, factor.shape[-1])
    root.copy_(torch.where(inside[:, :, None] & inside[:, None, :], whole, root))


def within(sizes: Tensor, n: int) -> Tensor:
    """Which of n rows belong to each matrix, [B, n] bool."""
    return torch.arange(n, dtype=sizes.dtype, device=sizes.device) < sizes[:, None]
