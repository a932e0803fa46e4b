"""Is a stack of roots fit for use? The verdict of :mod:`shampoo.kernels.reference.root_check` as a
tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo import ops
from shampoo.kernels.reference.root_check import are_fit, check_values, probe
from shampoo.ops.transit import is_near
from shampoo.roots.findings import findings

__all__ = ["check_values", "passes_root_check", "passes_with_findings"]


def passes_root_check(
    root: Tensor, factor: Tensor, ridge: Tensor, p: float, sizes: Tensor | None = None
) -> Tensor:
    """Which roots of a stack may be used, [B] bool.

    Args:
        root: X, [B, n, n].
        factor: A, [B, n, n].
        ridge: What the root was taken with, [B] float64; may be zero.
        p: The power of the root.
        sizes: [B] int32, of the matrices of a size class.
    """
    ok = torch.empty(len(root), dtype=torch.bool, device=root.device)
    ops.check_roots_(ok, root, factor, ridge, p, sizes)
    return ok


def passes_with_findings(
    root: Tensor, factor: Tensor, ridge: Tensor, p: float, sizes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same verdict, [B] bool, and what else is found of the roots, [3, B] float64."""
    found = probe(root, factor, ridge, p, sizes)
    # A CPU has no kernel for the check: its verdict is by these very numbers.
    if is_near(root.device):
        ok = are_fit(found, root, ridge, p, sizes)
    else:
        ok = passes_root_check(root, factor, ridge, p, sizes)
    return ok, findings(found, factor, ridge)
