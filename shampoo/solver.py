"""Which root solver runs, on which rows, and what it accepts."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from shampoo import ops
from shampoo.diagonal import diagonal_root_
from shampoo.eigen import eigen_root_
from shampoo.kernels.newton import newton_root_
from shampoo.precision import full_precision
from shampoo.schedule import minimax_schedule, smallest_relative_eps, tabulated_powers
from shampoo.wording import shown

ROOT_METHODS = ("auto", "eigh", "coupled_newton", "minimax")

MOST_POWER = 1 << 20  # the root of which is 1 to float32 for any matrix, or nearly

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
    reads: bool,
) -> None:
    """Writes the roots of one chunk, [B, n, n], and the ridges they were taken with, [B].

    ``reads`` says whether the host may look at values, which on a GPU means to wait for it.
    """
    if factor.numel() == 0:
        return
    method = choose_method(factor, p, eps, relative_eps, method)
    with full_precision(factor.device):
        if method == "minimax":
            schedule = [c for step in minimax_schedule(int(p), relative_eps) for c in step]
            ops.minimax_root_(root, ridge, factor, int(p), eps, relative_eps, schedule)
        elif method == "coupled_newton":
            newton_root_(root, ridge, factor, int(p), eps, relative_eps)
        else:
            eigen_root_(root, ridge, factor, p, eps, relative_eps)
        diagonal_root_(root, ridge, factor, p, eps, relative_eps, reads)


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


def check_stack(A: Tensor) -> None:
    """Refuses what is not a stack of square float32 or float64 matrices."""
    if A.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"Invalid dtype {A.dtype}. Must be torch.float32 or torch.float64: convert A first."
        )
    if A.ndim != 3 or A.shape[1] != A.shape[2]:
        raise ValueError(
            f"Invalid shape {tuple(A.shape)}. Must be [B, n, n]: one matrix is A[None]."
        )


def check_damping(eps: float, relative_eps: float, method: str) -> None:
    """Refuses ridges that are negative, not finite, or both zero where a ridge is needed."""
    for name, value in (("eps", eps), ("relative_eps", relative_eps)):
        if not 0 <= value <= sys.float_info.max:
            raise ValueError(f"Invalid {name}={shown(value)}. Must be finite and >= 0.0.")
    if eps == 0 and relative_eps == 0 and method not in ("auto", "eigh"):
        raise ValueError(
            f"Invalid eps={eps}, relative_eps={relative_eps} for method={method!r}. One must be "
            "> 0.0: use method='eigh' for the pseudo-inverse."
        )


def check_method(method: str, p: float) -> None:
    """Refuses a method that does not exist, and a p that it cannot take."""
    if method not in ROOT_METHODS:
        raise ValueError(f"Invalid method={method!r}. Must be one of {', '.join(ROOT_METHODS)}.")
    if not 0 < p <= sys.float_info.max:
        raise ValueError(f"Invalid p={shown(p)}. Must be finite and > 0.")
    if method == "coupled_newton" and p > MOST_POWER:
        raise ValueError(
            f"Invalid p={shown(p)} for method='coupled_newton'. Must be <= {MOST_POWER}: use 'eigh'"
            " or 'auto'."
        )
    if method == "coupled_newton" and p != int(p):
        raise ValueError(
            f"Invalid p={p} for method='coupled_newton'. Must be an integer: use 'eigh' or 'auto'."
        )
    if method == "minimax" and p not in tabulated_powers():
        powers = ", ".join(map(str, tabulated_powers()))
        raise ValueError(
            f"Invalid p={shown(p)} for method='minimax'. Must be one of {powers}: use 'eigh' or"
            " 'auto'."
        )
