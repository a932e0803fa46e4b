"""LARS and LAMB: directions rescaled to the norm of the whole parameter (algorithm.md 1.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo import ops
from shampoo.segments import Segment


def rescale(segments: Sequence[Segment], params: Sequence[Tensor], weight_decay: float) -> None:
    """``P <- P + weight_decay W``, then ``P <- P |W| / |P|`` over all blocks of a parameter.

    The factor is 1 where either norm is 0. Overwrites the gradients of the segments.

    Args:
        segments: all segments of an arena, each with a workspace of its own.
        params: the parameters of the plan.
        weight_decay: decoupled; 0 if it is coupled, and so already in P.
    """
    device = segments[0].grad.device
    squares = torch.zeros(2, len(params), dtype=torch.float64, device=device)  # of |W|, |P|
    for segment in segments:
        weights = segment.grad
        sources = [params[member] for member in segment.members]
        ops.gather_blocks_(weights, sources, segment.tiles, 1.0, False)
        for part in segment.parts:
            part.direction.mul_(part.scale.view(-1, *[1] * (part.direction.dim() - 1)))
        segment.direction.add_(weights, alpha=weight_decay)
        for side, flat in enumerate((weights, segment.direction)):
            squares[side].index_add_(0, segment.owners, _block_squares(flat, segment))
    weight_norm, norm = squares.sqrt()
    ratio = torch.where((weight_norm > 0) & (norm > 0), weight_norm / norm, 1.0)
    for segment in segments:
        segment.scale.copy_(ratio[segment.owners])


def _block_squares(flat: Tensor, segment: Segment) -> Tensor:
    """Squared norm of every block, [B] float64."""
    squares, start = [], 0
    for count, size in segment.runs.tolist():
        blocks = flat[start : start + count * size].view(count, size)
        squares.append(torch.linalg.vector_norm(blocks, dim=1, dtype=torch.float64).square())
        start += count * size
    return torch.cat(squares)
