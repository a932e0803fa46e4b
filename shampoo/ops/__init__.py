"""Every op, declared once: its schema and its meaning on any device.

PyTorch's dispatcher is the only switch between kernels. An op starts out as its reference
everywhere, and :func:`load_kernels` registers faster kernels over it for one device, as
:mod:`shampoo.ops.backends` chooses. Ops write into tensors they are given and return nothing, so
one fake that does nothing lets torch.compile trace them all.
"""

import functools
import importlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo.kernels.reference import minimax
from shampoo.kernels.reference import ops as reference
from shampoo.kernels.reference import root_check as health
from shampoo.ops import backends, jit

Number = float | Tensor  # a tensor is float64 on the device, and never read on the host

_library = torch.library.Library("shampoo", "DEF")  # type: ignore[no-untyped-call]
_meanings: dict[str, Callable[..., None]] = {}
_names: dict[str, list[str]] = {}  # of an op and of its overload for numbers on the device


def _no_output(*_: object) -> None:
    """What tracing needs to know of every op: nothing comes out, and tables are not read."""


def _define(schema: str, meaning: Callable[..., None]) -> Callable[..., Any]:
    name, _, overload = schema.partition("(")[0].partition(".")
    _meanings[name] = meaning
    _library.define(schema)  # type: ignore[no-untyped-call]
    full_name = f"{name}.{overload}" if overload else name
    if "cuda" in backends.KERNELS.get(name, ()):
        # The kernel in CUDA C++ has a name of its own, so that it can be chosen by size.
        _library.define(f"cuda_{schema}")  # type: ignore[no-untyped-call]
    _names.setdefault(name, []).append(full_name)
    _library.impl(full_name, meaning, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"shampoo::{full_name}", _no_output, lib=_library)
    return getattr(getattr(torch.ops.shampoo, name), overload or "default")  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=256)
def _constant(number: float) -> Tensor:
    """A number on the host as a tensor, which nobody writes to."""
    return torch.tensor(number, dtype=torch.float64, device="cpu")


def _define_twice(schema: str, numbers: str, meaning: Callable[..., None]) -> Callable[..., Any]:
    """Defines an op and its overload ``Tensor``, which reads ``numbers`` on the device.

    A step that a graph replays cannot take its moving numbers from the host: there they are 0-d
    float64 tensors beside the others. The choice is made here, since the dispatcher's own would
    turn such a tensor into a float, and wait for the device. Where one of them is a tensor, all
    become tensors.
    """
    names = numbers.split()
    plain = _define(schema, meaning)
    replayed = re.sub(rf"float ({'|'.join(names)})\b", r"Tensor \1", schema)
    replayed = re.sub(r"Tensor (\w+)=[\d.]+", r"Tensor? \1=None", replayed)
    on_device = _define(replayed.replace("(", ".Tensor(", 1), meaning)
    inside = schema[schema.index("(") + 1 : schema.index(") ->")]
    arguments = [re.sub(r"=.*", "", part.split()[-1]) for part in inside.split(",")]
    places = [arguments.index(each) for each in names]

    def choose(*given: Any, **named: Any) -> None:
        numbers = [given[place] for place in places if place < len(given)]
        numbers += [named[each] for each in names if each in named]
        living = next((number for number in numbers if isinstance(number, Tensor)), None)
        if living is None:
            plain(*given, **named)
            return

        def live(number: Any) -> Tensor:
            if isinstance(number, Tensor):
                return number
            if type(living) is Tensor and living.device.type == "cpu":  # and so is no fake
                return _constant(float(number))
            # Not torch.tensor, whose copy to a GPU waits for it.
            return torch.full((), float(number), dtype=torch.float64, device=living.device)

        positional = [live(value) if at in places else value for at, value in enumerate(given)]
        on_device(
            *positional,
            **{key: live(value) if key in names else value for key, value in named.items()},
        )

    return choose


gather_blocks_ = _define_twice(
    "gather_blocks_(Tensor(a!) out, Tensor[] sources, Tensor tiles, float alpha, bool accumulate)"
    " -> ()",
    "alpha",
    reference.gather_blocks_,
)
magnitudes_ = _define(
    "magnitudes_(Tensor(a!) out, Tensor[] tensors) -> ()",
    reference.magnitudes_,
)
graft_moments_ = _define_twice(
    "graft_moments_(Tensor(a!)? grad, Tensor(b!)? exp_avg, Tensor(c!)? exp_avg_sq,"
    " Tensor(d!)? direction, Tensor(e!) norm, Tensor[] sources, Tensor tiles, float alpha,"
    " bool accumulate, float beta1, float correction1, float beta2, float weight2,"
    " float correction2, float eps, bool normalized) -> ()",
    "alpha beta1 correction1 beta2 weight2 correction2",
    reference.graft_moments_,
)
# Not "mode" as in the reference: torch.compile would pass it by keyword to functions that have one.
gram_ema_ = _define_twice(
    "gram_ema_(Tensor(a!) factor, Tensor grad, int k, float beta, float weight) -> ()",
    "beta weight",
    reference.gram_ema_,
)
precondition_ = _define(
    "precondition_(Tensor(a!) out, Tensor(b!) norm, Tensor grad, Tensor?[] roots) -> ()",
    reference.precondition_,
)
eigh_ = _define(
    "eigh_(Tensor(a!) values, Tensor(b!) vectors, Tensor stack) -> ()",
    reference.eigh_,
)
minimax_root_ = _define(
    "minimax_root_(Tensor(a!) root, Tensor(b!) ridge, Tensor factor, int p, float eps,"
    " float relative_eps, float[] schedule) -> ()",
    minimax.minimax_root_,
)
# The same for up to 128 rows, where one launch can hold the whole chain.
small_root_ = _define(
    "small_root_(Tensor(a!) root, Tensor(b!) ridge, Tensor factor, int p, float eps,"
    " float relative_eps, float[] schedule) -> ()",
    minimax.minimax_root_,
)
judge_roots_ = _define(
    "judge_roots_(Tensor(a!) ok, Tensor root, Tensor factor, Tensor ridge, float p) -> ()",
    health.judge_roots_,
)
update_blocks_ = _define_twice(
    "update_blocks_(Tensor(a!)[] params, Tensor(b!)? momentum, Tensor direction, Tensor scale,"
    " Tensor tiles, float lr, float weight_decay, float mu, bool nesterov, int? seed=None,"
    " float step=0.0) -> ()",
    "lr weight_decay mu step",
    reference.update_blocks_,
)


_routes: dict[str, Callable[..., None]] = {}  # what runs on CUDA devices, where not the reference


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
    for name in backends.KERNELS:
        _route(name, backend, table, kinds)


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


def _route(name: str, backend: str, table: backends.Table, kinds: Iterable[str]) -> None:
    """Puts the chosen kernels over the reference on CUDA devices, for arguments they support."""
    meaning, choose = _meanings[name], backends.router(name, backend, table)
    for full_name in _names[name]:
        kernels = {
            kind: kernel(full_name, kind) for kind in backends.KERNELS[name] if kind in kinds
        }
        if kernels:
            _routes[full_name] = _switch(kernels, meaning, choose)
            _register(full_name, meaning)


def _switch(
    kernels: Mapping[str, tuple[Callable[..., None], Callable[..., bool] | None]],
    meaning: Callable[..., None],
    choose: Callable[[Sequence[Any]], str],
) -> Callable[..., None]:
    def run(*arguments: Any) -> None:
        implementation, supports = kernels.get(choose(arguments), (meaning, None))
        if supports is not None and not supports(*arguments):
            implementation = meaning
        implementation(*arguments)

    return run


@functools.cache
def _register(full_name: str, meaning: Callable[..., None]) -> None:
    """Sends an op on CUDA devices through its route, which may change."""

    def run(*arguments: Any) -> None:
        _routes.get(full_name, meaning)(*arguments)

    _library.impl(full_name, run, "CUDA")  # type: ignore[no-untyped-call]


def kernel(name: str, kind: str) -> tuple[Callable[..., None], Callable[..., bool] | None]:
    """A loaded kernel of an op and what says whether it takes arguments; None: it takes all.

    Kernels in Triton are one function for an op and its overload.
    """
    base, _, overload = name.partition(".")
    if kind == "cuda":
        if name in ("minimax_root_", "small_root_"):
            return torch.ops.shampoo.cuda_small_root_.default, backends.supports_small_root
        if name == "magnitudes_":
            return torch.ops.shampoo.cuda_magnitudes_.default, backends.supports_magnitudes
        return getattr(getattr(torch.ops.shampoo, f"cuda_{base}"), overload or "default"), None
    from shampoo.kernels.triton import (
        gram,
        precondition,
    )
    from shampoo.kernels.triton import (
        minimax as minimax_triton,
    )
    from shampoo.kernels.triton import (
        root_check as probe,
    )

    home: Any = {
        "gram_ema_": gram,
        "precondition_": precondition,
        "minimax_root_": minimax_triton,
        "judge_roots_": probe,
    }[base]
    return getattr(home, base), home.supports


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"shampoo uses PyTorch's own kernels, which are slower: {reason}",
        RuntimeWarning,
        stacklevel=4,  # the caller of the optimizer's constructor
    )


def kernels(device: str = "CPU") -> dict[str, bool]:
    """For every op, whether a kernel of its own is registered for a dispatch key."""
    return {name: has_kernel(name, device) for name in _meanings}


def has_kernel(name: str, device: str) -> bool:
    """Whether a name of an op has a kernel for a dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"shampoo::{name}", device)
