"""Checks and times kernels in a process that can be lost; a crash is the verdict on its kernel."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from shampoo.certificates.cases import CASES
from shampoo.certificates.cases.case import dtype_name
from shampoo.certificates.cases.shapes import Shape, shape_cases, sizes_of
from shampoo.certificates.checks import Finding, Trial
from shampoo.certificates.class_timing import CLASS_ROOT, ROOT, class_calls, rivals
from shampoo.certificates.report import Report, Timing
from shampoo.certificates.timing import timed
from shampoo.certificates.workloads import WORKLOADS, grid, in_dtype, shape_grid, size_of
from shampoo.ops.apart import Apart, LostError, note
from shampoo.ops.registry import Cpp, Cuda, Op, Run, Supports, has_kernel

PATIENCE = 120.0  # seconds for one case, in which a kernel may have to be compiled first
_MEASURE = {"cpu": 0.05, "cuda": 0.1}  # seconds of one op at one size

Subject = tuple[Op, str]  # an op, and a kind of its kernels
Progress = Callable[[int, int, str], None]  # kernels done, of how many, and what is being done


class UnavailableError(RuntimeError):
    """The device cannot be had by another process; the message says why and what to do."""


class DoesNotLoadError(RuntimeError):
    """The library is damaged."""


def examine(
    subjects: Sequence[Subject],
    device: torch.device,
    library: Path | None = None,
    *,
    is_timed: bool = True,
    progress: Progress = lambda done, total, text: None,
    shapes: Sequence[Shape] = (),
) -> list[Report]:
    """Runs every case of some kernels, and times those that pass.

    Args:
        subjects: the kernels.
        device: where they run.
        library: the compiled kernels; None if none of them is in it.
        is_timed: whether to time them too.
        progress: called before each kernel and each case.
        shapes: of a plan: their cases alone are run, in the place of those that all have to pass,
            and their sizes alone are timed.

    Raises:
        UnavailableError: if no process can be started there.
        DoesNotLoadError: if the library is no library.
    """
    reports: list[Report] = []
    # Threads that wait by spinning take minutes where others want the processor, as ranks do.
    waiting = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    with Apart(waiting) as process:
        lost = _begin(process, device, library)
        for done, (op, kind) in enumerate(subjects):
            if lost and kind != "triton":
                reports += _failed(op, kind, device, f"loading the library {lost}", "")
                continue
            at = [""]

            def hear(text: str, at: list[str] = at, done: int = done) -> None:
                at[0] = text
                progress(done, len(subjects), text)

            try:
                alone = _passed(ROOT, subjects[:done], reports)
                own = None if lost else library
                arguments = op, kind, device, own, is_timed, tuple(shapes), alone
                reports += process.ask(_examine_one, *arguments, timeout=PATIENCE, on_note=hear)
            except LostError as loss:
                reports += _failed(op, kind, device, str(loss), at[0])
            except Exception as error:  # on a GPU whose context is lost, all calls raise
                process.stop()
                reports += _failed(op, kind, device, f"raised {type(error).__name__}: {error}", "")
    return reports


def _passed(name: str, subjects: Sequence[Subject], reports: Sequence[Report]) -> tuple[str, ...]:
    """The kinds of an op's kernels that were asked, and of which nothing bad is known."""
    failed = {each.kernel for each in reports if each.op == name and not each.passed}
    return tuple(kind for op, kind in subjects if op.name == name and kind not in failed)


def _begin(process: Apart, device: torch.device, library: Path | None) -> str:
    """Starts the process: how it was lost where it loaded the library, or nothing."""
    try:
        process.ask(_occupy, device, torch.get_num_threads(), timeout=PATIENCE)
    except Exception as error:
        raise UnavailableError(
            f"no second process can use {device} ({error}). Run `python -m shampoo tune` while"
            " nothing else does."
        ) from error
    if library is None:
        return ""
    try:
        process.ask(_load, library, timeout=PATIENCE)
    except LostError as loss:
        return str(loss)
    except OSError as error:
        raise DoesNotLoadError(str(error)) from error
    return ""


def _occupy(device: torch.device, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.zeros(1, device=device)


def _load(library: Path | None) -> None:
    if library is not None:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]


def _failed(op: Op, kind: str, device: torch.device, why: str, at: str) -> list[Report]:
    """Reports of a kernel that took the process along: none of its dtypes is to be used."""
    cases = [case for case in CASES[op.name] if case.on_cpu or device.type != "cpu"]
    dtypes = dict.fromkeys(dtype_name(case.dtype) for case in cases)
    return [Report(op.name, kind, dtype, 0, worst=at, failure=why) for dtype in dtypes]


def _examine_one(
    op: Op,
    kind: str,
    device: torch.device,
    library: Path | None,
    is_timed: bool,
    shapes: Sequence[Shape],
    alone: Sequence[str],
) -> list[Report]:
    """All that is found of one kernel, in the process apart.

    ``alone`` are the kernels that take roots of one size, with which those of classes compete.
    """
    _load(library)
    cases = shape_cases(shapes, device.type).get(op.name, ()) if shapes else CASES[op.name]
    sizes = shape_grid(op, device, sizes_of(shapes)) if shapes else grid(op, device)
    try:
        if not _is_registered(op, kind):
            raise RuntimeError("it is not in the library")
        kernels = {overload: op.load(kind, overload) for overload in op.schemas}
    except Exception as error:
        return _failed(op, kind, device, f"cannot be loaded: {error}", "")
    _, supports = kernels[""]
    found: dict[str, list[tuple[str, Finding]]] = {}
    for case in cases:
        note(case.name)
        trial = Trial(case, op, device, kind)
        if trial.accepts(supports):
            finding = trial.examine(lambda overload: kernels[overload][0])
            found.setdefault(dtype_name(case.dtype), []).append((case.name, finding))
    return [
        _summary(op, kind, dtype, findings, device, kernels[""], sizes if is_timed else (), alone)
        for dtype, findings in found.items()
    ]


def _is_registered(op: Op, kind: str) -> bool:
    kernel = next(kernel for kernel in op.kernels if kernel.kind == kind)
    if isinstance(kernel, Cpp):
        return has_kernel(op.name, "CPU")
    if isinstance(kernel, Cuda):
        return has_kernel(f"cuda_{kernel.op or op.name}", "CUDA")
    return True


def _summary(
    op: Op,
    kind: str,
    dtype: str,
    findings: list[tuple[str, Finding]],
    device: torch.device,
    kernel: tuple[Run, Supports | None],
    sizes: Sequence[tuple[int, int]],
    alone: Sequence[str],
) -> Report:
    failed = [each for each in findings if each[1].failure]
    worst, finding = failed[0] if failed else max(findings, key=lambda each: _excess(each[1]))
    numbers = finding.error, finding.limit, worst, finding.failure
    timings: list[Timing] = []
    # A CPU has one kernel for all dtypes of an op: one of them says whether it pays.
    if not failed and sizes and (dtype == "float32" or device.type != "cpu"):
        timings = _timings(op, kernel, device, getattr(torch, dtype), sizes, alone)
    return Report(op.name, kind, dtype, len(findings), *numbers, tuple(timings))


def _excess(finding: Finding) -> float:
    """The error as a part of what it may be."""
    return finding.error / finding.limit if finding.limit > 0 else finding.error


def _timings(
    op: Op,
    kernel: tuple[Run, Supports | None],
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[tuple[int, int]],
    alone: Sequence[str],
) -> list[Timing]:
    run, supports = kernel
    found = []
    for size, batch in sizes:
        note(f"{op.name} {dtype_name(dtype)}: timing at {size}")
        arguments = in_dtype(WORKLOADS[op.name](batch, size, device), dtype)
        if supports is not None and not supports(*arguments):
            continue
        if op.name == CLASS_ROOT:
            calls = class_calls(run, arguments, rivals(alone))
        else:
            calls = {
                "kernel": functools.partial(run, *arguments),
                "reference": functools.partial(op.reference, *arguments),
            }
        times = timed(calls, device, _MEASURE.get(device.type, 0.05), 5)
        kernel_s = times.pop("kernel").p50
        reference_s = min(each.p50 for each in times.values())
        found.append(Timing(size_of(op, arguments), kernel_s, reference_s))
    return found
