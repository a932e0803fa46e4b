"""What travels between the holders of sharded parameters and the owners of their blocks.

Both ends derive the same lists alone, in the same order, so no metadata is exchanged
(distributed.md 3.1). A *piece* is the part of one block that lies in one rank's shard.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shampoo.blocks.blocking import Tile
from shampoo.distributed.shard_regions import Box, Coordinates, Region


@dataclass(frozen=True)
class Piece:
    """A box of one block in one rank's shard.

    Attributes:
        member: index of the parameter in the plan.
        block: index in its grid of blocks.
        start: of the box, inside the block.
        local_dims: the merged shape of the holder's local tensor.
        local_start: of the box, in that tensor.
        shape: of the box.
    """

    member: int
    block: int
    start: Coordinates
    local_dims: Coordinates
    local_start: Coordinates
    shape: Coordinates

    @property
    def numel(self) -> int:
        """Elements of the box."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel

    def local_tile(self) -> Tile:
        """The box as a tile of the holder's local tensor."""
        ones = (1,) * len(self.shape)
        zeros = (0,) * len(self.shape)
        return Tile(self.local_dims, self.local_start, ones, self.shape, zeros, ones)


@dataclass(frozen=True)
class ShardedParam:
    """A sharded parameter.

    Attributes:
        member: index in the plan.
        blocks: index and tile of every block.
        owners: of the blocks, positions in the team.
        regions: what each position of the team holds.
    """

    member: int
    blocks: Sequence[tuple[int, Tile]]
    owners: Sequence[int]
    regions: Sequence[Region]


@dataclass(frozen=True)
class PiecesByPeer:
    """The pieces one rank sends and receives, by the position of the other end, in wire order.

    Gradients travel from one holder of a piece to the owner of its block, directions from the owner
    to every holder.
    """

    gradients_out: list[list[Piece]]
    gradients_in: list[list[Piece]]
    directions_out: list[list[Piece]]
    directions_in: list[list[Piece]]


def pieces_of(sharded: Sequence[ShardedParam], me: int, size: int) -> PiecesByPeer:
    """The routes of position ``me`` in a team of ``size``."""
    nothing: list[list[list[Piece]]] = [[[] for _ in range(size)] for _ in range(4)]
    routes = PiecesByPeer(*nothing)
    entry = 0
    for param in sharded:
        overlaps = _Overlaps(param.regions)
        for block, tile in param.blocks:
            owner = param.owners[block]
            met = overlaps.of(tile, me if owner != me else None)
            holders_of: dict[tuple[Coordinates, Coordinates], list[int]] = {}
            for position, box in met:
                holders_of.setdefault(_meet(tile, box), []).append(position)
            for position, box in met:
                start, shape = meeting = _meet(tile, box)
                sharers = holders_of[meeting]
                piece = _piece(param, block, tile, position, box, start, shape)
                # The owner needs no wire; else senders take turns, so that none carries all.
                sender = owner if owner in sharers else sharers[_turn(entry, len(sharers))]
                if position == sender and position == me:
                    routes.gradients_out[owner].append(piece)
                if position == sender and owner == me:
                    routes.gradients_in[position].append(piece)
                if owner == me:
                    routes.directions_out[position].append(piece)
                if position == me:
                    routes.directions_in[owner].append(piece)
            entry += 1
    return routes


def _turn(entry: int, count: int) -> int:
    """Scatters the entries: owners of equal blocks go round too, and turns must not follow them."""
    return (entry * 0x9E3779B1 & 0xFFFFFFFF) * count >> 32


def _meet(tile: Tile, box: Box) -> tuple[Coordinates, Coordinates]:
    """Start and shape of the intersection of a block and a box that do meet."""
    start = tuple(map(max, tile.start, box.start))
    stop = tuple(
        min(first + extent, other + length)
        for first, extent, other, length in zip(
            tile.start, tile.extent, box.start, box.shape, strict=True
        )
    )
    return start, tuple(end - begin for begin, end in zip(start, stop, strict=True))


def _piece(
    param: ShardedParam,
    block: int,
    tile: Tile,
    position: int,
    box: Box,
    start: Coordinates,
    shape: Coordinates,
) -> Piece:
    local = tuple(
        own + begin - first
        for own, begin, first in zip(box.local_start, start, box.start, strict=True)
    )
    inside = tuple(begin - first for begin, first in zip(start, tile.start, strict=True))
    return Piece(param.member, block, inside, param.regions[position].dims, local, shape)


class _Overlaps:
    """Finds the shards that meet a block: along the first dimension by bisection."""

    def __init__(self, regions: Sequence[Region]) -> None:
        held = [(box, position) for position, region in enumerate(regions) for box in region.boxes]
        held.sort(key=lambda entry: (entry[0].start[0], entry[1]))
        self._held = held
        self._starts = [box.start[0] for box, _ in held]
        self._longest = max((box.shape[0] for box, _ in held), default=0)

    def of(self, tile: Tile, only: int | None) -> list[tuple[int, Box]]:
        """Position and box of every shard that meets a block; nothing unless ``only`` is one."""
        first = bisect.bisect_right(self._starts, tile.start[0] - self._longest)
        last = bisect.bisect_left(self._starts, tile.start[0] + tile.extent[0])
        met = [
            (position, box) for box, position in self._held[first:last] if self._meets(tile, box)
        ]
        if only is not None and all(position != only for position, _ in met):
            return []
        return sorted(met, key=lambda entry: (entry[0], entry[1].start))

    @staticmethod
    def _meets(tile: Tile, box: Box) -> bool:
        return all(
            first < other + length and other < first + extent
            for first, extent, other, length in zip(
                tile.start, tile.extent, box.start, box.shape, strict=True
            )
        )


def spans(pieces: Sequence[Sequence[Piece]], header: int) -> Iterator[tuple[int, Piece]]:
    """Every piece with the element at which it begins on the wire, a header before each peer's."""
    offset = 0
    for peer in pieces:
        offset += header
        for piece in peer:
            yield offset, piece
            offset += piece.numel
