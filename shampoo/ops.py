"""Every op, declared once: its schema and its meaning on any device.

PyTorch's dispatcher is the only switch between kernels. An op starts out as its reference
everywhere, and :func:`load_kernels` registers a faster kernel over it for one device. Ops write
into tensors they are given and return nothing, so one fake that does nothing lets torch.compile
trace them all.
"""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from shampoo import jit
from shampoo.kernels import health, minimax, reference

_library = torch.library.Library("shampoo", "DEF")  # type: ignore[no-untyped-call]
_meanings: dict[str, Callable[..., None]] = {}


def _no_output(*_: object) -> None:
    """What tracing needs to know of every op: nothing comes out, and tables are not read."""


def _define(schema: str, meaning: Callable[..., None]) -> Callable[..., Any]:
    name = schema.partition("(")[0]
    _meanings[name] = meaning
    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, meaning, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"shampoo::{name}", _no_output, lib=_library)
    return getattr(torch.ops.shampoo, name).default  # type: ignore[no-any-return]


gather_blocks_ = _define(
    "gather_blocks_(Tensor(a!) out, Tensor[] sources, Tensor tiles, float alpha, bool accumulate)"
    " -> ()",
    reference.gather_blocks_,
)
magnitudes_ = _define(
    "magnitudes_(Tensor(a!) out, Tensor[] tensors) -> ()",
    reference.magnitudes_,
)
graft_moments_ = _define(
    "graft_moments_(Tensor(a!)? exp_avg, Tensor(b!)? exp_avg_sq, Tensor(c!)? direction,"
    " Tensor(d!) norm, Tensor grad, Tensor runs, float beta1, float correction1, float beta2,"
    " float weight2, float correction2, float eps, bool normalized) -> ()",
    reference.graft_moments_,
)
# Not "mode" as in the reference: torch.compile would pass it by keyword to functions that have one.
gram_ema_ = _define(
    "gram_ema_(Tensor(a!) factor, Tensor grad, int k, float beta, float weight) -> ()",
    reference.gram_ema_,
)
precondition_ = _define(
    "precondition_(Tensor(a!) out, Tensor(b!) norm, Tensor grad, Tensor[] roots) -> ()",
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
update_blocks_ = _define(
    "update_blocks_(Tensor(a!)[] params, Tensor(b!)? momentum, Tensor direction, Tensor scale,"
    " Tensor tiles, float lr, float weight_decay, float mu, bool nesterov) -> ()",
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
