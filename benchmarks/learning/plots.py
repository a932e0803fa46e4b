"""The plots of docs/evidence.md: curves of every seed, loss over rates, steps to AdamW's end."""

import math
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.learning import studies
from benchmarks.learning.measures import median_loss, median_reached, reached
from benchmarks.learning.optimizers import ROWS
from benchmarks.learning.protocol import Search
from benchmarks.learning.race import fresh_runs
from benchmarks.learning.records import Record, Records
from benchmarks.tasks import TASKS

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
COLORS = {
    "adamw": "#4c78a8",
    "sgd": "#54a24b",
    "muon": "#f58518",
    "shampoo": "#e45756",
    "kl_shampoo": "#b279a2",
}
DPI = 80
TALLEST = 1.2  # of bars, which are cut there and say how high they are


def _tasks(records: Records) -> list[str]:
    """Those in which there is something to compare."""
    return [
        task
        for task in TASKS
        if fresh_runs(task, "adamw", records) and len(_names(task, records)) > 1
    ]


def _names(task: str, records: Records) -> list[str]:
    """The optimizers of the main table that have run with fresh seeds."""
    return [name for name in studies.MAIN if fresh_runs(task, name, records)]


def _grid(count: int) -> tuple[plt.Figure, list[Axes]]:
    columns = min(3, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.4 * rows), layout="constrained", squeeze=False
    )
    for spare in axes.flat[count:]:
        spare.set_visible(False)
    return figure, list(axes.flat[:count])


def curves(records: Records, over: str, path: Path) -> None:
    """Held-out loss over steps or CPU seconds, a thin line a seed, for the main optimizers."""
    tasks = _tasks(records)
    figure, axes = _grid(len(tasks))
    for task, axis in zip(tasks, axes, strict=True):
        lowest, highest = float("inf"), 0.0
        for name in studies.MAIN:
            runs = fresh_runs(task, name, records)
            early: list[float] = []
            for index, run in enumerate(runs):
                places = [p[0] if over == "steps" else p[4] for p in run["curve"]]
                losses = [math.nan if p[1] is None else p[1] for p in run["curve"]]
                axis.plot(
                    places,
                    losses,
                    color=COLORS[name],
                    linewidth=0.9,
                    alpha=0.8,
                    label=ROWS[name].title if index == 0 else None,
                )
                if name != "sgd" and not run["diverged"]:
                    lowest = min([lowest, *losses])
                    early.append(losses[len(losses) // 6])
            if early:  # a few seeds that begin badly must not press all others together
                highest = max(highest, median(early))
        adamw = median_loss(fresh_runs(task, "adamw", records))
        axis.axhline(adamw, color="black", linestyle=":", linewidth=0.8)
        margin = 0.05 * (highest - lowest)
        axis.set_ylim(lowest - margin, highest + margin)
        axis.set_title(task)
        axis.set_xlabel("step" if over == "steps" else "CPU seconds, one thread")
        axis.set_ylabel("held-out loss")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _loss_over_rates(search: Search, records: Records) -> list[tuple[float, float]]:
    """Rates and the final loss of the first seed at each, without those that diverged."""
    losses = search.losses(records, search.seeds[:1])
    return [(search.at(p, 0).rate, loss) for p, loss in losses.items() if loss < math.inf]


def rates(records: Records, path: Path) -> None:
    """Loss over the rate, relative to the best rate: how much a wrong guess costs."""
    tasks = _tasks(records)
    figure, axes = _grid(len(tasks))
    for task, axis in zip(tasks, axes, strict=True):
        lowest = []
        for name in studies.MAIN:
            losses = _loss_over_rates(Search.of(task, name), records)
            if losses:
                axis.plot(
                    *zip(*losses, strict=True), ".-", color=COLORS[name], label=ROWS[name].title
                )
                lowest.append(min(loss for _, loss in losses))
        best = min(lowest)
        axis.set_xscale("log")
        axis.set_ylim(best - 0.05 * best, 2 * max(lowest) - best + 0.3 * best)
        axis.set_title(task)
        axis.set_xlabel("learning rate")
        axis.set_ylabel("final loss, seed 0")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def steps_to_target(records: Records, path: Path) -> None:
    """Bars: part of AdamW's steps, and of its CPU time, to AdamW's final loss; a dot a seed."""
    tasks = _tasks(records)
    ran = {name for task in tasks for name in _names(task, records)}
    names = [name for name in studies.MAIN if name in ran and name != "adamw"]
    figure, axes = plt.subplots(
        2, 1, figsize=(1.2 * len(tasks) + 3, 6.5), layout="constrained", sharex=True
    )
    for axis, what, title in ((axes[0], 0, "steps"), (axes[1], 1, "CPU time")):
        for offset, name in enumerate(names):
            for place, task in enumerate(tasks):
                base = fresh_runs(task, "adamw", records)
                runs = fresh_runs(task, name, records)
                if not runs:
                    continue
                hit = median_reached(runs, median_loss(base))
                whole = TASKS[task].steps if what == 0 else _seconds(base)
                width = 0.8 / len(names)
                x = place + width * (offset - len(names) / 2 + 0.5)
                if hit is not None:
                    part = hit[what] / whole
                    axis.bar(x, min(part, TALLEST), 0.9 * width, color=COLORS[name])
                    if part > TALLEST:
                        axis.text(x, TALLEST, f"{part:.1f}", ha="center", va="bottom")
                    hits = [reached(run, median_loss(base)) for run in runs]
                    seeds = [each[what] / whole for each in hits if each is not None]
                    axis.plot([x] * len(seeds), seeds, ".", color="black", markersize=3)
                else:
                    axis.text(x, 0.02, "never", rotation=90, ha="center", fontsize="x-small")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylim(0, TALLEST + 0.15)
        axis.set_ylabel(f"{title} to AdamW's final loss,\nas part of AdamW's")
    axes[1].set_xticks(range(len(tasks)), tasks, rotation=20)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in names]
    titles = [ROWS[name].title for name in names]
    figure.legend(handles, titles, ncols=len(names), loc="outside upper center")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _seconds(runs: list[Record]) -> float:
    return sorted(run["seconds"] for run in runs)[len(runs) // 2]


def transfer(records: Records, path: Path) -> None:
    """Loss over the rate at every width, with muP's rates and without."""
    figure, axes = _grid(2)
    for axis, has_transfer in zip(axes, (False, True), strict=True):
        for width in studies.WIDTHS:
            losses = _loss_over_rates(studies.transfer(width, has_transfer), records)
            if losses:
                axis.plot(*zip(*losses, strict=True), ".-", label=f"width {width}")
        axis.set_xscale("log")
        axis.set_title("muP's rates" if has_transfer else "the same rate for all")
        axis.set_xlabel("learning rate")
        axis.set_ylabel("final loss, seed 0")
        axis.legend()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw(records: Records, folder: Path = FIGURES) -> list[Path]:
    """All plots for which there are runs."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    if _tasks(records):
        for over in ("steps", "seconds"):
            made.append(folder / f"loss_over_{over}.png")
            curves(records, over, made[-1])
        made.append(folder / "loss_over_rates.png")
        rates(records, made[-1])
        made.append(folder / "steps_to_target.png")
        steps_to_target(records, made[-1])
    if any(studies.transfer(width, True).losses(records, (0,)) for width in studies.WIDTHS):
        made.append(folder / "transfer.png")
        transfer(records, made[-1])
    return made
