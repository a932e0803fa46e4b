"""Work of one rank or of all, whose errors all ranks raise: none is left waiting for another."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def is_distributed() -> bool:
    """Whether there are ranks, be it one."""
    return dist.is_available() and dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """This rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def on_first_rank(work: Callable[[], Result]) -> Result:
    """What ``work`` returns or raises on rank 0, on all ranks, when it is done."""
    if not is_distributed():
        return work()
    outcome: list[Any] = [_outcome(work) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcome, src=0)
    [[result, error]] = outcome
    if error is not None:
        raise error
    found: Result = result
    return found


def on_every_rank(work: Callable[[], Result]) -> list[Result]:
    """What ``work`` returns on each rank, in their order; all raise the error of the first."""
    if not is_distributed():
        return [work()]
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, _outcome(work))
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


def _outcome(work: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error
