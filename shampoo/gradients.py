"""What must hold of gradients before a step may change anything."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    norms = torch._foreach_norm(list(grads), ord=float("inf"))
    if len({(norm.device, norm.dtype) for norm in norms}) > 1:
        norms = tuple(norm.to("cpu", torch.float64) for norm in norms)
    magnitudes: list[float] = torch.stack(norms).tolist()
    return magnitudes
