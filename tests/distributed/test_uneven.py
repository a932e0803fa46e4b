"""Shapes that differ between ranks, and shards that do not divide."""

from typing import Any

import pytest
import torch
from fake_world import each_rank
from fault_runs import HYPER, TIMEOUT, said_by
from ranks import Ranks
from test_regions import assert_holds
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from shampoo import Shampoo
from shampoo.blocks.blocking import merge_dims, merge_groups
from shampoo.distributed.shard_regions import local_tensor, regions_of


def _another_shape(rank: int, shapes: list[tuple[int, ...]], **hyper: Any) -> Any:
    # With few blocks nobody shares them, and nothing is compared.
    params = [*(Parameter(torch.ones(8, 8)) for _ in range(8)), Parameter(torch.ones(shapes[rank]))]
    opt = Shampoo(params, **HYPER, **hyper)
    for param in params:
        param.grad = torch.ones_like(param)
    said = said_by(opt.step)
    return said, all(bool((param == 1.0).all()) for param in params), len(opt.state)


@pytest.mark.parametrize(
    ("shapes", "hyper"),
    [
        ([(13, 9), (13, 8)], {}),
        ([(13, 9), (9, 13)], {}),  # as many elements, as many blocks
        ([(16, 8), (8, 16)], {"check_replicas_every": 1}),  # the same blocks, and the same bits
        ([(4, 6), (2, 2, 6)], {"precondition": False}),
    ],
)
def test_another_shape_on_one_rank_is_named_with_both(
    ranks: Ranks, shapes: list[tuple[int, ...]], hyper: dict[str, Any]
) -> None:
    answers = ranks.run(_answer, 2, shapes, hyper, timeout=TIMEOUT)
    for answer in answers:
        assert isinstance(answer, tuple), answer
        (error, words), is_same, states = answer
        assert error == "PlanMismatchError"
        assert f"with shape={shapes[1]}, rank 0 has" in words
        assert f"with shape={shapes[0]}." in words
        assert is_same
        assert states == 0


def _answer(rank: int, shapes: list[tuple[int, ...]], hyper: dict[str, Any]) -> Any:
    return _another_shape(rank, shapes, **hyper)


@pytest.mark.parametrize("rows", [72, 16, 5, 1])
def test_shards_that_do_not_divide_are_held_and_stepped_on_every_rank(rows: int) -> None:
    """72 rows on 16 ranks are 14 shards of 5, one of 2 and one of none."""
    world, shape, limit = 16, (rows, 6), 8
    numels = []
    for rank in each_rank(world):
        model = nn.Linear(shape[1], rows)
        with torch.no_grad():
            model.weight.copy_(torch.arange(model.weight.numel()).reshape(shape))
        # Of a name of its own: torch remembers the place of a rank in meshes that are equal.
        fully_shard(model, mesh=init_device_mesh("cpu", (world,), mesh_dim_names=(f"of_{rank}",)))
        weight = model.weight
        assert isinstance(weight, DTensor)
        local = local_tensor(weight).detach().clone()
        groups = merge_groups(shape, limit, "matrix")
        assert_holds(
            regions_of(weight, groups)[rank], local.long(), merge_dims(shape, limit, "matrix")
        )
        numels.append(local.numel())
        opt = Shampoo(model.parameters(), lr=0.1, max_preconditioner_dim=limit)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        opt.step()
        opt.step()
    chunk = -(-rows // world)
    expected = [max(0, min(chunk, rows - rank * chunk)) * 6 for rank in range(world)]
    assert numels == expected
