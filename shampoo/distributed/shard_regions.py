"""Which part of a merged parameter each rank of its mesh holds.

Blocks are cut on the global parameter, whatever the placements, so that their owners, their bits
and their names in a checkpoint do not depend on how many ranks there are.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shampoo.dtensor import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Coordinates = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A box of the merged parameter, and where it starts in the merged local tensor."""

    start: Coordinates
    local_start: Coordinates
    shape: Coordinates


@dataclass(frozen=True)
class Region:
    """All that one rank holds of a parameter.

    Attributes:
        dims: the merged shape of the local tensor.
        boxes: none for an empty shard; more than one only where a shard cuts a dimension that is
            merged behind another.
    """

    dims: Coordinates
    boxes: tuple[Box, ...]


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this rank, sharing its memory: itself if it is plain."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def check_placements(param: Tensor, name: str) -> None:
    """Refuses a DTensor whose local tensors are not boxes of it.

    Raises:
        RuntimeError: for a ``Partial`` placement, one that is strided without tensor parallelism,
            or a shard of another size than placements give, naming the parameter and the remedy.
    """
    if not is_dtensor(param):
        return
    is_partial = any(placement.is_partial() for placement in param.placements)
    orders = _shard_orders(param)
    if is_partial or None in orders:
        kind = "Partial" if is_partial else "such strided"
        raise RuntimeError(
            f"Shampoo does not support {kind} placements ({name} has {param.placements})."
            " Redistribute it to Shard or Replicate before the optimizer is built."
        )
    coordinate = param.device_mesh.get_coordinate()
    if coordinate is None:
        return
    expected = tuple(stop - start for start, stop in _cuts(param, orders, coordinate))
    found = tuple(param.to_local().shape)
    if found != expected:
        raise RuntimeError(
            f"The shard of {name} on this rank has shape {found}, but {param.placements} of"
            f" {tuple(param.shape)} give {expected}. Distribute it by fully_shard or"
            " distribute_tensor."
        )


def mesh_ranks(param: "DTensor") -> tuple[int, ...]:
    """The global ranks of a parameter's mesh, ascending: the order of their process group."""
    return tuple(sorted(param.device_mesh.mesh.flatten().tolist()))


def regions_of(param: "DTensor", merged: Sequence[Sequence[int]]) -> list[Region]:
    """What every rank of a parameter's mesh holds, in the order of :func:`mesh_ranks`.

    Args:
        merged: for each merged dimension, the dimensions of the parameter that it is made of
            (:func:`shampoo.blocks.blocking.merge_groups`).
    """
    mesh = param.device_mesh.mesh
    orders = _shard_orders(param)
    regions = {}
    coordinates = itertools.product(*map(range, mesh.shape))
    for coordinate, rank in zip(coordinates, mesh.flatten().tolist(), strict=True):
        cuts = _cuts(param, orders, coordinate)
        lengths, offset = [stop - start for start, stop in cuts], [start for start, _ in cuts]
        regions[rank] = region_of(param.shape, lengths, offset, merged)
    return [regions[rank] for rank in sorted(regions)]


def _shard_orders(param: "DTensor") -> list[list[int] | None]:
    """The axes of the mesh that cut each dimension, in the order in which they do.

    An axis cuts after those on its left, unless its placement is strided by the sizes of axes on
    its right: FSDP2 cuts what tensor parallelism has cut, and is left of it in the mesh. torch
    computes such shards from the stride alone, which is not where they are if cuts are uneven.
    None where axes do not explain the stride.
    """
    orders: list[list[int] | None] = [[] for _ in param.shape]
    for axis in reversed(range(param.device_mesh.ndim)):
        placement = param.placements[axis]
        dim = getattr(placement, "dim", None)
        if dim is None or (order := orders[dim]) is None:
            continue
        stride, place, product = getattr(placement, "split_factor", 1), 0, 1
        while product < stride and place < len(order):
            product *= param.device_mesh.shape[order[place]]
            place += 1
        if product == stride:
            order.insert(place, axis)
        else:
            orders[dim] = None
    return orders


def _cuts(
    param: "DTensor", orders: Sequence[Sequence[int] | None], coordinate: Sequence[int]
) -> list[tuple[int, int]]:
    """Start and stop of every dimension at a coordinate of the mesh, cut as torch.chunk does."""
    cuts = []
    for size, order in zip(param.shape, orders, strict=True):
        start, stop = 0, size
        for axis in order or ():
            length = -(-(stop - start) // param.device_mesh.shape[axis])
            first = start + coordinate[axis] * length
            start, stop = min(first, stop), min(first + length, stop)
        cuts.append((start, stop))
    return cuts


def region_of(
    shape: Sequence[int],
    local_shape: Sequence[int],
    offset: Sequence[int],
    merged: Sequence[Sequence[int]],
) -> Region:
    """The boxes that a shard ``local_shape`` at ``offset`` of a parameter occupies once merged."""
    dims, choices = [], []
    for group in merged:
        sizes, lengths, starts = (
            [values[dim] for dim in group] for values in (shape, local_shape, offset)
        )
        dims.append(torch.Size(lengths).numel())
        choices.append(_intervals(sizes, lengths, starts))
    if 0 in local_shape:
        return Region(tuple(dims), ())
    boxes = [Box(*zip(*choice, strict=True)) for choice in itertools.product(*choices)]
    return Region(tuple(dims), tuple(boxes))


def _intervals(
    sizes: Sequence[int], lengths: Sequence[int], starts: Sequence[int]
) -> list[tuple[int, int, int]]:
    """``start, local start, length`` of the runs that a shard has in one merged dimension.

    A shard that cuts only the first of the dimensions is a single run; one that cuts a later
    dimension has a run for every index before it.
    """
    cut = max((k for k in range(len(sizes)) if lengths[k] < sizes[k]), default=0)
    behind = torch.Size(sizes[cut + 1 :]).numel()
    run = lengths[cut] * behind if sizes else 1
    runs = []
    for local, outer in enumerate(itertools.product(*map(range, lengths[:cut]))):
        index = 0
        for size, start, position in zip(sizes[:cut], starts[:cut], outer, strict=True):
            index = index * size + start + position
        if sizes:
            index = index * sizes[cut] + starts[cut]
        runs.append((index * behind, local * run, run))
    return runs
