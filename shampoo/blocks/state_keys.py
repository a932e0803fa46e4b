"""The names of state: what under a parameter is this optimizer's, and what somebody else put there.

``step``, ``calls`` and ``block{k}.{kind}``, where the kinds of a factor end in its mode. A key is
looked at as a whole: ``exp_avg`` is part of the word ``exp_avg_sq``, and a user's own
``slot_weights`` are not the slots of a schedule.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

COUNTS = ("step", "calls")  # of a parameter
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum")  # the elementwise state that a block may have
FACTOR_STATE = ("factor", "root", "failures", "slot")  # of a mode; a diagonal factor has the first

# What a block cannot go on without; the other kinds may begin at zero when they are called for.
LASTING = ("exp_avg_sq", "factor", "root")

_KEY = re.compile(
    rf"block(?P<block>0|[1-9]\d*)\."
    rf"(?:(?P<moment>{'|'.join(MOMENTS)})"
    rf"|(?P<kind>{'|'.join(FACTOR_STATE)})(?P<mode>0|[1-9]\d*))"
)
_BLOCK = re.compile(r"block\d+\.")


class BlockKey(NamedTuple):
    """A key of one block: its row-major index, the kind of state, and the mode of a factor."""

    block: int
    kind: str
    mode: int | None

    def __str__(self) -> str:
        return f"block{self.block}.{self.kind}{'' if self.mode is None else self.mode}"


@functools.lru_cache(maxsize=1 << 16)  # the same keys are asked for again and again
def parse(key: Any) -> BlockKey | None:
    """What a key says of a block; None if it is none of this optimizer's, or is of no block."""
    found = _KEY.fullmatch(key) if isinstance(key, str) else None
    if found is None:
        return None
    if found["moment"]:
        return BlockKey(int(found["block"]), found["moment"], None)
    return BlockKey(int(found["block"]), found["kind"], int(found["mode"]))


def is_own(key: Any) -> bool:
    """Whether a key is this optimizer's."""
    return key in COUNTS or parse(key) is not None


def is_unknown(key: Any) -> bool:
    """Whether a key is named as that of a block, but none of this version: a later one's, say."""
    return isinstance(key, str) and _BLOCK.match(key) is not None and parse(key) is None


def may_begin(key: Any) -> bool:
    """Whether a key is of a moment that begins at zero where nothing has been saved under it."""
    named = parse(key)
    return named is not None and named.kind in MOMENTS and named.kind not in LASTING


def kinds_in(entries: Iterable[Any]) -> set[str]:
    """The kinds of state that keys name."""
    return {named.kind for named in map(parse, entries) if named is not None}


def foreign(entries: Mapping[Any, Any]) -> dict[Any, Any]:
    """What is under a parameter that is not this optimizer's: a wrapper's average, say."""
    return {key: value for key, value in entries.items() if not is_own(key)}
