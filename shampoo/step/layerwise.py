"""LARS and LAMB: directions rescaled to the norm of the whole parameter (algorithm.md 1.4).

In two halves, since the blocks of a parameter may have several owners: each measures its own, and
what they measured is added up in between. Every block has a place of its own, so that the sums do
not depend on who owns what.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo import ops
from shampoo.blocks.segments import Segment
from shampoo.blocks.stacks import Arena
from shampoo.distributed.distributor import Distributor
from shampoo.ops.limits import scale_


def measure(
    squares: Tensor, segments: Sequence[Segment], distributor: Distributor, weight_decay: float
) -> None:
    """``P <- P + weight_decay W``, then the squared norms of both. Overwrites the gradients.

    Args:
        squares: [2, blocks] float64, of |W| and |P|: written at the places of the segments' blocks.
        segments: all segments of an arena, each with a workspace of its own.
        distributor: what knows the weights.
        weight_decay: decoupled; 0 if it is coupled, and so already in P.
    """
    for segment in segments:
        weights = segment.grad
        ops.gather_blocks_(weights, *distributor.weights(segment), 1.0, False)
        for part in segment.parts:
            blocks = part.of(segment.direction)
            moved = part.take(blocks)
            scale_(moved, segment.scale[part.blocks])
            moved.add_(part.take(part.of(weights)), alpha=weight_decay)
            part.put(blocks, moved)
        for side, flat in enumerate((weights, segment.direction)):
            squares[side].index_copy_(0, segment.places, _block_squares(flat, segment))


def rescale(squares: Tensor, arena: Arena, segments: Sequence[Segment]) -> None:
    """``P <- P |W| / |P|`` over all blocks of a parameter, 1 where a norm is 0 or not finite.

    In a layer that is dead P fades into denormal numbers, and the ratio of the two norms beyond the
    range of float32: it ends at the largest number there, so that P keeps less than the norm of W.

    Args:
        squares: [2, blocks], complete.
    """
    sums = squares.new_zeros(2, len(arena.first)).index_add_(1, arena.block_members, squares)
    weight_norm, norm = sums.sqrt()
    is_ratio = (weight_norm > 0) & (norm > 0) & weight_norm.isfinite() & norm.isfinite()
    ratio = torch.where(is_ratio, weight_norm / norm, 1.0).clamp_(max=torch.finfo(arena.dtype).max)
    for segment in segments:
        segment.scale.copy_(ratio[segment.param_index])


def _block_squares(flat: Tensor, segment: Segment) -> Tensor:
    """Squared norm of every active block, [R] float64."""
    squares = [
        torch.linalg.vector_norm(part.take(part.of(flat)), dim=1, dtype=torch.float64).square()
        for part in segment.parts
    ]
    return torch.cat(squares)
