"""What the optimizer calls: kernels are loaded if they have a licence."""

from collections.abc import Iterable

import torch

from shampoo import ops
from shampoo.certificates.issue import licence_of
from shampoo.ops import backends


def load_kernels(required: bool = False) -> None:
    """:func:`shampoo.ops.load_kernels`, of kernels that passed their checks on this machine."""
    ops.load_kernels(required, licence_of)


def prepare(devices: Iterable[torch.device]) -> None:
    """Lets GPUs run what they are licensed for, examining those that are met for the first time.

    Raises:
        shampoo.ops.jit.BuildError: if ``SHAMPOO_BACKEND`` insists on a kernel that was refused.
    """
    if backends.chosen() == ops.REFERENCE:
        return
    for device in devices:
        if device.type == "cuda" and torch.cuda.is_available():  # and is not imagined by a tracer
            ops.grant(device, licence_of(device))
