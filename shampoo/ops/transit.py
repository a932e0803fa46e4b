"""Values on their way to the host, which does not wait for them.

A device works through a queue. Who reads a value on it waits until all that was asked of it before
is done, and leaves it without work meanwhile. So what the host wants to know travels in a
:class:`Letter`, and is read when it has come.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Types of devices on which the host may look at any value at once: they have no queue.
NEAR = frozenset({"cpu"})


def is_near(device: torch.device) -> bool:
    """Whether reading a value on a device waits for nothing."""
    return device.type in NEAR


class Letter:
    """A copy of a tensor on its way to the host, of what it holds now.

    Only a GPU of CUDA sends while the host goes on; with any other device it waits here.

    Args:
        values: of any shape.
    """

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if values.device.type != "cuda" or isinstance(values, FakeTensor):
            self._copy = values.to("cpu", copy=True)
            return
        self._copy = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        self._copy.copy_(values, non_blocking=True)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record(torch.cuda.current_stream(values.device))

    def has_arrived(self) -> bool:
        """Whether :meth:`read` would not wait."""
        return self._arrived is None or bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def read(self) -> Tensor:
        """The values, on the host; waits until they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._copy
