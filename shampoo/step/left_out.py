"""Steps that a rank has left out on its own, though it had gradients for them.

Its next ``step()`` would meet the one in which the others wait, and count as many steps as theirs:
from then on ranks would mix the gradients of two batches, until the last step has no partner. What
tells them apart is that ``zero_grad()`` has dropped gradients that no step has seen.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

_SEEN = "_shampoo_seen"  # on a gradient: its version when a step, or zero_grad(), has met it


class LeftOut:
    """Counts how often ``zero_grad()`` has dropped gradients that no ``step()`` has seen.

    What one gradient says counts for all: it costs nothing in a model of many. A count may be too
    high, where gradients are written to after a step: it is so on all ranks. The gradient itself is
    marked: ``Module.to()`` cannot swap one to which a weak reference is held, and its address may
    be that of the next one.
    """

    def __init__(self) -> None:
        self.count = 0

    def see(self, params: Iterable[Tensor]) -> None:
        """A step is asked for with the gradients that are there, or they have been zeroed."""
        for param in params:
            grad: Any = param.grad
            if grad is not None:  # the first one alone; no function is called, as this is each step
                grad._shampoo_seen = 0 if grad.is_inference() else grad._version
                break

    def drop(self, params: Iterable[Tensor]) -> None:
        """The gradients that are there will be dropped."""
        grad = next((param.grad for param in params if param.grad is not None), None)
        if grad is not None:
            version = 0 if grad.is_inference() else grad._version
            self.count += version != getattr(grad, _SEEN, None)
