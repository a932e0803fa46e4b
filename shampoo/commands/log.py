"""Metrics of a run as lines of JSON, one object a line: read, and refused by the line."""

import json
import math
from pathlib import Path
from typing import Any

from shampoo.errors import shown

Run = dict[str, list[tuple[float, float]]]  # for every name the points ``step, value``, ascending


def read_log(path: Path) -> Run:
    """The numbers of a run, by name.

    A line is what ``metrics()`` gives, with a ``"step"``, and whatever numbers else there are.
    Words, truth values and null are passed over, as are numbers that are not finite. Of lines of
    one step, which a run that was resumed may have, the last counts.

    Raises:
        ValueError: for a line that is no such object, naming it; if there is none; or if the file
            cannot be read as text.
    """
    found: dict[str, dict[float, float]] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        step, values = _read_line(line)
                    except ValueError as error:
                        raise ValueError(f"{path}, line {number}: {error}") from error
                    for name, value in values.items():
                        found.setdefault(name, {})[step] = value
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Invalid log={str(path)!r}: {error}. Must be lines of JSON.") from error
    if not found:
        raise ValueError(
            f"{path} has no metrics. Must have lines of JSON such as"
            ' {"step": 10, "shampoo/update_rms": 0.001}.'
        )
    return {name: sorted(points.items()) for name, points in found.items()}


def _read_line(line: str) -> tuple[float, dict[str, float]]:
    """The step of a line and its finite numbers."""
    try:
        entries = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}.") from error
    if not isinstance(entries, dict):
        raise ValueError(f'it is {shown(entries)}. Must be an object with a "step".')
    step = _number(entries.pop("step", None))
    if step is None or not math.isfinite(step) or step < 0:
        raise ValueError('its "step" must be a number >= 0.')
    values: dict[str, float] = {}
    for name, entry in entries.items():
        if isinstance(entry, (dict, list)):
            raise ValueError(f"{name} is {shown(entry)}. Must be a number.")
        value = _number(entry)
        if value is not None and math.isfinite(value):
            values[name] = value
    return step, values


def _number(entry: Any) -> float | None:
    """A number; None for what is none."""
    if isinstance(entry, bool) or not isinstance(entry, (int, float)):
        return None
    try:
        return float(entry)
    except OverflowError:
        return math.inf
