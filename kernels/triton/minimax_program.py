"""The root iteration of :mod:`shampoo.kernels.reference.minimax` as a fixed list of symmetric
products.

Nothing here runs on a device. What p, the schedule and the ridge determine is worked out once: the
order of the products, which buffers they use, their coefficients and the scales of their operands.
A launcher then only walks the list, so a refresh never waits for the host.

Every product has the form ``out = a L R + b L + c R + d I + e E``. In growth steps T = c0 I + c1 M
+ c2 Q^2 with Q = M or M^2 + b M + d I, X <- X T, M <- T^p M with three fp16 products each; in the
last steps, where M is close to I, R = I - M and D = T - t I are iterated instead, and single fp16
products lose little.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from shampoo.kernels.reference.minimax import Schedule, Step

ROOT = -1  # the output of the last product
_TOP = 12  # scaled operands stay below 2^12: 16 times what fits fp16, for what rounding adds
_NOISE = 1.5  # by which X may exceed its exact bound
SQUARED = 2.0  # bound of the entries of the matrix divided by the power of two below its largest


@dataclass(frozen=True)
class Product:
    """``out = a left right + b left + c right + d I + e addend``, all stored: scaled and split."""

    left: int
    right: int
    addend: int
    out: int
    coefficients: tuple[float, float, float, float, float]
    products: int  # 3: split precision; 1: leading bits only; 0: no product, a = 0
    doubled: bool  # left right + right left instead, for half the coefficient
    promote: int  # k after which the partial sum of split products is added to the rounded total


@dataclass(frozen=True)
class MinimaxProgram:
    """All products of one refresh, and what the first elementwise pass has to write."""

    p: int
    first: tuple[float, float, float]  # of I, M and M^2 in what step 0 begins with
    matrix: tuple[int, float]  # buffer and scale of M = (S + rho I) / c
    start: tuple[int, float]  # the same of that: of X = T if the step has degree 2, else of Q
    buffers: int
    products: tuple[Product, ...]


@dataclass(frozen=True)
class _Value:
    buffer: int
    bound: float

    @property
    def scale(self) -> float:
        return split_scale(self.bound)


def split_scale(bound: float) -> float:
    """The power of two that brings values up to ``bound`` to 2^12 at most."""
    return 2.0 ** (_TOP - math.ceil(math.log2(bound)))


def residual_steps(p: int, schedule: Schedule) -> int:
    """Last steps that may use single products at the standard level of accuracy.

    None of degree 4: it begins where R is still so large that half precision of it would show.
    """
    most = 2 if p >= 4 else 1 if p >= 2 else 0
    degrees = [step.degree for step in reversed(schedule[-most:] if most else ())]
    return next((at for at, degree in enumerate(degrees) if degree == 4), len(degrees))


def _largest(b: float, d: float) -> float:
    """Of a quadratic ``m^2 + b m + d`` on [0, 1], which has its bend inside."""
    return max(abs(d), abs(1.0 + b + d), abs(d - b * b / 4.0))


@functools.lru_cache(maxsize=256)
def minimax_program(p: int, schedule: Schedule, relative_eps: float) -> MinimaxProgram:
    """The list for ``(A + ridge I)^(-1/p)``.

    Args:
        p: The root, an integer >= 1.
        schedule: its steps.
        relative_eps: A lower bound of ridge / ||A||_S4, which bounds X; 0 if there is none.
    """
    return _Builder(p, schedule, relative_eps).build()


class _Builder:
    def __init__(self, p: int, schedule: Schedule, relative_eps: float) -> None:
        self.p, self.schedule = p, schedule
        damping = relative_eps / (1.0 + relative_eps)
        self.limit = _NOISE * damping ** (-1.0 / p) if damping > 0 else math.inf
        self.free: list[int] = []
        self.buffers = 0
        self.products: list[Product] = []
        self.step = 0

    def build(self) -> MinimaxProgram:
        count = len(self.schedule)
        growth = max(1, count - residual_steps(self.p, self.schedule))
        M = _Value(self._take(), 1.0)
        matrix = M.buffer, M.scale
        first, start = self._begin()
        X = self._first_root(M, start)
        for k, step in enumerate(self.schedule):
            self.step = k
            last = self.step == count - 1
            turns = self.step == growth - 1  # from here on M holds I - M
            if self.step < growth:
                M, X = self._grow(M, X, step, last, turns)
            else:
                M, X = self._contract(M, X, step, last)
        if count == 1:
            self._multiply(X, X, ROOT, 1.0, b=1.0, products=0)
        return MinimaxProgram(
            self.p, first, matrix, (start.buffer, start.scale), self.buffers, tuple(self.products)
        )

    def _begin(self) -> tuple[tuple[float, float, float], _Value]:
        """What the first elementwise pass makes of I, M and M^2 beside M."""
        c0, c1, c2, b, d = step = self.schedule[0]
        if step.degree < 4:
            return (c0, c1, c2), _Value(self._take(), c0)
        return (d, b, 1.0), _Value(self._take(), _largest(b, d))

    def _first_root(self, M: _Value, start: _Value) -> _Value:
        """X = T of step 0."""
        step = self.schedule[0]
        if step.degree < 4:
            return start
        X = self._multiply(
            start, start, None, step.at(0.0), a=step.c2, d=step.c0, e=step.c1, addend=M
        )
        self._give(start)
        return X

    def _grow(
        self, M: _Value, X: _Value, step: Step, last: bool, turns: bool
    ) -> tuple[_Value, _Value]:
        top = step.at(0.0)
        bound = min(X.bound * top, self.limit)
        if self.step == 0:
            T = X  # X = I so far
        elif last and step.degree == 1:  # X T = c0 X + c1 X M needs no T
            return M, self._replace(X, M, bound, a=step.c1, b=step.c0, last=True)
        else:
            T = self._polynomial(M, step, top)
            X = self._replace(X, T, bound, last=last)
        if last:
            return M, X
        P = self._power(T, top)
        sign = -1.0 if turns else 1.0
        update = self._multiply(
            P, M, None, 1.0, a=sign, d=1.0 if turns else 0.0, doubled=self.step == 0
        )
        if P is not T:
            self._give(P)
        if T is not X:
            self._give(T)
        self._give(M)
        return update, X

    def _polynomial(self, M: _Value, step: Step, top: float) -> _Value:
        """T of a step, at most ``top``."""
        c0, c1, c2, b, d = step
        if step.degree < 4:
            return self._multiply(M, M, None, top, a=c2, b=c1, d=c0, products=3 if c2 else 0)
        Q = self._multiply(M, M, None, _largest(b, d), b=b, d=d)
        T = self._multiply(Q, Q, None, top, a=c2, d=c0, e=c1, addend=M)
        self._give(Q)
        return T

    def _contract(self, R: _Value, X: _Value, step: Step, last: bool) -> tuple[_Value, _Value]:
        top, t = step.at(0.0), step.at(1.0)
        bound = min(X.bound * top, self.limit)
        if last and step.degree == 1:  # X T = t X - c1 X R
            return R, self._replace(X, R, bound, a=-step.c1, b=t, products=1, last=True)
        slope = -(step.c1 + 2.0 * step.c2)
        D = self._multiply(R, R, None, top + t, a=step.c2, b=slope, products=1 if step.c2 else 0)
        X = self._replace(X, D, bound, a=1.0, b=t, products=1, last=last)
        if last:
            return R, X
        # (I + D/t)^p - I, then I - M' = (1 - t^p) I - t^p (Q - R - Q R)
        F = _Value(D.buffer, D.bound)
        Q = self._power_less_identity(F, t, top / t)
        tp = t**self.p
        update = self._multiply(Q, R, None, 1.0, a=tp, b=-tp, c=tp, d=1.0 - tp, products=1)
        for value in (Q, R):
            self._give(value)
        return update, X

    def _power(self, T: _Value, top: float) -> _Value:
        """T^p by binary powering, T at most ``top``. T stays."""
        out: _Value | None = None
        square, degree, done, rest = T, 1, 0, self.p
        while True:
            if rest & 1:
                done += degree
                if out is None:
                    out = square
                else:
                    product = self._multiply(out, square, None, top**done, doubled=self.step == 0)
                    self._give_unless(out, T, square)
                    out = product
            rest >>= 1
            if not rest:
                assert out is not None
                self._give_unless(square, T, out)
                return out
            degree *= 2
            product = self._multiply(square, square, None, top**degree)
            self._give_unless(square, T, out)
            square = product

    def _power_less_identity(self, D: _Value, t: float, ratio: float) -> _Value:
        """(I + F)^p - I with F = D / t. D is given up."""
        out: _Value | None = None
        square, unit, degree, done, rest = D, 1.0 / t, 1, 0, self.p  # F = unit * square
        out_unit = 1.0
        while True:
            if rest & 1:
                done += degree
                if out is None:
                    out, out_unit = square, unit
                else:
                    product = self._multiply(
                        out,
                        square,
                        None,
                        ratio**done + 1.0,
                        a=out_unit * unit,
                        b=out_unit,
                        c=unit,
                        products=1,
                    )
                    self._give_unless(out, square)
                    out, out_unit = product, 1.0
            rest >>= 1
            if not rest:
                assert out is not None
                self._give_unless(square, out)
                if out_unit == 1.0:
                    return out
                Q = self._multiply(out, out, None, ratio + 1.0, b=out_unit, products=0)  # p = 1
                self._give(out)
                return Q
            degree *= 2
            product = self._multiply(
                square, square, None, ratio**degree + 1.0, a=unit * unit, b=2.0 * unit, products=1
            )
            self._give_unless(square, out)
            square, unit = product, 1.0

    def _replace(
        self,
        X: _Value,
        other: _Value,
        bound: float,
        *,
        a: float = 1.0,
        b: float = 0.0,
        products: int = 3,
        last: bool,
    ) -> _Value:
        """X <- a X other + b X; the root itself in the last step."""
        out = ROOT if last else None
        value = self._multiply(X, other, out, bound, a=a, b=b, products=products)
        self._give(X)
        return value

    def _multiply(
        self,
        left: _Value,
        right: _Value,
        out: int | None,
        bound: float,
        *,
        a: float = 1.0,
        b: float = 0.0,
        c: float = 0.0,
        d: float = 0.0,
        e: float = 0.0,
        addend: _Value | None = None,
        products: int = 3,
        doubled: bool = False,
    ) -> _Value:
        addend = left if addend is None else addend
        value = _Value(self._take() if out is None else out, bound)
        scale = 1.0 if out == ROOT else value.scale
        a = 0.0 if products == 0 else a * (0.5 if doubled else 1.0)
        coefficients = (
            a * scale / (left.scale * right.scale),
            b * scale / left.scale,
            c * scale / right.scale,
            d * scale,
            e * scale / addend.scale,
        )
        # Early products must not lose what the smallest eigenvalues still need; see roots.md 5.2.
        promote = 64 if self.step < 2 else 256
        self.products.append(
            Product(
                left.buffer,
                right.buffer,
                addend.buffer,
                value.buffer,
                coefficients,
                products,
                doubled,
                promote,
            )
        )
        return value

    def _take(self) -> int:
        if self.free:
            return self.free.pop()
        self.buffers += 1
        return self.buffers - 1

    def _give(self, value: _Value) -> None:
        if value.buffer != ROOT:
            self.free.append(value.buffer)

    def _give_unless(self, value: _Value, *kept: _Value | None) -> None:
        if all(value is not other for other in kept):
            self._give(value)
