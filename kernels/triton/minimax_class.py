"""Roots of a size class: the launches of :mod:`shampoo.kernels.triton.minimax` for several sizes.

Replaces those launches for each size by itself. Tiles beyond the size of a matrix are not computed,
and tiles are the same whatever the side of the class, so that a root in a class depends neither on
that side nor on its neighbours. Loses where a stack fills the GPU alone: padding it is work then.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shampoo.kernels.triton import minimax
from shampoo.kernels.triton.symmetric_gemm import launch_config

_LARGE = 1024  # by whose tiles all classes are worked on


def supports(
    root: Tensor,
    ridge: Tensor,
    factor: Tensor,
    sizes: Tensor,
    p: int,
    eps: float,
    relative_eps: float,
    schedule: Sequence[float],
) -> bool:
    """Whether :func:`minimax_class_root_` takes these: float32 with unit column strides."""
    return minimax.supports(root, ridge, factor, p, eps, relative_eps, schedule)


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
    """``root = (A + ridge I)^(-1/p)`` up to the size of each matrix; what is beyond stays.

    Args:
        root: [B, n, n] float32, written up to the sizes.
        ridge: [B] float64, written.
        factor: [B, n, n] float32, symmetric, read up to the sizes.
        sizes: [B] int32: the side of each matrix.
        p: The root, an integer.
        eps: Absolute ridge.
        relative_eps: Relative ridge; the schedule must reach down to it.
        schedule: c0, c1, c2, b, d of every step, one after another.
    """
    config = launch_config(_LARGE, factor.device)
    minimax.minimax_root_(
        root, ridge, factor, p, eps, relative_eps, schedule, sizes=sizes, config=config
    )
