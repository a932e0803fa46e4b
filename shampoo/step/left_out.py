"""Steps that a rank has left out on its own, though it had gradients for them.

Its next ``step()`` would meet the one in which the others wait, and count as many steps as theirs:
from then on ranks would mix the gradients of two batches, until the last step has no partner. What
tells them apart is that ``zero_grad()`` has dropped gradients that no step has seen.
"""

import weakref
from collections.abc import Iterable

from torch import Tensor


class LeftOut:
    """Counts how often ``zero_grad()`` has dropped gradients that no ``step()`` has seen.

    What one gradient says counts for all: it costs nothing in a model of many. A count may be too
    high, where gradients are written to after a step: it is so on all ranks.
    """

    def __init__(self) -> None:
        self.count = 0
        # The gradient that was there in the last step() or zero_grad(), and what version of it. A
        # weak reference, or memory would not be free where torch frees it.
        self._seen: tuple[weakref.ref[Tensor], int] | None = None

    def see(self, params: Iterable[Tensor]) -> None:
        """A step is asked for with the gradients that are there, or they have been zeroed."""
        grad = _first(params)
        self._seen = None if grad is None else (weakref.ref(grad), _version(grad))

    def drop(self, params: Iterable[Tensor]) -> None:
        """The gradients that are there will be dropped."""
        grad = _first(params)
        if grad is None:
            return
        seen, version = self._seen or (lambda: None, 0)
        if seen() is not grad or version != _version(grad):
            self.count += 1


def _first(params: Iterable[Tensor]) -> Tensor | None:
    return next((param.grad for param in params if param.grad is not None), None)


def _version(grad: Tensor) -> int:
    return 0 if grad.is_inference() else grad._version
