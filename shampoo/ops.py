"""Every op, declared once: its schema and its meaning on any device.

PyTorch's dispatcher is the only switch between kernels. An op starts out as its reference
everywhere, and :func:`load_kernels` registers a faster kernel over it for one device. Ops write
into tensors they are given and return nothing, so one fake that does nothing lets torch.compile
trace them all.
"""

import functools
import os
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo import jit
from shampoo.kernels import health, minimax, reference

_library = torch.library.Library("shampoo", "DEF")  # type: ignore[no-untyped-call]
_meanings: dict[str, Callable[..., None]] = {}


def _no_output(*_: object) -> None:
    """What tracing needs to know of every op: nothing comes out, and tables are not read."""


def _define(schema: str, meaning: Callable[..., None]) -> Callable[..., Any]:
    name, _, overload = schema.partition("(")[0].partition(".")
    _meanings[name] = meaning
    _library.define(schema)  # type: ignore[no-untyped-call]
    full_name = f"{name}.{overload}" if overload else name
    _library.impl(full_name, meaning, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"shampoo::{full_name}", _no_output, lib=_library)
    return getattr(getattr(torch.ops.shampoo, name), overload or "default")  # type: ignore[no-any-return]


def _define_twice(schema: str, numbers: str, meaning: Callable[..., None]) -> Callable[..., Any]:
    """Defines an op and its overload ``Tensor``, which reads ``numbers`` on the device.

    A step that a graph replays cannot take its moving numbers from the host: there they are 0-d
    float64 tensors beside the others. The choice is made here, since the dispatcher's own would
    turn such a tensor into a float, and wait for the device.
    """
    names = numbers.split()
    plain = _define(schema, meaning)
    replayed = re.sub(rf"float ({'|'.join(names)})\b", r"Tensor \1", schema)
    on_device = _define(replayed.replace("(", ".Tensor(", 1), meaning)
    arguments = [part.split()[-1] for part in schema[schema.index("(") :].split(",")]
    first = arguments.index(names[0])

    def choose(*given: Any, **named: Any) -> None:
        number = given[first] if first < len(given) else named[names[0]]
        (on_device if isinstance(number, Tensor) else plain)(*given, **named)

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
    "graft_moments_(Tensor(a!)? exp_avg, Tensor(b!)? exp_avg_sq, Tensor(c!)? direction,"
    " Tensor(d!) norm, Tensor grad, Tensor runs, float beta1, float correction1, float beta2,"
    " float weight2, float correction2, float eps, bool normalized) -> ()",
    "beta1 correction1 beta2 weight2 correction2",
    reference.graft_moments_,
)
# Not "mode" as in the reference: torch.compile would pass it by keyword to functions that have one.
gram_ema_ = _define_twice(
    "gram_ema_(Tensor(a!) factor, Tensor grad, int k, float beta, float weight) -> ()",
    "beta weight",
    reference.gram_ema_,
)
precondition_ = _define(
    "precondition_(Tensor(a!) out, Tensor(b!) norm, Tensor grad, Tensor[] roots) -> ()",
    reference.precondition_,
)
symmetric_product_ = _define(
    "symmetric_product_(Tensor(a!) out, Tensor left, Tensor right, Tensor? addend, float alpha,"
    " float beta, float diagonal) -> ()",
    reference.symmetric_product_,
)
eigh_ = _define(
    "eigh_(Tensor(a!) values, Tensor(b!) vectors, Tensor stack) -> ()",
    reference.eigh_,
)


def _minimax_root_(
    root: Tensor,
    ridge: Tensor,
    factor: Tensor,
    p: int,
    eps: float,
    relative_eps: float,
    schedule: Sequence[float],
) -> None:
    """The chain in plain PyTorch, around the op for its products."""
    multiply = symmetric_product_
    minimax.minimax_root_(root, ridge, factor, p, eps, relative_eps, schedule, multiply)


minimax_root_ = _define(
    "minimax_root_(Tensor(a!) root, Tensor(b!) ridge, Tensor factor, int p, float eps,"
    " float relative_eps, float[] schedule) -> ()",
    _minimax_root_,
)
# The same for up to 128 rows, where one launch can hold the whole chain.
small_root_ = _define(
    "small_root_(Tensor(a!) root, Tensor(b!) ridge, Tensor factor, int p, float eps,"
    " float relative_eps, float[] schedule) -> ()",
    _minimax_root_,
)
judge_roots_ = _define(
    "judge_roots_(Tensor(a!) ok, Tensor root, Tensor factor, Tensor ridge, float p) -> ()",
    health.judge_roots_,
)
update_blocks_ = _define_twice(
    "update_blocks_(Tensor(a!)[] params, Tensor(b!)? momentum, Tensor direction, Tensor scale,"
    " Tensor tiles, float lr, float weight_decay, float mu, bool nesterov) -> ()",
    "lr weight_decay mu",
    reference.update_blocks_,
)


BACKENDS = ("auto", "compiled", "triton", "reference")


def load_kernels(required: bool = False) -> None:
    """Registers the kernels, or says once why the slower references stay.

    ``SHAMPOO_BACKEND`` chooses: ``auto`` (default) takes the C++ kernels for the CPU, and warns
    once for each process if they are not there; ``compiled`` insists on the kernels in C++ and
    CUDA, ``triton`` on those in Triton, without the others; ``reference`` does not even try. The
    kernels for a GPU have been compiled and emulated but never run on one, so ``auto`` leaves the
    references there.

    Args:
        required: turns the reason why the chosen kernels are not there into an error, for a caller
            that was asked for them.

    Raises:
        ValueError: if ``SHAMPOO_BACKEND`` is none of the four.
        shampoo.jit.BuildError: if the kernels must be there and are not.
    """
    backend = os.environ.get("SHAMPOO_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"Invalid SHAMPOO_BACKEND={backend!r}. Must be one of {BACKENDS}.")
    if backend == "reference":
        if required:
            raise jit.BuildError("SHAMPOO_BACKEND=reference forbids the kernels. Unset it.")
        return
    if backend != "triton" and (reason := _load_once()):
        if required or backend == "compiled":
            raise jit.BuildError(reason)
        _warn_once(reason)
    if backend == "triton" and (reason := _load_triton_once()):
        raise jit.BuildError(reason)


@functools.cache
def _load_once() -> str:
    """Tries to load the compiled kernels: the reason why not, or nothing."""
    try:
        jit.load()
    except jit.BuildError as error:
        return str(error)
    return ""


@functools.cache
def _load_triton_once() -> str:
    """Tries to register the Triton kernels: the reason why not, or nothing."""
    if not torch.cuda.is_available():
        return "no CUDA device for the Triton kernels. Unset SHAMPOO_BACKEND."
    try:
        # Not at import: a torch for the CPU brings no Triton.
        from shampoo.kernels import gram, minimax_triton, precondition, probe
    except ImportError as error:
        return f"Triton cannot be imported ({error}). Install triton."
    _register("gram_ema_", gram.gram_ema_, gram.supports)
    _register("precondition_", precondition.precondition_, precondition.supports)
    _register("minimax_root_", minimax_triton.minimax_root_, minimax_triton.supports)
    _register("judge_roots_", probe.judge_roots_, probe.supports)
    return ""


def _register(name: str, kernel: Callable[..., None], supports: Callable[..., bool]) -> None:
    """Puts a kernel over the reference on CUDA devices, for the arguments that it supports."""
    meaning = _meanings[name]

    def choose(*arguments: Any) -> None:
        (kernel if supports(*arguments) else meaning)(*arguments)

    _library.impl(name, choose, "CUDA")  # type: ignore[no-untyped-call]


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"shampoo uses PyTorch's own kernels, which are slower: {reason}",
        RuntimeWarning,
        stacklevel=4,  # the caller of the optimizer's constructor
    )


def kernels(device: str = "CPU") -> dict[str, bool]:
    """For every op, whether a kernel of its own is registered for a dispatch key."""
    return {
        name: torch._C._dispatch_has_kernel_for_dispatch_key(f"shampoo::{name}", device)
        for name in _meanings
    }
