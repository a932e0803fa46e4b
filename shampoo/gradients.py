"""What must hold of gradients before a step may change anything."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo import ops


def check_dense(grad: Tensor, name: str) -> None:
    """Raises RuntimeError for a sparse gradient, naming the parameter and the remedy."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"Shampoo does not support sparse gradients ({name}). Give that parameter its own"
            " torch.optim.SparseAdam, or make the layer dense (sparse=False)."
        )


def largest_magnitudes(grads: Sequence[Tensor]) -> list[float]:
    """``max |g|`` of every gradient, NaN or Inf if it holds one, 0 if it is zero.

    One pass over the gradients; on a GPU, the one point at which a step waits for it.
    """
    magnitudes = torch.empty(len(grads), dtype=torch.float64, device=grads[0].device)
    ops.magnitudes_(magnitudes, grads)
    values: list[float] = magnitudes.tolist()
    return values


def can_square(magnitude: float, numel: int, dtype: torch.dtype) -> bool:
    """Whether statistics of ``dtype`` can hold the squares of a gradient: not if it is not finite.

    One finite gradient beyond that would leave Inf in the factors and moments for ever.
    """
    return magnitude * math.sqrt(numel) < math.sqrt(torch.finfo(dtype).max)
