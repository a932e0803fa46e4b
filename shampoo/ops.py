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
from shampoo.kernels import reference

_library = torch.library.Library("shampoo", "DEF")  # type: ignore[no-untyped-call]
_names: list[str] = []


def _no_output(*_: object) -> None:
    """What tracing needs to know of every op: nothing comes out, and tables are not read."""


def _define(schema: str, meaning: Callable[..., None]) -> Callable[..., Any]:
    name = schema.partition("(")[0]
    _names.append(name)
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
symmetric_product_ = _define(
    "symmetric_product_(Tensor(a!) out, Tensor left, Tensor right, Tensor? addend, float alpha,"
    " float beta, float diagonal) -> ()",
    reference.symmetric_product_,
)
eigh_ = _define(
    "eigh_(Tensor(a!) values, Tensor(b!) vectors, Tensor stack) -> ()",
    reference.eigh_,
)
update_blocks_ = _define(
    "update_blocks_(Tensor(a!)[] params, Tensor(b!)? momentum, Tensor direction, Tensor scale,"
    " Tensor tiles, float lr, float weight_decay, float mu, bool nesterov) -> ()",
    reference.update_blocks_,
)


BACKENDS = ("auto", "compiled", "reference")


def load_kernels(required: bool = False) -> None:
    """Registers the compiled kernels, or says once why the slower references stay.

    ``SHAMPOO_BACKEND`` chooses: ``auto`` (default) falls back to the references with one warning
    for each process, ``compiled`` turns its reason into an error, ``reference`` does not even try.

    Args:
        required: as ``SHAMPOO_BACKEND=compiled``, for a caller that was asked for the kernels.

    Raises:
        ValueError: if ``SHAMPOO_BACKEND`` is none of the three.
        shampoo.jit.BuildError: if the kernels must be there and are not.
    """
    backend = os.environ.get("SHAMPOO_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"Invalid SHAMPOO_BACKEND={backend!r}. Must be one of {BACKENDS}.")
    if backend == "reference":
        if required:
            raise jit.BuildError("SHAMPOO_BACKEND=reference forbids the kernels. Unset it.")
        return
    if reason := _load_once():
        if required or backend == "compiled":
            raise jit.BuildError(reason)
        _warn_once(reason)


@functools.cache
def _load_once() -> str:
    """Tries to load the kernels: the reason why not, or nothing."""
    try:
        jit.load()
    except jit.BuildError as error:
        return str(error)
    return ""


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
        for name in _names
    }
