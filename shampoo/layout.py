"""How one tensor is treated: its merged shape, its blocks, and the rule that moves them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shampoo.blocking import Tile, cut, merge_dims
from shampoo.hyperparameters import Geometry

FACTORED = "factored"  # Kronecker factors and their roots
GRAFTED = "grafted"  # the grafted method alone
ADAGRAD = "adagrad"  # the diagonal method of large_dim_method="adagrad"
RULES = (FACTORED, GRAFTED, ADAGRAD)


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
        elif is_large and geometry.large_dim_method == "diagonal":
            sizes = [max(limit, size) for size in merged]
            diagonal = [size > limit for size in merged]
        return cls(rule, tuple(cut(merged, sizes)), tuple(diagonal))
