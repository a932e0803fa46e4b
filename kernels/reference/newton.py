"""Inverse p-th roots by the coupled Newton iteration of the Shampoo papers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shampoo.kernels.reference.norms import absmax, frobenius, power_of_two

LIMIT = 100  # iterations, when the conditioning of the matrix bounds nothing
# max|M - I| up to which X is a root. A matrix that comes this close has every eigenvalue within a
# per mille or so, even where rounding keeps it from the tolerance, as float32 does if it is large;
# in one that does not, some are still near zero, or the iteration has diverged.
FINISHED = 1e-3


def newton_root_(
    root: Tensor, ridge: Tensor, factor: Tensor, p: int, eps: float, relative_eps: float
) -> None:
    """``root = (A + ridge I)^(-1/p)`` with ``ridge = max(eps, relative_eps * ||A||_S4)``.

    On the CPU everything is float64: in float32 the iteration converges to a root that is wrong by
    per cents on ill-conditioned input. On a GPU the dtype is that of the factor. The products are
    torch's: the last bits of a float64 root may depend on where it lies in the stack. A matrix that
    the iteration cannot finish (it is indefinite, or has no ridge that the dtype can see) comes out
    as NaN.

    Args:
        root: [B, n, n], written; bitwise symmetric.
        ridge: [B] float64, written.
        factor: [B, n, n], symmetric, read only.
        p: The root, an integer.
        eps: Absolute ridge.
        relative_eps: Relative ridge.

    """
    on_cpu = factor.device.type == "cpu"
    dtype = torch.float64 if on_cpu else factor.dtype
    scale = power_of_two(absmax(factor))
    B = (factor / scale.to(factor.dtype)[:, None, None]).to(dtype)
    rho = torch.maximum(relative_eps * frobenius(torch.bmm(B, B)).sqrt(), eps / scale)
    ridge.copy_(rho * scale)
    B.diagonal(dim1=1, dim2=2).add_(rho.to(dtype)[:, None])
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    limit = iteration_bound(p, relative_eps, factor.shape[-1], tolerance)
    X, M, _ = coupled_newton(B, p, tolerance, limit, early_exit=on_cpu)
    distance, _ = _residual(M)
    unit = torch.where(distance <= FINISHED, 0.5 * scale ** (-1 / p), torch.nan)
    X.mul_(unit.to(dtype)[:, None, None])
    root.copy_(torch.add(X, X.mT))


def coupled_newton(
    B: Tensor, p: int, tolerance: float, limit: int, early_exit: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """X = B^(-1/p) for a stack of positive definite matrices.

    T = ((p+1) I - M)/p;  X <- X T;  M <- T^p M, from M = z B with z = (p+1)/(2 ||B||_F) until
    max|M - I| <= tolerance. Each matrix stops on its own: when it is there, or, with the previous
    iterate, when its residual has grown by a factor of 1.2 (the residual that must not grow is the
    Frobenius norm: it cannot do so while the iteration converges).

    Returns:
        X and M, both [B, n, n], and the iterations taken, [B] int64. X is NaN where M is not
        finite.

    """
    z = (p + 1) / (2 * frobenius(B))
    M = B * z.to(B.dtype)[:, None, None]
    X = torch.zeros_like(B)
    X.diagonal(dim1=1, dim2=2).add_((z ** (1 / p)).to(B.dtype)[:, None])
    iterations = torch.zeros(len(B), dtype=torch.int64, device=B.device)
    largest, residual = _residual(M)
    active = largest > tolerance
    for _ in range(limit):
        if early_exit and not active.any():
            break
        T = M * (-1 / p)
        T.diagonal(dim1=1, dim2=2).add_((p + 1) / p)
        candidate = torch.bmm(_power(T, p), M)
        largest, grown = _residual(candidate)
        active = active & ~(grown >= 1.2 * residual)
        mask = active[:, None, None]
        X = torch.where(mask, torch.bmm(X, T), X)
        M = torch.where(mask, candidate, M)
        residual = torch.where(active, grown, residual)
        iterations += active
        active = active & (largest > tolerance)
    passes_root_check = residual.isfinite()[:, None, None]
    return torch.where(passes_root_check, X, torch.nan), M, iterations


def iteration_bound(p: int, relative_eps: float, n: int, tolerance: float) -> int:
    """Iterations after which every matrix with this relative ridge has converged, at most LIMIT.

    The smallest eigenvalue of M starts at no less than (p+1)/2 * relative_eps / n^(1/4) up to
    rounding, because ||B||_F <= n^(1/4) ||B||_S4, and grows monotonically. Two iterations are
    added for rounding.
    """
    m = (p + 1) / 2 * relative_eps / (1 + relative_eps * math.sqrt(n)) / n**0.25 / 1.2
    for k in range(LIMIT - 2):
        if abs(m - 1) <= 0.1 * tolerance:
            return k + 2
        m *= ((p + 1 - m) / p) ** p
    return LIMIT


def _residual(M: Tensor) -> tuple[Tensor, Tensor]:
    """max|M - I| and ||M - I||_F, [B] each."""
    R = M.clone()
    R.diagonal(dim1=1, dim2=2).sub_(1)
    return absmax(R), frobenius(R)


def _power(T: Tensor, p: int) -> Tensor:
    out = None
    while True:
        if p & 1:
            out = T if out is None else torch.bmm(out, T)
        p >>= 1
        if not p:
            assert out is not None
            return out
        T = torch.bmm(T, T)
