"""Puts the chosen kernels over the references: loads those for the CPU, routes those of a GPU."""

import functools
import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from shampoo.ops import backends, jit
from shampoo.ops.registry import OPS, Op, Run, Supports, library

_routes: dict[str, Run] = {}  # what runs on CUDA devices, where not the reference


def load_kernels(required: bool = False) -> None:
    """Registers the kernels that :mod:`shampoo.ops.backends` chooses, or says why references stay.

    ``SHAMPOO_BACKEND`` decides: ``auto`` (default) takes the C++ kernels for the CPU and on a GPU
    what its table says is fastest, and warns once for each process if they are not there; ``cuda``
    insists on the kernels in C++ and, where torch has CUDA, on those in CUDA C++; ``triton`` on
    those in Triton, without the others; ``reference`` does not even try. It is read at every call,
    for the whole process: on a GPU the last choice holds, kernels for the CPU stay once loaded.

    Args:
        required: turns the reason why the chosen kernels are not there into an error, for a caller
            that was asked for them.

    Raises:
        ValueError: if ``SHAMPOO_BACKEND`` is none of the four, or the table is not one.
        shampoo.ops.jit.BuildError: if the kernels must be there and are not.
    """
    backend, table = backends.chosen(), backends.table()
    if backend == backends.REFERENCE and required:
        raise jit.BuildError("SHAMPOO_BACKEND=reference forbids the kernels. Unset it.")
    kinds = set(backends.wanted(backend, backends.card(), table))
    if not torch.version.cuda:
        kinds.discard("cuda")  # no tensor could reach them
    for kind in sorted(kinds):
        if reason := _reason(kind):
            if required or backend != "auto":
                raise jit.BuildError(reason)
            _warn_once(reason)
            kinds.remove(kind)
    _routes.clear()
    for op in OPS.values():
        for name, run in routes_of(op, backend, table, kinds).items():
            _routes[name] = run
            _register(name, op.reference)


def _reason(kind: str) -> str:
    """Tries to load the kernels of one kind: the reason why not, or nothing."""
    if kind == "triton":
        return _load_triton_once()
    if kind == "cuda" and not jit.needs_cuda():
        return "no CUDA toolkit for the kernels in CUDA C++. Install it or set CUDA_HOME."
    return _load_once(jit.needs_cuda())


@functools.cache
def _load_once(cuda: bool) -> str:
    """Tries to load the compiled kernels: the reason why not, or nothing."""
    try:
        jit.load()
    except jit.BuildError as error:
        return str(error)
    return ""


@functools.cache
def _load_triton_once() -> str:
    """Tries to import the Triton kernels: the reason why not, or nothing."""
    if not torch.cuda.is_available():
        return "no CUDA device for the Triton kernels. Unset SHAMPOO_BACKEND."
    try:
        importlib.import_module("triton")  # not at import: a torch for the CPU brings none
    except ImportError as error:
        return f"Triton cannot be imported ({error}). Install triton."
    return ""


def routes_of(op: Op, backend: str, table: backends.Table, kinds: Iterable[str]) -> dict[str, Run]:
    """What runs an op and its overload on CUDA devices, by name.

    Each call goes to the kernel that is chosen for its arguments, if that takes them, and to the
    reference otherwise. Nothing if none of ``kinds``, the loaded ones, has a kernel of the op.
    """
    there = [kind for kind in op.kinds("cuda") if kind in kinds]
    if not there:
        return {}
    choose = backends.router(op, backend, table)
    return {
        op.full_name(overload): _switch(
            {kind: op.load(kind, overload) for kind in there}, op.reference, choose
        )
        for overload in op.schemas
    }


def _switch(
    kernels: Mapping[str, tuple[Run, Supports | None]],
    reference: Run,
    choose: Callable[[Sequence[Any]], str],
) -> Run:
    def run(*arguments: Any) -> None:
        kernel, supports = kernels.get(choose(arguments), (reference, None))
        if supports is not None and not supports(*arguments):
            kernel = reference
        kernel(*arguments)

    return run


@functools.cache
def _register(name: str, reference: Run) -> None:
    """Sends an op on CUDA devices through its route, which may change."""

    def run(*arguments: Any) -> None:
        _routes.get(name, reference)(*arguments)

    library.impl(name, run, "CUDA")  # type: ignore[no-untyped-call]


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"shampoo uses PyTorch's own kernels, which are slower: {reason}",
        RuntimeWarning,
        stacklevel=4,  # the caller of the optimizer's constructor
    )


def kernels(device: str = "CPU") -> dict[str, bool]:
    """For every op, whether a kernel of its own is registered for a dispatch key."""
    return {name: has_kernel(name, device) for name in OPS}


def has_kernel(name: str, device: str) -> bool:
    """Whether a name of an op has a kernel for a dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"shampoo::{name}", device)
