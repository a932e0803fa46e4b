"""FSDP2 with its parameters on the host, and process groups that cannot send what lies there."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fault_runs import said_by
from layouts import CASES, digest, fit
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from shampoo import Shampoo, checkpoint


def _train(rank: int, folder: Path) -> list[tuple[str, list[float]]]:
    """Parameters and losses of training by backward; the third goes on from what the second saved.

    Memory is not pinned, for which there would have to be a GPU.
    """
    found = []
    case = CASES["transformer"]
    for number, policy in enumerate((OffloadPolicy(), *[CPUOffloadPolicy(pin_memory=False)] * 2)):
        model = case.build()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(f"of{number}",))
        fully_shard(model, mesh=mesh, offload_policy=policy)
        optimizer = case.optimizer(model.parameters())
        if number < 2:
            fit(case.model, model, optimizer, seed=rank)
        if number == 1:
            checkpoint.save(folder, model, optimizer, step=10)
        elif number == 2:
            assert checkpoint.load(folder, model, optimizer) == 10
        losses = fit(case.model, model, optimizer, seed=10 + rank)
        found.append((digest(model.parameters()), losses))
    return found


def test_parameters_that_are_offloaded_train_to_the_bit_of_those_that_are_not(
    ranks: Ranks, tmp_path: Path
) -> None:
    for plain, *offloaded in ranks.returns(_train, 2, tmp_path):
        assert offloaded == [plain] * 2


def _refused(rank: int, layout: str, folder: Path) -> tuple[tuple[str, str], bool, int]:
    """What a first step says where groups have no backend for a CPU, and what it leaves behind."""
    if layout != "fsdp2 on a part":  # as of init_process_group("nccl"), for parameters on the host
        dist.destroy_process_group()
        dist.init_process_group(
            "cuda:gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
        )
    params: list[nn.Parameter]
    if layout == "fsdp2":
        model = nn.Linear(8, 16)
        policy = CPUOffloadPolicy(pin_memory=False)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)), offload_policy=policy)
        params = list(model.parameters())
    elif layout == "ddp":
        params = [nn.Parameter(torch.ones(8, 8)) for _ in range(8)]
    else:  # the ranks of all can agree, those of a mesh cannot exchange
        halves = [dist.new_group([first, first + 1], backend="cuda:gloo") for first in (0, 2)]
        mesh = DeviceMesh.from_group(halves[rank // 2], "cpu")
        shard = DTensor.from_local(torch.ones(4, 8), mesh, [Shard(0)], run_check=False)
        params = [*(nn.Parameter(torch.ones(8, 8)) for _ in range(16)), nn.Parameter(shard)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = Shampoo(params, lr=0.1)
    before = [_local(param).clone() for param in params]
    said = said_by(optimizer.step)
    is_same = all(torch.equal(_local(p), b) for p, b in zip(params, before, strict=True))
    return said, is_same, len(optimizer.state)


def _local(param: torch.Tensor) -> Any:
    param = param.detach()
    return param.to_local() if isinstance(param, DTensor) else param


@pytest.mark.parametrize(("layout", "world"), [("fsdp2", 2), ("ddp", 2), ("fsdp2 on a part", 4)])
def test_a_group_without_a_backend_for_the_parameters_is_named_with_one_that_has(
    ranks: Ranks, tmp_path: Path, layout: str, world: int
) -> None:
    for (error, words), is_same, states in ranks.returns(_refused, world, layout, tmp_path):
        assert error == "ValueError"
        assert "Invalid process group of the backends 'cuda:gloo'" in words
        assert "parameters are on cpu, as under CPUOffloadPolicy" in words
        assert 'init_process_group("cpu:gloo,cuda:gloo")' in words
        assert is_same
        assert states == 0
