"""What the distributed examples share: a small vision transformer, digits, and the loop.

The images of a step depend on the step alone, and ranks compute the gradients of whole shards of
them, so that the run ends in the same bits on one rank and on two, replicated or sharded.
"""

import argparse
import gc
import hashlib
import os
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional

try:
    from sklearn.datasets import load_digits

    from shampoo import Shampoo, checkpoint
except ImportError as error:
    raise SystemExit(f"This example needs more ({error}): pip install -e '.[bench]'") from None

SHARDS = 2  # of a batch, at least; more where there are more ranks
SHARD = 64  # images
TEST = 500
WIDTH = 48


class VisionTransformer(nn.Module):
    """Two pre-norm layers over the 16 patches, of 2 x 2 pixels, of an image ``[N, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(4, WIDTH)
        self.position = nn.Parameter(torch.zeros(16, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                *(WIDTH, 4, 2 * WIDTH),
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(16 * WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unflatten(1, (4, 2)).unflatten(3, (4, 2)).transpose(2, 3).flatten(1, 2)
        x = self.embedding(patches.flatten(2)) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).flatten(1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="of checkpoints; the newest is resumed from")
    parser.add_argument("--save-every", type=int, default=10, help="steps")
    return parser.parse_args()


def start() -> torch.device:
    """Joins the process group that torchrun describes; the device of this rank."""
    torch.manual_seed(0)
    store, rank, world = next(dist.rendezvous("env://"))
    # Since torch 2.13 the store outlives a restart by torchrun: without a prefix, ranks could find
    # in it the addresses of those that have died.
    store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    members = {"store": store, "rank": rank, "world_size": world}
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", **members)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, **members)
    return device


def end(mesh: DeviceMesh | None = None) -> None:
    """Ends the process group and its threads, while Python runs; model and optimizer have gone.

    A thread of gloo lets go of the tensors of the last collective when it gets to it. Where that is
    while the interpreter is taken apart, the process aborts: "terminate called without an active
    exception", after the last line of a run that has succeeded.
    """
    # FSDP2's modules lie in cycles and hold the group. So does DDP, which must not be the last to:
    # the group would end under Python's lock, and wait for threads that may be waiting for it.
    gc.collect()
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    if mesh is not None:
        # Since torch 2.13 a mesh holds its groups, and caches of DTensor hold the mesh for ever.
        vars(mesh).get("_pg_registry", {}).clear()
    assert group() is None, "something holds the process group: its threads have not ended"


def optimizer_of(model: nn.Module) -> Shampoo:
    """The same line whether parameters are replicated or sharded."""
    return Shampoo(model, lr=3e-3, weight_decay=0.01, max_preconditioner_dim=64)


def train(
    model: nn.Module, optimizer: Shampoo, device: torch.device, args: argparse.Namespace
) -> None:
    """Trains, from the newest checkpoint if there is one, and prints what came of it."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[order].to(device)
    labels = torch.tensor(digits.target)[order].to(device)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    extra = {"scheduler": scheduler}
    done = 0
    if args.folder is not None:
        done = checkpoint.load(args.folder, model, optimizer, extra=extra) or 0
    world, rank = dist.get_world_size(), dist.get_rank()
    shards = max(SHARDS, world)
    for step in range(done, args.steps):
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(images) - TEST, (shards, SHARD), generator=generator)
        optimizer.zero_grad()
        for shard in chosen[rank::world].to(device):
            loss = functional.cross_entropy(model(images[shard]), labels[shard])
            (loss * world / shards).backward()  # the mean over ranks is that over shards
        optimizer.step()
        scheduler.step()
        if args.folder is not None and (step + 1) % args.save_every == 0:
            checkpoint.save(args.folder, model, optimizer, step=step + 1, extra=extra, keep=2)
    with torch.no_grad():
        accuracy = (model(images[-TEST:]).argmax(1) == labels[-TEST:]).float().mean().item()
    digests: list[str] = [""] * world
    dist.all_gather_object(digests, digest(model.parameters()))
    assert len(set(digests)) == 1, f"ranks have different parameters: {digests}"
    if rank == 0:
        print(f"{world} ranks, steps {done} to {args.steps}: test accuracy {accuracy:.3f}")
        print(f"SHA-256 of the parameters: {digests[0]}", flush=True)


def digest(params: Iterable[Tensor]) -> str:
    """SHA-256 of the bytes of all parameters."""
    sha = hashlib.sha256()
    for param in params:
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        sha.update(whole.detach().cpu().numpy().tobytes())
    return sha.hexdigest()
