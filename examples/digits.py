"""Trains a small CNN on scikit-learn's digits with Shampoo, AdamW and SGD-Nesterov.

    python examples/digits.py [--out FOLDER]        # needs the extra: pip install 'shampoo[bench]'

1797 real images of 8 x 8 pixels, split once: 1000 to train, 297 to tune on, 500 to test. All three
optimizers get the same network, initial weights, batches, number of steps and schedule (linear
warm-up, then cosine to zero), and the same number of learning rates to choose from. Tuning, with
seeds of its own, takes the learning rate that needs the fewest steps to the target accuracy on the
tuning images. Each optimizer then trains with three fresh seeds at that rate, and the table says
after how many steps, and seconds of training, the accuracy on the test images reaches the target.
Every number is printed, and written with a plot into FOLDER (default ``benchmarks/results``).
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from shampoo import Shampoo

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BATCH = 100
STEPS = 150
WARMUP = 10
EVERY = 2  # steps between two evaluations
TARGET = 0.98
TUNING_SEEDS = (100, 101)
SEEDS = (0, 1, 2)
WEIGHT_DECAY = 0.01


class Task(NamedTuple):
    """An optimizer and the learning rates it may choose from."""

    build: Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
    rates: tuple[float, ...]


def grid(center: float, count: int = 7) -> tuple[float, ...]:
    """Learning rates around one, two to a factor of ten up to rounding: 1, 3, 10 .. or 3, 10, 30."""
    half = count // 2
    return tuple(float(f"{center * 10 ** ((i - half) / 2):.1g}") for i in range(count))


TASKS = {
    "Shampoo": Task(
        lambda params, lr: Shampoo(params, lr=lr, weight_decay=WEIGHT_DECAY), grid(1e-2)
    ),
    "AdamW": Task(
        lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=WEIGHT_DECAY), grid(1e-2)
    ),
    "SGD-Nesterov": Task(
        lambda params, lr: torch.optim.SGD(
            params, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4
        ),
        grid(1e-1),
    ),
}


class Data(NamedTuple):
    """Images ``[N, 1, 8, 8]`` in 0 .. 1 and labels ``[N]``."""

    images: Tensor
    labels: Tensor


def load() -> tuple[Data, Data, Data]:
    """The digits, shuffled once and split into training, tuning and test images."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order.split([1000, 297, 500])
    train, tune, test = (Data(images[part], labels[part]) for part in parts)
    return train, tune, test


def network() -> nn.Sequential:
    """Two convolutions and two linear layers, 20,138 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


class Curve(NamedTuple):
    """Accuracy at every evaluated step, and seconds of training until it (evaluation not counted)."""

    steps: list[int]
    accuracy: list[float]
    seconds: list[float]

    def reached(self) -> tuple[int, float] | None:
        """First evaluated step at the target with its seconds; None if it was never reached."""
        for step, accuracy, seconds in zip(*self, strict=True):
            if accuracy >= TARGET:
                return step, seconds
        return None

    def steps_to_target(self) -> float:
        """Steps to the target, infinite if it was never reached."""
        found = self.reached()
        return found[0] if found else math.inf


def train(task: Task, lr: float, seed: int, data: Data, judge: Data) -> Curve:
    """One run of ``STEPS`` steps, judged on ``judge``."""
    torch.manual_seed(seed)
    model = network()
    optimizer = task.build(list(model.parameters()), lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP, (1 + math.cos(math.pi * step / STEPS)) / 2),
    )
    curve, seconds = Curve([], [], []), 0.0
    batches = iter(())
    for step in range(1, STEPS + 1):
        start = time.perf_counter()
        picked = next(batches, None)
        if picked is None:
            batches = iter(torch.randperm(len(data.labels)).split(BATCH))
            picked = next(batches)
        loss = F.cross_entropy(model(data.images[picked]), data.labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        seconds += time.perf_counter() - start
        if step % EVERY == 0:
            with torch.no_grad():
                right = model(judge.images).argmax(1) == judge.labels
            curve.steps.append(step)
            curve.accuracy.append(right.double().mean().item())
            curve.seconds.append(seconds)
    return curve
