"""The pictures beside the numbers, drawn without a display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

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


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
