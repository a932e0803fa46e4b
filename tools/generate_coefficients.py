"""Coefficient schedules of the coupled inverse p-th root iteration (writes coefficients.json).

    T = c0 I + c1 M + c2 Q^2;  X <- X T;  M <- T^p M        (X0 = I, M0 = (A + ridge I) / bound)
    with Q = M in a step of degree 2, and Q = M^2 + b M + d I in one of degree 4

Every iterate is a polynomial of one symmetric matrix, so everything here is scalar: an eigenvalue m
of M goes to T(m)^p m and must end at 1; the eigenvalue x of X must end at m0^(-1/p).

Any polynomial of degree 4 has this form, and so takes two products. Q = (M - s I)^2 + h I, and
with s inside of the interval all terms are small: in powers of M, terms above 100 leave a sum of 1.

One step on [l, 1] minimises E = max |1 - m^(1/p) T(m)| over the coefficients. The functions
m^(1/p), m^(1/p+1), ..., are a Chebyshev system, so the optimum equioscillates in degree + 2
points and Remez exchange finds it. With s = m^(1/p), the extrema of s T(s^p) are roots of
sum a_k (1 + p k) m^k, T = sum a_k m^k. The step is divided by 1 + E, which keeps the upper end of M
at 1 and maps the interval into [((1-E)/(1+E))^p, 1].

Minimax on the true interval makes E -> 1 while l is tiny: large eigenvalues are thrown to the
bottom of the new interval in every step, and rounding noise is amplified in just the directions
that carry the gradient. The cushion avoids it: optimise on [max(l, l_tau), 1], where l_tau has
(1-E)/(1+E) = tau. Eigenvalues below l_tau grow by nearly T(0)^p a step. As soon as degree 1, 2 or 4
on the true interval reaches the tolerance, that is the last step (centred on 1, not rescaled).

Rounding decides which steps have degree 4, measured on factors of a training run. For p = 2 and 3
these are the first: they bring the small eigenvalues out of the noise of later steps. From p = 4
on, where a step of degree 2 does so already, they are the last. For p = 1, whose X spans all that
float32 has, there are none. Of the schedules with the fewest products the one with the last step of
the lowest degree is taken: kernels in half precision take what is near 1 in single products.

    python tools/generate_coefficients.py --out FILE      write the table (a few seconds)
    python tools/generate_coefficients.py --check FILE    regenerate, compare within 1e-6, and
                                                          verify every schedule by running it

Needs mpmath and numpy, which the package itself does not.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import mpmath as mp  # type: ignore[import-untyped]
import numpy as np

mp.mp.dps = 50

# Twice the orders 1 to 6, every smaller power, and so every integer a plain optimizer meets.
POWERS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)
RELATIVE_EPS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
PRODUCTS = {1: 0, 2: 1, 4: 2}  # of T, by its degree
SLACK = 1.2  # schedules are built for l = eps / SLACK: room for the rounding of A and its ridge


def tolerance(p: int) -> float:
    """Largest relative error of an eigenvalue of X, in exact arithmetic.

    The errors of two roots add up in the direction, whose limit is tighter from p = 4 on.
    """
    return 1e-3 if p <= 3 else 5e-4


def tau(p: int) -> float:
    """The cushion: what eigenvalues near 1 keep of themselves in a step.

    Less makes steps grow faster, and rounding noise with them, which high powers amplify.
    """
    return 0.6 if p <= 3 else 0.7


def remez(p: int, degree: int, lower: Any) -> tuple[list[Any], Any]:
    """Best T of one degree on [lower, 1]: its coefficients and its error E."""
    power, lower = mp.mpf(p), mp.mpf(lower)
    points = degree + 2
    low, high = lower ** (1 / power), mp.mpf(1)
    middle, radius = (low + high) / 2, (high - low) / 2
    reference = [middle - radius * mp.cos(mp.pi * i / (points - 1)) for i in range(points)]
    for _ in range(80):
        # s T(s^p) + (-1)^i E = 1 on the reference
        lhs, rhs = mp.matrix(points, points), mp.matrix(points, 1)
        for i, s in enumerate(reference):
            for k in range(degree + 1):
                lhs[i, k] = s * s ** (power * k)
            lhs[i, degree + 1] = (-1) ** i
            rhs[i] = 1
        solution = mp.lu_solve(lhs, rhs)
        c, error = [solution[k] for k in range(degree + 1)], solution[degree + 1]
        # Exchange: the end points and all interior extrema.
        derivative = [c[k] * (1 + power * k) for k in range(degree + 1)]
        roots = mp.polyroots(derivative[::-1], maxsteps=500, extraprec=200)
        inner = sorted(
            mp.re(r) ** (1 / power)
            for r in roots
            if abs(mp.im(r)) < mp.mpf(10) ** -25 * abs(r) and lower < mp.re(r) < 1
        )
        reference = [low, *inner, high]
        if len(reference) != points:
            raise ArithmeticError(f"lost an extremum: [{lower}, 1] is too short for {degree=}")
        errors = [abs(1 - s * mp.polyval(c[::-1], s**power)) for s in reference]
        if max(errors) - min(errors) < mp.mpf(10) ** -25 * max(errors):
            break
    return c, abs(error)


@functools.cache
def cushion_interval(p: int, degree: int) -> Any:
    """l_tau: the lower end whose optimum has (1-E)/(1+E) = tau, by bisection in log10 l."""
    target = (1 - mp.mpf(tau(p))) / (1 + mp.mpf(tau(p)))
    low, high = mp.mpf(-14), mp.mpf("-0.01")
    for _ in range(60):
        middle = (low + high) / 2
        try:
            too_wide = remez(p, degree, mp.mpf(10) ** middle)[1] > target
        except ArithmeticError:
            too_wide = False
        low, high = (middle, high) if too_wide else (low, middle)
    return mp.mpf(10) ** ((low + high) / 2)


def power_gemms(p: int) -> int:
    """Products of M <- T^p M by binary powering."""
    return int(math.log2(p)) + bin(p).count("1")


def coefficients(a: list[Any]) -> list[float]:
    """``c0, c1, c2, b, d`` of a polynomial given by its powers of M; b = d = 0 up to degree 2."""
    if len(a) < 5:
        return [float(x) for x in a] + [0.0] * (5 - len(a))
    s = -a[3] / (4 * a[4])
    # By powers of M - s I, of which the third is gone; completing the square, the second goes too.
    e = [sum(a[k] * mp.binomial(k, j) * s ** (k - j) for k in range(j, 5)) for j in range(5)]
    h = e[2] / (2 * e[4])
    c0, c1, c2 = e[0] - e[1] * s - e[4] * h**2, e[1], e[4]
    return [float(x) for x in (c0, c1, c2, -2 * s, s**2 + h)]


@functools.cache
def growth_step(p: int, degree: int, lower: Any) -> tuple[list[Any], Any]:
    """The powers of M in a step from [lower, 1], and the lower end that it leaves."""
    a, error = remez(p, degree, max(lower, cushion_interval(p, degree)))
    a = [x / (1 + error) for x in a]
    grown = mp.polyval(a[::-1], lower) ** p * lower
    return a, min(grown, ((1 - error) / (1 + error)) ** p)


def last_step(p: int, lower: Any) -> tuple[list[Any], float] | None:
    """The cheapest step that ends within the tolerance on [lower, 1], if there is one."""
    for degree in (1, 2) if p == 1 else PRODUCTS:
        try:
            a, error = remez(p, degree, lower)
        except ArithmeticError:
            continue
        if error < tolerance(p):
            return a, float(error)
    return None


def steps_of(p: int, eps: float, quadratic: int, quartic: int) -> dict[str, Any] | None:
    """The schedule with so many growth steps of degree 2 and of degree 4, if it ends then."""
    degrees = [4] * quartic + [2] * quadratic if p in (2, 3) else [2] * quadratic + [4] * quartic
    lower = mp.mpf(eps) / mp.mpf(SLACK)
    steps: list[list[Any]] = []
    lower_end = [float(lower)]
    for degree in degrees:
        a, lower = growth_step(p, degree, lower)
        steps.append(a)
        lower_end.append(float(lower))
    last = last_step(p, lower)
    return last and finish(p, [*steps, last[0]], lower_end, last[1])


def schedule(p: int, eps: float, most: int = 40) -> dict[str, Any]:
    """The cushioned schedule of one power and relative ridge."""
    least = 0 if p in (2, 3) else 1  # of degree 2
    found: list[dict[str, Any]] = []
    for quartic in range(1 if p == 1 else most):
        for quadratic in range(least, most):
            row = steps_of(p, eps, quadratic, quartic)
            if row is not None:
                found.append(row)
                break
        if found and quadratic == least:
            break  # with more of degree 4 there would be more steps than it takes
    if not found:
        raise ArithmeticError(f"schedule of {p=}, {eps=} did not converge in {most} steps")

    def order(row: dict[str, Any]) -> tuple[int, bool, bool]:
        *_, c2, b, d = row["coefficients"][-1]
        return row["gemms"], bool(b or d), c2 != 0.0

    return min(found, key=order)


def finish(p: int, steps: list[list[Any]], lower_end: list[float], error: float) -> dict[str, Any]:
    """One row of the table, of steps by their powers of M."""
    updates = len(steps) - 1  # the first X T and the last M update are free
    # Step 0's M^2 is also the norm bound's A^2.
    products = sum(PRODUCTS[len(a) - 1] for a in steps) + updates * (power_gemms(p) + 1)
    return {
        "steps": len(steps),
        "gemms": products,
        "x_bound": float(np.prod([float(a[0]) for a in steps])),
        "final_error": error,
        "lower_end": lower_end,
        "coefficients": [coefficients(a) for a in steps],
    }


def newton_schedule(p: int, eps: float, max_steps: int = 200) -> dict[str, Any]:
    """Coupled Newton as the same steps: T = ((p+1) I - M)/p, M0 = (p+1)/2 A/bound.

    The scale (p+1)/2 is folded into the first step, so the same chain runs it unchanged.
    """
    z = (p + 1) / 2
    first = [z ** (1 / p) * (p + 1) / p, -(z ** (1 / p + 1)) / p, 0.0, 0.0, 0.0]
    rest = [(p + 1) / p, -1 / p, 0.0, 0.0, 0.0]
    m0 = np.geomspace(eps / SLACK, 1.0, 20001)
    m, x, k = m0.copy(), np.ones_like(m0), 0
    while np.max(abs(x * m0 ** (1 / p) - 1)) >= 1e-3:
        c = rest if k else first
        t = c[0] + c[1] * m
        x, m, k = x * t, t**p * m, k + 1
        if k > max_steps:
            raise ArithmeticError(f"Newton schedule of {p=}, {eps=} did not converge")
    return {"steps": k, "gemms": (k - 1) * (power_gemms(p) + 1), "first": first, "rest": rest}


def build() -> dict[str, Any]:
    """The whole table."""
    return {
        "format": 2,
        "iteration": "T=c0*I+c1*M+c2*Q^2, Q=M^2+b*M+d*I, or M if b=d=0; X<-X*T; M<-T^p*M; X0=I,"
        " M0=(A+ridge*I)/bound; steps are [c0, c1, c2, b, d]",
        "tau": {str(p): tau(p) for p in POWERS},
        "slack": SLACK,
        "tolerance": {str(p): tolerance(p) for p in POWERS},
        "cushion_lower_end": {
            str(p): {str(d): float(cushion_interval(p, d)) for d in (2, 4)} for p in POWERS
        },
        "schedules": {str(p): {f"{e:.0e}": schedule(p, e) for e in RELATIVE_EPS} for p in POWERS},
        "newton": {
            str(p): {f"{e:.0e}": newton_schedule(p, e) for e in RELATIVE_EPS} for p in POWERS
        },
    }


def scalar_error(
    p: int, eps: float, steps: list[list[float]], points: int = 200001
) -> tuple[float, float]:
    """Largest |x m^(1/p) - 1| and largest x over [eps/SLACK, 1], iterating in float64."""
    m0 = np.geomspace(eps / SLACK, 1.0, points)
    m, x = m0.copy(), np.ones_like(m0)
    for c0, c1, c2, b, d in steps:
        q = m * m + b * m + d if b or d else m
        t = c0 + c1 * m + c2 * q * q
        x, m = x * t, t**p * m
    return float(np.max(abs(x * m0 ** (1 / p) - 1))), float(x.max())


def verify(table: dict[str, Any]) -> None:
    """Run every schedule and hold it to the error and the bound it claims."""
    for p, rows in table["schedules"].items():
        for eps, row in rows.items():
            error, largest = scalar_error(int(p), float(eps), row["coefficients"])
            if error > row["final_error"] * 1.001 + 1e-9:
                raise SystemExit(f"p={p} eps={eps}: error {error} > {row['final_error']}")
            if largest > row["x_bound"] * (1 + 1e-12):
                raise SystemExit(f"p={p} eps={eps}: |X| reaches {largest} > {row['x_bound']}")
            print(
                f"p={p} eps={eps}: steps {row['steps']:2d}  GEMMs {row['gemms']:2d}  "
                f"error {error:.2e}  |X| <= {row['x_bound']:.1f}   "
                f"coupled Newton {table['newton'][p][eps]['gemms']} GEMMs"
            )


def deviation(new: Any, old: Any, path: str = "table") -> float:
    """Largest relative deviation between two tables, which must have one shape."""
    if isinstance(new, dict):
        if not isinstance(old, dict) or new.keys() != old.keys():
            raise SystemExit(f"{path}: the entries differ. Write the file again with --out.")
        return max(deviation(new[k], old[k], f"{path}/{k}") for k in new)
    if isinstance(new, list):
        if len(new) != len(old):
            raise SystemExit(f"{path}: {len(old)} entries, not {len(new)}. Use --out.")
        return max(deviation(new[i], old[i], f"{path}/{i}") for i in range(len(new)))
    if isinstance(new, (int, float)):
        return float(abs(new - old) / max(abs(old), 1e-3))
    if new != old:
        raise SystemExit(f"{path}: {old!r}, not {new!r}. Write the file again with --out.")
    return 0.0


def dump(table: dict[str, Any], path: Path) -> None:
    """Write the table with one line for each list of numbers."""
    text = re.sub(
        r"\[\s+([-+0-9.eE,\s]+?)\s+\]",
        lambda match: "[" + re.sub(r"\s+", " ", match.group(1)) + "]",
        json.dumps(table, indent=1),
    )
    path.write_text(text + "\n")


def main() -> None:
    """Build, verify, then write or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", type=Path)
    args = parser.parse_args()
    table = build()
    verify(table)
    if args.out:
        dump(table, args.out)
    if args.check:
        worst = deviation(table, json.loads(args.check.read_text()))
        print(f"largest relative deviation from {args.check}: {worst:.1e}")
        raise SystemExit(worst > 1e-6)


if __name__ == "__main__":
    main()
