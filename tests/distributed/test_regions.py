"""Which elements a rank holds: boxes of the merged parameter against the indices themselves."""

import random

import pytest
import torch
import torch.distributed as dist
from fake_world import each_rank
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

from shampoo.blocks.blocking import MERGE_MODES, merge_dims, merge_groups
from shampoo.distributed.shard_regions import (
    Region,
    check_placements,
    local_tensor,
    mesh_ranks,
    region_of,
    regions_of,
)


def assert_holds(region: Region, local: Tensor, merged: tuple[int, ...]) -> None:
    """Every element of ``local``, which holds its own indices, lies where the region says."""
    numel = torch.Size(merged).numel()
    indices = torch.arange(numel).reshape(merged)
    if local.numel() == 0:
        assert region.boxes == ()
        return
    found = torch.full(region.dims, -1)
    for box in region.boxes:
        here, there = (
            tuple(slice(first, first + size) for first, size in zip(start, box.shape, strict=True))
            for start in (box.local_start, box.start)
        )
        assert (found[here] == -1).all(), "boxes overlap"
        found[here] = indices[there]
    assert torch.equal(found.flatten(), local.flatten())


SHAPES = [(), (1,), (7,), (3, 5), (1, 6), (4, 1, 5), (2, 3, 4), (6, 2, 1, 3), (2, 3, 2, 3)]


@pytest.mark.parametrize("mode", MERGE_MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_region_is_the_indices_of_the_shard(shape, mode):
    """Any rectangle, cut in any dimension, merged in any way."""
    chance = random.Random(0)
    indices = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for _ in range(60):
        limit = chance.randint(1, 30)
        starts = [chance.randint(0, size) for size in shape]
        lengths = [
            chance.choice([size - start, chance.randint(0, size - start)])
            for size, start in zip(shape, starts, strict=True)
        ]
        local = indices
        for dim, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            local = local.narrow(dim, start, length)
        region = region_of(shape, local.shape, starts, merge_groups(shape, limit, mode))
        assert_holds(region, local, merge_dims(shape, limit, mode))


def test_rows_are_one_box_whatever_is_merged():
    shape = (5, 2, 3)
    for limit in (1, 6, 30):
        region = region_of(shape, (2, 2, 3), (3, 0, 0), merge_groups(shape, limit, "full"))
        assert len(region.boxes) == 1
    columns = region_of(shape, (5, 1, 3), (0, 1, 0), merge_groups(shape, 30, "full"))
    assert [box.start for box in columns.boxes] == [(3,), (9,), (15,), (21,), (27,)]


PLACEMENTS = [
    (Shard(0), Shard(0)),
    (Shard(0), Shard(1)),
    (Shard(1), Shard(0)),
    (Shard(1), Shard(1)),
    (Replicate(), Shard(0)),
    (Shard(2), Replicate()),
    (Replicate(), Replicate()),
    (Shard(-1), Shard(-3)),
]


@pytest.mark.parametrize("ranks", [[[0, 1, 2], [3, 4, 5]], [[5, 1], [2, 0], [3, 4]]], ids=str)
def test_regions_are_what_dtensor_gives_every_rank(ranks):
    """Ragged shards, meshes in any order."""
    shape = (5, 4, 7)
    for rank in each_rank(6):
        mesh = dist.DeviceMesh("cpu", ranks)
        for placements in PLACEMENTS:
            indices = torch.arange(140).reshape(shape)
            tensor = distribute_tensor(indices, mesh, placements, src_data_rank=None)
            assert mesh_ranks(tensor) == tuple(range(6))
            for limit in (4, 30, 140):
                region = regions_of(tensor, merge_groups(shape, limit, "full"))[rank]
                assert_holds(region, local_tensor(tensor), merge_dims(shape, limit, "full"))


class Layers(nn.Module):
    """Weights that hold their own indices."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 13), nn.Linear(13, 5), nn.LayerNorm(7)
        for param in self.parameters():
            indices = torch.arange(param.numel(), dtype=param.dtype)
            param.data = indices.reshape(param.shape)


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (2, 3)], ids=str)
def test_regions_under_tensor_parallelism_and_fsdp2_with_ragged_strides(shape):
    seen = set()
    for rank in each_rank(shape[0] * shape[1]):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner"))
        styles = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        model = parallelize_module(Layers(), mesh["inner"], styles, src_data_rank=None)
        for param in fully_shard(model, mesh=mesh["outer"]).parameters():
            assert isinstance(param, DTensor)
            seen.update(type(placement).__name__ for placement in param.placements)
            merged = merge_groups(param.shape, 1000, "matrix")
            region = regions_of(param, merged)[mesh_ranks(param).index(rank)]
            local = local_tensor(param.detach()).long()
            assert_holds(region, local, merge_dims(param.shape, 1000, "matrix"))
    assert seen == {"_StridedShard", "Shard", "Replicate"}


def test_partial_placements_are_refused_by_name():
    for _ in each_rank(1):
        mesh = init_device_mesh("cpu", (1,))
        whole = DTensor.from_local(torch.ones(3), mesh, [Replicate()])
        check_placements(whole, "w")
        check_placements(torch.ones(3), "w")
        partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
        with pytest.raises(RuntimeError, match=r"Partial placements \(w has .*Redistribute it to"):
            check_placements(partial, "w")


def test_strides_that_no_other_cut_explains_are_refused_by_name():
    for _ in each_rank(2):
        whole = distribute_tensor(torch.ones(8), init_device_mesh("cpu", (2,)), [Shard(0)])
        strided = DTensor.from_local(
            whole.to_local(),
            whole.device_mesh,
            [_StridedShard(0, split_factor=2)],
            shape=whole.shape,
            stride=whole.stride(),
        )
        with pytest.raises(RuntimeError, match=r"strided placements \(w has .*Redistribute it to"):
            check_placements(strided, "w")


def test_shards_that_were_cut_otherwise_are_refused_with_both_shapes():
    for rank in each_rank(2):
        mesh = init_device_mesh("cpu", (2,))
        local = torch.ones(6 - 4 * rank)
        ragged = DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size([8]), stride=(1,))
        message = rf"shard of w .* shape \({len(local)},\), but .* of \(8,\) give \(4,\)"
        with pytest.raises(RuntimeError, match=message):
            check_placements(ragged, "w")
