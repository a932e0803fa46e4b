"""The table of cushioned minimax schedules that ships with the package."""

from __future__ import annotations

import functools
import json
from importlib import resources

from shampoo.kernels.reference.minimax import Schedule, Step


@functools.cache
def _table() -> dict[int, list[tuple[float, Schedule]]]:
    """p -> (relative eps, steps), the largest relative eps first."""
    text = resources.files("shampoo.roots").joinpath("coefficients.json").read_text()
    return {
        int(p): sorted(
            (
                (float(eps), tuple(Step(*step) for step in row["coefficients"]))
                for eps, row in rows.items()
            ),
            reverse=True,
        )
        for p, rows in json.loads(text)["schedules"].items()
    }


def tabulated_powers() -> tuple[int, ...]:
    """Every p that has a schedule, in order."""
    return tuple(sorted(_table()))


def smallest_relative_eps(p: int) -> float:
    """The relative ridge below which the schedule of p saturates instead of following it."""
    return _table()[p][-1][0]


@functools.cache
def minimax_schedule(p: int, relative_eps: float) -> Schedule:
    """The steps of the largest tabulated relative ridge that is no larger than relative_eps.

    Below the table the last schedule is a soft clamp: eigenvalues under its relative ridge end
    near the root of that ridge.
    """
    rows = _table()[p]
    return next((steps for eps, steps in rows if eps <= relative_eps), rows[-1][1])
