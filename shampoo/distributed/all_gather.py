"""Replicated parameters (DDP): every rank moves all of them by the directions of all owners.

A rank writes the directions of its blocks into its slice of a persistent buffer, and one AllGather
fills the rest (algorithm.md 3.5, distributed.md 3.2). All ranks, owners too, then move the
parameters by the bits that travelled, so that replicas stay equal to the bit. A slice is laid out
by the plan alone: it does not depend on which gradients are there.
"""

import bisect
import functools
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo.blocks.pattern_cache import Pattern, PatternCache
from shampoo.blocks.segments import Segment
from shampoo.blocks.stacks import Arena
from shampoo.distributed.consensus import FAILED
from shampoo.distributed.distributor import Distributor, StepInputs, search_direction
from shampoo.distributed.group_handle import GroupHandle
from shampoo.hyperparameters import Hyperparameters
from shampoo.ops.limits import clamped
from shampoo.scalars import Scalars

_HEADER = 16  # elements in front of a slice: its rank's status, and what keeps slices aligned
_PARTS = 4  # of a buffer that is sent while the rest is computed

_Entry = tuple[int, Tensor, Tensor]  # a part, tiles, scales of 1


def slice_length(numel: int) -> int:
    """Elements of a slice in which a rank sends at most ``numel`` elements of directions."""
    return _HEADER + -(-numel // _HEADER) * _HEADER


class AllGatherDistributor(Distributor):
    """A team whose ranks all hold the same parameters.

    Args:
        all_arenas: of the team, for each of its positions, in the order of the step.
        group: the team's process group, None for one rank.
        dtype: in which directions travel.
        overlap: send in parts, each as soon as the step has delivered it.
    """

    def __init__(
        self,
        all_arenas: Sequence[Sequence[Arena]],
        group: GroupHandle | None,
        dtype: torch.dtype,
        overlap: bool,
    ) -> None:
        super().__init__()
        self._all_arenas = all_arenas
        self._group = group
        self._team = all_arenas[0][0].team
        self._index = {
            id(arenas_by_rank[self._team.me]): index
            for index, arenas_by_rank in enumerate(all_arenas)
        }
        self._tables: PatternCache[list[list[_Entry]]] = PatternCache()
        # Where arenas begin among the elements of a rank, and where the parts of its slice do.
        self._bases = [
            [0, *accumulate(arenas_by_rank[position].numel for arenas_by_rank in all_arenas)]
            for position in range(self._team.size)
        ]
        self._edges = [
            self._edges_of(position, _PARTS if overlap else 1)
            for position in range(self._team.size)
        ]
        device = all_arenas[0][0].device
        self._buffers = []
        for part in range(len(self._edges[0]) - 1):
            longest = max(edges[part + 1] - edges[part] for edges in self._edges)
            length = slice_length(longest)
            # Zero: padding and absent blocks are never read, but nothing undefined travels either.
            self._buffers.append(torch.zeros(self._team.size, length, dtype=dtype, device=device))
        own = self._edges[self._team.me]
        for base, arenas_by_rank in zip(self._bases[self._team.me], all_arenas, strict=False):
            arenas_by_rank[self._team.me].cuts = frozenset(edge - base for edge in own)
        self._works: list[dist.Work | None] = []
        self._rows = [self._rows_of(index) for index in range(len(all_arenas))]

    def _edges_of(self, position: int, parts: int) -> list[int]:
        """Cuts a rank's elements at the starts of blocks into parts of about equal length."""
        total = self._bases[position][-1]
        starts = [
            base + placed.element
            for base, arenas_by_rank in zip(self._bases[position], self._all_arenas, strict=False)
            for stack in arenas_by_rank[position].stacks
            for placed in stack.placements
        ]
        edges = [0]
        for part in range(1, parts):
            at = bisect.bisect_left(starts, max(edges[-1], total * part // parts))
            edges.append(starts[at] if at < len(starts) else total)
        return [*edges, total]

    def open(self, inputs: StepInputs) -> None:
        """Takes a step's parameters and gradients."""
        super().open(inputs)
        self._table()  # here, where others still hear of it if this fails

    def apply_direction(
        self, arena: Arena, segment: Segment, hyper: Hyperparameters, scalars: Scalars
    ) -> None:
        """Writes D into this rank's slice; parts before it are complete and can travel."""
        me = self._team.me
        start = self._bases[me][self._index[id(arena)]] + segment.start
        part = bisect.bisect_right(self._edges[me], start) - 1
        self._launch(part, status=0)

        offset = _HEADER + start - self._edges[me][part]
        out = self._buffers[part][me, offset : offset + segment.direction.numel()]
        out.copy_(clamped(search_direction(arena, segment, hyper, self.weights), out.dtype))

    def sum_(self, values: Tensor) -> None:
        """Adds up what the ranks of the team know, in place."""
        if self._group is not None:
            dist.all_reduce(values, group=self._group.live())

    def _launch(self, until: int, status: int) -> None:
        """Starts to send the parts before ``until`` that have not been sent yet."""
        me = self._team.me
        for part in range(len(self._works), until):
            buffer = self._buffers[part]
            buffer[me, 0] = status
            work = None
            if self._group is not None:
                is_async = len(self._buffers) > 1
                work = _all_gather(buffer.view(-1), buffer[me], self._group.live(), is_async)
            self._works.append(work)

    def send(self, status: int) -> int:
        """Sends what is left with this rank's status; returns the team's, once all is here."""
        self._launch(len(self._buffers), status)
        for work in self._works:
            if work is not None:
                work.wait()
        self._works.clear()  # not in open(), which does not happen once something has failed
        statuses = torch.stack([buffer[:, 0] for buffer in self._buffers])
        return FAILED if bool((statuses != 0).any()) else status

    def apply(self) -> None:
        """W <- W - lr D for all blocks, by the bits that travelled."""

        @functools.cache  # once for all arenas: it may be as large as the model
        def wide(part: int, device: torch.device, dtype: torch.dtype) -> Tensor:
            return self._buffers[part].view(-1).to(device, dtype)

        for index, entries in enumerate(self._table()):
            arena = self._all_arenas[index][self._team.me]
            hyper = self.inputs.hyper[arena.group]
            dtype = arena.update_dtype if hyper.momentum > 0 else arena.dtype
            members = arena.members
            for part, tiles, ones in entries:
                self.move(arena, members, wide(part, arena.device, dtype), tiles, ones)

    def _table(self) -> list[list[_Entry]]:
        """For every arena, the parts in which present blocks lie: tiles, scales of 1."""

        def make(present: Pattern) -> list[list[_Entry]]:
            return [self._entries(index, present) for index in range(len(self._all_arenas))]

        return self._tables.get(self.inputs.present, make)

    def _entries(self, index: int, present: Pattern) -> list[_Entry]:
        own = self._all_arenas[index][self._team.me]
        is_here = torch.tensor([present[member] for member in own.first], device="cpu")
        entries = []
        for part, rows in enumerate(self._rows[index]):
            tiles = rows[is_here[rows[:, 0]]]
            if len(tiles) > 0:
                ones = torch.ones(_count_blocks(tiles), dtype=own.dtype, device=own.device)
                entries.append((part, tiles, ones))
        return entries

    def _rows_of(self, index: int) -> list[Tensor]:
        """The tiles of an arena's blocks in each part of the buffer, by the places of members."""
        arenas_by_rank = self._all_arenas[index]
        places = {member: place for place, member in enumerate(arenas_by_rank[0].first)}
        placed = [
            (position, placement)
            for position, arena in enumerate(arenas_by_rank)
            for stack in arena.stacks
            for placement in stack.placements
        ]
        order = max((len(placement.tile.dims) for _, placement in placed), default=1)
        rows: list[list[list[int]]] = [[] for _ in self._buffers]
        for position, placement in placed:
            start = self._bases[position][index] + placement.element
            edges = self._edges[position]
            part = bisect.bisect_right(edges, start) - 1
            offset = position * self._buffers[part].shape[1] + _HEADER + start - edges[part]
            rows[part].append(placement.tile.row(places[placement.member], offset, order))
        return [
            torch.tensor(part, dtype=torch.int64, device="cpu").view(-1, 2 + 4 * order)
            for part in rows
        ]


def _count_blocks(tiles: Tensor) -> int:
    """How many blocks the tiles of a table have, [T, 2 + 4 K]."""
    order = (tiles.shape[1] - 2) // 4
    return int(tiles[:, 2 + 2 * order : 2 + 3 * order].prod(1).sum())


def _all_gather(
    buffer: Tensor, own: Tensor, group: dist.ProcessGroup, is_async: bool
) -> dist.Work | None:
    """Fills the slices of the others, in place; torch 2.13 renamed the function."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = gather(buffer, own, group=group, async_op=is_async)
    return work
