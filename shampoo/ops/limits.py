"""How large numbers may become, so that nothing that a step keeps leaves the range of its dtype.

Sums that never forget, the factors of ``betas[1] = 1``, AdaGrad's moment and momentum, need no
other bound than one of their summands: a floating-point sum stops growing once a summand is less
than half of its last place. So what is checked are gradients, before anything moves, and the
lengths of directions, a number a block, and never the state itself.
"""

import functools
import math

import torch
from torch import Tensor


@functools.cache
def summand_limit(dtype: torch.dtype) -> float:
    """The largest number of which sums of any length stay finite: 5e30 in float32.

    With m digits after the leading one, a sum ends below ``2^(m + 2)`` times its largest summand;
    one more factor of 2 is for the roundings on the way.
    """
    info = torch.finfo(dtype)
    return info.max * info.eps / 8


def scale_(blocks: Tensor, scale: Tensor) -> None:
    """``blocks[b] *= scale[b]``, where 0 stands for zeros: an Inf times zero would be a NaN.

    Args:
        blocks: [B, ...].
        scale: [B].
    """
    factor = scale.to(blocks.dtype).view(-1, *[1] * (blocks.dim() - 1))
    blocks.mul_(factor).masked_fill_(factor == 0.0, 0.0)  # the host does not look if there is one


def clip_squares_(blocks: Tensor, length: Tensor) -> None:
    """Shortens blocks to the length up to which sums of their squares stay finite.

    Args:
        blocks: [B, ...]; zero afterwards where an element is not finite.
        length: [B], their norms; NaN or Inf where an element is.
    """
    longest = math.sqrt(summand_limit(blocks.dtype))
    scale_(blocks, (longest / length).clamp(max=1.0).nan_to_num(nan=0.0))


def clamped(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values that ``dtype`` can hold: its largest number in place of what is larger."""
    largest = torch.finfo(dtype).max
    # Directions stay below half of their range, and bfloat16 has nearly that of float32.
    if largest >= torch.finfo(values.dtype).max / 2:
        return values
    return values.clamp(-largest, largest)
