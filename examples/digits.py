"""Trains a small CNN on scikit-learn's digits with Shampoo, AdamW and SGD-Nesterov.

    python examples/digits.py [--out FOLDER]        # needs: pip install -e '.[bench]'

1797 real images of 8 x 8 pixels, split once: 1000 to train, 297 to tune on, 500 to test. The three
optimizers get the same network, initial weights, batches, number of steps and schedule (linear
warm-up, then cosine to zero), and equally many learning rates to choose from. Tuning, with seeds of
its own, takes the rate that needs the fewest steps to the target accuracy on the tuning images.
Each optimizer then trains with three fresh seeds at that rate, and the table says after how many
steps, and after how many seconds of training, the test accuracy reaches the target. Every number is
printed, and written with a plot into FOLDER (default ``benchmarks/results``).
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

try:
    import matplotlib
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
    from sklearn.datasets import load_digits

    from shampoo import Shampoo
except ImportError as error:
    raise SystemExit(f"This example needs more ({error}): pip install -e '.[bench]'") from None

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BATCH = 100
STEPS = 100
WARMUP = 5
EVERY = 2  # steps between two evaluations on the test images
TUNING_EVERY = 4  # and on the tuning images: half of a run is evaluation otherwise
TARGET = 0.98
OTHER_TARGETS = (0.96, 0.97, 0.98, 0.985, 0.99)
TUNING_SEEDS = (100, 101, 102)
SEEDS = (0, 1, 2)
WEIGHT_DECAY = 0.01

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


class Choice(NamedTuple):
    """An optimizer, the learning rates it may choose from, and its colour in the plot."""

    build: Callable[[nn.Module, float], torch.optim.Optimizer]
    rates: tuple[float, ...]
    color: str


def shampoo(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Defaults but for what AdamW gets too."""
    return Shampoo(model, lr=lr, weight_decay=WEIGHT_DECAY)


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Defaults; its weight decay of 0.01 is torch's default."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)


def sgd_nesterov(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The usual momentum and weight decay."""
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )


ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SGD_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)

CHOICES = {
    "Shampoo": Choice(shampoo, ADAM_RATES, "#e45756"),
    "AdamW": Choice(adamw, ADAM_RATES, "#4c78a8"),
    "SGD-Nesterov": Choice(sgd_nesterov, SGD_RATES, "#54a24b"),
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
    """Three convolutions with group norm, then a linear classifier: 26,090 parameters."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU()]
        if inputs > 1:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 64, 10))


class Curve(NamedTuple):
    """Accuracy at each evaluated step, and seconds of training up to it, without evaluation."""

    steps: list[int]
    accuracy: list[float]
    seconds: list[float]

    def reached(self, target: float = TARGET) -> tuple[int, float] | None:
        """First evaluated step at the target with its seconds; None if it was never reached."""
        for step, accuracy, seconds in zip(*self, strict=True):
            if accuracy >= target:
                return step, seconds
        return None


def schedule(step: int) -> float:
    """Multiplier of the learning rate at a step from 0 to ``STEPS - 1``."""
    return min((step + 1) / WARMUP, (1 + math.cos(math.pi * step / STEPS)) / 2)


def train(choice: Choice, lr: float, seed: int, data: Data, judge: Data, every: int) -> Curve:
    """One run of ``STEPS`` steps, judged on ``judge`` every few."""
    torch.manual_seed(seed)
    model = network()
    optimizer = choice.build(model, lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    curve, seconds = Curve([], [], []), 0.0
    batches: list[Tensor] = []
    for step in range(1, STEPS + 1):
        start = time.perf_counter()
        batches = batches or list(torch.randperm(len(data.labels)).split(BATCH))
        picked = batches.pop()
        loss = functional.cross_entropy(model(data.images[picked]), data.labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        seconds += time.perf_counter() - start
        if step % every == 0:
            with torch.no_grad():
                is_right = model(judge.images).argmax(1) == judge.labels
            curve.steps.append(step)
            curve.accuracy.append(is_right.double().mean().item())
            curve.seconds.append(seconds)
    return curve


class Trial(NamedTuple):
    """A learning rate and its curves on the tuning images, one a tuning seed."""

    lr: float
    curves: list[Curve]

    def cost(self) -> float:
        """Mean steps to the target; a run that misses it counts as two full runs."""
        found = [curve.reached() for curve in self.curves]
        return mean([2 * STEPS if hit is None else hit[0] for hit in found])

    def best_accuracy(self) -> float:
        """Mean over the seeds of the best accuracy on the tuning images."""
        return mean([max(curve.accuracy) for curve in self.curves])


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the fewest steps to the target, the more accurate one of equals."""
    return min(trials, key=lambda trial: (trial.cost(), -trial.best_accuracy()))


def tuning_table(tuned: dict[str, list[Trial]]) -> Table:
    """Steps to the target on the tuning images, a row an optimizer and learning rate."""
    table = Table(title=f"Tuning: steps to {TARGET:.1%} of the tuning images, seed by seed")
    for name in ("optimizer", "learning rate", "steps", "best accuracy", ""):
        table.add_column(name, justify="left" if name in ("optimizer", "") else "right")
    for name, trials in tuned.items():
        chosen = best(trials)
        for trial in trials:
            at_edge = trial is chosen and trial in (trials[0], trials[-1])
            note = "chosen" if trial is chosen else ""
            hits = [curve.reached() for curve in trial.curves]
            table.add_row(
                name,
                f"{trial.lr:g}",
                _steps(hits),
                f"{trial.best_accuracy():.2%}",
                note + (", at the edge of the grid" if at_edge else ""),
            )
        table.add_section()
    return table


def result_table(rates: dict[str, float], curves: dict[str, list[Curve]]) -> Table:
    """Steps and seconds to the target on the test images, every seed."""
    table = Table(title=f"Steps and seconds to {TARGET:.1%} of the test images, fresh seeds")
    table.add_column("optimizer", no_wrap=True)
    for name in ("lr", *(f"seed {seed}" for seed in SEEDS)):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("mean steps", "mean seconds", "ms a step", "final accuracy"):
        table.add_column(name, justify="right")
    for name, runs in curves.items():
        hits = [curve.reached() for curve in runs]
        reached = [hit for hit in hits if hit is not None]
        is_complete = len(reached) == len(hits)
        table.add_row(
            name,
            f"{rates[name]:g}",
            *("not reached" if hit is None else f"{hit[0]} / {hit[1]:.2f}s" for hit in hits),
            f"{mean([hit[0] for hit in reached]):.1f}" if is_complete else "-",
            f"{mean([hit[1] for hit in reached]):.2f}" if is_complete else "-",
            f"{1e3 * mean([curve.seconds[-1] for curve in runs]) / STEPS:.1f}",
            f"{mean([curve.accuracy[-1] for curve in runs]):.2%}",
        )
    return table


def targets_table(curves: dict[str, list[Curve]]) -> Table:
    """Steps to other test accuracies, so that nothing hangs on the choice of one."""
    table = Table(title="Steps to other accuracies on the test images, seed by seed")
    table.add_column("optimizer", no_wrap=True)
    for target in OTHER_TARGETS:
        table.add_column(f"{target:.1%}", justify="right")
    for name, runs in curves.items():
        rows = [[curve.reached(target) for curve in runs] for target in OTHER_TARGETS]
        table.add_row(name, *(_steps(hits) for hits in rows))
    return table


def _steps(hits: Sequence[tuple[int, float] | None]) -> str:
    return ", ".join("-" if hit is None else str(hit[0]) for hit in hits)


def plot(rates: dict[str, float], curves: dict[str, list[Curve]], path: Path) -> None:
    """Test accuracy by step: the mean of the seeds, their range, and each seed's hit."""
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    for name, runs in curves.items():
        color, steps = CHOICES[name].color, runs[0].steps
        columns = list(zip(*(curve.accuracy for curve in runs), strict=True))
        axes.plot(
            steps, [mean(c) for c in columns], color=color, label=f"{name}, lr {rates[name]:g}"
        )
        low, high = ([bound(column) for column in columns] for bound in (min, max))
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        hits = [hit[0] for curve in runs if (hit := curve.reached())]
        axes.plot(hits, [TARGET] * len(hits), "o", color=color, markersize=6, zorder=3)
    axes.axhline(TARGET, color="black", linestyle=":", label=f"target {TARGET:.1%}, a dot a seed")
    axes.set_ylim(0.85, 1.0)
    axes.set_xlabel(f"step (batch {BATCH})")
    axes.set_ylabel(f"test accuracy, mean and range of {len(SEEDS)} seeds")
    axes.set_title("A small CNN on scikit-learn's digits")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Tunes, trains, prints, writes ``digits.json`` and ``digits.png``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON and the plot")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console() if sys.stdout.isatty() else Console(width=130)
    start = time.perf_counter()
    training, tuning, test = load()

    def runs() -> Iterator[tuple[str, float]]:
        for name, choice in CHOICES.items():
            for lr in choice.rates:
                yield name, lr

    tuned: dict[str, list[Trial]] = {name: [] for name in CHOICES}
    for name, lr in track(list(runs()), "tuning", console=console, transient=True):
        tried = [
            train(CHOICES[name], lr, seed, training, tuning, TUNING_EVERY) for seed in TUNING_SEEDS
        ]
        tuned[name].append(Trial(lr, tried))
    console.print(tuning_table(tuned))
    rates = {name: best(trials).lr for name, trials in tuned.items()}
    final: dict[str, list[Curve]] = {name: [] for name in CHOICES}
    for seed in track(SEEDS, "final runs", console=console, transient=True):
        for name, choice in CHOICES.items():
            final[name].append(train(choice, rates[name], seed, training, test, EVERY))
    console.print(result_table(rates, final), targets_table(final), sep="\n")

    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "target": TARGET,
        "steps": STEPS,
        "batch": BATCH,
        "threads": options.threads,
        "torch": torch.__version__,
        "tuning": {name: [_trial_record(t) for t in trials] for name, trials in tuned.items()},
        "rates": rates,
        "seeds": SEEDS,
        "test": {name: [curve._asdict() for curve in runs] for name, runs in final.items()},
    }
    (options.out / "digits.json").write_text(json.dumps(record) + "\n")
    plot(rates, final, options.out / "digits.png")
    console.print(f"wrote digits.json and digits.png to {options.out}")
    console.print(f"{time.perf_counter() - start:.0f} s in all, {options.threads} threads")


def _trial_record(trial: Trial) -> dict[str, Any]:
    hits = [curve.reached() for curve in trial.curves]
    return {
        "lr": trial.lr,
        "steps": [None if hit is None else hit[0] for hit in hits],
        "best_accuracy": [max(curve.accuracy) for curve in trial.curves],
    }


if __name__ == "__main__":
    main()
