"""What a user is told: errors by name, how they print what they refuse, warnings at their line.

Bad arguments are plain ``ValueError``.
"""

import math
import sys
import warnings
from numbers import Integral
from typing import Any

_MOST_DIGITS = 30
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


def shown(value: Any) -> str:
    """``repr``, but of a long integer its size: Python refuses to print one of 4300 digits."""
    if isinstance(value, Integral):
        digits = math.log10(2.0) * abs(int(value)).bit_length()
        if digits > _MOST_DIGITS:
            return f"{'-' if int(value) < 0 else ''}1e{digits:.0f} or so"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return repr(value)


def shown_bytes(number: float) -> str:
    """A number of bytes in the unit that suits it, to four digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} TiB"


def warn_outside(message: str) -> None:
    """Warns at the innermost line that is neither of the package nor of torch."""
    frame, depth = sys._getframe(), 1
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] in _INSIDE:
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth)
