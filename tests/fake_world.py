"""Plays the ranks of a world one after the other, on a process group that does not communicate."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_rank(rank: int, world: int) -> Iterator[None]:
    """Collectives return at once and do nothing: for what ranks decide alone."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def each_rank(world: int) -> Iterator[int]:
    """Every rank in turn."""
    for rank in range(world):
        with fake_rank(rank, world):
            yield rank
