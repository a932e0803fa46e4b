"""What the optimizer calls: kernels are loaded if they have a licence."""

from collections.abc import Collection, Mapping

import torch
from torch._guards import active_fake_mode

from shampoo import ops
from shampoo.certificates.cases.shapes import Shape, lacking
from shampoo.certificates.issue import licence_of
from shampoo.ops import backends


def load_kernels(required: bool = False) -> None:
    """:func:`shampoo.ops.load_kernels`, of kernels that passed their checks on this machine."""
    ops.load_kernels(required, licence_of)


def prepare(shapes: Mapping[torch.device, Collection[Shape]]) -> None:
    """Lets devices run what they are licensed for, examining what is met for the first time.

    A GPU that nobody has examined is; and kernels are asked for the shapes of a plan.

    Args:
        shapes: of the blocks of a plan, by the devices where they lie.

    Raises:
        shampoo.ops.jit.BuildError: if ``SHAMPOO_BACKEND`` insists on a kernel that was refused.
    """
    backend = backends.chosen()
    if backend == ops.REFERENCE:
        return
    for device, held in shapes.items():
        if device.type == "cuda":
            if torch.cuda.is_available():  # and is not imagined by a tracer
                ops.grant(device, licence_of(device, held))
        elif backend != "triton" and lacking(held, device.type) and active_fake_mode() is None:
            ops.confine_cpu(licence_of(device, held))
