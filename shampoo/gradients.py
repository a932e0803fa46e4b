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


def largest_magnitudes(grads: Sequence[Tensor]) -> Tensor:
    """``max |g|`` of every gradient, [m] float64: NaN or Inf if it holds one, 0 if it is zero.

    One pass over the gradients. It must end before the first of them moves anything, so the pass
    that gathers them, segment after segment, comes too late to do this on the way.
    """
    magnitudes = torch.empty(len(grads), dtype=torch.float64, device=grads[0].device)
    ops.magnitudes_(magnitudes, grads)
    return magnitudes


def square_limit(numel: int, dtype: torch.dtype) -> float:
    """The magnitude from which statistics of ``dtype`` cannot hold the squares of a gradient.

    One finite gradient beyond it would leave Inf in the factors and moments for ever.
    """
    return math.sqrt(torch.finfo(dtype).max) / math.sqrt(numel)
