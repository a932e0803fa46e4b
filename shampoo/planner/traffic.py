"""Where the rows of sharded parameters lie, so that what must travel can be counted.

The pieces (:mod:`shampoo.distributed.pieces`) are listed for one rank. Counting needs no
pieces: a rank receives its blocks but for what it holds of them, and the directions of its rows but
for those of its own blocks. That takes constant time a block, for all ranks at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shampoo.blocks.layout import Layout


@dataclass(frozen=True)
class Rows:
    """How rows of one tensor lie on ``shards`` ranks, as FSDP2 chunks dimension 0.

    In the merged tensor the chunks are intervals of its first dimension, ``chunk`` long but for the
    last ones, which are shorter or empty.
    """

    layout: Layout
    numel: int
    shards: int
    chunk: int
    dim: int  # of the merged tensor, its first

    @classmethod
    def of(cls, shape: Sequence[int], layout: Layout, shards: int) -> "Rows":
        """The rows of a tensor with at least one element."""
        dims, numel = layout.dims, layout.numel
        rows = shape[0] if shape else 1
        # Merging multiplies whole dimensions into the first one or drops it at size 1, so a chunk
        # of rows is a whole number of merged rows.
        chunk = -(-rows // shards) * (numel // rows) // (numel // dims[0])
        return cls(layout, numel, shards, chunk, dims[0])

    def local_numels(self) -> list[int]:
        """[shards], the elements on each."""
        whole = Span(0, self.dim, self.numel // self.dim, self.chunk)
        return [whole.on(shard) for shard in range(self.shards)]

    def spans(self) -> list["Span"]:
        """Where the rows of every block lie, in row-major order of the tensor's blocks."""
        by_block: dict[int, Span] = {}
        for tile in self.layout.tiles:
            behind = math.prod(tile.counts[1:])
            length, width = tile.extent[0], tile.block_numel // tile.extent[0]
            by_row = {
                tile.first[0] + row: Span(
                    tile.start[0] + row * length,
                    tile.start[0] + (row + 1) * length,
                    width,
                    self.chunk,
                )
                for row in range(tile.grid[0])
            }
            for index in tile.block_indices():
                by_block[index] = by_row[index // behind]
        return [by_block[index] for index in range(len(by_block))]


@dataclass(frozen=True)
class Span:
    """The rows ``[start, stop)`` of a block, each ``width`` elements, on shards of ``chunk``."""

    start: int
    stop: int
    width: int
    chunk: int

    @property
    def numel(self) -> int:
        """Elements of the block."""
        return (self.stop - self.start) * self.width

    @property
    def holders(self) -> int:
        """How many shards hold a piece."""
        return (self.stop - 1) // self.chunk - self.start // self.chunk + 1

    @property
    def largest_piece(self) -> int:
        """Elements on the shard that holds the most of the block."""
        # The first may hold a part of a chunk; of three and more, the second holds a whole one.
        first = self.start // self.chunk
        return max(self.on(shard) for shard in range(first, first + min(2, self.holders)))

    def on(self, shard: int) -> int:
        """Elements of the block on one shard."""
        low = shard * self.chunk
        return self.width * _overlap(self.start, self.stop, low, low + self.chunk)


def _overlap(start: int, stop: int, low: int, high: int) -> int:
    return max(0, min(stop, high) - max(start, low))
