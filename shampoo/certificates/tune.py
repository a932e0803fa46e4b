"""The command ``python -m shampoo tune``: a certificate made on demand, and shown."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from shampoo.certificates.certificate import Certificate, of_models
from shampoo.certificates.issue import certificate_of
from shampoo.certificates.report import Report

SET_ASIDE = 3  # the exit status where a kernel is not used
_COLUMNS = ("op", "kernel", "dtype", "cases", "worst error", "limit", "verdict", "speed by size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--device", help="cpu, cuda or cuda:i; by default the GPU if there is one")
    add("--force", action="store_true", help="check anew, though there is a certificate")
    add("--json", dest="file", type=Path, metavar="FILE", help="write the certificate there too")


def run(options: argparse.Namespace) -> int:
    """Makes and prints a certificate; 3 if a kernel is not used, 1 if there is none."""
    device = device_of(options.device)
    # Not by the variable: who asks for it wants it.
    found = certificate_of(device, is_forced=options.force, is_timed=True)
    if found is None:
        return 1
    if options.file is not None:
        options.file.write_text(found.to_json(), encoding="utf-8")
    show(found)
    return 0 if all(report.is_used for report in found.reports) else SET_ASIDE


def device_of(name: str | None) -> torch.device:
    """The device of a name, with its index.

    Raises:
        SystemExit: with a message, for a device that is not there.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit(f"Invalid --device={name}: torch sees no GPU. Use --device cpu.")
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise SystemExit(f"Invalid --device={name}. Must be cpu, cuda or cuda:i.")
    return device


def show(found: Certificate) -> None:
    """Prints a table, and what was set aside in full."""
    rows = [_cells(report) for report in found.reports]
    title = f"{found.facts['name']}: made {found.made}, in {found.seconds:.1f} s"
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
        for row in (_COLUMNS, *rows):
            print("  ".join(map(str.ljust, row, widths)).rstrip())
    else:
        table = Table(title=title)
        for name in _COLUMNS:
            table.add_column(name)
        for row in rows:
            table.add_row(*row)
        console = Console() if sys.stdout.isatty() else Console(width=160)
        console.print(table)
    for report in found.reports:
        if report.failure:
            where = f"{report.op} ({report.kernel}, {report.dtype})"
            print(f"{where}: {report.failure} in {report.worst}")


def _cells(report: Report) -> Sequence[str]:
    verdict = "passed" if report.is_used else "slower" if report.passed else "failed"
    speeds = ", ".join(f"{timing.size}: {timing.speed:.2g}x" for timing in report.timings)
    error, limit = f"{report.error:.2g}", f"{report.limit:.2g}"
    return (
        *(report.op, report.kernel, report.dtype, str(report.cases)),
        *(error, limit, verdict, speeds),
    )


def in_words(device: torch.device) -> str:
    """When the certificate of a device was made, and how many kernels passed."""
    found = certificate_of(device)
    if found is None:
        return "none"
    passed = sum(report.passed for report in found.reports)
    times = "" if found.is_timed else ", not timed"
    models = len(of_models(found.facts))
    more = f", sizes of models: {models}" if models else ""
    return f"{found.made}, {passed} of {len(found.reports)} passed{times}{more}"
