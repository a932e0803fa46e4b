"""FSDP2 with its parameters on the host, and process groups that cannot send what lies there."""

from typing import Any

import torch
import torch.distributed as dist
from fault_runs import said_by
from layouts import CASES, digest, fit
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from shampoo import Shampoo, checkpoint


def _train(rank: int, names: list[str]) -> list[tuple[str, list[float]]]:
    """Parameters and losses of training by backward, with each policy."""
    found = []
    for number, policy in enumerate((OffloadPolicy(), CPUOffloadPolicy(pin_memory=False))):
        case = CASES["transformer"]
        model = case.build()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(f"of{number}",))
        fully_shard(model, mesh=mesh, offload_policy=policy)
        optimizer = case.optimizer(model.parameters())
        losses = fit(case.model, model, optimizer, seed=rank)
        found.append((digest(model.parameters()), losses))
    return found


def test_parameters_that_are_offloaded_train_with_the_bits_of_others(ranks: Ranks) -> None:
    for plain, offloaded in ranks.returns(_train, 2, []):
        assert offloaded == plain
