"""Who shares the blocks with whom."""

import os

import pytest
import torch
import torch.distributed as dist
from fake_world import each_rank, fake_rank
from ranks import DiedError, Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import Parameter

from shampoo import Shampoo
from shampoo.blocks.ownership import Team
from shampoo.distributed.process_groups import ProcessGroups, trainers_per_group


def _sum_of_ranks(rank: int, scale: int) -> int:
    total = torch.tensor(rank * scale)
    dist.all_reduce(total)
    return int(total)


def _leave(rank: int) -> int:
    if rank == 1:
        os._exit(3)
    return rank


def test_ranks_are_processes_that_outlive_a_job_and_are_replaced_when_they_die(
    ranks: Ranks,
) -> None:
    assert ranks.returns(_sum_of_ranks, 3, 10) == [30, 30, 30]
    zero, one = ranks.run(_leave, 2)
    assert zero == 0
    assert isinstance(one, DiedError)
    assert "3" in str(one)
    assert ranks.returns(_sum_of_ranks, 2, 1) == [1, 1]


@pytest.mark.parametrize(
    ("requested", "replicas", "local", "blocks", "size"),
    [
        (0, 8, 8, 100, 1),
        (1, 8, 8, 100, 1),
        (2, 8, 8, 1, 2),  # asked for: the number of blocks does not matter
        (8, 8, 4, 100, 8),
        (-1, 16, 8, 100, 8),
        (-1, 2, 8, 100, 2),
        (-1, 1, 8, 100, 1),
        (-1, 8, 8, 31, 4),  # four blocks a rank
        (-1, 8, 8, 32, 8),
        (-1, 8, 8, 3, 1),
        (-1, 8, 8, 0, 1),
        (-1, 12, 8, 100, 4),  # a group of 6 would have ranks of two nodes
        (-1, 8, 6, 100, 2),
    ],
)
def test_group_sizes_follow_the_rules(requested, replicas, local, blocks, size):
    assert trainers_per_group(requested, replicas, local, blocks) == size


def test_a_group_size_that_does_not_divide_names_those_that_do():
    with pytest.raises(
        ValueError, match=r"=5\. Must divide the 12 ranks .*: one of 1, 2, 3, 4, 6, 12"
    ):
        trainers_per_group(5, 12, 8, 100)


def test_a_group_larger_than_the_world_is_the_world_and_says_so(said):
    assert trainers_per_group(64, 8, 8, 100) == 8
    assert "num_trainers_per_group=64, but there are 8 ranks: using 8" in said()


def test_too_few_blocks_are_logged(caplog):
    caplog.set_level("INFO")
    trainers_per_group(-1, 8, 8, 9)
    assert "groups of 2 ranks divide the blocks, not the 8 of a node" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_trainers_per_group": -2}, r"num_trainers_per_group=-2\. Must be an integer >= -1"),
        ({"num_trainers_per_group": 2.0}, r"num_trainers_per_group=2\.0\. Must be an integer"),
        ({"num_trainers_per_group": True}, r"num_trainers_per_group=True\. Must be an integer"),
        (
            {"communication_dtype": torch.float64},
            r"communication_dtype=torch\.float64\. Must be",
        ),
        ({"communication_dtype": "bf16"}, r"communication_dtype='bf16'\. Must be None or one of"),
        ({"overlap": 1}, r"overlap=1\. Must be True or False"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        Shampoo([Parameter(torch.ones(2))], **arguments)


def test_without_a_process_group_a_rank_is_alone():
    process_groups = ProcessGroups()
    process_groups.settle_trainers(100)
    assert process_groups.replicas() == process_groups.team_of(torch.ones(2)) == Team((0,), 0)
    assert process_groups.stepping_ranks([torch.ones(2)]).is_alone


def test_groups_are_consecutive_ranks_of_the_process_group():
    for rank in each_rank(8):
        process_groups = ProcessGroups(num_trainers_per_group=2)
        process_groups.settle_trainers(100)
        team = process_groups.team_of(torch.ones(2))
        assert team == Team((rank - rank % 2, rank - rank % 2 + 1), rank % 2)
        odd = dist.new_group([1, 3, 5, 7])
        if rank % 2:
            process_groups = ProcessGroups(process_group=odd, num_trainers_per_group=2)
            process_groups.settle_trainers(100)
            assert process_groups.team_of(torch.ones(2)).ranks == ((1, 3) if rank < 4 else (5, 7))


def test_a_rank_outside_its_process_group_is_refused():
    with fake_rank(0, 4):
        others = dist.new_group([1, 2])
        with pytest.raises(ValueError, match=r"its ranks are \(1, 2\), this is rank 0\. Build the"):
            Shampoo([Parameter(torch.ones(2))], process_group=others).step()


def test_holders_are_all_that_share_a_parameter_with_a_rank():
    plain = torch.ones(2)
    for rank in each_rank(8):
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("a", "b", "c"))
        rows, columns = mesh["a"], mesh["b"]
        params = [
            distribute_tensor(torch.ones(4), part, [Shard(0)], src_data_rank=None)
            for part in (rows, columns)
        ]
        own = {rank, rank ^ 4, rank ^ 2}
        assert set(ProcessGroups().stepping_ranks(params).ranks) == own
        assert ProcessGroups().stepping_ranks([plain, *params]).ranks == tuple(range(8))
        assert (
            set(ProcessGroups(num_trainers_per_group=1).stepping_ranks([plain, *params]).ranks)
            == own
        )
        assert ProcessGroups(num_trainers_per_group=1).stepping_ranks([plain]).is_alone


def test_only_placements_decide_whether_a_team_is_sharded():
    with fake_rank(2, 4):
        mesh = init_device_mesh("cpu", (4,))
        process_groups = ProcessGroups()
        for placement, is_sharded in ((Shard(0), True), (Replicate(), False)):
            param = distribute_tensor(torch.ones(8), mesh, [placement], src_data_rank=None)
            assert process_groups.team_of(param) == Team((0, 1, 2, 3), 2, is_sharded)


def _step_beside_another_group(rank: int) -> float:
    dist.new_group([0])  # for logging, say: of these ranks, only the first is in it
    params = [Parameter(torch.ones(8, 8)) for _ in range(8)]
    opt = Shampoo(params, num_trainers_per_group=2, lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    return float(params[0].detach().sum())


def test_groups_that_only_some_ranks_are_in_do_not_part_the_others(ranks: Ranks) -> None:
    """torch numbers the groups that ranks make among themselves by those that a rank is in."""
    moved = ranks.returns(_step_beside_another_group, 4)
    assert moved == [moved[0]] * 4
    assert moved[0] < 64.0
