"""What has been made for a pattern of present gradients, while the pattern keeps coming back."""

from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")
Pattern = tuple[bool, ...]  # for every planned parameter, whether it has a gradient

_KEPT = 16


class PatternCache(Generic[Value]):
    """Keeps what was made for the patterns that were used last."""

    def __init__(self) -> None:
        self._made: dict[Pattern, Value] = {}

    def __contains__(self, pattern: Pattern) -> bool:
        return pattern in self._made

    def get(self, pattern: Pattern, make: Callable[[Pattern], Value]) -> Value:
        """What is kept for a pattern, made now if need be."""
        # Put back at the end: what is dropped is what was not asked for longest.
        value = self._made.pop(pattern) if pattern in self._made else make(pattern)
        self._made[pattern] = value
        if len(self._made) > _KEPT:
            del self._made[next(iter(self._made))]
        return value

    @property
    def latest(self) -> Value | None:
        """What was asked for last, None if nothing is kept."""
        return self._made[next(reversed(self._made))] if self._made else None

    def clear(self) -> None:
        """Forgets everything."""
        self._made.clear()
