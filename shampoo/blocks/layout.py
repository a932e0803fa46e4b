"""How one tensor is treated: its merged shape, its blocks, and the kind that moves them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from shampoo.blocks.blocking import Tile, cut
from shampoo.blocks.cost import default_side

AUTO = "auto"  # of large_dim_method and max_preconditioner_dim: nobody has named one
LARGE_DIM_METHODS = (AUTO, "blocking", "adagrad", "diagonal")
AUTOMATIC = "automatic_dim"  # in a group's extra: a max_preconditioner_dim that nobody has named
DTYPES = {"float32": torch.float32, "float64": torch.float64}

# Numbers an element that "auto" may keep for modes: factors and roots, say. With the two moments,
# of gradients and of their squares, they are 5 times the two numbers of AdamW. Of factors and roots
# a matrix with both sides above max_preconditioner_dim always has fewer, cut at that.
AFFORDABLE = 8

# How many times shorter blocks "auto" makes of a long side before it keeps the diagonal alone. Both
# sides' factors are worth much: with them, 3x3 convolutions learn as they do in whole blocks. But a
# matrix of 8 rows would have hundreds of blocks.
SHORTER = 8


def is_auto(value: Any) -> bool:
    """Whether a value is "auto"; there are values that cannot be compared with a word."""
    return isinstance(value, str) and value == AUTO


def automatic_dim(group: Mapping[str, Any]) -> int:
    """What ``max_preconditioner_dim="auto"`` is in a group: its first parameter says the device.

    Without a parameter, as in a plan of shapes, the nominal accelerator is meant.
    """
    tensors = (each for each in group.get("params", ()) if isinstance(each, torch.Tensor))
    return default_side(next((each.device.type for each in tensors), "meta"))


def take_dim(group: dict[str, Any], number: int) -> None:
    """Gives a group a ``max_preconditioner_dim`` that nobody has named, which it remembers."""
    group["max_preconditioner_dim"] = number
    group["extra"] = {**group.get("extra", {}), AUTOMATIC: number}


def settle_dim(group: dict[str, Any]) -> None:
    """Gives a group that says "auto" the number which that is."""
    if is_auto(group["max_preconditioner_dim"]):
        take_dim(group, automatic_dim(group))


def is_automatic(group: Mapping[str, Any]) -> bool:
    """Whether nobody has named the ``max_preconditioner_dim`` of a group, which holds a number."""
    number = group["max_preconditioner_dim"]
    return is_auto(number) or group.get("extra", {}).get(AUTOMATIC) == number


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
    preconditioner: str

    @classmethod
    def of(cls, group: dict[str, Any]) -> "Geometry":
        """The geometry a group asks for, unchecked, with a number in the place of "auto"."""
        values = cls(*(group[field.name] for field in fields(cls)))
        if not is_auto(values.max_preconditioner_dim):
            return values
        return replace(values, max_preconditioner_dim=automatic_dim(group))

    @property
    def dtype(self) -> torch.dtype:
        """Of all statistics: factors, roots and moments."""
        return DTYPES[self.preconditioner_dtype]


@dataclass(frozen=True)
class Layout:
    """The blocks of one tensor.

    ``kind`` names what moves them (:mod:`shampoo.preconditioner`). ``diagonal`` says, mode by mode,
    whether a matrix of the mode would take too much memory.
    """

    kind: str
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


def affordable(
    merged: Sequence[int], limit: int, numbers: Callable[[Sequence[int], Sequence[bool]], int]
) -> tuple[list[int], list[bool]]:
    """How "auto" cuts: the length of blocks along every mode, and which modes are diagonal.

    As short as is affordable along the longest mode. Where no block is, or only such as would be
    far too many, that mode stays whole and diagonal, and the next one is looked at. In the end
    there is an answer if a mode that is diagonal keeps at most one number an element.

    Args:
        merged: the merged shape.
        limit: ``max_preconditioner_dim``.
        numbers: that the modes of a block hold, by its sides and which of them are diagonal.
    """
    sizes, diagonal = [limit] * len(merged), [False] * len(merged)
    for mode in sorted(range(len(merged)), key=lambda mode: -merged[mode]):
        side = min(limit, merged[mode])
        for times in range(1, SHORTER + 1):
            sizes[mode] = -(-side // times)
            held = sum(tile.blocks * numbers(tile.extent, diagonal) for tile in cut(merged, sizes))
            if held <= AFFORDABLE * math.prod(merged):
                return sizes, diagonal
        sizes[mode], diagonal[mode] = merged[mode], True
    return sizes, diagonal
