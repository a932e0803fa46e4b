"""What a task says of itself, and the learning rates of its steps."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Split = Literal["tuning", "report"]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """One thing to learn.

    Attributes:
        name: of the task.
        family: ``"language"``, ``"vision"`` or ``"autoencoder"``.
        source: the data in :mod:`benchmarks.data`, None for what comes with a library.
        steps: of a run.
        warmup: steps in which the rate grows.
        weight_decay: decoupled, of every optimizer unless it is tuned.
        every: steps between two evaluations.
        model: makes the network, by torch's global generator.
        batches: an endless stream of inputs and targets, by a seed.
        loss: mean loss of a batch.
        judge: mean loss of what is held out, and the accuracy where there is one. ``"tuning"`` and
            ``"report"`` are different parts of it.
        version: to be raised with any change of model, data, batches or judge, which makes old runs
            another task's.
    """

    name: str
    family: str
    source: str | None
    steps: int
    warmup: int
    weight_decay: float
    every: int
    model: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    judge: Callable[[nn.Module, Split], tuple[float, float | None]]
    version: int = 1


def multiplier(step: int, steps: int, warmup: int, last: float = 0.1) -> float:
    """Of the learning rate at a step from 0 on: linear warm-up, then a cosine to ``last``."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return last + (1 - last) * (1 + math.cos(math.pi * done)) / 2
