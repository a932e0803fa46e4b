"""Warnings that point at the user's line: the package and torch lie between it and the reason."""

import sys
import warnings

_INSIDE = ("shampoo", "torch")


def warn_outside(message: str) -> None:
    """Warns at the innermost line that is neither of the package nor of torch."""
    frame, depth = sys._getframe(), 1
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] in _INSIDE:
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth)
