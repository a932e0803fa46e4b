"""One run: a task, an optimizer, a rate and a seed, and the curve that comes of them."""

import functools
import gc
import hashlib
import inspect
import json
import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.learning.optimizers import ROWS
from benchmarks.tasks import TASKS, Split, Task
from benchmarks.tasks.base import multiplier
from shampoo import Shampoo

Point = tuple[int, float, float | None, float, float]


@dataclass(frozen=True)
class Trial:
    """What defines a run.

    Attributes:
        task: a name of ``TASKS``.
        optimizer: a name of ``ROWS``.
        rate: the learning rate at its highest.
        seed: of the weights and the batches.
        split: the part of what is held out that judges.
        arguments: of the optimizer, beside those of its row.
        weight_decay: None for the task's.
        warmup: steps, None for the task's.
    """

    task: str
    optimizer: str
    rate: float
    seed: int
    split: Split = "tuning"
    arguments: dict[str, Any] = field(default_factory=dict)
    weight_decay: float | None = None
    warmup: int | None = None

    def key(self) -> str:
        """Names the run: equal trials have equal ones."""
        text = json.dumps(vars(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def made_with(task_name: str, optimizer: str) -> str:
    """Names what a run depends on beside its trial: the task's numbers, our defaults.

    A run with another one is another run, and is made again.
    """
    task, row = TASKS[task_name], ROWS[optimizer]
    numbers = [task.steps, task.warmup, task.weight_decay, task.every, task.version]
    words = [*map(str, numbers), str(row.arguments)]
    if row.is_ours:
        parameters = inspect.signature(Shampoo).parameters.values()
        words += [f"{parameter.name}={parameter.default}" for parameter in parameters]
    return hashlib.sha256("; ".join(words).encode()).hexdigest()[:12]


class Training:
    """A model that learns as a trial says.

    Attributes:
        task: of the trial.
        model: trained in place.
        stepping: CPU seconds spent in the optimizer's steps so far.
    """

    def __init__(self, trial: Trial) -> None:
        self.task, row = TASKS[trial.task], ROWS[trial.optimizer]
        torch.manual_seed(trial.seed)
        self.model = self.task.model()
        decay = self.task.weight_decay if trial.weight_decay is None else trial.weight_decay
        warmup = self.task.warmup if trial.warmup is None else trial.warmup
        arguments = {**row.arguments, **trial.arguments}
        self._optimizer = row.build(self.model, trial.rate, decay, arguments)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: multiplier(step, self.task.steps, warmup)
        )
        self._batches = self.task.batches(trial.seed)
        self.stepping = 0.0

    def step(self) -> float:
        """One step; the loss of its batch."""
        loss = self.task.loss(self.model, next(self._batches))
        loss.backward()  # type: ignore[no-untyped-call]
        start = time.process_time()
        self._optimizer.step()
        self.stepping += time.process_time() - start
        self.model.zero_grad()  # an optimizer of views would miss the parameters
        self._scheduler.step()
        return loss.item()


def run(trial: Trial) -> dict[str, Any]:
    """Trains, and returns what is recorded of it, as JSON-like values.

    ``curve`` holds ``(step, loss, accuracy or None, training loss, CPU seconds)`` at each
    evaluation, None where a loss is not finite; seconds are those of this process, without
    evaluations. A run is ``diverged``, and is not waited for, whose loss is not finite, or after a
    third of the steps above that of the untrained model.
    """
    gc.collect()  # the run before: a scheduler and its optimizer hold each other, and much memory
    training = Training(trial)
    task, model = training.task, training.model
    curve: list[Point] = []
    untrained, _ = _judged(task, model, trial.split)
    seconds = train_loss = 0.0
    since, diverged = 0, False
    for step in range(1, task.steps + 1):
        start = time.process_time()
        train_loss, since = train_loss + training.step(), since + 1
        seconds += time.process_time() - start
        if step % task.every == 0 or step == task.steps:
            held, accuracy = _judged(task, model, trial.split)
            curve.append((step, held, accuracy, train_loss / since, seconds))
            train_loss, since = 0.0, 0
            is_worse = 3 * step > task.steps and held > untrained
            if diverged := is_worse or not math.isfinite(held):
                break
    return {
        **asdict(trial),
        "key": trial.key(),
        "made_with": made_with(trial.task, trial.optimizer),
        "diverged": diverged,
        "loss": None if diverged else curve[-1][1],
        "accuracy": curve[-1][2],
        "seconds": seconds,
        "optimizer_seconds": training.stepping,
        "curve": [[s, *(_short(x) for x in rest)] for s, *rest in curve],
    }


def failed(trial: Trial, error: str) -> dict[str, Any]:
    """The record of a run that raised."""
    return {
        **asdict(trial),
        "key": trial.key(),
        "made_with": made_with(trial.task, trial.optimizer),
        "diverged": True,
        "error": error,
        "loss": None,
        "accuracy": None,
        "seconds": 0.0,
        "optimizer_seconds": 0.0,
        "curve": [],
    }


def _judged(task: Task, model: nn.Module, split: Split) -> tuple[float, float | None]:
    model.eval()
    with torch.no_grad():
        found = task.judge(model, split)
    model.train()
    return found


def _short(value: float | None) -> float | None:
    is_number = value is not None and math.isfinite(value)  # JSON knows no others
    return float(f"{value:.5g}") if is_number else None
