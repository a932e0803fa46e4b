"""How one tensor is treated: its merged shape, its blocks, and the rule that moves them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from shampoo.blocks.blocking import Tile, cut, merge_dims

AUTO = "auto"  # of large_dim_method: nobody has named one
LARGE_DIM_METHODS = (AUTO, "blocking", "adagrad", "diagonal")
DTYPES = {"float32": torch.float32, "float64": torch.float64}

FACTORED = "factored"  # Kronecker factors and their roots
GRAFTED = "grafted"  # the grafted method alone
ADAGRAD = "adagrad"  # the diagonal method of large_dim_method="adagrad"
RULES = (FACTORED, GRAFTED, ADAGRAD)

# Numbers of factors and roots an element that "auto" may keep. With the two moments, of gradients
# and of their squares, they are 5 times the two numbers of AdamW. A matrix with both sides above
# max_preconditioner_dim always has fewer, cut at that.
AFFORDABLE = 8

# How many times shorter blocks "auto" makes of a long side before it keeps the diagonal alone. Both
# sides' factors are worth much: with them, 3x3 convolutions learn as they do in whole blocks. But a
# matrix of 8 rows would have hundreds of blocks.
SHORTER = 8


def factor_numbers(extent: Sequence[int], diagonal: Sequence[bool]) -> int:
    """Numbers that the factors of a block and their roots hold.

    Args:
        extent: [o], the sides of the block.
        diagonal: [o], which modes keep only the factor's diagonal, which has no root.
    """
    return sum(
        side if is_diagonal else 2 * side * side
        for side, is_diagonal in zip(extent, diagonal, strict=True)
    )


@dataclass(frozen=True)
class Geometry:
    """What decides how tensors are cut and what state they have.

    Where a change of it while training would cut other blocks, the step refuses it.
    """

    max_preconditioner_dim: int
    merge_dims: str
    precondition_1d: bool
    precondition: bool
    large_dim_method: str
    preconditioner_dtype: str
    grafting: str
    refresh_schedule: str
    capturable: bool

    @classmethod
    def of(cls, group: dict[str, Any]) -> "Geometry":
        """The geometry a group asks for, unchecked."""
        return cls(*(group[field.name] for field in fields(cls)))

    @property
    def dtype(self) -> torch.dtype:
        """Of all statistics: factors, roots and moments."""
        return DTYPES[self.preconditioner_dtype]


@dataclass(frozen=True)
class Layout:
    """The blocks of one tensor.

    ``diagonal`` says, mode by mode, whether a factored tensor keeps only the factor's diagonal.
    """

    rule: str
    tiles: tuple[Tile, ...]
    diagonal: tuple[bool, ...]

    @property
    def dims(self) -> tuple[int, ...]:
        """The merged shape."""
        return self.tiles[0].dims

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.dims)

    @property
    def blocks(self) -> int:
        """How many blocks."""
        return sum(tile.blocks for tile in self.tiles)

    @property
    def order(self) -> int:
        """Number of merged dimensions: o of algorithm.md."""
        return len(self.diagonal)

    @classmethod
    def of(cls, shape: Sequence[int], geometry: Geometry) -> "Layout":
        """The layout of a tensor with at least one element (algorithm.md 3.1 to 3.4)."""
        limit = geometry.max_preconditioner_dim
        merged = merge_dims(shape, limit, geometry.merge_dims)
        is_vector = sum(size > 1 for size in shape) <= 1
        is_large = max(merged) > limit
        rule, sizes, diagonal = FACTORED, [limit] * len(merged), [False] * len(merged)
        if not geometry.precondition or (is_vector and not geometry.precondition_1d):
            rule = ADAGRAD if geometry.grafting == "none" else GRAFTED
        elif is_large and geometry.large_dim_method == "adagrad":
            rule = ADAGRAD
        elif geometry.large_dim_method == "diagonal":
            sizes = [max(limit, size) for size in merged]
            diagonal = [size > limit for size in merged]
        elif geometry.large_dim_method == AUTO:
            sizes, diagonal = _affordable(merged, limit)
        return cls(rule, tuple(cut(merged, sizes)), tuple(diagonal))


def _affordable(merged: Sequence[int], limit: int) -> tuple[list[int], list[bool]]:
    """How "auto" cuts: the length of blocks along every mode, and which modes are diagonal.

    As short as is affordable along the longest mode. Where no block is, or only such as would be
    far too many, that mode stays whole and diagonal, and the next one is looked at. In the end
    there is an answer: with every mode diagonal there is at most one number an element.
    """
    sizes, diagonal = [limit] * len(merged), [False] * len(merged)
    for mode in sorted(range(len(merged)), key=lambda mode: -merged[mode]):
        side = min(limit, merged[mode])
        for times in range(1, SHORTER + 1):
            sizes[mode] = -(-side // times)
            numbers = sum(
                tile.blocks * factor_numbers(tile.extent, diagonal) for tile in cut(merged, sizes)
            )
            if numbers <= AFFORDABLE * math.prod(merged):
                return sizes, diagonal
        sizes[mode], diagonal[mode] = merged[mode], True
    return sizes, diagonal
