"""How fast checkpoints are written, compared with their checksums, and read, by one rank.

    python -m benchmarks.checkpoint [--mib 512] [--repeats 3] [--folder FOLDER]

A model of one matrix and the moments of its optimizer, three times its bytes in all. Each line is a
rate in MB/s of the bytes of the checkpoint, by the clock and by the processor's time of this
process, the best of the repeats: a disk and other work on the machine slow down the first alone.
"""

import argparse
import contextlib
import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from shampoo import Shampoo, checkpoint
from shampoo.checkpoint.manifest import check_file, read_manifest


def build(mib: float) -> tuple[nn.Module, Shampoo]:
    """A model and an optimizer that has taken a step, of so many MiB with its state."""
    side = max(int((mib * 2**20 / 12) ** 0.5), 1)
    model = nn.Linear(side, side, bias=False)
    optimizer = Shampoo(model.parameters(), lr=1e-3, precondition=False)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    return model, optimizer


def rates(work: Callable[[], object], repeats: int, count: int) -> tuple[float, float]:
    """MB/s of ``count`` bytes, by the clock and by the time of the processor."""
    clock, processor = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        work()
        clock.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return count / 1e6 / min(clock), count / 1e6 / min(processor)


def measure(mib: float, repeats: int, folder: Path) -> dict[str, tuple[float, float]]:
    """The rates by what was done."""
    model, optimizer = build(mib)
    checkpoint.save(folder, model, optimizer, step=1)
    place = folder / "step-00000001"
    records = read_manifest(place, 1)
    assert records is not None
    count = sum(record.bytes for record in records.values())
    content = memoryview(model.weight.detach().numpy()).cast("B")

    def verify() -> None:
        for name, record in records.items():
            check_file(place / name, record)

    works: dict[str, tuple[Callable[[], object], int]] = {
        "SHA-256 of bytes in memory": (lambda: hashlib.sha256(content), len(content)),
        "length and SHA-256 of all files compared": (verify, count),
        "save": (lambda: checkpoint.save(folder, model, optimizer, step=1), count),
        "load": (lambda: checkpoint.load(folder, model, optimizer), count),
        "load, verify=False": (
            lambda: checkpoint.load(folder, model, optimizer, verify=False),
            count,
        ),
    }
    return {name: rates(work, repeats, size) for name, (work, size) in works.items()}


def main(arguments: list[str] | None = None) -> None:
    """Prints a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=float, default=512, help="of a checkpoint")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    options = parser.parse_args(arguments)
    for name in ("mib", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"Invalid {name}={getattr(options, name)}. Must be >= 1.")
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        folder = options.folder or stack.enter_context(tempfile.TemporaryDirectory())
        for name, found in measure(options.mib, options.repeats, Path(folder)).items():
            print(f"{name:42} {found[0]:6.0f} MB/s, {found[1]:6.0f} of processor time")


if __name__ == "__main__":
    main()
