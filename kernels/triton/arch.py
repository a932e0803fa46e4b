# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, import-not-found"
"""What the Triton launchers must know of the machine, and the arithmetic their kernels share.

A launcher never asks whether a tensor is on a GPU: under ``TRITON_INTERPRET=1`` the same call runs
on tensors of the CPU, as the newest architecture of the table.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

HOPPER = 90
BLACKWELL = 100

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Kernels run in Triton's interpreter. It knows nothing of bf16: there, tiles are widened first."""


@functools.cache
def capability(device: torch.device) -> int:
    """``80`` for an A100, ``90`` for an H100; of a device without one, ``90``."""
    if device.type != "cuda":
        return HOPPER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@triton.jit
def triangle(index):
    """Row i and column j >= i of the index-th upper tile; the same for every number of tiles."""
    j = ((tl.sqrt((8 * index + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > index, j - 1, j)  # the root was rounded up
    j = tl.where((j + 1) * (j + 2) // 2 <= index, j + 1, j)  # or down
    return index - j * (j + 1) // 2, j


@triton.jit
def mirrored(value, rows, cols):
    """A diagonal tile with its upper half reflected, so that it is bitwise symmetric."""
    return tl.where(rows[:, None] <= cols[None, :], value, tl.trans(value))
