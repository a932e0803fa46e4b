"""What a user is told: errors by name, how they print what they refuse, warnings at their line.

Bad arguments are plain ``ValueError``.
"""

import math
import reprlib
import sys
import warnings
from numbers import Integral
from typing import Any

_MOST_DIGITS = 30
_MOST_CHARACTERS = 200  # of a value in a message
_INSIDE = ("shampoo", "torch")


class ShampooError(RuntimeError):
    """Base class of the errors this package raises while it trains or loads."""


class NonFiniteGradientError(ShampooError):
    """A gradient holds NaN or Inf and the group says ``nonfinite="raise"``."""


class BlockGridMismatchError(ShampooError):
    """State was cut into other blocks than the ones this optimizer uses."""


class IncompleteCheckpointError(ShampooError):
    """A checkpoint lacks blocks of a parameter that it claims to hold."""


class ForeignCheckpointError(ShampooError):
    """A checkpoint is another optimizer's."""


class DamagedCheckpointError(ShampooError):
    """A file of a checkpoint is missing, or holds something else than was written."""


class UnsafeCheckpointError(ShampooError):
    """A file of a checkpoint holds what could run code, or reach out of its folder."""


class FolderInUseError(ShampooError):
    """Another job saves its checkpoints in this folder."""


class PlanMismatchError(ShampooError):
    """Ranks that train one model would cut, own or move its blocks differently."""


class ShampooDistributedError(ShampooError):
    """A rank could not take its part of a step; no rank has changed a parameter in it."""


class ReplicaMismatchError(ShampooError):
    """Ranks that must hold the same bits of a parameter hold different ones."""


class RootFailureError(ShampooError):
    """A factor has had no valid root for more refreshes than ``max_root_failures`` allows."""


class _Shown(reprlib.Repr):
    """``repr`` of at most some characters, members and levels, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 20
        self.maxstring = self.maxother = _MOST_CHARACTERS

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, Integral):
            # Python refuses to print one of 4300 digits.
            digits = math.log10(2.0) * abs(int(x)).bit_length()
            if digits > _MOST_DIGITS:
                return f"{'-' if int(x) < 0 else ''}1e{digits:.0f} or so"
        # Objects of others may have a repr that prints anything.
        return printable(super().repr1(x, level))

    def repr_tuple(self, x: tuple[Any, ...], level: int) -> str:
        return self.repr_list(list(x), level)


_shown = _Shown()


def shown(value: Any) -> str:
    """A value in a message: ``repr``, but cut where it is long; of a long integer its size."""
    return _shown.repr(value)


def require(valid: bool, name: str, value: Any, bound: str) -> None:
    """Raises ValueError with the name of a value, the value, and what it must be, if it is not."""
    if not valid:
        raise ValueError(f"Invalid {name}={shown(value)}. Must be {bound}.")


def printable(text: str) -> str:
    """A text that cannot move a cursor, ring or clear: what is not printed is escaped.

    Lines stay lines.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text
    )


def shown_bytes(number: float) -> str:
    """A number of bytes in the unit that suits it, to four digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} TiB"


def warn_outside(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the innermost line that is neither of the package nor of torch."""
    frame, depth = sys._getframe(), 1
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] in _INSIDE:
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, category, stacklevel=depth)
