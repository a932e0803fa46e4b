"""What the kernels in CUDA C++ take, where that is less than the op takes."""

from collections.abc import Sequence

import torch
from torch import Tensor

SMALL_ROWS = (
    128  # of a matrix whose whole root iteration one thread block holds: csrc/cuda/launch.h
)
SMALL_STEPS = 16  # of the schedule of such an iteration


def minimax_small_root(
    root: Tensor,
    ridge: Tensor,
    factor: Tensor,
    p: int,
    eps: object,
    relative_eps: object,
    schedule: Sequence[float],
) -> bool:
    """Whether one thread block can take a root: float32, contiguous, n <= 128, p >= 2."""
    return (
        root.dtype == factor.dtype == torch.float32
        and factor.shape[-1] <= SMALL_ROWS
        and p >= 2
        and 5 <= len(schedule) <= 5 * SMALL_STEPS
        and root.is_contiguous()
        and factor.is_contiguous()
        and ridge.is_contiguous()
    )


def magnitudes(out: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors are on one device: one launch has the memory of no other."""
    return all(tensor.device == out.device for tensor in tensors)
