"""Pure geometry: merge small dimensions, cut large ones, name the blocks.

A *tile* is a grid of blocks of one extent inside one merged tensor. Cutting every dimension at
multiples of ``max_preconditioner_dim`` gives at most ``2^order`` tiles: the full blocks, and the
shorter last ones along each subset of the dimensions.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MERGE_MODES = ("matrix", "full", "none")


def merge_dims(shape: Sequence[int], max_dim: int, mode: str) -> tuple[int, ...]:
    """The merged shape of a tensor (algorithm.md 3.1).

    Args:
        shape: of the tensor; no dimension may be 0.
        max_dim: a merged dimension never exceeds it (a dimension that already does stays).
        mode: ``"full"`` drops dimensions of size 1, then walks from the last dimension to the
            first, multiplying each into the current one while the product is at most ``max_dim``.
            ``"matrix"`` is the same but never merges down to fewer than two dimensions. ``"none"``
            only drops dimensions of size 1. A tensor of one element becomes ``(1,)``.
    """
    return tuple(
        math.prod(shape[dim] for dim in group) for group in merge_groups(shape, max_dim, mode)
    )


def merge_groups(shape: Sequence[int], max_dim: int, mode: str) -> list[list[int]]:
    """For each merged dimension of :func:`merge_dims`, the dimensions that it is made of."""
    kept = [dim for dim, size in enumerate(shape) if size != 1]
    if not kept:
        return [list(range(len(shape)))]
    if mode == "none":
        return [[dim] for dim in kept]
    groups = [[kept[-1]]]
    product = shape[kept[-1]]
    for dim in reversed(kept[:-1]):
        would_flatten = dim == kept[0] and len(groups) == 1
        if product * shape[dim] <= max_dim and not (mode == "matrix" and would_flatten):
            groups[0].insert(0, dim)
            product *= shape[dim]
        else:
            groups.insert(0, [dim])
            product = shape[dim]
    return groups


@dataclass(frozen=True)
class Tile:
    """A grid of equal blocks: block ``g`` is the box of ``extent`` at ``start + g * extent``."""

    dims: tuple[int, ...]  # the merged shape of the whole tensor
    start: tuple[int, ...]
    grid: tuple[int, ...]
    extent: tuple[int, ...]
    first: tuple[int, ...]  # position of the first block in the tensor's grid of blocks
    counts: tuple[int, ...]  # the tensor's grid of blocks

    @property
    def blocks(self) -> int:
        """How many blocks the tile holds."""
        return math.prod(self.grid)

    @property
    def block_numel(self) -> int:
        """Elements of one block."""
        return math.prod(self.extent)

    def block_indices(self) -> Iterator[int]:
        """Row-major positions, in the tensor's grid of blocks, of the blocks of this tile."""
        for position in itertools.product(*map(range, self.grid)):
            index = 0
            for count, first, offset in zip(self.counts, self.first, position, strict=True):
                index = index * count + first + offset
            yield index

    def split(self, max_blocks: int) -> Iterator["Tile"]:
        """The same blocks, in the same order, in tiles of at most ``max_blocks >= 1`` each."""
        if self.blocks <= max_blocks:
            yield self
            return
        mode = next(k for k, count in enumerate(self.grid) if count > 1)
        behind = self.blocks // self.grid[mode]
        stride = max(1, max_blocks // behind)
        for offset in range(0, self.grid[mode], stride):
            part = self._narrow(mode, offset, min(stride, self.grid[mode] - offset))
            yield from part.split(max_blocks)

    def _narrow(self, mode: int, offset: int, length: int) -> "Tile":
        def replace(values: tuple[int, ...], value: int) -> tuple[int, ...]:
            return (*values[:mode], value, *values[mode + 1 :])

        return Tile(
            self.dims,
            replace(self.start, self.start[mode] + offset * self.extent[mode]),
            replace(self.grid, length),
            self.extent,
            replace(self.first, self.first[mode] + offset),
            self.counts,
        )

    def row(self, source: int, offset: int, order: int) -> list[int]:
        """The tile as a row of the ``tiles`` table of the ops, padded to ``order`` dimensions."""
        pad = order - len(self.dims)
        return [
            source,
            offset,
            *([1] * pad + list(self.dims)),
            *([0] * pad + list(self.start)),
            *([1] * pad + list(self.grid)),
            *([1] * pad + list(self.extent)),
        ]


def cut(merged: Sequence[int], sizes: Sequence[int]) -> list[Tile]:
    """Cuts dimension k into chunks of ``sizes[k]``, the last one shorter (algorithm.md 3.2)."""
    dims = tuple(merged)
    counts = tuple(-(-dim // size) for dim, size in zip(dims, sizes, strict=True))
    chunks = []  # per dimension: (start, grid, extent, first) of its full blocks, then of its rest
    for dim, size in zip(dims, sizes, strict=True):
        full, rest = divmod(dim, size)
        chunks.append(
            [(0, full, size, 0)] * (full > 0) + [(full * size, 1, rest, full)] * (rest > 0)
        )
    tiles = []
    for choice in itertools.product(*chunks):
        start, grid, extent, first = zip(*choice, strict=True)
        tiles.append(Tile(dims, start, grid, extent, first, counts))
    return tiles
