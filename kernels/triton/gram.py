# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, import-not-found"
"""Exponential averages of Gram matrices, upper tiles only.

Replaces one ``baddbmm_`` per mode, and the copy that unfolding a middle mode costs. Every tile
pair is computed once, so it moves half of the bytes of the factor; where d <= 256 and there are few
blocks, too few tiles are left to fill a GPU and cuBLAS is as fast.

Gradients in half precision are multiplied as they are. Those in float32 take three TF32 products
(``tf32x3``): it drops the product of the two remainders, 2^-24 of the whole, while ``bf16x3``
drops 2^-18, a negative eigenvalue larger than a relative ridge of 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shampoo.kernels.reference.ops import Number
from shampoo.kernels.triton.arch import HOPPER, INTERPRETED, capability, mirrored, triangle

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LaunchConfig(NamedTuple):
    """``block`` x ``block`` tiles of the factor, ``block_k`` of the unfolded columns at a time."""

    block: int
    block_k: int
    warps: int
    stages: int


def launch_config(size: int, dtype: torch.dtype, device: torch.device) -> LaunchConfig:
    """The tiles for a factor of this size and gradients of this dtype."""
    wide = dtype == torch.float32
    block_k = 32 if wide else 64
    if size <= 32:
        return LaunchConfig(32, block_k, 4, 3)
    if size <= 256 or (wide and capability(device) < HOPPER):  # where large tiles would spill
        return LaunchConfig(64, block_k, 4, 3)
    return LaunchConfig(128, block_k, 8, 3)


def supports(factor: Tensor, grad: Tensor, k: int, beta: Number, weight: Number) -> bool:
    """Whether :func:`gram_ema_` takes these: a full float32 factor, blocks below 2^31 elements.

    Both numbers of the host, or both one float64 on the device of the factor.
    """
    return (
        factor.dim() == 3
        and factor.dtype == torch.float32
        and grad.dtype in _DTYPES
        and grad.numel() > 0
        and reach(grad) < 2**31
        and _are_readable((beta, weight), factor.device)
    )


def _are_readable(numbers: Sequence[Number], device: torch.device) -> bool:
    if not any(isinstance(number, Tensor) for number in numbers):
        return True
    return all(
        isinstance(number, Tensor)
        and number.dtype == torch.float64
        and number.numel() == 1
        and number.device == device
        for number in numbers
    )


def reach(blocks: Tensor) -> int:
    """The largest offset inside one block: kernels compute it in 32 bits."""
    return sum((d - 1) * s for d, s in zip(blocks.shape[1:], blocks.stride()[1:], strict=True))


@triton.jit
def offsets(index, after, stride_before, stride_after, LAYOUT: tl.constexpr):
    """Where element ``index`` of (before, after) lies. LAYOUT: 0 no before, 1 no after, 2 both."""
    if LAYOUT == 0:
        return index * stride_after
    elif LAYOUT == 1:
        return index * stride_before
    else:
        return (index // after) * stride_before + (index % after) * stride_after


@triton.jit
def number(given, ON_DEVICE: tl.constexpr):
    """An argument in float32, or one in float64 behind a pointer, rounded as a launch rounds."""
    if ON_DEVICE:
        return tl.load(given).to(tl.float32)
    else:
        return given


# Numbers on the device are cut from one tensor, 8 bytes apart: one kernel for all their places.
@triton.jit(do_not_specialize_on_alignment=("beta", "weight"))
def gram_ema_kernel(
    factor,  # [B, d, d] float32
    grad,  # [B, before, d, after]
    beta,  # as weight float32, or if ON_DEVICE a pointer to float64
    weight,
    size,  # d
    depth,  # before * after
    after,
    factor_stride_b,
    factor_stride_row,
    factor_stride_col,
    stride_b,
    stride_before,
    stride_size,
    stride_after,
    count,  # tiles of a factor
    LAYOUT: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One upper tile of ``beta A + weight mat(G) mat(G)^T`` and its mirror image."""
    matrix = (tl.program_id(0) // count).to(tl.int64)
    row_tile, col_tile = triangle(tl.program_id(0) % count)
    rows = row_tile * BLOCK + tl.arange(0, BLOCK)
    cols = col_tile * BLOCK + tl.arange(0, BLOCK)
    grad += matrix * stride_b
    left = grad + rows[:, None] * stride_size
    right = grad + cols[:, None] * stride_size
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        offset = offsets(k, after, stride_before, stride_after, LAYOUT)[None, :]
        inside = (k < depth)[None, :]
        a = tl.load(left + offset, mask=(rows < size)[:, None] & inside, other=0.0)
        b = tl.load(right + offset, mask=(cols < size)[:, None] & inside, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision="tf32x3")
    factor += matrix * factor_stride_b
    here = factor + rows[:, None] * factor_stride_row + cols[None, :] * factor_stride_col
    inside = (rows < size)[:, None] & (cols < size)[None, :]
    # Loaded with the tile, not before the loop: they would hold registers through it.
    beta = number(beta, ON_DEVICE)
    weight = number(weight, ON_DEVICE)
    old = beta * tl.load(here, mask=inside, other=0.0)
    # Spelled out: a compiler that may choose which product it fuses could choose by their origin.
    value = tl.fma(weight, total, old)
    if row_tile == col_tile:
        value = mirrored(value, rows, cols)
    tl.store(here, value, mask=inside)
    if row_tile != col_tile:
        there = factor + cols[:, None] * factor_stride_row + rows[None, :] * factor_stride_col
        mirror = (cols < size)[:, None] & (rows < size)[None, :]
        tl.store(there, tl.trans(value), mask=mirror)


def layout_of(before: int, after: int) -> int:
    """The LAYOUT of :func:`offsets`."""
    return 0 if before == 1 else 1 if after == 1 else 2


def unfolded(blocks: Tensor, mode: int) -> Tensor:
    """[B, before, d_k, after]: a view, unless the strides of the blocks do not allow one."""
    before = math.prod(blocks.shape[1 : mode + 1])
    after = math.prod(blocks.shape[mode + 2 :])
    return blocks.reshape(len(blocks), before, blocks.shape[mode + 1], after)


def gram_ema_(
    factor: Tensor,
    grad: Tensor,
    k: int,
    beta: Number,
    weight: Number,
    *,
    config: LaunchConfig | None = None,
) -> None:
    """``A_k <- beta A_k + weight mat_k(G) mat_k(G)^T``, bitwise symmetric.

    Only the upper triangle of A_k is read, which must be symmetric.

    Args:
        factor: [B, d_k, d_k] float32, read and written.
        grad: [B, d_1 .. d_o] float32, bfloat16 or float16, any order; not copied.
        k: The mode, from 0.
        beta: Decay; a float, or 0-d float64 on the device, which gives the same bits.
        weight: Of the new Gram matrix; as ``beta``.
        config: The tiles; by the table of :func:`launch_config` by default.
    """
    view = unfolded(grad, k)
    batch, before, size, after = view.shape
    config = launch_config(size, grad.dtype, grad.device) if config is None else config
    rows = triton.cdiv(size, config.block)
    count = rows * (rows + 1) // 2
    gram_ema_kernel[(batch * count,)](
        factor,
        view,
        beta,
        weight,
        size,
        before * after,
        after,
        *factor.stride(),
        *view.stride(),
        count,
        LAYOUT=layout_of(before, after),
        ON_DEVICE=isinstance(beta, Tensor),
        UPCAST=INTERPRETED and grad.dtype == torch.bfloat16,
        BLOCK=config.block,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
    )
