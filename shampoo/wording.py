"""How errors print the values that they refuse."""

import math
from numbers import Integral
from typing import Any

_MOST_DIGITS = 30


def shown(value: Any) -> str:
    """``repr``, but of a long integer its size: Python refuses to print one of 4300 digits."""
    if isinstance(value, Integral):
        digits = math.log10(2.0) * abs(int(value)).bit_length()
        if digits > _MOST_DIGITS:
            return f"{'-' if int(value) < 0 else ''}1e{digits:.0f} or so"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return repr(value)
