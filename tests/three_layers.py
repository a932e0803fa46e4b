"""A small model of matrices and vectors, plain, in DDP or sharded."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def three_layers(layout: str, seed: int) -> nn.Module:
    """The model in the layout ``"ddp"`` or ``"fsdp2"``; in any other as it is."""
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(11, 13), nn.LayerNorm(13), nn.Linear(13, 7))
    if layout == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif layout == "ddp":
        model = DistributedDataParallel(model)
    return model
