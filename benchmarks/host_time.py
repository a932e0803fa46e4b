"""What the host does in an ordinary step, with next to nothing to compute: 161 tiny tensors.

    python -m benchmarks.host_time [--against CHECKOUT]

As many as ResNet-50 has parameters. Prints the microseconds of a step, the median of several
processes, for AdamW (foreach) and for Shampoo with a learning rate that stands and with one that
moves at every step, as schedules move it. With ``--against``, the same is measured of another
checkout of this repository, process by process in turns, and the ratio is printed.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import Parameter

from benchmarks.machine import describe, is_busy
from shampoo.certificates.timing import Clock, interleaved, quantiles

ROOT = Path(__file__).parents[1]
VECTORS, MATRICES = 107, 54  # of ResNet-50: batch norms and biases, convolutions and the head
SIDE = 4
NAMES = ("AdamW", "Shampoo", "Shampoo, lr moves")


def measure(rounds: int) -> list[float]:
    """Median seconds of a step, in the order of :data:`NAMES`."""
    from shampoo import Shampoo  # here, so that it is that of the checkout that PYTHONPATH names

    def params() -> list[Parameter]:
        shapes = [(SIDE,)] * VECTORS + [(SIDE, SIDE)] * MATRICES
        found = [Parameter(torch.randn(shape)) for shape in shapes]
        for param in found:
            param.grad = torch.randn_like(param)
        return found

    rootless = {"start_preconditioning_step": math.inf}  # nor a refresh in what is measured
    adamw = torch.optim.AdamW(params(), foreach=True)
    still, moving = Shampoo(params(), **rootless), Shampoo(params(), **rootless)

    def moved() -> None:
        moving.param_groups[0]["lr"] *= 0.999
        moving.step()

    variants = dict(zip(NAMES, (adamw.step, still.step, moved), strict=True))
    clock = Clock(torch.device("cpu"))
    interleaved(variants, clock, rounds=20)
    samples = interleaved(variants, clock, rounds=rounds)
    return [quantiles(samples[name]).p50 for name in NAMES]


def in_process(checkout: Path, rounds: int) -> list[float]:
    """The same, in a process that imports the package of a checkout."""
    environment = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{ROOT}"}
    command = [sys.executable, __file__, "--once", "--rounds", str(rounds)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    return [float(line) for line in done.stdout.split()]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=__doc__)
    parser.add_argument("--against", type=Path, help="root of another checkout")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--processes", type=int, default=7)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.once:
        print(*measure(options.rounds))
        return 0
    facts, busy = describe(torch.device("cpu")), is_busy()
    checkouts = [ROOT] + ([options.against.resolve()] if options.against else [])
    runs: list[list[list[float]]] = [[] for _ in checkouts]
    for _ in range(options.processes):
        for found, checkout in zip(runs, checkouts, strict=True):
            found.append(in_process(checkout, options.rounds))
    medians = [
        [statistics.median(run[index] for run in found) for index in range(len(NAMES))]
        for found in runs
    ]
    table = Table(title=f"host time of a step of {VECTORS + MATRICES} tensors, us")
    for column in ("", "here", *(("there", "here / there") if options.against else ())):
        table.add_column(column, justify="right")
    for index, name in enumerate(NAMES):
        values = [each[index] for each in medians]
        cells = [f"{value * 1e6:.0f}" for value in values]
        cells += [f"{values[0] / values[1]:.2f}"] if options.against else []
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    console.print(f"{facts['name']}, torch {facts['torch']}, one thread, commit {facts['commit']}")
    if busy:
        console.print("[yellow]The machine was busy before: do not quote these numbers.[/yellow]")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
