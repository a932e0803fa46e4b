"""LARS and LAMB: directions rescaled to the norm of the whole parameter (algorithm.md 1.4).

In two halves, since the blocks of a parameter may have several owners: each measures its own, and
what they measured is added up in between.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo.agreement import Attempt
from shampoo.exchange import Exchange
from shampoo.hyperparameters import Hyperparameters
from shampoo.precision import full_precision
from shampoo.segments import Segment
from shampoo.stacks import Arena


class Norms:
    """``|W|^2`` and ``|P|^2`` of every block of an arena's parameters, whoever owns it.

    Args:
        arena: the arena; its members are all parameters, its blocks those of this rank.
        counts: how many blocks each member has.
    """

    def __init__(self, arena: Arena, counts: Sequence[int]) -> None:
        self.arena = arena
        device = arena.device
        self._first = dict(zip(arena.members, _starts(counts), strict=True))
        self._owner = torch.repeat_interleave(
            torch.arange(len(counts), device=device), torch.tensor(counts, device=device)
        )
        self._places: list[Tensor] = []
        # Every block has a place of its own, so that sums do not depend on who owns what.
        self.squares = torch.zeros(2, sum(counts), dtype=torch.float64, device=device)

    def measure(self, segments: Sequence[Segment], exchange: Exchange, weight_decay: float) -> None:
        """``P <- P + weight_decay W``; squares of both. Overwrites the segments' gradients.

        Args:
            segments: all segments of the arena, each with a workspace of its own.
            exchange: what knows the weights.
            weight_decay: decoupled; 0 if it is coupled, and so already in P.
        """
        self._places.clear()
        self.squares.zero_()
        for segment in segments:
            weights = segment.grad
            exchange.weights(segment, weights, 1.0, False)
            for part in segment.parts:
                part.direction.mul_(part.scale.view(-1, *[1] * (part.direction.dim() - 1)))
            segment.direction.add_(weights, alpha=weight_decay)
            places = [
                self._first[placed.member] + block
                for placed in segment.placements
                for block in placed.tile.block_indices()
            ]
            self._places.append(torch.tensor(places, device=self.squares.device))
            for side, flat in enumerate((weights, segment.direction)):
                self.squares[side, self._places[-1]] = _block_squares(flat, segment)

    def rescale(self, segments: Sequence[Segment]) -> None:
        """``P <- P |W| / |P|`` over all blocks of a parameter, 1 where either norm is 0."""
        members = len(self._first)
        sums = torch.zeros(2, members, dtype=torch.float64, device=self.squares.device)
        weight_norm, norm = sums.index_add_(1, self._owner, self.squares).sqrt()
        ratio = torch.where((weight_norm > 0) & (norm > 0), weight_norm / norm, 1.0)
        for segment, places in zip(segments, self._places, strict=True):
            segment.scale.copy_(ratio[self._owner[places]])


def rescale(
    norms: Norms,
    segments: Sequence[Segment],
    exchange: Exchange,
    hyper: Hyperparameters,
    attempt: Attempt,
) -> None:
    """P <- P |W| / |P| for an arena, whose blocks others may own too; then delivers it.

    A rank that has failed still takes part in the sum.
    """
    with full_precision(norms.arena.device):
        attempt.run(norms.measure, segments, exchange, hyper.decoupled_decay)
        exchange.sum_(norms.squares)
        attempt.run(norms.rescale, segments)
        for segment in segments:
            attempt.run(exchange.deliver, norms.arena, segment, hyper)


def _starts(counts: Sequence[int]) -> list[int]:
    starts, total = [], 0
    for count in counts:
        starts.append(total)
        total += count
    return starts


def _block_squares(flat: Tensor, segment: Segment) -> Tensor:
    """Squared norm of every block, [B] float64."""
    squares, start = [], 0
    for count, size in segment.runs.tolist():
        blocks = flat[start : start + count * size].view(count, size)
        squares.append(torch.linalg.vector_norm(blocks, dim=1, dtype=torch.float64).square())
        start += count * size
    return torch.cat(squares)
