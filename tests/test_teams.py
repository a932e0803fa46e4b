"""Who shares the blocks with whom."""

import os

import torch.distributed as dist
from ranks import DiedError, Ranks


def _sum_of_ranks(rank: int, scale: int) -> int:
    import torch

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
