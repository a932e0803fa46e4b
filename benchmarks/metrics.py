"""What ``record_metrics()`` takes of a step, on a CPU: twins in one process, step by step in turns.

    python -m benchmarks.metrics [--model transformer-512] [--periods 20] [--every 10]

One twin is not asked for metrics, one is asked every n-th step. Both refresh their roots every
tenth step, so that a period has steps of every kind. CPU seconds, since a machine may be shared;
for every place in the period the median over periods of what the two differ by; their sum is what
metrics cost in a period. Printed in percent of ordinary steps, the twin's own without a refresh.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch.nn import Parameter

from benchmarks.machine import describe
from benchmarks.shapes import MODELS
from shampoo import Shampoo

PERIOD = 10  # of refreshes

Pairs = list[tuple[float, float]]


def make(shapes: Sequence[tuple[int, ...]], block: int) -> Shampoo:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 1e-3
    return Shampoo(params, max_preconditioner_dim=block, precondition_frequency=PERIOD)


def seconds(opt: Shampoo) -> float:
    """CPU seconds of one step."""
    start = time.process_time()
    opt.step()
    return time.process_time() - start


def measure(off: Shampoo, on: Shampoo, periods: int, length: int) -> list[Pairs]:
    """For every place in a period the seconds of both, [length][periods]."""
    found: list[Pairs] = [[] for _ in range(length)]
    for period in range(-2, periods):  # the first two make memory and first roots
        for place in range(length):
            if (period + place) % 2:
                pair = seconds(off), seconds(on)
            else:
                pair = (seconds(on), seconds(off))[::-1]
            if period >= 0:
                found[place].append(pair)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.metrics", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="transformer-512")
    parser.add_argument("--periods", type=int, default=20)
    parser.add_argument("--every", type=int, default=10)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = MODELS[options.model]()
    off, on = make(model.shapes, model.block), make(model.shapes, model.block)
    on.record_metrics(every=options.every)
    # Steps 1 .. 10 of a period: the last refreshes, and is measured where every tenth is.
    found = measure(off, on, options.periods, PERIOD)
    differences = [statistics.median(b - a for a, b in pairs) for pairs in found]
    ordinary = statistics.median(a for pairs in found[:-1] for a, _ in pairs)
    refreshing = statistics.median(a for a, _ in found[-1])
    print(f"{model.name}: {len(model.shapes)} tensors, {model.numel:,} parameters")
    print(f"ordinary step {ordinary * 1e3:.3f} ms, with a refresh {refreshing * 1e3:.3f} ms")
    print(f"differences by place, us: {', '.join(f'{each * 1e6:.0f}' for each in differences)}")
    total = sum(differences)
    print(f"metrics every {options.every} steps: {total * 1e3:.3f} ms in {PERIOD} steps,")
    print(f"{total / PERIOD / ordinary:.2%} of an ordinary step")
    facts = describe(torch.device("cpu"))
    print(f"{facts['name']}, torch {facts['torch']}, one thread, commit {facts['commit']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
