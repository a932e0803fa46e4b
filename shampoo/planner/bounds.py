"""What may be planned: shapes, ranks and links within bounds, so that every plan ends."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from shampoo.errors import shown
from shampoo.inputs import is_integer, is_number
from shampoo.planner.forecast import Tensor

LAYOUTS = ("ddp", "fsdp2", "hsdp")
Shapes = Mapping[str, Sequence[int]] | Iterable[Sequence[int]]

MOST_RANKS = 1 << 20
MOST_TENSORS = 1 << 16
MOST_DIMENSIONS = 8
MOST_CORNERS = 1 << 18  # of all tensors: every dimension doubles the blocks that may be unlike
MOST_NUMEL = 1 << 60  # of a tensor: its bytes are an integer of 64 bits
MOST_BLOCKS = 1 << 21
_MOST_CANDIDATES = 64
_MOST_SIDE = 1 << 53
_MOST_BANDWIDTH = 1e30


def tensors_of(shapes: Shapes, dtype: torch.dtype) -> list[Tensor]:
    """The tensors of these shapes, by the names that they have or get.

    Raises:
        ValueError: for what is no shape.
    """
    return [Tensor(name, _sizes(name, shape), dtype) for name, shape in _named(shapes)]


def check_tensors(tensors: Sequence[Tensor]) -> None:
    """Refuses a plan of nothing, and tensors whose plan would not end.

    Raises:
        ValueError: for a name that cannot be printed, a shape out of bounds, or no tensor at all.
    """
    if not tensors:
        raise ValueError(
            "Invalid model_or_shapes: nothing to train. Must have at least one tensor with an"
            " element that requires a gradient."
        )
    for tensor in tensors:
        _check_name(tensor.name)
        _check_size(tensor.name, tensor.shape)
    corners = sum(1 << sum(size > 1 for size in tensor.shape) for tensor in tensors)
    if corners > MOST_CORNERS:
        raise ValueError(
            f"Invalid model_or_shapes: {len(tensors)} tensors with {corners} corners. Must have at"
            f" most {MOST_CORNERS}, 4 a matrix: plan one of the stages that have optimizers of"
            " their own."
        )


def _named(shapes: Shapes) -> list[tuple[str, Any]]:
    """Of any iterable, one without end too, at most as many as are taken."""
    if isinstance(shapes, Mapping):
        pairs: Iterable[tuple[str, Any]] = ((str(name), shape) for name, shape in shapes.items())
    elif isinstance(shapes, Iterable):
        pairs = ((f"tensor{index}", shape) for index, shape in enumerate(shapes))
    else:
        raise ValueError(
            f"Invalid model_or_shapes={shown(shapes)}. Must be a module, or shapes by name or in a"
            " row."
        )
    found = list(itertools.islice(pairs, MOST_TENSORS + 1))
    if len(found) > MOST_TENSORS:
        raise ValueError(
            f"Invalid model_or_shapes: more than {MOST_TENSORS} shapes. Must be fewer: plan one of"
            " the stages that have optimizers of their own."
        )
    return found


def _check_name(name: str) -> None:
    if not name.isprintable():
        raise ValueError(f"Invalid name {shown(name)}. Must have characters that can be printed.")


def _sizes(name: str, shape: Any) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else None
    if sizes is None or not all(is_integer(size, 0, MOST_NUMEL) for size in sizes):
        raise ValueError(
            f"Invalid shape {shown(shape)} of {shown(name)}. Must be a list of integers >= 0 and"
            f" <= {MOST_NUMEL}."
        )
    return sizes


def _check_size(name: str, sizes: tuple[int, ...]) -> None:
    if len(sizes) > MOST_DIMENSIONS or math.prod(sizes) > MOST_NUMEL:
        raise ValueError(
            f"Invalid shape {shown(list(sizes))} of {shown(name)}. Must have at most"
            f" {MOST_DIMENSIONS} dimensions and {MOST_NUMEL} elements."
        )


def check_counts(**counts: Any) -> None:
    """Refuses what is no number of ranks, by its name."""
    for name, count in counts.items():
        if not is_integer(count, 1, MOST_RANKS):
            raise ValueError(
                f"Invalid {name}={shown(count)}. Must be an integer >= 1 and <= {MOST_RANKS}."
            )


def check_candidates(blocks: Any) -> None:
    """Refuses ``block_candidates`` that are not a few sides of blocks."""
    if not isinstance(blocks, Sequence) or len(blocks) > _MOST_CANDIDATES:
        raise ValueError(
            f"Invalid block_candidates={shown(blocks)}. Must be a sequence of at most"
            f" {_MOST_CANDIDATES} integers."
        )
    for index, block in enumerate(blocks):
        if not is_integer(block, 1, _MOST_SIDE):
            raise ValueError(
                f"Invalid block_candidates[{index}]={shown(block)}. Must be an integer >= 1 and"
                f" <= {_MOST_SIDE}."
            )


def check_layout(layout: Any, world_size: int, replicas: int) -> None:
    """Refuses a layout that there is not, and replicas that it cannot have."""
    if layout not in LAYOUTS:
        raise ValueError(f"Invalid layout={shown(layout)}. Must be one of {', '.join(LAYOUTS)}.")
    if layout == "hsdp" and (replicas < 2 or world_size % replicas):
        divisors = [n for n in range(2, world_size + 1) if world_size % n == 0]
        raise ValueError(
            f"Invalid replicas={replicas}. Must divide the {world_size} ranks and be >= 2 under"
            f" hsdp: one of {', '.join(map(str, divisors)) or 'none, use fsdp2'}."
        )
    if layout != "hsdp" and replicas != 1:
        raise ValueError(f'Invalid replicas={replicas}. Must be 1 unless layout="hsdp".')


def check_bandwidth(name: str, bandwidth: Any) -> None:
    """Refuses what is no bandwidth."""
    if not is_number(bandwidth, 1.0, _MOST_BANDWIDTH):
        raise ValueError(
            f"Invalid {name}={shown(bandwidth)}. Must be a number >= 1 and <="
            f" {_MOST_BANDWIDTH:.0e}, in bytes a second."
        )


def check_dtype(dtype: Any) -> None:
    """Refuses what no parameter can have."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"Invalid parameter_dtype={shown(dtype)}. Must be a floating-point torch.dtype."
        )
