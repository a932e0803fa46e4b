"""Which blocks move together in one step.

A *segment* is a run of consecutive blocks of an arena whose parameters all have a gradient, short
enough for its gradient and direction to stay in cache (on a CPU) or in a bounded workspace (on a
GPU). Everything in it is a view made once; the step only calls ops on them. The choice depends on
which gradients are there, so it is cached under that pattern.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shampoo.refresh import PendingFlags
from shampoo.stacks import Arena, BlockStack, FactorStack, Placement


@dataclass
class Part:
    """The blocks of one stack inside a segment: B of them, of shape d_1 .. d_o."""

    grad: Tensor  # [B, d_1 .. d_o]
    direction: Tensor  # [B, d_1 .. d_o]
    exp_avg: Tensor | None  # [B, d_1 .. d_o]
    blocks: slice  # of those of the segment
    factors: list[Tensor]  # a mode: [B, d_k, d_k] or, diagonal, [B, d_k]
    roots: list[Tensor | None]  # a mode: [B, d_k, d_k], None where the factor is diagonal
    rooted: list[Tensor]  # a mode with a root: [B] bool
    all_rooted: bool = False  # known to be, and then for ever

    def is_rooted(self) -> bool:
        """Whether every factor of every block has a valid root.

        A root is never lost, so the answer yes is final: a GPU is asked at the first root step,
        and at ordinary steps only while some block is still without a root.
        """
        self.all_rooted = self.all_rooted or all(bool(rooted.all()) for rooted in self.rooted)
        return self.all_rooted


@dataclass(frozen=True, eq=False)  # known by identity: exchanges keep tables for each
class Segment:
    """A run of blocks with the views and tables that the ops take."""

    start: int  # the element of the arena at which it begins
    placements: tuple[Placement, ...]
    members: list[int]  # parameters, in the order in which ``tiles`` numbers them
    tiles: Tensor
    packed: Tensor  # tiles that lie in the memory of the segment itself
    runs: list[tuple[int, int]]  # of equal blocks that follow one another: count, size
    owners: Tensor  # [B], for every block its parameter, by its place in the arena
    places: Tensor  # [B], for every block its place among those of all of the arena's parameters
    grad: Tensor
    direction: Tensor
    norm: Tensor  # [B], of the grafted direction
    scale: Tensor  # [B]
    moments: dict[str, Tensor]
    parts: list[Part]


@dataclass(frozen=True)
class FactorRange:
    """Factors whose blocks have a gradient: rows ``start`` to ``stop`` of a stack."""

    stack: FactorStack
    start: int
    stop: int
    pending: PendingFlags = field(default_factory=PendingFlags)


@dataclass(frozen=True)
class Selection:
    """What one arena does in a step with a given pattern of gradients."""

    arena: Arena
    segments: list[Segment]
    factors: dict[int, list[FactorRange]]  # by the slot in which their roots are refreshed


def select(
    arena: Arena, present: Sequence[bool], workspace: Tensor, max_numel: int, shared: bool
) -> Selection:
    """Cuts the present blocks of an arena into segments.

    Args:
        present: for every parameter of the plan, whether it has a gradient.
        workspace: ``[2, W]``, for gradients and directions; W at least the largest segment.
        max_numel: a segment ends before it would exceed this, unless it is a single tile.
        shared: whether all segments use the start of ``workspace`` in turn. If not, each has its
            own place, and W must be at least the arena.
    """
    runs: list[list[tuple[BlockStack, Placement]]] = []
    end = numel = -1
    for stack in arena.stacks:
        for placed in stack.placements:
            if not present[placed.member]:
                continue
            is_cut = placed.element != end or placed.element in arena.cuts
            if is_cut or numel + placed.numel > max_numel:
                runs.append([])
                numel = 0
            runs[-1].append((stack, placed))
            numel += placed.numel
            end = placed.element + placed.numel
    segments = [_segment(arena, run, workspace, shared) for run in runs]
    return Selection(arena, segments, _factor_ranges(runs))


def _segment(
    arena: Arena, run: list[tuple[BlockStack, Placement]], workspace: Tensor, shared: bool
) -> Segment:
    first, last = run[0][1], run[-1][1]
    start, stop = first.element, last.element + last.numel
    offset = 0 if shared else start
    grad, direction = (row[offset : offset + stop - start] for row in workspace)
    moments = {name: tensor[start:stop] for name, tensor in arena.moments.items()}
    members = sorted({placed.member for _, placed in run})
    order = max(len(stack.extent) for stack, _ in run)
    blocks = sum(placed.tile.blocks for _, placed in run)
    norm = torch.zeros(blocks, dtype=arena.dtype, device=arena.device)
    scale = torch.ones_like(norm)
    ranks = {member: rank for rank, member in enumerate(arena.members)}
    numel = stop - start
    rows, packed, runs, owners, places, parts = [], [], [], [], [], []
    block = 0
    for stack, tiles in _by_stack(run):
        count = sum(placed.tile.blocks for placed in tiles)
        for placed in tiles:
            source = members.index(placed.member)
            rows.append(placed.tile.row(source, placed.element - start, order))
            owners += [ranks[placed.member]] * placed.tile.blocks
            base = arena.first[placed.member]
            places += [base + index for index in placed.tile.block_indices()]
        size, at = tiles[0].tile.block_numel, tiles[0].element - start
        runs.append((count, size))
        packed.append([0, at, numel, at, count, size])
        elements = slice(at, at + count * size)
        shape = (count, *stack.extent)
        slot = tiles[0].slot
        owned = [
            (factors, slice(base + slot, base + slot + count)) for factors, base in stack.factors
        ]
        exp_avg = moments.get("exp_avg")
        parts.append(
            Part(
                grad=grad[elements].view(shape),
                direction=direction[elements].view(shape),
                exp_avg=None if exp_avg is None else exp_avg[elements].view(shape),
                blocks=slice(block, block + count),
                factors=[factors.factor[own] for factors, own in owned],
                roots=[None if factors.diagonal else factors.root[own] for factors, own in owned],
                rooted=[factors.rooted[own] for factors, own in owned if not factors.diagonal],
            )
        )
        block += count
    return Segment(
        start,
        tuple(placed for _, placed in run),
        members,
        torch.tensor(rows, dtype=torch.int64, device="cpu"),
        torch.tensor(packed, dtype=torch.int64, device="cpu"),
        runs,
        torch.tensor(owners, dtype=torch.int64, device=arena.device),
        torch.tensor(places, dtype=torch.int64, device=arena.device),
        grad,
        direction,
        norm,
        scale,
        moments,
        parts,
    )


def _by_stack(
    run: list[tuple[BlockStack, Placement]],
) -> list[tuple[BlockStack, list[Placement]]]:
    grouped: list[tuple[BlockStack, list[Placement]]] = []
    for stack, placed in run:
        if not grouped or grouped[-1][0] is not stack:
            grouped.append((stack, []))
        grouped[-1][1].append(placed)
    return grouped


def _factor_ranges(
    runs: list[list[tuple[BlockStack, Placement]]],
) -> dict[int, list[FactorRange]]:
    """The present factors by slot, neighbours joined, so that solvers get long batches."""
    rows: dict[int, tuple[FactorStack, list[int]]] = {}
    for run in runs:
        for stack, placed in run:
            for factors, base in stack.factors:
                if not factors.diagonal:
                    start = base + placed.slot
                    _, present = rows.setdefault(id(factors), (factors, []))
                    present.extend(range(start, start + placed.tile.blocks))
    ranges: dict[int, list[FactorRange]] = {}
    for factors, present in rows.values():
        slots = factors.slot.tolist()
        ordered = sorted(present)
        start = ordered[0]
        for row, following in zip(ordered, [*ordered[1:], -1], strict=True):
            if following != row + 1 or slots[following] != slots[row]:
                ranges.setdefault(slots[row], []).append(FactorRange(factors, start, row + 1))
                start = following
    return ranges
