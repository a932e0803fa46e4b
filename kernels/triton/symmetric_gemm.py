# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, import-not-found"
"""Products of commuting symmetric matrices in split precision, upper tiles only.

Replaces ``torch.bmm`` on float32 in the root iteration: three fp16 products for one in float32,
over little more than half of the tiles. A plain product of a few matrices with n <= 512 does not
fill a GPU, and there one call of cuBLAS is at least as fast; the win at those sizes is the batch.

A matrix x is kept as the sum of two fp16 matrices: the leading bits of sigma x and the rest, 22
bits together. sigma is a power of two from a bound of the entries that is known on the host, so
hi hi + hi lo + lo hi share one float32 accumulator. Tensor cores truncate when they accumulate, so
every few k a fresh accumulator starts and the old one is added, rounded, in registers.

Both operands are read along their rows, the right one as its own transpose. That is only as good as
the operands are symmetric: results are therefore bitwise symmetric, by mirroring.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shampoo.kernels.triton.arch import BLACKWELL, HOPPER, capability, mirrored, triangle

SPLIT, ROOT, SQUARE = 0, 1, 2  # what a product writes


class LaunchConfig(NamedTuple):
    """How one product is launched: ``block`` x ``block`` tiles, ``block_k`` of k at a time.

    ``promote`` bounds the k that three products add up in one accumulator.
    """

    block: int
    block_k: int
    warps: int
    stages: int
    promote: int = 256


def launch_config(n: int, device: torch.device) -> LaunchConfig:
    """The tiles for matrices of size n: a table, as kernels that accumulate cannot be tuned live.

    64 x 64 tiles where 128 x 128 ones would be mostly padding, and on the A100, whose fragments of
    four fp16 matrices leave no registers for larger ones. A stage of the large tiles holds 64 KiB.

    On the B200, Triton 3.6 copies some of those tiles, which leaves no room for a third stage, and
    where not every step of k starts a fresh accumulator it keeps one more than tensor memory holds.
    """
    if capability(device) < HOPPER:
        return LaunchConfig(64, 32, 4, 3)
    if n <= 320 and padded(n, 64) < padded(n, 128):
        return LaunchConfig(64, 64, 4, 3)
    if capability(device) >= BLACKWELL:
        return LaunchConfig(128, 64, 8, 2, promote=64)
    return LaunchConfig(128, 64, 8, 3)


def padded(n: int, block: int) -> int:
    """The padded size: whole tiles, so that the loop over k needs no masks."""
    return -(-n // block) * block


def tile_count(size: int, block: int) -> int:
    """Upper tiles of a padded matrix."""
    rows = size // block
    return rows * (rows + 1) // 2


@triton.jit
def _accumulate(
    total,
    left,
    right,
    rows,
    cols,
    size,
    steps,
    PRODUCTS: tl.constexpr,
    PROMOTE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``total + left[rows] right[cols]^T`` over ``steps`` tiles of k."""
    k = tl.arange(0, BLOCK_K)
    a = left + rows[:, None] * size + k[None, :]
    b = right + cols[:, None] * size + k[None, :]
    rest = size * size  # from the leading bits to the rest
    partial = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(steps):
        a_hi = tl.load(a)
        b_hi = tl.load(b)
        if PRODUCTS == 3:
            a_lo = tl.load(a + rest)
            b_lo = tl.load(b + rest)
            partial = tl.dot(a_lo, tl.trans(b_hi), partial)
            partial = tl.dot(a_hi, tl.trans(b_lo), partial)
            partial = tl.dot(a_hi, tl.trans(b_hi), partial)
            if (step + 1) % (PROMOTE // BLOCK_K) == 0:
                total += partial
                partial = tl.zeros((BLOCK, BLOCK), tl.float32)
        else:  # the rounding of the operands hides that of the accumulator
            total = tl.dot(a_hi, tl.trans(b_hi), total)
        a += BLOCK_K
        b += BLOCK_K
    return total + partial


@triton.jit
def _load_split(matrix, rows, cols, size):
    """The stored value of a tile, float32."""
    at = matrix + rows[:, None] * size + cols[None, :]
    return tl.load(at).to(tl.float32) + tl.load(at + size * size).to(tl.float32)


@triton.jit
def symmetric_gemm_kernel(
    out,  # [B, 2, N, N] fp16 (SPLIT), or [B, n, n] float32 (ROOT), or [B, N, N] float32 (SQUARE)
    left,  # [B, 2, N, N]
    right,  # [B, 2, N, N]
    addend,  # [B, 2, N, N]
    coefficients,  # [5] float32
    sizes,  # [B] int32: real sizes
    norms,  # ROOT: [B, 4] float64, read; SQUARE: [B, tiles] float64, written; else unused
    size,  # N
    out_stride_b,
    out_stride_row,
    count,  # tiles of a matrix
    PRODUCTS: tl.constexpr,
    DOUBLED: tl.constexpr,
    PROMOTE: tl.constexpr,
    ADD_LEFT: tl.constexpr,
    ADD_RIGHT: tl.constexpr,
    ADD_ADDEND: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One upper tile of ``a left right + b left + c right + d I + e addend``, and its mirror."""
    matrix = tl.program_id(0) // count
    tile = tl.program_id(0) % count
    row_tile, col_tile = triangle(tile)
    n = tl.load(sizes + matrix)
    if KIND != 2 and col_tile * BLOCK >= n:
        return  # padding, of which nobody reads more than whole tiles of k
    rows = row_tile * BLOCK + tl.arange(0, BLOCK)
    cols = col_tile * BLOCK + tl.arange(0, BLOCK)
    left += matrix.to(tl.int64) * 2 * size * size
    right += matrix.to(tl.int64) * 2 * size * size
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    if PRODUCTS != 0:
        steps = tl.cdiv(n, BLOCK_K)
        total = _accumulate(
            total, left, right, rows, cols, size, steps, PRODUCTS, PROMOTE, BLOCK, BLOCK_K
        )
        if DOUBLED:  # the transpose of a rounded product is the rounded product turned around
            total = _accumulate(
                total, right, left, rows, cols, size, steps, PRODUCTS, PROMOTE, BLOCK, BLOCK_K
            )
    value = tl.load(coefficients) * total
    if ADD_LEFT:
        value += tl.load(coefficients + 1) * _load_split(left, rows, cols, size)
    if ADD_RIGHT:
        value += tl.load(coefficients + 2) * _load_split(right, rows, cols, size)
    if ADD_ADDEND:
        addend += matrix.to(tl.int64) * 2 * size * size
        value += tl.load(coefficients + 4) * _load_split(addend, rows, cols, size)
    diagonal = rows[:, None] == cols[None, :]
    value += tl.where(diagonal, tl.load(coefficients + 3), 0.0)
    if row_tile == col_tile:
        value = mirrored(value, rows, cols)
    out += matrix.to(tl.int64) * out_stride_b
    here = out + rows[:, None] * out_stride_row + cols[None, :]
    there = out + cols[:, None] * out_stride_row + rows[None, :]
    if KIND == 0:
        hi = value.to(tl.float16)
        lo = (value - hi.to(tl.float32)).to(tl.float16)
        rest = size * size
        tl.store(here, hi)
        tl.store(here + rest, lo)
        if row_tile != col_tile:
            tl.store(there, tl.trans(hi))
            tl.store(there + rest, tl.trans(lo))
    elif KIND == 1:
        value *= tl.load(norms + matrix * 4 + 3).to(tl.float32)
        inside = (rows[:, None] < n) & (cols[None, :] < n)
        tl.store(here, value, mask=inside)
        if row_tile != col_tile:
            tl.store(there, tl.trans(value), mask=(cols[:, None] < n) & (rows[None, :] < n))
    else:
        tl.store(here, value)
        if row_tile != col_tile:
            tl.store(there, tl.trans(value))
        squares = tl.sum(tl.sum(value * value, axis=1).to(tl.float64), axis=0)
        weight = tl.where(row_tile == col_tile, 1.0, 2.0)
        tl.store(norms + matrix.to(tl.int64) * count + tile, squares * weight)


def symmetric_gemm_(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    addend: Tensor,
    coefficients: Tensor,
    sizes: Tensor,
    norms: Tensor,
    *,
    kind: int,
    products: int,
    doubled: bool,
    promote: int,
    add_left: bool,
    add_right: bool,
    add_addend: bool,
    config: LaunchConfig,
) -> None:
    """``out = a left right + b left + c right + d I + e addend``, bitwise symmetric matrices.

    Args:
        out: By ``kind``: fp16 [B, 2, N, N] (``SPLIT``); float32 [B, n, n] with unit column
            stride, times ``norms[b, 3]`` (``ROOT``); float32 [B, N, N], with the squared Frobenius
            norm of every tile left in ``norms`` (``SQUARE``). Must not overlap an operand.
        left: [B, 2, N, N] float16, symmetric; N a multiple of the block.
        right: The same; the exact matrices must commute.
        addend: The same.
        coefficients: [5] float32 on the device: (a, b, c, d, e) for stored values.
        sizes: [B] int32: matrices end here, what is beyond counts as zero and is not written.
        norms: [B, 4] float64 (``ROOT``) or [B, tiles] float64 (``SQUARE``).
        kind: What ``out`` is.
        products: 3, 1 (leading bits only) or 0 (no product).
        doubled: Adds ``right left`` to ``left right``: symmetric to the last bit before mirroring.
        promote: k after which three products start a fresh accumulator; ``config`` may say fewer.
        add_left: Whether b is not zero.
        add_right: Whether c is not zero.
        add_addend: Whether e is not zero.
        config: The tiles.
    """
    batch, _, size, _ = left.shape
    count = tile_count(size, config.block)
    symmetric_gemm_kernel[(batch * count,)](
        out,
        left,
        right,
        addend,
        coefficients,
        sizes,
        norms,
        size,
        out.stride(0),
        out.stride(-2),
        count,
        PRODUCTS=products,
        DOUBLED=doubled,
        PROMOTE=min(promote, config.promote),
        ADD_LEFT=add_left,
        ADD_RIGHT=add_right,
        ADD_ADDEND=add_addend,
        KIND=kind,
        BLOCK=config.block,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
    )
