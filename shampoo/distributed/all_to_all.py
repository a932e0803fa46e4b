"""Sharded parameters (FSDP2, HSDP, tensor parallel): pieces travel to owners and back.

Two uneven all-to-alls a step: gradients (and weights, where a direction depends on them) from the
holders of shards to the owners of blocks, directions to every holder. Who sends what is decided by
the plan alone (:mod:`shampoo.distributed.pieces`); absent gradients leave their place on the wire
empty.
"""

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo import ops
from shampoo.blocks.pattern_cache import Pattern, PatternCache
from shampoo.blocks.segments import Segment
from shampoo.blocks.stacks import Arena
from shampoo.distributed.consensus import FAILED
from shampoo.distributed.distributor import (
    Blocks,
    Distributor,
    StepInputs,
    search_direction,
)
from shampoo.distributed.group_handle import GroupHandle
from shampoo.distributed.pieces import Piece, PiecesByPeer, ShardedParam, pieces_of, spans
from shampoo.hyperparameters import Hyperparameters
from shampoo.ops.limits import clamped
from shampoo.scalars import Scalars

_HEADER = 1  # element in front of what goes to each rank: the sender's status

Pieces = list[list[Piece]]
Block = tuple[int, int]  # member, index in its grid of blocks


@dataclass
class _Wire:
    """What is sent in one direction, and the places of the pieces on it."""

    outgoing: Tensor
    incoming: Tensor
    outgoing_splits: list[int]
    incoming_splits: list[int]

    @classmethod
    def of(
        cls, outgoing: Pieces, incoming: Pieces, dtype: torch.dtype, device: torch.device
    ) -> "_Wire":
        """Buffers for these pieces."""
        splits = [
            [_HEADER + sum(piece.numel for piece in peer) for peer in side]
            for side in (outgoing, incoming)
        ]
        # Zero: places of absent gradients are never read, but nothing undefined travels either.
        sent, received = (torch.zeros(sum(side), dtype=dtype, device=device) for side in splits)
        return cls(sent, received, *splits)

    def exchange(self, group: dist.ProcessGroup, status: int) -> Tensor:
        """Sends everything; returns the statuses of all ranks."""
        for offset in _starts(self.outgoing_splits):
            self.outgoing[offset] = status
        dist.all_to_all_single(
            self.incoming, self.outgoing, self.incoming_splits, self.outgoing_splits, group=group
        )
        return self.incoming[_starts(self.incoming_splits)]


def _starts(splits: Sequence[int]) -> list[int]:
    return [sum(splits[:position]) for position in range(len(splits))]


@dataclass
class _Copies:
    """Views for one foreach copy."""

    to: list[Tensor] = field(default_factory=list)
    source: list[Tensor] = field(default_factory=list)

    def run(self) -> None:
        if self.to:
            torch._foreach_copy_(self.to, self.source)


class AllToAllDistributor(Distributor):
    """A team whose ranks hold shards.

    Args:
        arenas: this rank's, all of one team.
        sharded: the team's parameters, in plan order.
        group: the team's process group.
        gradient_dtype: wide enough for every gradient and weight.
        dtype: in which directions travel.
        longest: elements of the longest segment.
        weighted: indices of arenas whose directions depend on weights.
    """

    def __init__(
        self,
        arenas: Sequence[Arena],
        sharded: Sequence[ShardedParam],
        group: GroupHandle,
        gradient_dtype: torch.dtype,
        dtype: torch.dtype,
        longest: int,
        weighted: frozenset[int],
    ) -> None:
        super().__init__()
        self._arenas = arenas
        self._team = arenas[0].team
        self._group = group
        self._device = arenas[0].device
        self._routes = pieces_of(sharded, self._team.me, self._team.size)
        outgoing, incoming = self._routes.directions_out, self._routes.directions_in
        self._directions = _Wire.of(outgoing, incoming, dtype, self._device)
        self._out_places = _by_block(spans(outgoing, _HEADER))
        self._arena_of = {
            member: index for index, arena in enumerate(arenas) for member in arena.members
        }
        widest = functools.reduce(torch.promote_types, (arena.update_dtype for arena in arenas))
        self._weights = torch.empty(longest if weighted else 0, dtype=widest, device=self._device)
        self._space = torch.empty(longest, dtype=dtype, device=self._device)
        members = {member for index in weighted for member in arenas[index].members}
        self._incoming = _Incoming(self._routes, members, gradient_dtype, self._device)
        self._departures: WeakKeyDictionary[Segment, _Copies] = WeakKeyDictionary()
        self._applied: PatternCache[list[tuple[Arena, Tensor, Tensor]]] = PatternCache()
        self._rows = self._rows_of()

    def open(self, inputs: StepInputs) -> None:
        """Packs the pieces of this rank's gradients, and of weights where owners need them."""
        super().open(inputs)
        self._table()  # here, where others still hear of it if this fails
        self._incoming.pack(inputs)

    def fetch(self) -> None:
        """The first all-to-all."""
        # No status here: ranks have agreed, and what goes wrong from here on is said in send().
        self._incoming.wire.exchange(self._group.live(), 0)

    def gradients(self, segment: Segment) -> Blocks:
        """The pieces that came, put together where directions will be."""
        self._incoming.copies(segment, segment.direction, is_weight=False).run()
        return [segment.direction], segment.packed

    def weights(self, segment: Segment) -> Blocks:
        """The pieces that came, put together in memory that all segments share."""
        space = self._weights[: segment.grad.numel()]
        self._incoming.copies(segment, space, is_weight=True).run()
        return [space], segment.packed

    def apply_direction(
        self, arena: Arena, segment: Segment, hyper: Hyperparameters, scalars: Scalars
    ) -> None:
        """Puts the pieces of D on the wire."""
        direction = search_direction(arena, segment, hyper, self.weights)
        space = self._space[: len(direction)]
        # Rounded to what travels, and where views of it have been made.
        space.copy_(clamped(direction, space.dtype))
        if segment.key not in self._departures:
            copies = _Copies()
            for block, view in _block_views(segment, space):
                for offset, piece in self._out_places.get(block, ()):
                    copies.to.append(_piece_view(self._directions.outgoing, offset, piece))
                    copies.source.append(_inside(view, piece))
            self._departures[segment.key] = copies
        self._departures[segment.key].run()

    def sum_(self, values: Tensor) -> None:
        """Adds up what the ranks of the team know, in place."""
        dist.all_reduce(values, group=self._group.live())

    def send(self, status: int) -> int:
        """The second all-to-all, with this rank's status; returns the team's."""
        statuses = self._directions.exchange(self._group.live(), status)
        return FAILED if bool((statuses != 0).any()) else status

    def apply(self) -> None:
        """W <- W - lr D on this rank's shards, by the bits that travelled."""
        wide = functools.cache(self._directions.incoming.to)
        for arena, tiles, ones in self._table():
            hyper = self.inputs.hyper[arena.group]
            dtype = arena.update_dtype if hyper.momentum > 0 else arena.dtype
            self.move(arena, arena.members, wide(dtype), tiles, ones)

    def _table(self) -> list[tuple[Arena, Tensor, Tensor]]:
        """For every arena with present pieces here: tiles, scales of 1."""

        def make(present: Pattern) -> list[tuple[Arena, Tensor, Tensor]]:
            tables = []
            for arena, rows in self._rows:
                is_here = torch.tensor([present[member] for member in arena.first], device="cpu")
                tiles = rows[is_here[rows[:, 0]]]
                if len(tiles) > 0:  # each is one piece of one block
                    ones = torch.ones(len(tiles), dtype=arena.dtype, device=self._device)
                    tables.append((arena, tiles, ones))
            return tables

        return self._applied.get(self.inputs.present, make)

    def _rows_of(self) -> list[tuple[Arena, Tensor]]:
        """The tiles of all pieces that come here, by arena and the places of members in it."""
        by_arena: dict[int, list[tuple[int, Piece]]] = {}
        for offset, piece in spans(self._routes.directions_in, _HEADER):
            by_arena.setdefault(self._arena_of[piece.member], []).append((offset, piece))
        return [
            (
                self._arenas[index],
                _tiles(found, {member: at for at, member in enumerate(self._arenas[index].first)}),
            )
            for index, found in sorted(by_arena.items())
        ]


class _Incoming:
    """The way to the owners: for each peer its gradients, then the weights that go with them.

    Args:
        members: the parameters whose weights travel too.
    """

    def __init__(
        self,
        routes: PiecesByPeer,
        members: Collection[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        outgoing, incoming = (
            [[*peer, *(piece for piece in peer if piece.member in members)] for peer in side]
            for side in (routes.gradients_out, routes.gradients_in)
        )
        self.wire = _Wire.of(outgoing, incoming, dtype, device)
        self._sent = _halves(routes.gradients_out, outgoing)
        self._came = tuple(_by_block(half) for half in _halves(routes.gradients_in, incoming))
        self._tables: PatternCache[Tensor] = PatternCache()
        self._packed = sorted({piece.member for _, piece in self._sent[0]})
        self._rows = self._rows_of()
        self._copies: WeakKeyDictionary[Segment, dict[bool, _Copies]] = WeakKeyDictionary()

    def pack(self, inputs: StepInputs) -> None:
        """Copies this rank's pieces of what is present to the wire, in its own dtype."""
        table = self._tables.get(inputs.present, self._table)
        if len(table) == 0:
            return
        params = [inputs.params[member] for member in self._packed]
        grads = [inputs.grads[member] for member in self._packed]
        # Where there is no gradient, something that no tile names keeps the others in their places.
        sources = [p if grad is None else grad for p, grad in zip(params, grads, strict=True)]
        sources += params
        # The op writes float32 and float64; what is narrower comes out of float32 as it went in.
        wide = torch.promote_types(self.wire.outgoing.dtype, torch.float32)
        out = self.wire.outgoing.to(wide)
        ops.gather_blocks_(out, sources, table, 1.0, False)
        if out is not self.wire.outgoing:
            self.wire.outgoing.copy_(out)

    def _table(self, present: Pattern) -> Tensor:
        """The tiles of what has a gradient."""
        is_here = torch.tensor([present[member] for member in self._packed] * 2, device="cpu")
        return self._rows[is_here[self._rows[:, 0]]] if len(self._rows) else self._rows

    def _rows_of(self) -> Tensor:
        """The tiles of all that is packed: sources are gradients, then their parameters."""
        places = {member: place for place, member in enumerate(self._packed)}
        order = max((len(piece.shape) for _, piece in self._sent[0]), default=1)
        gradients = _rows(self._sent[0], places, order)
        weights = {member: len(places) + at for member, at in places.items()}
        table = torch.tensor(
            gradients + _rows(self._sent[1], weights, order), dtype=torch.int64, device="cpu"
        )
        return table.view(-1, 2 + 4 * order)

    def copies(self, segment: Segment, to: Tensor, is_weight: bool) -> _Copies:
        """From the wire into the blocks of a segment, which lie one after another in ``to``."""
        known = self._copies.setdefault(segment.key, {})
        if is_weight not in known:
            copies = _Copies()
            for block, view in _block_views(segment, to):
                for offset, piece in self._came[is_weight].get(block, ()):
                    copies.to.append(_inside(view, piece))
                    copies.source.append(_piece_view(self.wire.incoming, offset, piece))
            known[is_weight] = copies
        return known[is_weight]


def _halves(first: Pieces, both: Pieces) -> tuple[list[tuple[int, Piece]], list[tuple[int, Piece]]]:
    """Splits what ``both`` sends into the pieces of ``first``, which each peer gets first."""
    halves: tuple[list[tuple[int, Piece]], list[tuple[int, Piece]]] = ([], [])
    entries = spans(both, _HEADER)
    for own, peer in zip(first, both, strict=True):
        for position in range(len(peer)):
            halves[position >= len(own)].append(next(entries))
    return halves


def _by_block(entries: Iterable[tuple[int, Piece]]) -> dict[Block, list[tuple[int, Piece]]]:
    found: dict[Block, list[tuple[int, Piece]]] = {}
    for offset, piece in entries:
        found.setdefault((piece.member, piece.block), []).append((offset, piece))
    return found


def _rows(
    entries: Iterable[tuple[int, Piece]], sources: Mapping[int, int], order: int
) -> list[list[int]]:
    return [
        piece.local_tile().row(sources[piece.member], offset, order) for offset, piece in entries
    ]


def _tiles(entries: Sequence[tuple[int, Piece]], sources: Mapping[int, int]) -> Tensor:
    order = max(len(piece.shape) for _, piece in entries)
    return torch.tensor(_rows(entries, sources, order), dtype=torch.int64, device="cpu")


def _block_views(segment: Segment, flat: Tensor) -> Iterator[tuple[Block, Tensor]]:
    """Every block of a segment: which it is, and its view of a tensor that holds the segment."""
    for placed in segment.placements:
        start = placed.element - segment.start
        for block in placed.tile.block_indices():
            stop = start + placed.tile.block_numel
            yield (placed.member, block), flat[start:stop].view(placed.tile.extent)
            start = stop


def _piece_view(wire: Tensor, offset: int, piece: Piece) -> Tensor:
    return wire[offset : offset + piece.numel].view(piece.shape)


def _inside(block: Tensor, piece: Piece) -> Tensor:
    for mode, (start, size) in enumerate(zip(piece.start, piece.shape, strict=True)):
        block = block.narrow(mode, start, size)
    return block
