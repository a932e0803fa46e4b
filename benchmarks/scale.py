"""Simulates the optimizer on up to 4096 ranks and writes what it finds as a document.

    python -m benchmarks.scale [--models resnet50 llama-7b] [--ranks 8 64] [--out docs/scaling.md]

Nothing is measured here. Blocks, owners and bytes are those of the package's own plan; seconds come
from its cost model, once with nominal constants of an accelerator and once with constants measured
by ``benchmarks.calibrate``.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import chart
from shampoo import plan
from shampoo.blocks.cost import CostModel
from shampoo.planner.architectures import ARCHITECTURES
from shampoo.planner.report import PlanReport

ROOT = Path(__file__).parents[1]
MODELS = ("resnet50", "vit-l16", "llama-7b", "llama-70b")
RANKS = (8, 64, 512, 4096)
BLOCK, FREQUENCY, SHARDS = 1024, 50, 64  # of HSDP, SHARDS ranks share a copy

HEAD = """# Scaling, simulated

Written by `{command}`: edit `benchmarks/scale.py`, not this file.

**Nothing here was measured on more than one rank.** Blocks, owners and bytes are computed by the
package's own code for these shapes, and tests compare them with the plan of the optimizer on ranks
of a fake process group. Seconds are predictions of its cost model.

- Block size {block}, roots every {frequency} steps, Adam grafting; bfloat16 parameters, gradients
  and directions, float32 statistics. Every matrix is preconditioned, embeddings included,
  by full factors (`large_dim_method="blocking"`).
- Nominal constants: {nominal}.
  Links: 350 GB/s a rank inside a node of 8, 40 GB/s across. All of the exchange is counted, as if
  no other work hid it, but not its latency: on thousands of ranks an all-to-all has a kB or
  less for each peer and takes longer than its bytes.
- Calibrated constants: {calibrated}
  (`python -m benchmarks.calibrate`), with the same links and owners. They say how the work scales
  where arithmetic is dear, not how long an accelerator takes, which has not been measured yet.

| column | meaning |
|---|---|
| imbalance | largest over mean compute of the ranks that share the blocks |
| state | `optimizer.state` of the busiest rank |
| received | bytes a step on the busiest rank, beyond what the layout moves anyway |
| mean, worst | the optimizer's step over a period in which all roots are refreshed in one step |
| staggered | the worst step when roots are spread over rank-aligned slots |
| recommended | the largest block size of 512 to 4096 that balances and costs no more than {block} |

DDP shares the blocks among the ranks of a node and does the same work in every node, so it has one
row. FSDP2 and HSDP share them among all ranks.

![imbalance, state, traffic and step time over ranks]({picture})

## What it says

- Blocks, not tensors, are what is shared, so compute stays balanced while every rank has several:
  Llama 7B to 512 ranks and 70B to 4096. A small model runs out of blocks: ResNet-50 has 61 with
  factors, and most of 64 ranks would idle. It should stay with DDP and groups of a node.
- Under FSDP2, state, compute and traffic fall with the number of ranks. HSDP receives more, since a
  direction goes to every copy of its rows; that is the price of fewer ranks for each row.
- One step in {frequency} refreshes all roots and takes about ten times the mean. Staggering brings
  the worst step to the mean, as long as a rank has dozens of blocks.
"""

TABLE = """
## {name}

{numel:,} parameters, {blocks:,} blocks, {factored:,} of them with factors.

| layout | ranks | imbalance | state, MiB | received, MiB | mean, ms | worst, ms | staggered, ms \
| calibrated mean, s | recommended |
|---|---|---|---|---|---|---|---|---|---|
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="benchmarks.scale", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--models", nargs="+", choices=tuple(ARCHITECTURES), default=MODELS)
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument(
        "--cost-model",
        type=Path,
        default=ROOT / "benchmarks/results/cost_amd_epyc_2_cores.json",
        help="of the calibrated column",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/scaling.md")
    options = parser.parse_args(arguments)
    if min(options.ranks) < 1:
        parser.error(f"Invalid --ranks={min(options.ranks)}. Must be >= 1.")
    return options


def layouts(ranks: int, *, first: bool) -> Iterator[tuple[str, int]]:
    """The layouts worth a row at a number of ranks, with their replicas."""
    if first:
        yield "ddp", 1
    yield "fsdp2", 1
    if ranks > SHARDS and ranks % SHARDS == 0:
        yield "hsdp", ranks // SHARDS


def predict(
    name: str, ranks: int, layout: str, replicas: int, model: CostModel | None, *, recommend: bool
) -> PlanReport:
    """One simulated configuration."""
    blocks = {} if recommend else {"block_candidates": ()}
    return plan(
        ARCHITECTURES[name]().shapes,
        ranks,
        layout=layout,
        replicas=replicas,
        parameter_dtype=torch.bfloat16,
        communication_dtype=torch.bfloat16,
        cost_model=model,
        max_preconditioner_dim=BLOCK,
        precondition_frequency=FREQUENCY,
        large_dim_method="blocking",
        **blocks,
    )


def row(report: PlanReport, calibrated: PlanReport) -> str:
    """A line of a table."""
    names = {
        "ddp": f"DDP, groups of {report.owners}",
        "fsdp2": "FSDP2",
        "hsdp": f"HSDP, shards of {SHARDS}",
    }
    cells = (
        names[report.layout],
        f"{report.world_size:,}{' or more' * (report.layout == 'ddp')}",
        f"{report.compute_imbalance:.2f}",
        f"{max(report.state_bytes) / 2**20:,.1f}",
        f"{max(report.traffic_bytes) / 2**20:,.1f}",
        f"{report.together.mean * 1e3:.2f}",
        f"{report.together.worst * 1e3:.2f}",
        f"{report.staggered.worst * 1e3:.2f}",
        f"{calibrated.together.mean:.3g}",
        f"{report.recommended_block}",
    )
    return f"| {' | '.join(cells)} |\n"


def main(arguments: Sequence[str]) -> int:
    """Simulates, and writes the document and the picture beside it."""
    options = parse(arguments)
    measured = CostModel.load(options.cost_model)
    picture = options.out.with_suffix(".png")
    text = HEAD.format(
        command=" ".join(["python -m benchmarks.scale", *arguments]),
        block=BLOCK,
        frequency=FREQUENCY,
        nominal=CostModel().machine,
        calibrated=measured.machine,
        picture=picture.name,
    )
    reports: dict[str, list[PlanReport]] = {}
    for name in options.models:
        lines = []
        for ranks in options.ranks:
            for layout, replicas in layouts(ranks, first=ranks == options.ranks[0]):
                case = (name, ranks, layout, replicas)
                report = predict(*case, None, recommend=True)
                lines.append(row(report, predict(*case, measured, recommend=False)))
                reports.setdefault(name, []).append(report)
        title = {"blocks": report.blocks, "factored": report.factored_blocks}
        text += TABLE.format(name=name, numel=report.numel, **title) + "".join(lines)
        print(f"{name}: {len(lines)} configurations")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    chart.save_scaling(reports, picture)
    print(f"wrote {options.out} and {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
