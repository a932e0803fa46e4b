"""Trains a small model under torchrun on any number of ranks, with the same bits on each.

torchrun --nproc-per-node N elastic_run.py FOLDER STEPS [ddp|fsdp2]

The batch of a step has six shards, whose gradients the ranks share out, send to all and add up in
the order of shards: unlike the mean that an all-reduce makes, the sum does not depend on how many
ranks there are. Prints the steps that were taken, and the digest of the parameters.
"""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import forget_groups_of_meshes
from resharded_runs import digest, placed, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from shampoo import Shampoo, checkpoint

SHARDS = 6
SAVE_EVERY = 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(11, 13), nn.Tanh(), nn.Linear(13, 7))


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    """Those of the mean over the shards of a step, on every rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    twin = network()  # all of the parameters, where the model has some of each
    with torch.no_grad():
        for own, param in zip(twin.parameters(), model.parameters(), strict=True):
            own.copy_(whole(param))
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(SHARDS, 4, 11, generator=generator)
    classes = torch.randint(7, (SHARDS, 4), generator=generator)
    mine = []
    for shard in range(rank, SHARDS, world):
        loss = functional.cross_entropy(twin(inputs[shard]), classes[shard])
        grads = torch.autograd.grad(loss, list(twin.parameters()))
        mine.append(torch.cat([grad.flatten() for grad in grads]))
    everyone = torch.empty(world, SHARDS // world, mine[0].numel())
    dist.all_gather_into_tensor(everyone.flatten(0, 1), torch.stack(mine))
    total = torch.zeros_like(mine[0])
    for shard in range(SHARDS):
        total += everyone[shard % world, shard // world]
    sizes = [param.numel() for param in twin.parameters()]
    parts = (total / SHARDS).split(sizes)
    return [part.view_as(p) for part, p in zip(parts, twin.parameters(), strict=True)]


def train(folder: Path, steps: int, layout: str) -> None:
    model = network()
    if layout == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    hyper = {"lr": 0.05, "momentum": 0.9, "precondition_frequency": 4, "max_preconditioner_dim": 5}
    optimizer = Shampoo(model.parameters(), **hyper, large_dim_method="blocking")
    done = checkpoint.load(folder, model, optimizer) or 0
    for step in range(done, steps):
        for param, grad in zip(model.parameters(), gradients(model, step), strict=True):
            param.grad = placed(grad, param)
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0:
            checkpoint.save(folder, model, optimizer, step=step + 1)
    found = digest(model)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks, steps {done} to {steps}: {found}", flush=True)


def main() -> None:
    folder, steps, layout = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train(Path(folder), int(steps), layout)
    gc.collect()  # docs/faults.md, "How a run ends"
    dist.destroy_process_group()
    forget_groups_of_meshes()


if __name__ == "__main__":
    main()
