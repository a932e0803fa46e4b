"""Is a stack of roots fit for use? The verdict of :mod:`shampoo.kernels.reference.root_check` as a
tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo import ops
from shampoo.kernels.reference.root_check import check_values

__all__ = ["check_values", "passes_root_check"]


def passes_root_check(root: Tensor, factor: Tensor, ridge: Tensor, p: float) -> Tensor:
    """Which roots of a stack may be used, [B] bool.

    Args:
        root: X, [B, n, n].
        factor: A, [B, n, n].
        ridge: What the root was taken with, [B] float64; may be zero.
        p: The power of the root.
    """
    ok = torch.empty(len(root), dtype=torch.bool, device=root.device)
    ops.check_roots_(ok, root, factor, ridge, p)
    return ok
