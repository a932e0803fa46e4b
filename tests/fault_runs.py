"""What a rank does in a test of faults: it trains small parameters, and is made to fail.

``SHAMPOO_WAITS`` names a file that gets a line for every call that raises on a rank: the seconds
that the rank stood in it, and the error.
"""

import hashlib
import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from patience import GROUP_TIMEOUT
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

from shampoo import Shampoo, ShampooError

TIMEOUT = GROUP_TIMEOUT  # where a rank waits for one that does not come, which is the fault
SHAPES = ((13, 9), (20, 6), (9, 13), (5,), (8, 8))  # 13 blocks, whole shards of some are empty
HYPER: dict[str, Any] = {
    "lr": 0.1,
    "max_preconditioner_dim": 8,
    "precondition_frequency": 2,
    "start_preconditioning_step": 2,
}


@dataclass(frozen=True)
class Placing:
    """How many ranks, the shape of their mesh, and the arguments of the optimizer."""

    world: int
    mesh: tuple[int, ...] = ()
    placements: tuple[Any, ...] = ()
    plain: int = 0  # the first parameters, which are no DTensors
    rows: int = 0  # the first parameters, which with vectors lie on rows of the mesh only
    hyper: dict[str, Any] = field(default_factory=dict)


LAYOUTS = {
    "ddp": Placing(2),
    "ddp, overlap": Placing(2, hyper={"overlap": True}),
    "groups of 2 in 4": Placing(4, hyper={"num_trainers_per_group": 2}),
    "fsdp2": Placing(3, (3,), (Shard(0),)),
    "hsdp 2x2": Placing(4, (2, 2), (Replicate(), Shard(0))),
    "tensor parallel, ddp 2x2": Placing(4, (2, 2), (Replicate(), Shard(1)), rows=2),
    "tensor parallel, fsdp2 2x2": Placing(4, (2, 2), (Shard(0), Shard(1)), rows=2),
    "fsdp2 and plain": Placing(2, (2,), (Shard(0),), plain=2),
}


class Run:
    """One rank's parameters and optimizer. All ranks see the same gradients."""

    def __init__(self, layout: str, shapes: Sequence[Any] = SHAPES, **hyper: Any) -> None:
        self.layout = LAYOUTS[layout]
        self._mesh = None
        if self.layout.mesh:
            names = ("rows", "columns")[: len(self.layout.mesh)]
            self._mesh = init_device_mesh("cpu", self.layout.mesh, mesh_dim_names=names)
        generator = torch.Generator().manual_seed(0)
        whole = [torch.randn(shape, generator=generator) for shape in shapes]
        self.params = [Parameter(self.place(i, tensor)) for i, tensor in enumerate(whole)]
        self.opt = Shampoo(self.params, **{**HYPER, **self.layout.hyper, **hyper})

    def place(self, index: int, whole: Tensor) -> Tensor:
        """A tensor as parameter ``index`` is placed."""
        if self._mesh is None or index < self.layout.plain:
            return whole.clone()
        mesh, placements = self._mesh, self.layout.placements
        if index < self.layout.rows or (self.layout.rows and whole.dim() < 2):
            mesh, placements = mesh["rows"], placements[:1]
        return distribute_tensor(whole, mesh, placements, src_data_rank=None)

    def feed(self, step: int) -> None:
        """Gradients of a step."""
        generator = torch.Generator().manual_seed(1000 + step)
        for index, param in enumerate(self.params):
            param.grad = self.place(index, torch.randn(param.shape, generator=generator))

    def step(self, *steps: int) -> None:
        """Takes steps."""
        for step in steps:
            self.feed(step)
            self.opt.step()

    def weights(self) -> str:
        """Of whole parameters: equal on all ranks of a healthy run. Collective where sharded."""
        return digest(p.full_tensor() if isinstance(p, DTensor) else p for p in self.params)

    def held(self) -> str:
        """Of all that this rank holds: its part of the parameters, and its state."""
        return digest([*map(local, self.params), *self.state().values()])

    def parts(self) -> str:
        """Of this rank's part of the parameters."""
        return digest([*map(local, self.params)])

    def state(self) -> dict[tuple[int, str], Tensor]:
        """This rank's state by parameter and key."""
        return {
            (index, key): value
            for index, param in enumerate(self.params)
            for key, value in self.opt.state.get(param, {}).items()
        }


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def digest(tensors: Iterator[Tensor] | Sequence[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def said_by(work: Callable[[], Any]) -> tuple[str, str]:
    """The class and words of the error that some work raises."""
    start = time.monotonic()
    try:
        work()
    except (ShampooError, ValueError) as error:
        if path := os.environ.get("SHAMPOO_WAITS"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{time.monotonic() - start:.3f} {type(error).__name__}\n")
        return type(error).__name__, str(error)
    return "nothing", ""


@contextmanager
def broken(target: str, is_here: bool, after: int = 0) -> Iterator[None]:
    """Makes a function of the package, ``module:name.name``, fail from a call on, on this rank."""
    module_name, path = target.split(":")
    owner: Any = importlib.import_module(module_name)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    def fail(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise MemoryError(f"no memory for {target}")
        return original(*arguments, **keywords)

    if is_here:
        setattr(owner, name, fail)
    try:
        yield
    finally:
        setattr(owner, name, original)


def wait_for_all(name: str) -> None:
    """Returns once all ranks have come here; unlike a barrier, needs no healthy process group."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{name} {dist.get_rank()}", "here")
    store.wait([f"{name} {rank}" for rank in range(dist.get_world_size())])
