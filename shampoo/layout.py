"""How one tensor is treated: its merged shape, its blocks, and the rule that moves them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shampoo.blocking import Tile, cut, merge_dims
from shampoo.hyperparameters import AUTO, Geometry

FACTORED = "factored"  # Kronecker factors and their roots
GRAFTED = "grafted"  # the grafted method alone
ADAGRAD = "adagrad"  # the diagonal method of large_dim_method="adagrad"
RULES = (FACTORED, GRAFTED, ADAGRAD)

# Numbers of factors and roots an element, up to which "auto" keeps full factors. With the two
# moments, of the gradient and of its square, they are 5 times the two numbers of AdamW. A matrix
# with both sides above max_preconditioner_dim always has fewer: it is cut, never diagonal.
AFFORDABLE = 8


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
        rule, diagonal = FACTORED, [False] * len(merged)
        if not geometry.precondition or (is_vector and not geometry.precondition_1d):
            rule = ADAGRAD if geometry.grafting == "none" else GRAFTED
        elif is_large and geometry.large_dim_method == "adagrad":
            rule = ADAGRAD
        elif geometry.large_dim_method == "diagonal":
            diagonal = [size > limit for size in merged]
        elif geometry.large_dim_method == AUTO:
            diagonal = _unaffordable(merged, limit)
        return cls(rule, tuple(_blocks(merged, limit, diagonal)), tuple(diagonal))


def _unaffordable(merged: Sequence[int], limit: int) -> list[bool]:
    """The modes that "auto" makes diagonal: the longest ones, until the rest is affordable.

    It always becomes so: with every mode diagonal there is at most one number an element.
    """
    diagonal = [False] * len(merged)
    for mode in sorted(range(len(merged)), key=lambda mode: -merged[mode]):
        numbers = sum(
            tile.blocks * factor_numbers(tile.extent, diagonal)
            for tile in _blocks(merged, limit, diagonal)
        )
        if numbers <= AFFORDABLE * math.prod(merged):
            break
        diagonal[mode] = True
    return diagonal


def _blocks(merged: Sequence[int], limit: int, diagonal: Sequence[bool]) -> list[Tile]:
    """Cuts every mode at the limit but the diagonal ones, which stay whole: a vector is short."""
    sizes = [size if alone else limit for size, alone in zip(merged, diagonal, strict=True)]
    return cut(merged, sizes)
