# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, import-not-found"
"""Roots applied to every mode of a stack of blocks, three fp16 products for one in float32.

Replaces one float32 ``bmm`` per mode, the copies around a middle mode, and a norm. A root has
entries over many orders of magnitude, so single TF32 products are wrong by per cents, while two
fp16 numbers for an entry, scaled by a power of two, hold 22 bits. Loses to ``torch.bmm`` on a few
blocks with d <= 128, where the launches for the scales weigh most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shampoo.kernels.triton.gram import layout_of, offsets, reach, unfolded
from shampoo.kernels.triton.split_fp16 import absmax_

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LaunchConfig(NamedTuple):
    """Tiles of ``rows`` x ``cols`` results, ``block_k`` of the mode at a time."""

    rows: int
    cols: int
    block_k: int
    warps: int
    stages: int


def launch_config(size: int) -> LaunchConfig:
    """The tiles for a mode of this size."""
    if size <= 32:
        return LaunchConfig(64, 32, 32, 4, 3)
    if size <= 128:
        return LaunchConfig(64, 64, 32, 4, 3)
    return LaunchConfig(128, 128, 32, 8, 3)


def supports(out: Tensor, norm: Tensor, grad: Tensor, roots: Sequence[Tensor | None]) -> bool:
    """Whether :func:`precondition_` takes these: full float32 roots, contiguous float32 results.

    It has no form for a mode that stays as it is.
    """
    return (
        out.dtype == torch.float32
        and out.is_contiguous()
        and out.numel() > 0
        and reach(out) < 2**31
        and grad.dtype in _DTYPES
        and reach(grad) < 2**31
        and len(roots) > 0
        and all(
            root is not None
            and root.dim() == 3
            and root.dtype == torch.float32
            and root.stride(2) == 1
            for root in roots
        )
    )


@triton.jit
def scale_of(bits):
    """The powers of two that bring a magnitude, given as float32 bits, below 2^12, and back."""
    exponent = tl.maximum(bits >> 23, 12)  # the scale of what is smaller would be infinite
    scale = ((265 - exponent) << 23).to(tl.float32, bitcast=True)
    back = ((exponent - 11) << 23).to(tl.float32, bitcast=True)
    return scale, back


@triton.jit
def apply_root_kernel(
    out,  # [B, before, d, after] float32
    blocks,  # [B, before, d, after]
    root,  # [B, d, d] float32, symmetric
    block_absmax,  # [B] int32: bits of the largest magnitude
    root_absmax,  # [B] int32
    out_absmax,  # [B] int32, raised, unless LAST
    squares,  # [B, tiles] float64, written if LAST
    size,  # d
    others,  # before * after
    after,
    out_stride_b,
    out_stride_before,
    out_stride_size,
    out_stride_after,
    stride_b,
    stride_before,
    stride_size,
    stride_after,
    root_stride_b,
    root_stride_row,
    row_tiles,
    count,  # tiles of a block
    LAYOUT: tl.constexpr,
    HALF: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of ``blocks x_k root``: rows are the other modes, columns the new mode k."""
    matrix = (tl.program_id(0) // count).to(tl.int64)
    tile = tl.program_id(0) % count
    rows = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)
    cols = (tile // row_tiles) * COLS + tl.arange(0, COLS)
    block_scale, block_back = scale_of(tl.load(block_absmax + matrix))
    root_scale, root_back = scale_of(tl.load(root_absmax + matrix))
    source = blocks + matrix * stride_b
    source += offsets(rows, after, stride_before, stride_after, LAYOUT)[:, None]
    factor = root + matrix * root_stride_b + cols[:, None] * root_stride_row
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < size)[None, :]
        a = tl.load(source + k[None, :] * stride_size, mask=(rows < others)[:, None] & inside)
        a = tl.where((rows < others)[:, None] & inside, a.to(tl.float32) * block_scale, 0.0)
        x = tl.load(factor + k[None, :], mask=(cols < size)[:, None] & inside, other=0.0)
        x = x * root_scale
        a_hi = a.to(tl.float16)
        x_hi = x.to(tl.float16)
        x_lo = (x - x_hi.to(tl.float32)).to(tl.float16)
        if not HALF:  # what was half precision has no rest
            a_lo = (a - a_hi.to(tl.float32)).to(tl.float16)
            total = tl.dot(a_lo, tl.trans(x_hi), total)
        total = tl.dot(a_hi, tl.trans(x_lo), total)
        total = tl.dot(a_hi, tl.trans(x_hi), total)
    # One scale at a time: their product may leave the range of float32 though the result does not.
    value = total * root_back * block_back
    target = out + matrix * out_stride_b + cols[None, :] * out_stride_size
    target += offsets(rows, after, out_stride_before, out_stride_after, LAYOUT)[:, None]
    tl.store(target, value, mask=(rows < others)[:, None] & (cols < size)[None, :])
    # Without an axis, not along axis 0: Triton 3.6 follows a tile out of tensor memory (sm_100)
    # through its users, and dies of one that reduces a vector unless that is reshaped before.
    if LAST:
        wide = value.to(tl.float64)  # the square of a float32 may leave its range
        tl.store(squares + matrix * count + tile, tl.sum(tl.sum(wide * wide, axis=1)))
    else:
        bits = tl.abs(value).to(tl.int32, bitcast=True)
        tl.atomic_max(out_absmax + matrix, tl.max(tl.max(bits, axis=1)), sem="relaxed")


@triton.jit
def norm_kernel(norm, squares, stride, count, BLOCK: tl.constexpr):
    """``norm[b] = sqrt(sum squares[b])``, always in the same order."""
    matrix = tl.program_id(0)
    total = tl.zeros((), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(squares + matrix.to(tl.int64) * count + at, mask=at < count, other=0.0)
        total += tl.sum(value, axis=0)
    tl.store(norm + matrix * stride, tl.sqrt(total).to(norm.dtype.element_ty))


def precondition_(
    out: Tensor,
    norm: Tensor,
    grad: Tensor,
    roots: Sequence[Tensor],
    *,
    config: LaunchConfig | None = None,
) -> None:
    """``out <- G x_1 X_1 ... x_o X_o`` and ``norm[b] <- |out_b|``.

    Args:
        out: [B, d_1 .. d_o] float32, contiguous, written.
        norm: [B], written.
        grad: [B, d_1 .. d_o] float32, bfloat16 or float16.
        roots: One a mode: [B, d_k, d_k] float32 with unit column stride, positive semi-definite.
        config: The tiles of every mode; by the table of :func:`launch_config` by default.
    """
    batch, order = len(grad), len(roots)
    device = grad.device
    absmax = torch.zeros(2 * order, batch, dtype=torch.int32, device=device)
    scratch = [torch.empty_like(out) for _ in range(min(order - 1, 2))]
    flat = grad.reshape(batch, 1, -1)
    absmax_(absmax[0], flat)
    blocks = grad
    for mode, root in enumerate(roots):
        # No entry of a positive semi-definite matrix exceeds its largest diagonal entry.
        absmax_(absmax[order + mode], root.diagonal(dim1=1, dim2=2)[:, :, None])
        last = mode == order - 1
        target = out if last else scratch[mode % 2]
        view, written = unfolded(blocks, mode), unfolded(target, mode)
        _, before, size, after = view.shape
        chosen = launch_config(size) if config is None else config
        row_tiles = triton.cdiv(before * after, chosen.rows)
        count = row_tiles * triton.cdiv(size, chosen.cols)
        squares = torch.empty(batch * count if last else 1, dtype=torch.float64, device=device)
        apply_root_kernel[(batch * count,)](
            written,
            view,
            root,
            absmax[mode],
            absmax[order + mode],
            absmax[min(mode + 1, order - 1)],
            squares,
            size,
            before * after,
            after,
            *written.stride(),
            *view.stride(),
            root.stride(0),
            root.stride(1),
            row_tiles,
            count,
            LAYOUT=layout_of(before, after),
            HALF=blocks.dtype != torch.float32,
            LAST=last,
            ROWS=chosen.rows,
            COLS=chosen.cols,
            BLOCK_K=chosen.block_k,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
        )
        blocks = target
    norm_kernel[(batch,)](norm, squares, norm.stride(0), count, BLOCK=64, num_warps=1)
