"""Which root solver runs, on which rows, and what it accepts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shampoo import ops
from shampoo.kernels.reference.newton import newton_root_
from shampoo.ops.precision import full_precision
from shampoo.roots.eigh import eigh_root_
from shampoo.roots.minimax_table import minimax_schedule, smallest_relative_eps, tabulated_powers

# Bytes of a stack worked on at a time, which bounds the temporary memory.
_CPU_CHUNK = 16 << 20
_GPU_CHUNK = 256 << 20
_CPU_EIGH_FROM = 640  # from this n, float64 LAPACK, a matrix a thread, measures faster


def solve_(
    root: Tensor,
    ridge: Tensor,
    factor: Tensor,
    p: float,
    eps: float,
    relative_eps: float,
    method: str,
    sizes: Tensor | None = None,
) -> None:
    """Writes the roots of one chunk, [B, n, n], and the ridges they were taken with, [B].

    With ``sizes``, [B] int32, the matrices are those of a size class: zero beyond their sizes.
    """
    if factor.numel() == 0:
        return
    method = choose_method(factor, p, eps, relative_eps, method)
    with full_precision(factor.device):
        if method == "minimax":
            schedule = [c for step in minimax_schedule(int(p), relative_eps) for c in step]
            how = int(p), eps, relative_eps, schedule
            if sizes is None:
                ops.minimax_root_(root, ridge, factor, *how)
            else:
                ops.minimax_class_root_(root, ridge, factor, sizes, *how)
        elif method == "coupled_newton":
            newton_root_(root, ridge, factor, int(p), eps, relative_eps)
        elif sizes is None:
            eigh_root_(root, ridge, factor, p, eps, relative_eps)
        else:
            _eigh_class_root_(root, ridge, factor, sizes, p, eps, relative_eps)
        ops.diagonal_root_(root, ridge, factor, p, eps, relative_eps)


def _eigh_class_root_(
    root: Tensor,
    ridge: Tensor,
    factor: Tensor,
    sizes: Tensor,
    p: float,
    eps: float,
    relative_eps: float,
) -> None:
    """Roots of a size class without the padding, as each matrix has them alone.

    The host reads the sizes: it waits for the device in an eigendecomposition anyway.
    """
    for n in set(sizes.tolist()):
        which = (sizes == n).nonzero()[:, 0]
        own = factor[which, :n, :n]
        found, used = torch.empty_like(own), ridge[which]
        eigh_root_(found, used, own, p, eps, relative_eps)
        root[which, :n, :n], ridge[which] = found, used


def choose_method(factor: Tensor, p: float, eps: float, relative_eps: float, method: str) -> str:
    """What ``"auto"`` stands for; the other methods stand for themselves."""
    if method != "auto":
        return method
    if factor.dtype != torch.float32 or p not in tabulated_powers():
        return "eigh"
    if relative_eps < smallest_relative_eps(int(p)):
        return "eigh"  # the schedules would saturate
    if factor.device.type == "cpu" and factor.shape[-1] >= _CPU_EIGH_FROM:
        return "eigh"
    return "minimax"


def chunks(stack: Tensor) -> Iterator[slice]:
    """Rows of a stack that are worked on together; on a CPU at least one for each thread."""
    count, n, _ = stack.shape
    on_cpu = stack.device.type == "cpu"
    size, least = (_CPU_CHUNK, torch.get_num_threads()) if on_cpu else (_GPU_CHUNK, 1)
    length = max(least, size // max(1, n * n * stack.element_size()))
    for start in range(0, count, length):
        yield slice(start, min(start + length, count))
