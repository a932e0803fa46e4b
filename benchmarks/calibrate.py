"""Measures what the planner's cost model needs to know about this machine.

    python -m benchmarks.calibrate [--device cpu|cuda] [--threads 2] [--json PATH]

For stacks of square blocks of several sides: the factor update and the apply in seconds a FLOP, and
refreshed roots, probe included, in seconds; of every method, but the model takes ``auto``. Memory:
the bandwidth of a copy. Each is the fastest call of ``--rounds`` rounds, which lie apart in time so
that a neighbour's burst of work does not decide; the other methods have one round.

The JSON is what ``python -m shampoo plan --cost-model`` reads. Where ``benchmarks.step_time`` has
left its results for this machine, predicted steps are printed beside measured ones.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.shapes import MODELS
from shampoo import ops, plan
from shampoo.blocks.cost import CostModel
from shampoo.certificates.timing import Clock
from shampoo.roots.methods import ROOT_METHODS
from shampoo.roots.refresh import refresh_roots_

RESULTS = Path(__file__).parent / "results"
SIDES = {"cpu": (32, 64, 128, 256, 512, 1024), "cuda": (64, 128, 256, 512, 1024, 2048)}
ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}  # of a stack, as segments have them

COPIED = {"cpu": 1 << 26, "cuda": 1 << 28}  # elements


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="benchmarks.calibrate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--sides", type=int, nargs="+", help="of the blocks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.1, help="a measurement and round (0.1)")
    parser.add_argument("--threads", type=int, help="torch threads (torch's own choice)")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/cost_<device>.json")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("Invalid --device=cuda: torch sees no GPU. Use --device cpu.")
    options.sides = sorted(set(options.sides or SIDES[options.device]))
    if options.sides[0] < 1:
        parser.error(f"Invalid --sides={options.sides[0]}. Must be >= 1.")
    if options.rounds < 1:
        parser.error(f"Invalid --rounds={options.rounds}. Must be >= 1.")
    options.json = options.json or RESULTS / f"cost_{_slug(options.device)}.json"
    return options


def _slug(device: str) -> str:
    return re.sub(r"\W+", "_", machine.device_name(torch.device(device))).strip("_").lower()


class Stack:
    """Square blocks of one side, with everything a step does to them."""

    def __init__(self, side: int, device: torch.device) -> None:
        self.side = side
        self.count = max(torch.get_num_threads(), ELEMENTS[device.type] // side**2)
        generator = torch.Generator(device).manual_seed(side)
        shape = (self.count, side, side)
        self.grad = torch.randn(shape, device=device, generator=generator)
        self.out = torch.empty_like(self.grad)
        self.norm = torch.empty(self.count, device=device)
        self.factor = self.grad @ self.grad.mT / side
        self.root = torch.zeros_like(self.factor)
        self.failures = torch.zeros(self.count, dtype=torch.int32, device=device)
        self.ready = torch.zeros(self.count, dtype=torch.bool, device=device)
        # Not all: a few take as long each, and coupled Newton takes seconds for one of side 1024.
        self.roots = min(self.count, max(torch.get_num_threads(), 2048 // side))

    def accumulate(self) -> None:
        """Updates the factors of both modes: ``2 B d^3`` FLOPs."""
        for mode in range(2):
            ops.gram_ema_([self.factor], [self.grad], [mode], 0.5, 0.5)

    def apply(self) -> None:
        """Applies a root to both modes: ``4 B d^3`` FLOPs."""
        ops.precondition_([self.out], [self.norm], [self.grad], [self.factor, self.factor])

    def refresh(self, method: str) -> None:
        """Refreshes ``self.roots`` roots of power 4."""
        rows = slice(self.roots)
        refresh_roots_(
            self.root[rows],
            self.factor[rows],
            self.failures[rows],
            self.ready[rows],
            p=4,
            correction=1.0,
            eps=1e-12,
            relative_eps=1e-6,
            method=method,
        )


def fastest(call: Callable[[], object], clock: Clock, seconds: float) -> float:
    """The fastest of the calls that fit into ``seconds``, after one that is not counted."""
    call()
    samples = [clock.time(call)]
    while sum(samples) < seconds:
        samples.append(clock.time(call))
    return min(samples)


def measure_side(side: int, clock: Clock, seconds: float) -> dict[str, float]:
    """Seconds a FLOP of ``accumulate`` and ``apply``, and of one root."""
    stack = Stack(side, clock.device)
    flops = stack.count * side**3
    return {
        "accumulate": fastest(stack.accumulate, clock, seconds) / (2 * flops),
        "apply": fastest(stack.apply, clock, seconds) / (4 * flops),
        "auto": measure_root(side, "auto", clock, seconds),
    }


def measure_root(side: int, method: str, clock: Clock, seconds: float) -> float:
    """Seconds of one root by a method."""
    stack = Stack(side, clock.device)
    return fastest(partial(stack.refresh, method), clock, seconds) / stack.roots


def measure_copy(clock: Clock, seconds: float) -> float:
    """Seconds to move a byte in a copy far larger than any cache, read and written."""
    source = torch.ones(COPIED[clock.device.type], device=clock.device)
    target = torch.empty_like(source)
    traffic = 2 * source.numel() * source.element_size()
    return fastest(lambda: target.copy_(source), clock, seconds) / traffic


def measure(
    device: torch.device, sides: Sequence[int], rounds: int, seconds: float
) -> dict[str, Any]:
    """The contents of the JSON: machine, cost model, roots by method and side."""
    ops.load_kernels(required=False)
    clock = Clock(device)
    facts = machine.describe(device)
    passes = [{side: measure_side(side, clock, seconds) for side in sides} for _ in range(rounds)]
    best = {
        side: {name: min(times[side][name] for times in passes) for name in passes[0][side]}
        for side in sides
    }
    roots = {
        method: {side: measure_root(side, method, clock, seconds) for side in sides}
        for method in ROOT_METHODS
        if method != "auto"
    }
    roots["auto"] = {side: best[side]["auto"] for side in sides}
    model = CostModel(
        accumulate=tuple((side, best[side]["accumulate"]) for side in sides),
        apply=tuple((side, best[side]["apply"]) for side in sides),
        root=tuple((side, best[side]["auto"] / side**3) for side in sides),
        byte=min(measure_copy(clock, seconds) for _ in range(rounds)),
        machine=f"{facts['name']}, {facts['threads']} threads, torch {facts['torch']}, measured",
    )
    return {"machine": facts, "cost_model": model.to_json(), "roots_s": roots}


def predicted(row: dict[str, Any], model: CostModel) -> tuple[float, float]:
    """Seconds of the ordinary and the root step that a row of ``benchmarks.step_time`` measured."""
    report = plan(
        MODELS[row["model"]]().shapes,
        1,
        max_preconditioner_dim=row["block"],
        precondition_frequency=row["refresh"],
        cost_model=model,
        block_candidates=(),
    )
    step, refresh = report.together, row["refresh"]
    return (step.mean * refresh - step.worst) / (refresh - 1), step.worst


def main(arguments: Sequence[str]) -> int:
    """Measures, prints and writes the JSON."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if machine.is_busy():
        print("This machine is busy: the constants will be too large. Run again when it is idle.")
    device = torch.device(options.device)
    found = measure(device, options.sides, options.rounds, options.seconds)
    found["machine"]["command"] = machine.command("benchmarks.calibrate", arguments)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    model = CostModel.load(options.json)
    print(f"{model.machine}; copy {1e-9 / model.byte:.1f} GB/s")
    print("  side  accumulate, apply in GFLOP/s; ms a root by", ", ".join(ROOT_METHODS))
    for (side, accumulate), (_, apply) in zip(model.accumulate, model.apply, strict=True):
        times = (f"{found['roots_s'][method][side] * 1e3:10.3g}" for method in ROOT_METHODS)
        print(f"{side:6} {1e-9 / accumulate:12.1f} {1e-9 / apply:8.1f} {' '.join(times)}")
    steps = RESULTS / f"step_time_{_slug(options.device)}.json"
    for row in json.loads(steps.read_text()) if steps.is_file() else []:
        ordinary, root = predicted(row, model)
        print(
            f"{row['model']}, block {row['block']}: ordinary step {ordinary * 1e3:.3g} ms"
            f" predicted, {row['ordinary_s']['p50'] * 1e3:.3g} measured; root step"
            f" {root * 1e3:.4g} and {row['root_s']['p50'] * 1e3:.4g}"
        )
    print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
