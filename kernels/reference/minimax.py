"""Inverse p-th roots by a coupled iteration of fixed length: matrix products and nothing else.

T = c0 I + c1 M + c2 Q^2, Q = M or M^2 + b M + d I;  X <- X T;  M <- T^p M, from X = I and
M = (A + ridge I) / bound. The coefficients are cushioned minimax polynomials
(shampoo/roots/coefficients.json), so the length is known before the first product: no convergence
test, and nothing to read back from the device. All
matrices are polynomials of one, so every product is symmetric and half of it is enough; but
rounding makes operands commute only nearly, and in step 0, which decides the accuracy of the root,
that error must not be mirrored: there products are averaged over both orders of their operands,
and the first update of M is taken in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo.kernels.reference.norms import absmax, frobenius, power_of_two


class Step(NamedTuple):
    """``T = c0 I + c1 M + c2 Q^2`` with ``Q = M^2 + b M + d I``, or ``Q = M`` where b = d = 0.

    The first has degree 4 and takes two products; the second has degree 2 and takes one, or 1 and
    none.
    """

    c0: float
    c1: float
    c2: float
    b: float
    d: float

    @property
    def degree(self) -> int:
        """Of T as a polynomial of M."""
        if self.b or self.d:
            return 4
        return 2 if self.c2 else 1

    def at(self, m: float) -> float:
        """T of an eigenvalue. Of tabulated steps it is largest at 0, on [0, 1]."""
        q = m * m + self.b * m + self.d if self.degree == 4 else m
        return self.c0 + self.c1 * m + self.c2 * q * q


Schedule = tuple[Step, ...]


def minimax_root_(
    root: Tensor,
    ridge: Tensor,
    factor: Tensor,
    p: int,
    eps: float,
    relative_eps: float,
    schedule: Sequence[float],
) -> None:
    """``root = (A + ridge I)^(-1/p)`` with ``ridge = max(eps, relative_eps * ||A||_S4)``.

    Args:
        root: [B, n, n] in the dtype of ``factor``, written; bitwise symmetric.
        ridge: [B] float64, written.
        factor: [B, n, n] float32 or float64, symmetric, read only.
        p: The root, an integer.
        eps: Absolute ridge.
        relative_eps: Relative ridge; the schedule must reach down to it.
        schedule: c0, c1, c2, b, d of every step, one after another.

    """
    steps = steps_of(schedule)
    pool = _Pool(factor)
    scale = power_of_two(absmax(factor))  # neither A^2 nor its norm can overflow
    S = torch.div(factor, _column(scale, factor), out=pool.take())
    X = pool.product(S, S)
    norm = frobenius(X).sqrt()
    rho = torch.maximum(relative_eps * norm, eps / scale)
    ridge.copy_(rho * scale)
    bound = norm + rho  # >= lambda_max, so the spectrum of M lies in [low, 1]
    low = rho / bound

    # Step 0, written in S and S^2:  M = S / bound + low I
    c0, c1, c2, b, d = steps[0]
    if steps[0].degree < 4:
        X.mul_(_column(c2 / bound**2, X)).addcmul_(S, _column((c1 + 2 * c2 * low) / bound, S))
        _add_identity_(X, c0 + c1 * low + c2 * low**2)
    else:
        X.mul_(_column(bound**-2, X)).addcmul_(S, _column((b + 2 * low) / bound, S))
        _add_identity_(X, d + b * low + low**2)
        T = torch.mul(S, _column(c1 / bound, S), out=pool.take())
        X = pool.give(X, T.baddbmm_(X, X, alpha=c2))
        _add_identity_(X, c0 + c1 * low)
    M = _first_update(X, p, S, bound, low, pool)

    for k, step in enumerate(steps[1:], 1):
        T = _polynomial(M, step, pool)
        X = pool.give(X, pool.product(X, T))
        if k + 1 < len(steps):
            P = _power(T, p, pool)
            M = pool.give(M, pool.product(P, M))
            if P is not T:
                pool.give(P)
        pool.give(T)

    torch.add(X, X.mT, out=root)
    root.mul_(_column(0.5 * (bound * scale) ** (-1 / p), root))


def minimax_small_root_(
    root: Tensor,
    ridge: Tensor,
    factor: Tensor,
    p: int,
    eps: float,
    relative_eps: float,
    schedule: Sequence[float],
) -> None:
    """:func:`minimax_root_` for up to 128 rows, of which one launch holds the whole iteration.

    Args:
        root: [B, n, n] float32, contiguous, written; bitwise symmetric.
        ridge: [B] float64, contiguous, written.
        factor: [B, n, n] float32, symmetric, contiguous, read; n <= 128.
        p: The root, an integer, at least 2.
        eps: Absolute ridge.
        relative_eps: Relative ridge; the schedule must reach down to it.
        schedule: c0, c1, c2, b, d of every step, one after another; at most 16 steps.

    """
    minimax_root_(root, ridge, factor, p, eps, relative_eps, schedule)


def steps_of(schedule: Sequence[float]) -> Schedule:
    """The steps of a schedule that came as one list, as an op must take it."""
    return tuple(Step(*row) for row in zip(*(schedule[k::5] for k in range(5)), strict=True))


class _Pool:
    """Buffers of one shape that are written again and again, so that they stay in the cache."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.free: list[Tensor] = []

    def take(self) -> Tensor:
        return self.free.pop() if self.free else torch.empty_like(self.like)

    def give(self, spent: Tensor, successor: Tensor | None = None) -> Tensor:
        """Takes a buffer back; returns what replaces it, if anything does."""
        self.free.append(spent)
        return spent if successor is None else successor

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(left, right, out=self.take())

    def average(self, left: Tensor, right: Tensor) -> Tensor:
        """(left right + right left) / 2."""
        out = self.product(left, right)
        return out.baddbmm_(right, left, beta=0.5, alpha=0.5)


def _polynomial(M: Tensor, step: Step, pool: _Pool) -> Tensor:
    """T of one step, in a new buffer."""
    c0, c1, c2, b, d = step
    Q = M
    if step.degree == 4:
        Q = torch.baddbmm(M, M, M, beta=b, out=pool.take())
        _add_identity_(Q, d)
    if c2 != 0.0:
        T = torch.baddbmm(M, Q, Q, beta=c1, alpha=c2, out=pool.take())
    else:
        T = torch.mul(M, c1, out=pool.take())
    if Q is not M:
        pool.give(Q)
    _add_identity_(T, c0)
    return T


def _power(T: Tensor, p: int, pool: _Pool, is_first: bool = False) -> Tensor:
    """T^p by binary powering: a new buffer, or T itself for p = 1. T is left as it is."""
    multiply = pool.average if is_first else pool.product
    out, square = None, T
    while True:
        if p & 1:
            product = square if out is None else multiply(out, square)
            if out is not None and out is not T:
                pool.give(out)
            out = product
        p >>= 1
        if not p:
            assert out is not None
            if square is not out and square is not T:
                pool.give(square)
            return out
        following = pool.product(square, square)
        if square is not T and square is not out:
            pool.give(square)
        square = following


def _first_update(T: Tensor, p: int, S: Tensor, bound: Tensor, low: Tensor, pool: _Pool) -> Tensor:
    """(T^p M + M T^p) / 2 in float64, M = S / bound + low I unrounded. S is given up."""
    P = _power(T, p, pool, is_first=True)
    M = S / bound[:, None, None]  # float64, as the bound is
    _add_identity_(M, low)
    S.copy_(_Pool(M).average(P.double(), M))
    if P is not T:
        pool.give(P)
    return S


def _add_identity_(stack: Tensor, value: float | Tensor) -> None:
    diagonal = stack.diagonal(dim1=1, dim2=2)
    diagonal.add_(value[:, None] if isinstance(value, Tensor) else value)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype)[:, None, None]
