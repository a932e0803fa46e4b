# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, import-not-found"
"""The verdict of :mod:`shampoo.kernels.reference.root_check` on a stack of roots, flags left on the
device.

Replaces some thirty calls of torch. The factor and the root are each read once per product with 16
vectors at a time; those are too few to fill the tensor cores, so bandwidth decides. The thresholds
are those of the reference. Products are ``tf32x3``: the noise of plain TF32 is as large as the
commutator of a bad root.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shampoo.kernels.reference.minimax_class import within
from shampoo.kernels.reference.root_check import (
    COMMUTATOR,
    COMMUTATOR_LOW,
    MAGNITUDE,
    QUADRATIC,
    VECTORS,
    white_vectors,
)
from shampoo.kernels.triton.split_fp16 import take_absmax

_PANEL = 2 * VECTORS
_ROWS = 64
_DEPTH = 64
_ELEMENTS = 4096  # of a program that looks for the largest


def supports(
    ok: Tensor,
    root: Tensor,
    factor: Tensor,
    ridge: Tensor,
    p: float,
    sizes: Tensor | None = None,
) -> bool:
    """Whether :func:`check_roots_` takes these: float32, unit column strides, p an integer."""
    return (
        root.dtype == factor.dtype == torch.float32
        and root.numel() > 0
        and root.stride(2) == factor.stride(2) == 1
        and p == int(p)
    )


@triton.jit
def magnitude(bits):
    """A magnitude given as float32 bits, in float64; 1 for zero."""
    value = bits.to(tl.float32, bitcast=True).to(tl.float64)
    return tl.where(value == 0.0, 1.0, value)


@triton.jit
def factor_size(factor_absmax, ridge, matrix):
    """The unit of A + ridge I: its entries are at most 1 in it."""
    bits = tl.load(factor_absmax + matrix)
    size = bits.to(tl.float32, bitcast=True).to(tl.float64) + tl.load(ridge + matrix)
    return tl.where(size > 0.0, size, tl.where(size == 0.0, 1.0, size))


@triton.jit
def both_absmax_kernel(
    absmax,  # [2, B] int32, of zeros
    factor,
    root,
    count,
    batch,
    factor_stride_b,
    factor_stride_row,
    root_stride_b,
    root_stride_row,
    columns,
    BLOCK: tl.constexpr,
):
    """The largest magnitudes of factors and of roots."""
    if tl.program_id(2) == 0:
        take_absmax(
            absmax,
            factor,
            absmax,
            count,
            factor_stride_b,
            factor_stride_row,
            columns,
            False,
            BLOCK,
        )
    else:
        take_absmax(
            absmax + batch,
            root,
            absmax,
            count,
            root_stride_b,
            root_stride_row,
            columns,
            False,
            BLOCK,
        )


@triton.jit
def panel_kernel(
    out,  # [B, n, 16] float32; of it ``columns`` columns
    matrices,  # [B, n, n] float32
    panel,  # [B, n, 16] float32, or [n, 8] if IS_START, which then stands before ``out``
    factor_absmax,
    root_absmax,
    ridge,
    size,  # n
    stride_b,
    stride_row,
    row_tiles,
    columns,
    IS_ROOT: tl.constexpr,
    IS_START: tl.constexpr,
    PANEL: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Rows of ``X w`` or ``(A + ridge I) w``, in units of the largest entries."""
    matrix = tl.program_id(0) // row_tiles
    rows = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)
    vectors = tl.arange(0, PANEL)
    wanted = (vectors < columns)[None, :]
    source = matrices + matrix.to(tl.int64) * stride_b + rows[:, None] * stride_row
    width: tl.constexpr = PANEL // 2 if IS_START else PANEL
    if not IS_START:
        panel += matrix.to(tl.int64) * size * PANEL
    out += matrix.to(tl.int64) * size * PANEL
    total = tl.zeros((ROWS, PANEL), tl.float32)
    for start in range(0, size, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = (rows < size)[:, None] & (k < size)[None, :]
        a = tl.load(source + k[None, :], mask=inside, other=0.0)
        at = k[:, None] * width + vectors[None, :]
        w = tl.load(panel + at, mask=(k < size)[:, None] & wanted, other=0.0)
        total = tl.dot(a, w, total, input_precision="tf32x3")
    mask = (rows < size)[:, None] & wanted
    at = rows[:, None] * PANEL + vectors[None, :]
    if IS_ROOT:
        unit = magnitude(tl.load(root_absmax + matrix))
        total *= (1.0 / unit).to(tl.float32)
    else:
        unit = factor_size(factor_absmax, ridge, matrix)
        total *= (1.0 / unit).to(tl.float32)
        shift = (tl.load(ridge + matrix) / unit).to(tl.float32)
        own = tl.load(panel + rows[:, None] * width + vectors[None, :], mask=mask, other=0.0)
        total += shift * own
        if IS_START:
            tl.store(out - width + at, own, mask=mask)
    tl.store(out + at, total, mask=mask)


@triton.jit
def check_kernel(
    ok,  # [B] bool
    values,  # [B, 2] float64: commutator and quadratic form
    commuted,  # [B, n, 16]: X A v in the last columns
    swapped,  # [B, n, 16]: A X v in the first
    left,  # [B, n, 16]: X^floor(p/2) v in the first
    right,  # [B, n, 16]: A X^ceil(p/2) v in the first
    start_panel,  # [B, n, 16]: v in the first
    root,  # [B, n, n]
    factor_absmax,
    root_absmax,
    ridge,
    sizes,  # [B] int32, if SIZED: the side of each matrix
    size,
    stride_b,
    stride_diagonal,
    p,
    commutator_limit,
    lowest,
    highest,
    reach_limit,
    TESTED: tl.constexpr,  # whether the commutator tells
    SIZED: tl.constexpr,
    PANEL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """All tests of one root, from the panels."""
    matrix = tl.program_id(0)
    base = matrix.to(tl.int64) * size * PANEL
    vectors = tl.arange(0, PANEL // 2)
    difference = tl.zeros((), tl.float64)
    length = tl.zeros((), tl.float64)
    form = tl.zeros((), tl.float64)
    white = tl.zeros((), tl.float64)
    smallest = tl.full((), float("inf"), tl.float32)
    side = tl.load(sizes + matrix) if SIZED else size
    for start in range(0, size, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < size)[:, None]
        at = base + rows[:, None] * PANEL + vectors[None, :]
        xav = tl.load(commuted + at + PANEL // 2, mask=mask, other=0.0).to(tl.float64)
        axv = tl.load(swapped + at, mask=mask, other=0.0).to(tl.float64)
        gap = xav - axv
        difference += tl.sum(tl.sum(gap * gap, axis=1), axis=0)
        length += tl.sum(tl.sum(xav * xav, axis=1), axis=0)
        low = tl.load(left + at, mask=mask, other=0.0).to(tl.float64)
        high = tl.load(right + at, mask=mask, other=0.0).to(tl.float64)
        form += tl.sum(tl.sum(low * high, axis=1), axis=0)
        v = tl.load(start_panel + at, mask=mask, other=0.0).to(tl.float64)
        white += tl.sum(tl.sum(v * v, axis=1), axis=0)
        offset = matrix.to(tl.int64) * stride_b + rows.to(tl.int64) * stride_diagonal
        diagonal = tl.load(root + offset, mask=rows < size, other=float("inf"))
        if SIZED:
            diagonal = tl.where(rows < side, diagonal, float("inf"))
        smallest = tl.minimum(smallest, tl.min(diagonal, axis=0))
    damping = tl.load(ridge + matrix)
    damped = damping > 0.0
    bits = tl.load(root_absmax + matrix)
    largest = bits.to(tl.float32, bitcast=True).to(tl.float64)
    commutator = tl.sqrt(difference) / tl.sqrt(length)
    unit = tl.log2(factor_size(factor_absmax, ridge, matrix)) + p * tl.log2(magnitude(bits))
    form = form * tl.exp2(unit) / white
    tl.store(values + matrix * 2, commutator)
    tl.store(values + matrix * 2 + 1, form)
    # Every test is written so that a NaN fails it.
    passed = (bits < 0x7F800000) & ((smallest > 0.0) | ((smallest == 0.0) & (damped == 0)))
    bound = reach_limit * tl.exp2(-tl.log2(tl.where(damped, damping, 1.0)) / p)
    passed = passed & ((damped == 0) | (largest <= bound))
    if TESTED:
        passed = passed & ((commutator <= commutator_limit) | ((damped == 0) & (bits == 0)))
    passed = passed & ((damped == 0) | ((form >= lowest) & (form <= highest)))
    tl.store(ok + matrix, passed)


def check_roots_(
    ok: Tensor,
    root: Tensor,
    factor: Tensor,
    ridge: Tensor,
    p: float,
    sizes: Tensor | None = None,
    *,
    values: Tensor | None = None,
) -> None:
    """Writes which roots of a stack may be used.

    Args:
        ok: [B] bool, written.
        root: X, [B, n, n] float32 with unit column stride.
        factor: A, the same.
        ridge: What the root was taken with, [B] float64; may be zero.
        p: The power of the root, an integer.
        sizes: [B] int32: the side of each matrix of a size class. All n by default.
        values: [B, 2] float64, written: the commutator and the quadratic form.
    """
    batch, size, _ = root.shape
    p = int(p)
    absmax = torch.zeros(2, batch, dtype=torch.int32, device=root.device)
    for first in range(0, batch, 65535):  # the second axis of a grid ends there
        part = slice(first, min(first + 65535, batch))
        both_absmax_kernel[(triton.cdiv(size * size, _ELEMENTS), part.stop - first, 2)](
            absmax[:, first:],
            factor[part],
            root[part],
            size * size,
            batch,
            factor.stride(0),
            factor.stride(1),
            root.stride(0),
            root.stride(1),
            size,
            BLOCK=_ELEMENTS,
            num_warps=8,
        )
    row_tiles = triton.cdiv(size, _ROWS)

    def times(matrices: Tensor, panel: Tensor, out: Tensor, columns: int, is_root: bool) -> Tensor:
        panel_kernel[(batch * row_tiles,)](
            out,
            matrices,
            panel,
            absmax[0],
            absmax[1],
            ridge,
            size,
            matrices.stride(0),
            matrices.stride(1),
            row_tiles,
            columns,
            IS_ROOT=is_root,
            IS_START=panel.dim() == 2,
            PANEL=_PANEL,
            ROWS=_ROWS,
            DEPTH=_DEPTH,
            num_warps=4,
            num_stages=3,
        )
        return out

    def fresh() -> Tensor:
        return root.new_empty(batch, size, _PANEL)

    start = fresh()  # v and A v, side by side
    white = white_vectors(size, root.dtype, root.device)
    if sizes is not None:  # each matrix has its own, zero beyond its size
        start[:, :, :VECTORS] = white * within(sizes, size)[:, :, None]
        white = start
    times(factor, white, start[:, :, VECTORS:], VECTORS, is_root=False)
    powers = [
        start,
        times(root, start, fresh(), _PANEL, is_root=True),
    ]  # X^k v in the first columns
    swapped = times(factor, powers[1], fresh(), VECTORS, is_root=False)
    while len(powers) <= (p + 1) // 2:
        powers.append(times(root, powers[-1], fresh(), VECTORS, is_root=True))
    right = (
        swapped if len(powers) == 2 else times(factor, powers[-1], fresh(), VECTORS, is_root=False)
    )
    check_kernel[(batch,)](
        ok,
        ridge.new_empty(batch, 2) if values is None else values,
        powers[1],
        swapped,
        powers[p // 2],
        right,
        start,
        root,
        absmax[0],
        absmax[1],
        ridge,
        absmax if sizes is None else sizes,
        size,
        root.stride(0),
        root.stride(1) + 1,
        p,
        COMMUTATOR if p >= 4 else COMMUTATOR_LOW,
        *QUADRATIC,
        MAGNITUDE,
        TESTED=p >= 2,
        SIZED=sizes is not None,
        PANEL=_PANEL,
        ROWS=_ROWS,
        num_warps=4,
    )
