"""Process groups end with ``destroy_process_group()`` while the optimizer that used them lives."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fault_runs import LAYOUTS, Run
from ranks import Ranks, forget_groups_of_meshes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from shampoo import Shampoo, ShampooDistributedError

TASKS = Path("/proc/self/task")  # where there is none, the references alone are looked at


def gloo_threads() -> list[str]:
    """Names of the threads of this process that belong to a group."""
    names = [(task / "comm").read_text().strip() for task in TASKS.glob("*")]
    return [name for name in names if "gloo" in name]


def destroy() -> tuple[int, int, list[str]]:
    """Groups that there were, those that outlive it, and the threads that do."""
    groups = [weakref.ref(group) for group in dist.distributed_c10d._world.pg_map]
    assert gloo_threads() or not TASKS.exists()
    dist.destroy_process_group()
    forget_groups_of_meshes()  # torch's, of parameters that live
    return len(groups), sum(group() is not None for group in groups), gloo_threads()


def _step_and_destroy(_: int, layout: str, hyper: dict[str, Any]) -> Any:
    run = Run(layout, **hyper)
    run.step(1, 2, 3)
    run.opt.consolidate_state_dict()
    return *destroy(), len(run.opt.state) > 0


@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        ("ddp", 1),
        ("ddp, overlap", 1),
        ("groups of 2 in 4", 2),
        ("fsdp2", 1),
        ("hsdp 2x2", 3),
        ("fsdp2 and plain", 1),
    ],
)
def test_no_group_outlives_its_end_while_the_optimizer_lives(
    ranks: Ranks, layout: str, groups: int
) -> None:
    hyper = {"check_replicas_every": 1, "grafting": "lamb"}  # every collective that there is
    answers = ranks.returns(_step_and_destroy, LAYOUTS[layout].world, layout, hyper)
    assert [answer[0] >= groups for answer in answers] == [True] * len(answers)
    assert [answer[1:] for answer in answers] == [(0, [], True)] * len(answers)


def _train_and_destroy(_: int, wrapper: str) -> Any:
    def train() -> Shampoo:
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
        if wrapper == "ddp":
            model = DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in (model[0], model[2], model):
                fully_shard(layer, mesh=mesh)
        optimizer = Shampoo(model.parameters(), lr=0.1, precondition_frequency=2)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 12)).square().sum().backward()
            optimizer.step()
        return optimizer

    optimizer = train()
    gc.collect()  # the model, as docs/faults.md says
    return *destroy(), len(optimizer.state) > 0


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_the_model_and_not_the_optimizer_has_to_go_before_the_groups(
    ranks: Ranks, wrapper: str
) -> None:
    assert ranks.returns(_train_and_destroy, 2, wrapper) == [(1, 0, [], True)] * 2


def _step_without_its_group(rank: int) -> Any:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    run = Run("ddp", process_group=halves[rank // 2])
    run.step(1, 2)
    before = run.held()
    dist.destroy_process_group(halves.pop(rank // 2))
    halves.clear()
    run.feed(3)
    try:
        run.opt.step()
    except ShampooDistributedError as error:
        return str(error), before == run.held()
    return "nothing", before == run.held()


def test_a_step_without_its_group_says_so(ranks: Ranks) -> None:
    """gloo would go on with it while somebody holds it, and NCCL would not."""
    for rank, (error, is_same) in enumerate(ranks.returns(_step_without_its_group, 4)):
        own = "(0, 1)" if rank < 2 else "(2, 3)"
        assert f"the process group of the ranks {own} has been destroyed" in error
        assert "build a new optimizer" in error
        assert is_same
