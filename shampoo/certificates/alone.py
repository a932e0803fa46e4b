"""What is called without an optimizer: it runs the kernels that an optimizer would."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch._guards import active_fake_mode

from shampoo import ops, roots
from shampoo.certificates.loading import load_kernels, prepare
from shampoo.roots.methods import check_stack


@functools.wraps(roots.inverse_root, assigned=("__doc__",))
def inverse_root(  # noqa: D103
    A: Tensor,
    p: float,
    *,
    eps: float = 1e-12,
    relative_eps: float = 1e-6,
    method: str = "auto",
) -> Tensor:
    check_stack(A)
    is_real = not torch.compiler.is_compiling() and active_fake_mode() is None
    if is_real and A.device.type in ("cpu", "cuda"):
        _ask(A.device)
    return roots.inverse_root(A, p, eps=eps, relative_eps=relative_eps, method=method)


@functools.cache  # an error is not kept: the next call asks again
def _ask(device: torch.device) -> None:
    """Loads kernels unless an optimizer has, and has them checked, but at no sizes of their own."""
    if not ops.are_loaded():
        load_kernels()
    prepare({device: []})
