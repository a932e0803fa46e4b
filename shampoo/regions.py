"""Which part of a merged parameter each rank of its mesh holds.

Blocks are cut on the global parameter, whatever the placements, so that their owners, their bits
and their names in a checkpoint do not depend on how many ranks there are.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

# Private, but the only place where torch computes it, _StridedShard of TP + FSDP2 included.
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

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
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_placements(param: Tensor, name: str) -> None:
    """Refuses a DTensor whose local tensors are not parts of it.

    Raises:
        RuntimeError: for a ``Partial`` placement, naming the parameter and the remedy.
    """
    if isinstance(param, DTensor) and any(
        isinstance(placement, Partial) for placement in param.placements
    ):
        raise RuntimeError(
            f"Shampoo does not support Partial placements ({name} has {param.placements})."
            " Redistribute it to Shard or Replicate before the optimizer is built."
        )


def mesh_ranks(param: DTensor) -> tuple[int, ...]:
    """The global ranks of a parameter's mesh, ascending: the order of their process group."""
    return tuple(sorted(param.device_mesh.mesh.flatten().tolist()))


def regions_of(param: DTensor, merged: Sequence[Sequence[int]]) -> list[Region]:
    """What every rank of a parameter's mesh holds, in the order of :func:`mesh_ranks`.

    Args:
        merged: for each merged dimension, the dimensions of the parameter that it is made of
            (:func:`shampoo.blocking.merge_groups`).
    """
    mesh = param.device_mesh.mesh
    regions = {}
    for coordinate in itertools.product(*map(range, mesh.shape)):
        shape, offset = _compute_local_shape_and_global_offset(
            param.shape, mesh.shape, list(coordinate), param.placements
        )
        regions[int(mesh[coordinate])] = region_of(param.shape, shape, offset, merged)
    return [regions[rank] for rank in sorted(regions)]


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
