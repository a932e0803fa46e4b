"""Trains a small vision transformer whose parameters, gradients and state are sharded.

    torchrun --nproc-per-node 2 examples/fsdp2.py [--steps N] [--folder CHECKPOINTS]

Needs pip install -e '.[bench]'. Runs on gloo on a laptop, on NCCL where there are
GPUs. Checkpoints are those of ``ddp.py``: each example goes on from what the other has saved.
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import VisionTransformer, arguments, end, optimizer_of, start, train


def main() -> None:
    args = arguments()
    device = start()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    run(device, mesh, args)
    end(mesh)


def run(device: torch.device, mesh: DeviceMesh, args: argparse.Namespace) -> None:
    """A function of its own: model and optimizer end with it, before the process group does."""
    model = VisionTransformer().to(device)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, optimizer_of(model), device, args)


if __name__ == "__main__":
    main()
