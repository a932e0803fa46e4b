"""The names of state: what under a parameter is this optimizer's, and what somebody else put there.

``step``, ``calls``, ``block{k}.{kind}`` and, for what belongs to a mode, ``block{k}.{kind}{mode}``,
with the kinds of state that are declared (:mod:`shampoo.blocks.declared`). A key is looked at as a
whole: ``exp_avg`` is part of the word ``exp_avg_sq``, and a user's own ``slot_weights`` are not the
slots of a schedule.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from shampoo.blocks.declared import BLOCK_STATE, MODE_STATE

COUNTS = ("step", "calls")  # of a parameter
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum")  # elementwise, of blocks of any kind
# Of a mode that is refreshed, its phase in a staggered schedule. The key is older than the word,
# and checkpoints know it.
PHASE = "slot"

_MAY_BEGIN = ("exp_avg", "momentum")  # at zero, when they are called for

_KEY = re.compile(r"block(?P<block>0|[1-9]\d*)\.(?P<kind>[a-z]+(?:_[a-z]+)*)(?P<mode>0|[1-9]\d*)?")
_BLOCK = re.compile(r"block\d+\.")


class BlockKey(NamedTuple):
    """A key of one block: its row-major index, the kind of state, and the mode of a factor."""

    block: int
    kind: str
    mode: int | None

    def __str__(self) -> str:
        return f"block{self.block}.{self.kind}{'' if self.mode is None else self.mode}"


def parse(key: Any) -> BlockKey | None:
    """What a key says of a block; None if it is none of this optimizer's, or is of no block."""
    named = _split(key) if isinstance(key, str) else None
    if named is None:
        return None
    if named.mode is None:
        is_known = named.kind in MOMENTS or named.kind in BLOCK_STATE
    else:
        is_known = named.kind == PHASE or named.kind in MODE_STATE
    return named if is_known else None


@functools.lru_cache(maxsize=1 << 16)  # the same keys are asked for again and again
def _split(key: str) -> BlockKey | None:
    """A key of the form that those of blocks have, in its parts."""
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    mode = None if found["mode"] is None else int(found["mode"])
    return BlockKey(int(found["block"]), found["kind"], mode)


def is_count(key: Any) -> bool:
    """Whether a key of this optimizer's holds one whole number."""
    named = parse(key)
    if named is None:
        return key in COUNTS
    if named.mode is None:
        return False
    return named.kind == PHASE or MODE_STATE[named.kind].is_count


def is_lasting(key: Any) -> bool:
    """Whether a block cannot go on without what a key of it holds."""
    named = parse(key)
    if named is None or named.kind == PHASE:
        return False
    if named.mode is None:
        return named.kind not in _MAY_BEGIN
    return MODE_STATE[named.kind].is_lasting


def is_own(key: Any) -> bool:
    """Whether a key is this optimizer's."""
    return key in COUNTS or parse(key) is not None


def is_unknown(key: Any) -> bool:
    """Whether a key is named as that of a block, but none of this version: a later one's, say."""
    return isinstance(key, str) and _BLOCK.match(key) is not None and parse(key) is None


def may_begin(key: Any) -> bool:
    """Whether a key is of a moment that begins at zero where nothing has been saved under it."""
    named = parse(key)
    return named is not None and named.kind in _MAY_BEGIN


def kinds_in(entries: Iterable[Any]) -> set[str]:
    """The kinds of state that keys name."""
    return {named.kind for named in map(parse, entries) if named is not None}


def foreign(entries: Mapping[Any, Any]) -> dict[Any, Any]:
    """What is under a parameter that is not this optimizer's: a wrapper's average, say."""
    return {key: value for key, value in entries.items() if not is_own(key)}
