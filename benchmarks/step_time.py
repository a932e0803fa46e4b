"""Time of one optimizer step, Shampoo against AdamW, on the parameter shapes of real models.

    python -m benchmarks.step_time [--device cpu|cuda] [--models mlp resnet50 | all] [--small] ...

All optimizers step in turn in one run, on equal parameters and gradients. *Ordinary* steps and
*root* steps (one in ``--refresh``) are reported apart: a median alone would hide the root steps.
*Amortised* is the measured mean over whole periods. ``benchmarks/floor.py`` says what the floor is.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import chart, contest, floor, machine
from benchmarks.shapes import MODELS, Model, shrunk
from shampoo import Shampoo

RESULTS = Path(__file__).parent / "results"
SUBSET = ("transformer-512", "mlp", "vit-b16-layer")  # what two CPU cores do in two minutes
DEFAULTS = {"cpu": SUBSET, "cuda": tuple(MODELS)}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="benchmarks.step_time", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument(
        "--models",
        nargs="+",
        choices=[*MODELS, "all"],
        help=f"default: {' '.join(SUBSET)} on a CPU, all on a GPU",
    )
    parser.add_argument("--refresh", type=int, default=10, help="precondition_frequency (10)")
    parser.add_argument("--block", type=int, help="max_preconditioner_dim (256 or 1024, by model)")
    parser.add_argument("--root-method", default="auto")
    parser.add_argument(
        "--grafted-embeddings", action="store_true", help="no factors for embeddings"
    )
    parser.add_argument("--threads", type=int, help="torch threads (torch's own choice)")
    parser.add_argument("--seconds", type=float, default=12.0, help="measured, a model (12)")
    parser.add_argument("--periods", type=int, default=3, help="measured at least (3)")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/step_time_<device>")
    parser.add_argument("--plot", type=Path, help="default: the JSON's path, as .png")
    parser.add_argument("--small", action="store_true", help="sizes / 16, one period: a smoke test")
    options = parser.parse_args(arguments)
    if options.refresh < 2:
        parser.error(
            f"Invalid --refresh={options.refresh}. Must be >= 2: ordinary steps lie between roots."
        )
    if options.block is not None and options.block < 1:
        parser.error(f"Invalid --block={options.block}. Must be >= 1.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("Invalid --device=cuda: torch sees no GPU. Use --device cpu.")
    chosen = options.models or DEFAULTS[options.device]
    options.models = list(MODELS) if "all" in chosen else list(dict.fromkeys(chosen))
    if options.small:
        options.seconds, options.periods = 0.0, 1
    name = re.sub(r"\W+", "_", machine.device_name(torch.device(options.device))).strip("_").lower()
    options.json = options.json or RESULTS / f"step_time_{name}.json"
    options.plot = options.plot or options.json.with_suffix(".png")
    return options


def shampoo_factory(block: int, options: argparse.Namespace) -> contest.Factory:
    """Shampoo with its defaults but for block size, refresh, root method and full factors.

    The floor counts these, thin matrices included, and peers have them.
    """

    def build(groups: contest.Groups) -> torch.optim.Optimizer:
        return Shampoo(
            groups,
            betas=contest.betas(options.refresh),
            max_preconditioner_dim=block,
            precondition_frequency=options.refresh,
            root_method=options.root_method,
            large_dim_method="blocking",
        )

    return build


def measure(
    models: Sequence[tuple[Model, int]], options: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    """One row a model, as many as fit into memory."""
    device = torch.device(options.device)
    plan = contest.Plan(
        device, options.refresh, options.grafted_embeddings, options.seconds, options.periods
    )
    facts = {**machine.describe(device), "command": options.command}
    if machine.is_busy():
        console.print(
            f"This machine is busy (load {facts['load']:.1f} on {os.cpu_count()} cores): times and"
            " ratios will be noisy. Run again when it is idle."
        )
    rates = floor.measure_rates(device, sorted({block for _, block in models}))
    console.print(
        f"{machine.device_name(device)}, {torch.get_num_threads()} threads, torch"
        f" {torch.__version__}: copy {rates.copy / 1e9:.1f} GB/s, in place"
        f" {rates.bandwidth / 1e9:.1f} GB/s, fp32 product {rates.flops / 1e9:.0f} GFLOP/s"
    )
    rows = []
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        for model, block in models:
            needed, free = contest.bytes_needed(model, block), machine.free_bytes(device)
            if needed > free:
                console.print(f"{model.name}: skipped, needs {needed:.2g} bytes of {free:.2g}")
                continue
            task = progress.add_task(model.name, total=1.0)

            def show(phase: str, part: float, name: str = model.name, task: Any = task) -> None:
                progress.update(task, description=f"{name}: {phase}", completed=part)

            factory = shampoo_factory(block, options)
            row = contest.row(model, block, factory, plan, rates, after_round=show)
            progress.remove_task(task)
            console.print(
                f"{model.name}: ordinary {_ms(row['ordinary_s']['p50'])} ms, root"
                f" {_ms(row['root_s']['p50'])} ms, over {row['root_s']['samples']} periods"
            )
            rows.append({**row, "root_method": options.root_method, "machine": facts})
    return rows


def times_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Milliseconds of every kind of step."""
    table = Table(title="Time of a step in ms: p20 / median / p80")
    table.add_column("model", no_wrap=True)
    for name in ("parameters", "block", "ordinary step", "root step", "amortised"):
        table.add_column(name, justify="right")
    for name in contest.BASELINES:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['parameters']:,}",
            str(row["block"]),
            _spread(row["ordinary_s"]),
            _spread(row["root_s"]),
            _ms(row["amortised_s"]),
            *(_spread(row["baselines_s"][name]) for name in contest.BASELINES),
        )
    return table


def _spread(times: dict[str, float]) -> str:
    return " / ".join(_ms(times[level]) for level in ("p20", "p50", "p80"))


def _ms(seconds: float) -> str:
    """Milliseconds, three digits or all before the point."""
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def ratios_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Ratios to AdamW, bytes of state, and the floor."""
    table = Table(
        title=f"Against {rows[0]['base']}, and against the floor (floor: symmetric factor products;"
        " full: general ones; overlapped: bytes hidden behind products)"
    )
    table.add_column("model", no_wrap=True)
    for name in (
        *("ordinary / AdamW", "root / AdamW", "amortised / AdamW", "state B/param"),
        *("all held B/param", "formula B/param", "floor ms", "time / floor", "/ full"),
        "/ overlapped",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        over = row["ordinary_over_floor"]
        table.add_row(
            row["model"],
            *(f"{row[f'{kind}_over_base']:.2f}" for kind in ("ordinary", "root", "amortised")),
            *(f"{row[f'{kind}_bytes_per_parameter']:.2f}" for kind in ("state", "held", "formula")),
            _ms(row["floor_s"]["floor"]),
            *(f"{over[bound]:.2f}" for bound in ("floor", "full", "overlapped")),
        )
    return table


def targets(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The targets for two CPU cores, each met or not, for the rows that ran as they state."""
    lines = []
    for row in rows:
        if (row["machine"]["device"], row["block"], row["refresh"]) != ("cpu", 256, 10):
            continue
        checks = {
            "transformer-512": [
                ("ordinary step / AdamW(foreach)", row["ordinary_over_base"], 5.5),
                ("ordinary step / floor", row["ordinary_over_floor"]["floor"], 1.5),
            ],
            "mlp": [("amortised step / AdamW(foreach)", row["amortised_over_base"], 12.0)],
        }
        for what, value, bound in checks.get(row["model"], []):
            verdict = "met" if value <= bound else "NOT MET"
            lines.append(f"target: {row['model']}: {what} <= {bound}: {value:.2f}, {verdict}")
    return lines


def main(arguments: Sequence[str]) -> int:
    """Measures, prints, writes JSON and PNG; the exit status."""
    options = parse(arguments)
    options.command = machine.command("benchmarks.step_time", arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console() if sys.stdout.isatty() else Console(width=150)
    models = []
    for name in options.models:
        model = shrunk(MODELS[name]()) if options.small else MODELS[name]()
        models.append((model, options.block or model.block))
    rows = measure(models, options, console)
    if not rows:
        console.print("Nothing was measured: no model fits into memory. Choose smaller --models.")
        return 1
    console.print(times_table(rows), ratios_table(rows), sep="\n")
    for line in [] if options.small else targets(rows):
        console.print(line)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    chart.save_step_times(rows, options.plot)
    console.print(f"wrote {options.json} and {options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
