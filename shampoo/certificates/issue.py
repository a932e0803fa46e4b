"""Gives certificates: reads the one there is, or examines the device and writes it."""

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from shampoo.certificates import certificate
from shampoo.certificates.cases.shapes import Shape, lacking, shape_cases
from shampoo.certificates.certificate import Certificate
from shampoo.certificates.runner import (
    DoesNotLoadError,
    Progress,
    Subject,
    UnavailableError,
    examine,
)
from shampoo.errors import warn_outside
from shampoo.ops import OPS, backends, jit
from shampoo.ops.licence import REFERENCE, Licence
from shampoo.ops.trust import locked, make_folder

Shapes = tuple[Shape, ...]
KINDS = ("cpp", "cuda", "triton")  # of kernels that a certificate licenses
_Key = tuple[torch.device, bool, Path]

_given: dict[tuple[_Key, Shapes], Certificate] = {}  # to this process
_warned: set[str] = set()


def mode() -> str:
    """What ``SHAMPOO_TUNE`` says: ``"0"``, ``"1"``, or nothing.

    Raises:
        ValueError: if it is something else.
    """
    found = os.environ.get("SHAMPOO_TUNE", "")
    if found not in ("", "0", "1"):
        raise ValueError(f"Invalid SHAMPOO_TUNE={found!r}. Must be 0, 1, or not set.")
    return found


def subjects_on(device: torch.device) -> list[Subject]:
    """Every kernel that the device has beside the references, as far as it can be built here."""
    missing = {
        "cuda": device.type == "cuda" and not jit.needs_cuda(),
        "triton": importlib.util.find_spec("triton") is None,
    }
    kernels = [(op, kind) for op in OPS.values() for kind in op.kinds(device.type)]
    return [(op, kind) for op, kind in kernels if not missing.get(kind)]


def library_for(subjects: Sequence[Subject]) -> Path | None:
    """The compiled kernels, if one of these is in them and they can be built."""
    if all(kind == "triton" for _, kind in subjects):
        return None
    try:
        return jit.build()
    except jit.BuildError:
        return None


def certificate_of(
    device: torch.device,
    *,
    shapes: Shapes = (),
    is_forced: bool = False,
    is_timed: bool | None = None,
) -> Certificate | None:
    """The certificate of a device, which is made if there is none.

    Args:
        device: an index is needed of a GPU.
        shapes: of a plan, for the certificate of these alone, beside that which all have to have.
        is_forced: make it anew, whatever there is and ``SHAMPOO_TUNE`` says.
        is_timed: whether kernels are timed too; by default on a GPU only, since on a CPU those of
            the package win. A certificate without times is made anew where they are asked for.

    Returns:
        None if there are no kernels; or if it must not or cannot be made, which one line on stderr
        says.
    """
    try:
        key, tune = (_key(device), shapes), mode()
    except jit.BuildError as reason:
        _say(f"kernels are not checked, and none is used: {reason}")
        return None
    found = _given.get(key)
    if found is not None and not is_forced and (found.is_timed or not is_timed):
        return found
    subjects = subjects_on(device)
    library = library_for(subjects)
    if library is None:
        subjects = [(op, kind) for op, kind in subjects if kind not in ("cpp", "cuda")]
    if shapes:
        subjects = _proven(device, subjects, shapes)
    if not subjects:
        return None
    is_timed = device.type != "cpu" if is_timed is None else is_timed
    is_forced = is_forced or (tune == "1" and found is None)
    facts = certificate.facts_of(device, library)
    if shapes:
        facts[certificate.SHAPES] = " ".join(shape.words for shape in shapes)
    path = certificate.path_of(facts)
    before = path.stat().st_mtime_ns if path.exists() else 0
    found = certificate.read(path, facts)
    if not is_forced and found is not None and (found.is_timed or not is_timed):
        return _given.setdefault(key, found)
    if tune == "0" and not is_forced:
        if not shapes:
            _say(f"SHAMPOO_TUNE=0 forbids checking the kernels on {facts['name']}: none is used")
        return None
    with _lock(path):
        if path.exists() and path.stat().st_mtime_ns != before:
            found = certificate.read(path, facts)  # another process made it while this one waited
            if found is not None and (found.is_timed or not is_timed):
                _given[key] = found
                return found
        try:
            found = _examined(device, subjects, library, is_timed, facts, shapes)
        except (UnavailableError, DoesNotLoadError, jit.BuildError) as reason:
            where = " for the sizes of this model" if shapes else ", and none is used"
            _say(f"kernels are not checked{where}: {reason}")
            return None
        with contextlib.suppress(OSError):  # then the next process makes it again
            certificate.write(certificate.path_of(found.facts), found)
    _given[key] = found
    return found


def _proven(device: torch.device, subjects: Sequence[Subject], shapes: Shapes) -> list[Subject]:
    """The kernels that have passed what all have to pass, of ops that are asked for shapes."""
    base = certificate_of(device)
    passed = {(each.op, each.kernel) for each in base.reports if each.passed} if base else set()
    asked = shape_cases(shapes, device.type)
    return [(op, kind) for op, kind in subjects if (op.name, kind) in passed and op.name in asked]


def _examined(
    device: torch.device,
    subjects: Sequence[Subject],
    library: Path | None,
    is_timed: bool,
    facts: dict[str, str],
    shapes: Shapes,
) -> Certificate:
    """A new certificate. A library that is damaged is built again first."""
    began = time.time()
    seconds = 5 if device.type == "cpu" else 30
    what = " for the sizes of this model" if shapes else ""
    _say(f"checking kernels{what} on {facts['name']}, once, about {seconds} s")
    with shown_progress() as progress:
        how: dict[str, Any] = {"is_timed": is_timed, "progress": progress, "shapes": shapes}
        try:
            reports = examine(subjects, device, library, **how)
        except DoesNotLoadError:
            assert library is not None
            jit.rebuild(library)
            facts = {**facts, **certificate.facts_of(device, library)}
            reports = examine(subjects, device, library, **how)
    took = time.time() - began
    return Certificate(facts, tuple(reports), is_timed, certificate.now(), took)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held while a certificate is made, where a file can be."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # nowhere to write: each process for itself
            make_folder(path.parent, path.parents[1])
            held.enter_context(locked(path.with_suffix(".lock")))
        yield


def _say(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        print(f"shampoo: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def shown_progress() -> Iterator[Progress]:
    """A bar where a person watches and rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar
    except ImportError:
        yield lambda done, total, text: None
        return
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1)

        def show(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=text[:60])

        yield show


def licence_of(device: torch.device, shapes: Collection[Shape] = ()) -> Licence:
    """What a device may run: nothing beside references where it has no certificate.

    Args:
        device: an index is needed of a GPU.
        shapes: of a plan, on which kernels are checked too, if they were not. What is found holds
            for this process, whichever plan asks.
    """
    found = certificate_of(device)
    if found is None:
        return Licence()
    if lacked := lacking(shapes, device.type):
        certificate_of(device, shapes=lacked)
    for (key, others), more in _given.items():
        if others and key == _key(device):
            found = found.joined(more)
    complain(found.licence, device)
    return found.licence


def _key(device: torch.device) -> _Key:
    return device, jit.needs_cuda(), jit.cache_dir()


def complaints_of(device: torch.device) -> list[str]:
    """Why kernels are not used on a device, one line each: everywhere, or in some model."""
    every = licence_of(device).complaints(KINDS)
    base = certificate_of(device)
    for model in certificate.of_models(base.facts) if base is not None else ():
        every += [f"{line} (in one model)" for line in model.licence.complaints(KINDS)]
    return every


def complain(licence: Licence, device: torch.device) -> None:
    """Names the kernels that were refused, in one warning a process."""
    complaints = licence.complaints(KINDS)
    text = (
        f"shampoo uses PyTorch's own kernels on {device} in place of {len(complaints)} that did not"
        f" pass their checks: {'; '.join(complaints)}. `python -m shampoo tune --force` checks them"
        " again."
    )
    if complaints and text not in _warned:
        _warned.add(text)
        warn_outside(text, RuntimeWarning)


def kernels_in_use(device: torch.device | str) -> dict[str, dict[str, list[tuple[float, str]]]]:
    """Which kernel runs what on a device, as ``SHAMPOO_BACKEND`` and its certificate have it.

    Args:
        device: such as ``"cpu"`` or ``"cuda:0"``. Kernels are built and checked if they were not.

    Returns:
        By op and dtype, ``(size, kernel)`` with sizes that ascend: the kernel runs up to this size
        and, the last one, beyond (``inf``). The size counts elements, or columns of the largest
        factor; kernels are ``"cpp"``, ``"cuda"``, ``"triton"`` and ``"reference"``. Of
        ``"minimax_class_root_"`` the size is the side of a size class: where it is ``"reference"``,
        no smaller factors are padded up to that side for a refresh.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    backend, table = backends.chosen(), backends.table()
    licence = Licence() if backend == REFERENCE else licence_of(device)
    return {op.name: backends.choices(op, device, backend, table, licence) for op in OPS.values()}
