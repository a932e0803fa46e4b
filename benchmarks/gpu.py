"""The GPU command: builds, tests and measures everything on one card, within eight minutes.

    python -m benchmarks.gpu [--write-table] [--json PATH] [--budget-seconds 450]
    python -m benchmarks.gpu --device cpu --small        # a dry run of all of it, anywhere

Writes ``benchmarks/results/gpu_<card>.json`` after every row: a run that is ended keeps what it
has. Rows are measured in another process (:mod:`benchmarks.worker`): a kernel that hangs or
breaks the CUDA context costs its row. What does not fit into the budget is written as skipped.

``--write-table`` adopts what was measured: of every op and size the fastest kernel that passed its
check goes into ``shampoo/ops/backends.json``, which ``SHAMPOO_BACKEND=auto`` follows before the
times of a certificate. Rows of whole steps and training iterations are taken with these choices,
adopted or not, of kernels that have a certificate, which the first of them makes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import kernels, machine, peers, roofline, suite
from benchmarks.worker import Worker
from shampoo.ops import backends

RESULTS = Path(__file__).parent / "results"
SHIPPED = Path(backends.__file__).with_name("backends.json")
SKIPPED = "skipped: budget"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, few samples: a dry run")
    parser.add_argument("--budget-seconds", type=float, default=450.0)
    parser.add_argument("--sections", nargs="+", choices=suite.SECTIONS, default=[*suite.SECTIONS])
    parser.add_argument(
        "--json", type=Path, help="default: benchmarks/results/gpu_<card>; nothing on a CPU"
    )
    parser.add_argument(
        "--write-table", type=Path, nargs="?", const=SHIPPED, help="adopt the fastest kernels"
    )
    options = parser.parse_args(arguments)
    if not options.budget_seconds > 0:
        parser.error(f"Invalid --budget-seconds={options.budget_seconds}. Must be > 0.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("Invalid --device=cuda: torch sees no GPU. Use --device cpu --small.")
    if options.device == "cpu" and options.write_table:
        parser.error("Invalid --write-table with --device cpu. The table is about GPUs.")
    if options.device == "cuda" and options.json is None:
        card = re.sub(r"\W+", "_", torch.cuda.get_device_name()).strip("_").lower()
        options.json = RESULTS / f"gpu_{card}.json"
    return options


class Run:
    """One run: its clock, its worker, and the report that is written after every row."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        self.start = time.perf_counter()
        self.scratch = tempfile.TemporaryDirectory(prefix="shampoo-")
        self.worker = Worker(options.device)
        self.worker.environment = {"SHAMPOO_BACKEND": "cuda"}
        facts = machine.describe(torch.device(options.device))
        self.report: dict[str, Any] = {
            "machine": {**facts, "command": options.command},
            **{section: [] for section in suite.SECTIONS},
            "table": {},
            "seconds": 0.0,
        }

    def left(self, section: str = "peers") -> float:
        """Seconds until no more rows of a section may start."""
        until = suite.SECTIONS[section] * self.options.budget_seconds
        return until - (time.perf_counter() - self.start)

    def add(self, section: str, row: dict[str, Any]) -> None:
        """Keeps a row, and writes the report by one rename."""
        self.report[section].append(row)
        self.write()

    def write(self) -> None:
        """Writes the report, if it is to be written."""
        self.report["seconds"] = time.perf_counter() - self.start
        if self.options.json:
            write_json(self.options.json, self.report)

    def measure(self, case: dict[str, Any]) -> dict[str, Any]:
        """The row of one case, or why there is none."""
        section = case["section"]
        if section == "peers" and (reason := peers.why_absent(case["peer"])):
            return {**case, "error": reason}
        if self.left(section) <= 0:
            return {**case, "skipped": SKIPPED}
        if section == "peers":
            self.worker.stop()  # what a package changes in its process must not reach other rows
        timeout = min(suite.LONGEST.get(section, suite.USUAL), self.left())
        began = time.perf_counter()
        row = {**case, **self.worker.ask(case, timeout)}
        row["wall_s"] = time.perf_counter() - began
        rates = self.report["rates"][0] if self.report["rates"] else {}
        return roofline.annotated(row, rates) if section == "kernels" else row

    def test(self) -> None:
        """Every GPU test, under each of the two named backends."""
        for backend in ("cuda", "triton"):
            row: dict[str, Any] = {"backend": backend}
            if self.left("tests") <= 0:
                row["skipped"] = SKIPPED
            else:
                share = 0.5 if backend == "cuda" else 1.0  # of what is left for tests
                timeout = min(suite.LONGEST["tests"], share * self.left("tests"))
                row.update(suite.run_tests(backend, timeout))
            self.add("tests", row)
            self.console.print(f"tests, {backend}: {_outcome(row)}")

    def adopt(self) -> None:
        """Makes a table of what was measured, and lets the rows to come follow it."""
        self.worker.stop()  # what it loaded is what "cuda" names
        self.worker.environment = {"SHAMPOO_BACKEND": "auto"}
        if self.options.device != "cuda":
            return
        facts = {
            "card": self.report["machine"]["name"],
            **{key: self.report["machine"][key] for key in ("torch", "triton", "commit")},
        }
        entry = kernels.measured_table(self.report["kernels"], facts)
        if not entry["ops"]:
            return  # nothing was measured: the rows to come follow the table that there is
        self.report["table"] = {backends.card(): entry}
        target = self.options.write_table
        if target is None:
            target = Path(self.scratch.name) / "backends.json"
        merge_table(target, backends.card(), entry)
        self.worker.environment["SHAMPOO_BACKEND_TABLE"] = str(target.resolve())


def merge_table(path: Path, card: str, entry: dict[str, Any]) -> None:
    """Puts a card's entry into a table, beside other cards'; ops that were not measured stay."""
    source = path if path.is_file() and path.stat().st_size else SHIPPED
    table = json.loads(source.read_text(encoding="utf-8"))
    before = table["cuda"].get(card, {}).get("ops", {})
    table["cuda"][card] = {**entry, "ops": {**before, **entry["ops"]}}
    write_json(path, table)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def driver() -> str | None:
    """The version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def _outcome(row: dict[str, Any]) -> str:
    """A row in a few words."""
    for key in ("skipped", "error"):
        if isinstance(row.get(key), str):
            return str(row[key]).partition("\n")[0][:120]
    if "passed" in row and isinstance(row["passed"], int):
        return f"{row['passed']} passed, {row['skipped']} skipped, {len(row['failed'])} failed"
    return "measured"


def kernels_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Microseconds of every kernel, and why one is not there."""
    table = Table(title="Kernels, median us (part of the roofline)")
    kinds = ("reference", "cpp", "cuda", "triton", "library")
    for name in ("op", "size", "batch", *kinds, "failures"):
        table.add_column(name)
    for row in rows:
        times, reached = row.get("seconds", {}), row.get("of_roofline", {})
        cells = []
        for kind in kinds:
            text = f"{times[kind]['p50'] * 1e6:.4g}" if kind in times else ""
            cells.append(text + (f" ({reached[kind]:.0%})" if kind in reached else ""))
        failures = "; ".join(f"{kind}: {why}" for kind, why in row.get("failures", {}).items())
        failed = failures or ("" if times else _outcome(row))
        table.add_row(row["op"], str(row["size"]), str(row["batch"]), *cells, failed)
    return table


def steps_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Milliseconds of a step, and its ratio to fused AdamW."""
    table = Table(title="Steps, mean ms (times fused AdamW)")
    times = ("mean", "ordinary", "root", "worst / mean", "waits")
    for name in ("shapes", "refresh", "optimizer", *times):
        table.add_column(name)
    for row in rows:
        where = row["model"], str(row["refresh"])
        if "found" not in row:
            table.add_row(*where, row.get("peer", ""), _outcome(row))
            continue
        for name, found in row["found"].items():
            parts = [found[key]["p50"] if found[key] else None for key in ("ordinary_s", "root_s")]
            table.add_row(
                *where,
                name,
                f"{found['mean_s'] * 1e3:.4g} ({found['mean_over_adamw']:.3g}x)",
                *("" if s is None else f"{s * 1e3:.4g}" for s in parts),
                f"{found['worst_over_mean']:.3g}",
                found.get("waits", ""),
            )
    return table


def main(arguments: Sequence[str]) -> int:
    """Runs every section; 1 if a GPU test failed or a kernel did not pass its check."""
    options = parse(arguments)
    options.command = machine.command("benchmarks.gpu", arguments)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    run = Run(options, console)
    if options.device == "cuda":
        facts = run.report["machine"]
        facts.update(driver=driver(), capability=backends.card())
        facts["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    cases = [case for case in suite.cases(options.small) if case["section"] in options.sections]
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=len(cases))
            for section in suite.SECTIONS:
                if section == "steps":
                    run.adopt()
                if section == "tests" and section in options.sections:
                    progress.update(task, description=section)
                    run.test()
                for case in (case for case in cases if case["section"] == section):
                    keys = ("op", "model", "size", "refresh", "peer")
                    name = " ".join([section, *(str(case[key]) for key in keys if key in case)])
                    progress.update(task, description=name)
                    row = run.measure(case)
                    run.add(section, row)
                    if "error" in row:
                        console.print(f"{name}: {_outcome(row)}")
                    progress.advance(task)
    finally:
        run.worker.stop()
        run.scratch.cleanup()
        run.write()
    console.print(kernels_table(run.report["kernels"]))
    console.print(steps_table([*run.report["steps"], *run.report["peers"]]))
    console.print(f"{run.report['seconds']:.0f} s; wrote {options.json or 'nothing: no --json'}")
    failed = any(row.get("failed") for row in run.report["tests"])
    wrong = any(not ok for row in run.report["kernels"] for ok in row.get("passed", {}).values())
    return int(failed or wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
