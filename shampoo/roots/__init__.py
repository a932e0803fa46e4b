"""Inverse p-th roots of stacks of symmetric positive semi-definite matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo.roots.methods import check_damping, check_method, check_stack
from shampoo.roots.solver import chunks, solve_


@torch.no_grad()
def inverse_root(
    A: Tensor,
    p: float,
    *,
    eps: float = 1e-12,
    relative_eps: float = 1e-6,
    method: str = "auto",
) -> Tensor:
    """``(A + ridge I)^(-1/p)`` of every matrix, ``ridge = max(eps, relative_eps * ||A||_S4)``.

    The Schatten-4 norm ``(sum lambda^4)^(1/4)`` bounds the largest eigenvalue and lies within
    n^(1/4) of it. Without a ridge (both eps 0) the result is the root of the pseudo-inverse:
    eigenvalues up to n * machine epsilon * lambda_max become 0.

    ``shampoo.inverse_root`` runs the kernels that an optimizer would, which the first call of a
    process loads, or builds and checks where nobody has (docs/kernels.md); those of torch else.

    Args:
        A: [B, n, n], float32 or float64, symmetric, positive semi-definite up to rounding. Not
            modified.
        p: The root, > 0.
        eps: Absolute ridge, >= 0.
        relative_eps: Relative ridge, >= 0. ``"minimax"`` saturates below 1e-7.
        method: ``"eigh"``, any p; ``"coupled_newton"``, integer p; ``"minimax"``, the p that have
            a schedule; ``"auto"``, the fastest on the device that is accurate enough for a
            preconditioner: ``"minimax"`` for float32 with a schedule and ``relative_eps >= 1e-7``
            (on a CPU for n < 640), else ``"eigh"``.

    Returns:
        A new [B, n, n], bitwise symmetric. ``"eigh"`` and, on a CPU, ``"coupled_newton"`` work in
        float64: of float32 matrices their roots are right to 1e-5 for p >= 2. ``"minimax"``, and
        ``"auto"`` where it is that, is off by 3e-6 to 3e-3 relative, measured against eigenvalues
        for p >= 2 and ``relative_eps >= 1e-6``; by up to 5e-3 at 1e-7, and for p = 1 by up to
        3e-2 at 1e-6 and 0.3 at 1e-7, where float32 itself cannot hold the small eigenvalues. A
        matrix that is not finite, or that ``"coupled_newton"`` cannot finish, gives NaN and leaves
        neighbours as they are.

    Raises:
        ValueError: A shape, dtype or option that does not fit.
        shampoo.ops.jit.BuildError: If ``SHAMPOO_BACKEND`` names kernels that cannot be had here.

    """
    check_stack(A)
    check_damping(eps, relative_eps, method)
    check_method(method, p)
    root = torch.empty_like(A, memory_format=torch.contiguous_format)
    ridge = torch.empty(len(A), dtype=torch.float64, device=A.device)
    for rows in chunks(A):
        solve_(root[rows], ridge[rows], A[rows], p, eps, relative_eps, method)
    return root
