"""What a step pays where gradients come and go, and for noticing what others do to its state.

``python -m benchmarks.presence`` prints, for some numbers of small matrices, a step in which all
have gradients, one in which another random half has them each time, and the share of a step that
goes into the question if ``optimizer.state`` still shows what trains. Matrices are small on
purpose: the work that does not depend on their size is what is asked for.
"""

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import Parameter

from benchmarks.machine import describe, is_busy
from shampoo import Shampoo
from shampoo.certificates.timing import Clock, interleaved, quantiles


class Matrices:
    """An optimizer of equal matrices, with gradients that are drawn once.

    Args:
        count: of matrices.
        side: of each.
        share: of them with a gradient in a step, another choice for every step if less than 1.
    """

    def __init__(self, count: int, side: int, share: float) -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(2, side, side, generator=generator) for _ in range(count)]
        self.params = [Parameter(weight.clone()) for weight, _ in drawn]
        self.grads = [grad.clone() for _, grad in drawn]
        # No root is ever refreshed: all steps are alike.
        self.optimizer = Shampoo(self.params, start_preconditioning_step=math.inf)
        self._share, self._generator = share, generator
        self.draw(share=1.0)
        self.optimizer.step()

    def draw(self, share: float | None = None) -> None:
        """Chooses who has a gradient in the next step."""
        drawn = torch.rand(len(self.params), generator=self._generator)
        here = (drawn < (self._share if share is None else share)).tolist()
        for param, grad, is_here in zip(self.params, self.grads, here, strict=True):
            param.grad = grad if is_here else None

    def notice(self) -> bool:
        """What a step does to find out if ``optimizer.state`` shows what trains."""
        plan = self.optimizer._plan
        return plan is not None and plan.is_intact(self.optimizer.state)


def measure(count: int, side: int, rounds: int) -> dict[str, float]:
    """Median seconds of each variant, in one interleaved run."""
    steady, changing = Matrices(count, side, 1.0), Matrices(count, side, 0.5)
    variants: dict[str, Callable[[], object]] = {
        "steady": steady.optimizer.step,
        "changing": changing.optimizer.step,
        "noticing": steady.notice,
    }

    def prepare(name: str) -> None:
        if name == "changing":
            changing.draw()

    clock = Clock(torch.device("cpu"))
    interleaved(variants, clock, rounds=10, before_call=prepare)
    samples = interleaved(variants, clock, rounds=rounds, before_call=prepare)
    return {name: quantiles(times).p50 for name, times in samples.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.presence", description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[64, 400, 500, 1000])
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console()
    facts = describe(torch.device("cpu"))
    console.print(f"{facts['name']}, torch {facts['torch']}, one thread, commit {facts['commit']}")
    if is_busy():
        console.print(f"[yellow]the machine is busy (load {facts['load']:.1f})[/yellow]")
    table = Table(title=f"matrices of {options.side} x {options.side}, ordinary steps, medians")
    for column in ("matrices", "same set", "another half each step", "ratio", "noticing", "share"):
        table.add_column(column, justify="right")
    for count in options.counts:
        found = measure(count, options.side, options.rounds)
        table.add_row(
            str(count),
            f"{found['steady'] * 1e3:.2f} ms",
            f"{found['changing'] * 1e3:.2f} ms",
            f"{found['changing'] / found['steady']:.2f}",
            f"{found['noticing'] * 1e6:.0f} us",
            f"{found['noticing'] / found['steady']:.1%}",
        )
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
