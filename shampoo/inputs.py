"""JSON that a person or a file gives: read within bounds, and checked member by member.

Nothing read here may run for ever, take memory without bound, or come back as what JSON is not.
What is wrong is said in words that complete ``Invalid NAME=VALUE:``.
"""

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Set
from pathlib import Path
from typing import Any

from shampoo.errors import shown

MOST_BYTES = 8 << 20  # of a file: the shapes of some 100,000 tensors by name
MOST_INTEGER = (1 << 63) - 1
_DIGITS = len(str(MOST_INTEGER)) + 1  # with the sign


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Args:
        path: of a regular file of at most 8 MiB. A pipe or a device could have no end.

    Raises:
        ValueError: if it cannot be read, is no JSON, or holds NaN, Infinity, a number beyond 64
            bits or beyond a float, or a name twice in one object.
    """
    try:
        return parse_json(_text(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}.") from error
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}.") from error


def parse_json(text: str) -> Any:
    """What a text says in JSON.

    Raises:
        ValueError: as :func:`read_json`.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_distinct,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}.") from error


def _text(path: str | Path) -> str:
    # Opening a pipe would wait for who writes into it.
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(file, "rb") as stream:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ValueError("it is not a file.")
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES} bytes.")
    return content.decode("utf-8")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(
            name for name, count in Counter(name for name, _ in pairs).items() if count > 1
        )
        raise ValueError(f"it has {shown(twice)} twice in one object.")
    return found


def _integer(digits: str) -> int:
    # Python takes time that grows with the square of the digits, and refuses 4300.
    if len(digits) > _DIGITS or abs(value := int(digits)) > MOST_INTEGER:
        raise ValueError(f"it has an integer of {len(digits)} digits. Must be < 2^63.")
    return value


def _number(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError(f"it has {shown(digits)}, which is more than a float holds.")
    return value


def _constant(word: str) -> float:
    raise ValueError(f"it has {word}, which is not a number.")


def check_object(value: Any, name: str, needed: Set[str] = frozenset()) -> dict[str, Any]:
    """The value, an object with certain members.

    Raises:
        ValueError: if it is none, or lacks one.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {shown(value)}. Must be an object.")
    if missing := sorted(needed - set(value)):
        raise ValueError(f"{name} has no {missing[0]!r}. Must have {', '.join(sorted(needed))}.")
    return value


def check_list(value: Any, name: str) -> list[Any]:
    """The value, a list.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, list):
        raise ValueError(f"{name} is {shown(value)}. Must be a list.")
    return value


def is_integer(value: Any, least: int, most: int) -> bool:
    """Whether a value is an integer in these bounds; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any, least: float, most: float) -> bool:
    """Whether a value is a finite number in these bounds, ends included."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and least <= value <= most
