"""What every framework trains here, and what ends a job: a model, its data, a digest."""

import contextlib
import gc
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import TensorDataset

# Blocks of several shapes on both ranks, roots that are refreshed on both sides of the save.
ARGUMENTS: dict[str, Any] = {
    "lr": 3e-3,
    "weight_decay": 0.01,
    "max_preconditioner_dim": 16,
    "precondition_frequency": 3,
}


class Classifier(nn.Module):
    """Tokens in, logits out; a parameter of every role."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.first = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.second = nn.Linear(32, 32)
        self.out = nn.Linear(32, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(self.embed(tokens).mean(1))))
        return self.out(torch.relu(self.second(hidden)))


def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


def data(rows: int = 96) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 10, (rows, 6), generator=generator)
    return TensorDataset(tokens, tokens.sum(1) % 4)


def batches(steps: int, rank: int = 0, world: int = 1) -> list[tuple[Tensor, Tensor]]:
    """The same for every run: eight rows a step and rank."""
    tokens, labels = data(8 * steps * world).tensors
    places = range(rank, steps * world, world)
    return [(tokens[8 * at : 8 * at + 8], labels[8 * at : 8 * at + 8]) for at in places]


def weights(module: nn.Module) -> list[Tensor]:
    """All parameters, whole, on the host: what two runs are compared by."""
    found = []
    for param in module.parameters():
        value = param.detach()
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        found.append(value.float().clone())
    return found


def assert_equal(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    """Every rank ends in the same bits, and these are the expected ones."""
    for here, there in zip(found, expected, strict=True):
        for each in (here, there):
            assert all(map(torch.equal, each, expected[0]))


@contextlib.contextmanager
def launched(rank: int) -> Iterator[None]:
    """What torchrun would say to a process, for frameworks that ask the environment."""
    world = dist.get_world_size()
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    said |= {"GROUP_RANK": 0, "ROLE_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": 29517}
    said |= {"TORCHELASTIC_RUN_ID": "none", "ACCELERATE_USE_CPU": "true"}
    before, here = dict(os.environ), os.getcwd()
    os.environ.update({name: str(value) for name, value in said.items()})
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where frameworks leave what nobody asked for
        try:
            yield
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(before)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What the package logs meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("shampoo").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("shampoo").removeHandler(handler)


def each(
    rank: int, folder: str, function: Callable[..., Any], cases: dict[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """What a function returns or raises in every case, in one job: frameworks import for long.

    Args:
        folder: of which every case gets one of its own.
        function: of rank, folder and a case. What it raises, all ranks must raise.
        cases: by name.
    """
    found: dict[str, Any] = {}
    gc.collect()
    gc.freeze()  # the Trainer collects garbage in every run: what was imported is none
    for name, case in cases.items():
        own = Path(folder, name)
        own.mkdir(exist_ok=True)
        try:
            with launched(rank):
                found[name] = function(rank, str(own), *case)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    gc.unfreeze()
    return found
