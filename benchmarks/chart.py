"""The pictures beside the numbers, drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import matplotlib
except ImportError as error:
    raise SystemExit(f"Charts need matplotlib ({error}): pip install -e '.[bench]'") from None

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from shampoo.planner.report import PlanReport

KINDS = (("ordinary", "#4c78a8"), ("amortised", "#72b7b2"), ("root", "#e45756"))


def save_step_times(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of the ordinary, amortised and root step in multiples of AdamW, and the floor."""
    figure, axes = plt.subplots(figsize=(2.5 + 2.3 * len(rows), 4.8), layout="constrained")
    width = 0.26
    for index, (kind, color) in enumerate(KINDS):
        places = [place + (index - 1) * width for place in range(len(rows))]
        heights = [row[f"{kind}_over_base"] for row in rows]
        bars = axes.bar(places, heights, width, color=color, label=f"Shampoo, {kind} step")
        axes.bar_label(bars, [f"{height:.3g}x" for height in heights], fontsize=8, padding=2)
    for place, row in enumerate(rows):
        base = row["baselines_s"][row["base"]]["p50"]
        bound = row["floor_s"]["floor"] / base
        ends = (place - 1.5 * width, place - 0.5 * width)
        axes.hlines(bound, *ends, color="black", label="" if place else "floor of ordinary")
        for name, times in row["baselines_s"].items():
            style = "-" if name == row["base"] else ":"
            axes.hlines(
                times["p50"] / base,
                place - 1.6 * width,
                place + 1.6 * width,
                color="gray",
                linestyle=style,
                label="" if place else name,
            )
    axes.set_yscale("log")
    axes.set_xticks(range(len(rows)), [f"{row['model']}\nblock {row['block']}" for row in rows])
    machine, refresh = rows[0]["machine"], rows[0]["refresh"]
    axes.set_ylabel(f"time of a step / {rows[0]['base']} (log)")
    axes.set_title(
        f"{machine['name']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"root step every {refresh}",
        fontsize=9,
    )
    axes.margins(y=0.12)
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    _save(figure, path)


def save_scaling(reports: Mapping[str, Sequence[PlanReport]], path: Path) -> None:
    """Four panels over the number of ranks: a color a model, a line style a layout."""
    panels = (
        ("compute, largest / mean", lambda report: report.compute_imbalance),
        ("state of the busiest rank, GiB", lambda report: max(report.state_bytes) / 2**30),
        ("received a step, MiB", lambda report: max(report.traffic_bytes) / 2**20),
        ("mean step, nominal constants, ms", lambda report: report.together.mean * 1e3),
    )
    ranks = sorted({report.world_size for found in reports.values() for report in found})
    figure, grid = plt.subplots(2, 2, figsize=(10, 7.6), layout="constrained")
    for axes, (label, value) in zip(grid.flat, panels, strict=True):
        for color, (name, found) in enumerate(reports.items()):
            for layout, style in (("fsdp2", "-"), ("hsdp", "--")):
                chosen = [report for report in found if report.layout == layout]
                places = [report.world_size for report in chosen]
                heights = [value(report) for report in chosen]
                look = {"marker": "o", "markersize": 4, "color": f"C{color}"}
                axes.plot(places, heights, style, label=f"{name}, {layout}", **look)
            for report in found:
                if report.layout == "ddp":
                    axes.axhline(value(report), ls=":", color=f"C{color}", label=f"{name}, ddp")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [f"{count}" for count in ranks])
        axes.set_yscale("log")
        axes.set_xlabel("ranks")
        axes.set_ylabel(label)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=4, loc="outside lower center", frameon=False)
    figure.suptitle("simulated: exact blocks and bytes, predicted seconds", fontsize=10)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
