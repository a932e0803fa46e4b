"""What must hold of gradients before a step may change anything."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo import ops
from shampoo.limits import summand_limit


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


def with_decay(magnitudes: Tensor, weights: Sequence[Tensor], decays: Sequence[float]) -> Tensor:
    """``max |g| + decay max |W|``: what the elements of ``g + decay W`` cannot exceed.

    Only with coupled decay is there another pass, over the weights that it brings in.

    Args:
        magnitudes: [m] float64, of the gradients; returned where no decay is coupled.
        weights: m tensors, none of them empty.
        decays: the coupled decay of each.
    """
    decayed = [index for index, decay in enumerate(decays) if decay != 0.0]
    if not decayed:
        return magnitudes
    largest = largest_magnitudes([weights[index] for index in decayed]).to(magnitudes.device)
    shares = torch._foreach_mul(largest.unbind(), [decays[index] for index in decayed])
    reach = magnitudes.clone()
    places = reach.unbind()
    torch._foreach_add_([places[index] for index in decayed], shares)
    return reach


def square_limit(numel: int, dtype: torch.dtype) -> float:
    """The magnitude from which statistics of ``dtype`` cannot hold the squares of a gradient.

    2.2e15 in float32, divided by the root of the number of elements. The squares of any number of
    steps add up below it, with ``betas[1] = 1`` and AdaGrad too; one finite gradient beyond could
    leave Inf in the factors and moments for ever.
    """
    return math.sqrt(summand_limit(dtype) / numel)
