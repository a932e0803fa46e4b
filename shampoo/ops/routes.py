"""Puts the chosen kernels over the references: loads those for the CPU, routes those of a GPU."""

import functools
import importlib
import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo.errors import warn_outside
from shampoo.ops import backends, jit
from shampoo.ops.licence import REFERENCE, Licence
from shampoo.ops.registry import OPS, Op, Run, Supports, has_kernel, library

Ask = Callable[[torch.device], Licence]
"""What says which kernels a device may run. They are built then, and not yet loaded."""

Choices = Mapping[str, Sequence[tuple[float, str]]]
"""By dtype: sizes that ascend up to infinity, and the kernel that runs up to each of them."""

CPU = torch.device("cpu")
_MOST_LAYOUTS = 64  # of stacks for which it is known what runs them

_routes: dict[str, Run] = {}  # what runs on CUDA devices, where not the reference
_licences: dict[torch.device, Licence] = {}  # of the CUDA devices that were asked about
_imposed: dict[tuple[str, str], Choices] = {}  # by type of device and op: what ranks agreed on
_set_aside: dict[str, torch.library.Library] = {}  # references over kernels of the CPU, by op


def load_kernels(required: bool = False, ask: Ask | None = None) -> None:
    """Registers the kernels that :mod:`shampoo.ops.backends` chooses, or says why references stay.

    ``SHAMPOO_BACKEND`` decides: ``auto`` (default) takes what has a licence, and warns once for
    each process if kernels are not there; ``cuda`` insists on the kernels in C++ and, where torch
    has CUDA, on those in CUDA C++; ``triton`` on those in Triton, without the others;
    ``reference`` does not even try. It is read at every call, for the whole process: on a GPU the
    last choice holds, kernels for the CPU stay once loaded, whether they are set aside or not.

    Args:
        required: turns the reason why the chosen kernels are not there into an error, for a caller
            that was asked for them.
        ask: who licenses kernels. The CPU's are asked about here, before they are loaded; those of
            a CUDA device when its licence is granted (:func:`grant`), and until then it runs
            references. Without, every kernel counts as passed.

    Raises:
        ValueError: if ``SHAMPOO_BACKEND`` is none of the four, or the table is not one.
        shampoo.ops.jit.BuildError: if the kernels must be there and are not, or did not pass.
    """
    backend, table = backends.chosen(), backends.table()
    if backend == REFERENCE and required:
        raise jit.BuildError("SHAMPOO_BACKEND=reference forbids the kernels. Unset it.")
    kinds = set(backends.wanted(backend, backends.card(), table))
    if not torch.version.cuda:
        kinds.discard("cuda")  # no tensor could reach them
    insists = required or backend != "auto"
    licence = None
    for kind in sorted(kinds):
        reason = _reason(kind)
        if kind in ("cpp", "cuda") and not reason:  # in one library
            licence = ask(CPU) if ask is not None and licence is None else licence
            reason = _load_licensed(licence, insists, required)
            if licence is not None and not licence.passed and not insists:
                kinds.discard("cuda")
        if reason:
            if insists:
                raise jit.BuildError(reason)
            _warn_once(reason)
            kinds.discard(kind)
    if licence is not None or ask is None:  # else what was set aside stays so
        _set_aside_on_cpu(licence, backend, table)
    _state[:] = backend, table, frozenset(kinds), ask is not None
    _route()


def _load_licensed(licence: Licence | None, insists: bool, required: bool) -> str:
    """Loads the library, unless none of its kernels passed: the reason why not, or nothing."""
    if licence is None:
        return _load_once(jit.needs_cuda())
    if insists:
        raise_complaints(licence, ["cpp"])
    if required and not licence.passed:
        return "the kernels were not checked on this machine. Unset SHAMPOO_TUNE."
    return _load_once(jit.needs_cuda()) if licence.passed or insists else ""


_state: list[Any] = []  # of the last choice: backend, table, kinds, and whether licences count


def are_loaded() -> bool:
    """Whether :func:`load_kernels` has chosen kernels in this process, be they references."""
    return bool(_state)


def grant(device: torch.device, licence: Licence) -> None:
    """Lets a CUDA device run what it is licensed for.

    Raises:
        shampoo.ops.jit.BuildError: if ``SHAMPOO_BACKEND`` insists on a kernel that was refused.
    """
    backend, _, kinds, _ = _state
    if backend != "auto":
        raise_complaints(licence, [backend])
    if kinds and _licences.get(device) != licence:
        _licences[device] = licence
        _route()


def confine_cpu(licence: Licence) -> None:
    """Lets the CPU run nothing but what it is licensed for, where more was loaded before.

    Raises:
        shampoo.ops.jit.BuildError: if ``SHAMPOO_BACKEND`` insists on a kernel that was refused.
    """
    backend, table, *_ = _state
    if backend != "auto":
        raise_complaints(licence, ["cpp"])
    _set_aside_on_cpu(licence, backend, table)


def raise_complaints(licence: Licence, kinds: Sequence[str]) -> None:
    """Raises with the words of a licence if it refuses kernels of these kinds."""
    if complaints := licence.complaints(kinds):
        raise jit.BuildError(
            "kernels that were asked for did not pass their checks: "
            f"{'; '.join(complaints)}. Unset SHAMPOO_BACKEND and fused to go on without them."
        )


def _route() -> None:
    backend, table, kinds, is_licensed = _state
    nothing = Licence() if is_licensed else None

    def licence_of(device: torch.device) -> Licence | None:
        return _licences.get(device, nothing)

    _routes.clear()
    for op in OPS.values():
        if imposed := _imposed.get(("cuda", op.name)):
            routes = routes_of(op, "auto", {"cuda": {}}, kinds, _imposing(op.name, imposed))
        else:
            routes = routes_of(op, backend, table, kinds, licence_of)
        for name, run in routes.items():
            _routes[name] = run
            _register(name, op.reference)


def _imposing(op: str, imposed: Choices) -> Callable[[torch.device], Licence]:
    """A licence of every device that leaves no choice."""
    rows = {
        dtype: [{"size": end, "kernel": kernel} for end, kernel in sized]
        for dtype, sized in imposed.items()
    }
    kinds = {kind for sized in imposed.values() for _, kind in sized}
    licence = Licence({(op, kind): frozenset(imposed) for kind in kinds}, rows={op: rows})
    return lambda device: licence


def kernel_at(op: str, like: Tensor, size: int) -> str:
    """The kernel that runs an op at a size, on the device and in the dtype of a tensor.

    Args:
        op: its name.
        like: a tensor; only on a CUDA device anything is chosen by size.
        size: columns of the largest factor; elements for an op that works on elements.
    """
    if like.device.type != "cuda" or not _state:
        return REFERENCE
    backend, table, kinds, is_licensed = _state
    licence = _licences.get(like.device, Licence() if is_licensed else None)
    if imposed := _imposed.get(("cuda", op)):
        backend, table, licence = "auto", {"cuda": {}}, _imposing(op, imposed)(like.device)
    card, dtype = backends.card_of(like.device), backends.dtype_name(like.dtype)
    how: dict[str, Any] = {"backend": backend, "card": card, "table": table, "licence": licence}
    kernel = backends.choose(op, "cuda", dtype, size, **how)
    return kernel if kernel in kinds else REFERENCE


def choices(op: Op, device: torch.device) -> Choices:
    """What runs an op on a device, as things are."""
    if device.type == "cpu":
        kind = "cpp" if runs_kernel_on_cpu(op.name) else REFERENCE
        return {"": [(math.inf, kind)]}
    if imposed := _imposed.get((device.type, op.name)):
        return imposed
    backend, table, _, is_licensed = _state
    licence = _licences.get(device, Licence() if is_licensed else None)
    return backends.choices(op, device, backend, table, licence)


def allowed(op: Op, device: torch.device) -> dict[str, list[str]]:
    """The kernels beside the reference that may run an op on a device, by dtype as in choices."""
    if device.type == "cpu":
        return {"": ["cpp"] if runs_kernel_on_cpu(op.name) else []}
    _, _, kinds, is_licensed = _state
    licence = _licences.get(device, Licence() if is_licensed else None)
    loaded = [kind for kind in op.kinds("cuda") if kind in kinds]
    return {
        dtype: [k for k in loaded if licence is None or licence.allows(op.name, k, dtype)]
        for dtype in backends.DTYPES
    }


def impose(device: str, op: str, chosen: Choices) -> None:
    """Fixes what runs an op on a type of device from now on, whatever else says.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        op: its name.
        chosen: for a CPU, under the dtype ``""``, one kernel for all sizes.
    """
    _imposed[device, op] = chosen
    if device == "cuda":
        _route()
    elif chosen[""][-1][1] == REFERENCE and runs_kernel_on_cpu(op):
        _set_aside[op] = _over_kernel(OPS[op])


def _set_aside_on_cpu(licence: Licence | None, backend: str, table: backends.Table) -> None:
    """Puts the reference over every kernel of the CPU that is not licensed, in all its dtypes.

    No call asks on a CPU which kernel to take: what passed is called by torch itself.
    """
    _set_aside.clear()  # which takes away what they registered
    if licence is None:
        return
    settings = {"backend": backend, "card": "", "table": table, "licence": licence}
    for op in OPS.values():
        kernel = backends.choose(op.name, "cpu", "float32", 1, **settings)  # type: ignore[arg-type]
        imposed = _imposed.get(("cpu", op.name), {"": [(math.inf, kernel)]})
        if "cpp" in op.kinds("cpu") and REFERENCE in (kernel, imposed[""][-1][1]):
            _set_aside[op.name] = _over_kernel(op)


def _over_kernel(op: Op) -> torch.library.Library:
    """The reference of an op in place of its kernel for the CPU, for as long as this is held."""
    aside = torch.library.Library("shampoo", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is overridden, as it should be
        for overload in op.schemas:
            if has_kernel(op.full_name(overload), "CPU"):
                aside.impl(op.full_name(overload), op.reference, "CPU")  # type: ignore[no-untyped-call]
    return aside


def runs_kernel_on_cpu(op: str) -> bool:
    """Whether a kernel runs an op on the CPU, and not its reference."""
    return has_kernel(op, "CPU") and op not in _set_aside


def _reason(kind: str) -> str:
    """Tries to build the kernels of one kind: the reason why not, or nothing."""
    if kind == "triton":
        return _load_triton_once()
    if kind == "cuda" and not jit.needs_cuda():
        return "no CUDA toolkit for the kernels in CUDA C++. Install it or set CUDA_HOME."
    return _build_once(jit.needs_cuda())


@functools.cache
def _build_once(cuda: bool) -> str:
    """Tries to build the compiled kernels: the reason why not, or nothing."""
    try:
        jit.build()
    except jit.BuildError as error:
        return str(error)
    return ""


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


def routes_of(
    op: Op,
    backend: str,
    table: backends.Table,
    kinds: Iterable[str],
    licence_of: Callable[[torch.device], Licence | None] = lambda device: None,
) -> dict[str, Run]:
    """What runs an op and its overload on CUDA devices, by name.

    Each call goes to the kernel that is chosen for its arguments, if that takes them, and to the
    reference otherwise. Nothing if none of ``kinds``, the loaded ones, has a kernel of the op.
    """
    there = [kind for kind in op.kinds("cuda") if kind in kinds]
    if not there:
        return {}
    choose = backends.router(op, backend, table, licence_of)
    routes = {}
    for overload in op.schemas:
        kernels = {kind: op.load(kind, overload) for kind in there}
        switch = _switch_by_stack if op.by_stack else _switch
        routes[op.full_name(overload)] = switch(op, kernels, choose)
    return routes


def _switch(
    op: Op,
    kernels: Mapping[str, tuple[Run, Supports | None]],
    choose: Callable[[Sequence[Any]], str],
) -> Run:
    def run(*arguments: Any) -> None:
        _chosen(op, kernels, choose, arguments)(*arguments)

    return run


def _switch_by_stack(
    op: Op,
    kernels: Mapping[str, tuple[Run, Supports | None]],
    choose: Callable[[Sequence[Any]], str],
) -> Run:
    """One call of each kernel that is chosen for some of the stacks, and dtype of blocks.

    What is chosen is kept for stacks of the same layouts: a step has the same ones every time.
    """
    at = op.arguments.index("grads")
    known: dict[Hashable, list[tuple[Run, list[int]]]] = {}

    def grouped(calls: Sequence[Sequence[Any]]) -> list[tuple[Run, list[int]]]:
        groups: dict[tuple[Run, torch.dtype], list[int]] = {}
        for place, call in enumerate(calls):
            key = _chosen(op, kernels, choose, call), call[at][0].dtype
            groups.setdefault(key, []).append(place)
        return [(kernel, places) for (kernel, _), places in groups.items()]

    def run(*arguments: Any) -> None:
        layouts = tuple(map(_layout_of, arguments))
        groups = known.get(layouts)
        calls = None
        if groups is None:
            calls = op.stacks_of(arguments)
            if len(known) >= _MOST_LAYOUTS:
                known.clear()
            known[layouts] = groups = grouped(calls)
        if len(groups) == 1:
            groups[0][0](*arguments)
            return
        calls = calls or op.stacks_of(arguments)
        for kernel, places in groups:
            kernel(*op.joined([calls[place] for place in places]))

    return run


def _layout_of(argument: Any) -> Hashable:
    """All that kernels are chosen by: of tensors not their values, of floats nothing."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    if isinstance(argument, Sequence):
        return tuple(map(_layout_of, argument))
    other: Hashable = float if isinstance(argument, float) else argument
    return other


def _chosen(
    op: Op,
    kernels: Mapping[str, tuple[Run, Supports | None]],
    choose: Callable[[Sequence[Any]], str],
    arguments: Sequence[Any],
) -> Run:
    """The kernel for the arguments of a call, if it takes them; else the reference."""
    kernel, supports = kernels.get(choose(arguments), (op.reference, None))
    return kernel if supports is None or supports(*arguments) else op.reference


@functools.cache
def _register(name: str, reference: Run) -> None:
    """Sends an op on CUDA devices through its route, which may change."""

    def run(*arguments: Any) -> None:
        _routes.get(name, reference)(*arguments)

    library.impl(name, run, "CUDA")  # type: ignore[no-untyped-call]


@functools.cache
def _warn_once(reason: str) -> None:
    text = f"shampoo uses PyTorch's own kernels, which are slower: {reason}"
    warn_outside(text, RuntimeWarning)


def kernels(device: str = "CPU") -> dict[str, bool]:
    """For every op, whether a kernel of its own is registered for a dispatch key."""
    return {name: has_kernel(name, device) for name in OPS}
