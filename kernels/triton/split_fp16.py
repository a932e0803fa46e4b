# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, import-not-found"
"""From float32 matrices to the pairs of fp16 ones that the root iteration works on.

Replaces some ten elementwise calls and reductions of torch. Norms are partial results reduced in a
fixed order: no float atomics, so that roots do not change from run to run or with the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096  # of one program
_TILE = 32


@triton.jit
def take_absmax(
    absmax,
    values,
    sizes,
    count,
    stride_b,
    stride_row,
    columns,
    SIZED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Largest magnitude of rows x columns values of a matrix, as its float32 bits.

    The order of atomics does not matter to a maximum, and that of the bits of magnitudes is that of
    the magnitudes, NaN above all.
    """
    matrix = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values += matrix.to(tl.int64) * stride_b
    offset = (at // columns).to(tl.int64) * stride_row + at % columns
    inside = at < count
    if SIZED:
        n = tl.load(sizes + matrix)
        inside = inside & (at // columns < n) & (at % columns < n)
    value = tl.load(values + offset, mask=inside, other=0.0).to(tl.float32)
    bits = tl.abs(value).to(tl.int32, bitcast=True)
    tl.atomic_max(absmax + matrix, tl.max(bits, axis=0), sem="relaxed")


@triton.jit
def absmax_kernel(
    absmax,
    values,
    sizes,
    count,
    stride_b,
    stride_row,
    columns,
    SIZED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """:func:`take_absmax` of every matrix of a stack."""
    take_absmax(absmax, values, sizes, count, stride_b, stride_row, columns, SIZED, BLOCK)


def absmax_(absmax: Tensor, values: Tensor, sizes: Tensor | None = None) -> None:
    """``absmax[b] <- max(absmax[b], max |values[b]|)`` as the bits of a float32.

    Args:
        absmax: [B] int32.
        values: [B, rows, columns], any strides but unit ones for columns, or one column.
        sizes: [B] int32: rows and columns that count. All of them by default.
    """
    batch, rows, columns = values.shape
    for first in range(0, batch, 65535):  # the second axis of a grid ends there
        part = values[first : first + 65535]
        absmax_kernel[(triton.cdiv(rows * columns, _ELEMENTS), len(part))](
            absmax[first:],
            part,
            absmax if sizes is None else sizes[first:],
            rows * columns,
            part.stride(0),
            part.stride(1),
            columns,
            SIZED=sizes is not None,
            BLOCK=_ELEMENTS,
            num_warps=8,
        )


@triton.jit
def unit_of(bits):
    """The power of two at or below a magnitude given as float32 bits, float64; 1 for zero.

    What is not finite stays so, and makes everything divided by it NaN.
    """
    magnitude = bits.to(tl.float32, bitcast=True).to(tl.float64)
    exponent = magnitude.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    unit = exponent.to(tl.float64, bitcast=True)
    return tl.where(magnitude == 0.0, 1.0, unit)


@triton.jit
def store_split(split, at, rest, value, mask):
    """Stores a scaled value as the sum of two fp16 numbers."""
    hi = value.to(tl.float16)
    tl.store(split + at, hi, mask=mask)
    tl.store(split + at + rest, (value - hi.to(tl.float32)).to(tl.float16), mask=mask)


@triton.jit
def normalize_kernel(
    split, factor, absmax, sizes, size, stride_b, stride_row, scale, BLOCK: tl.constexpr
):
    """``scale A / s``, split, zero outside of the real size; (A + A^T) / 2 is taken as A."""
    matrix = tl.program_id(0)
    tile, across = tl.program_id(1), size // BLOCK
    rows = (tile // across) * BLOCK + tl.arange(0, BLOCK)
    cols = (tile % across) * BLOCK + tl.arange(0, BLOCK)
    n = tl.load(sizes + matrix)
    factor += matrix.to(tl.int64) * stride_b
    split += matrix.to(tl.int64) * 2 * size * size
    inside = (rows[:, None] < n) & (cols[None, :] < n)
    inverse = scale / unit_of(tl.load(absmax + matrix))
    here = tl.load(factor + rows[:, None] * stride_row + cols[None, :], mask=inside, other=0.0)
    mirror = (cols[:, None] < n) & (rows[None, :] < n)
    there = tl.load(factor + cols[:, None] * stride_row + rows[None, :], mask=mirror, other=0.0)
    value = (here.to(tl.float64) + tl.trans(there).to(tl.float64)) * (0.5 * inverse)
    at = rows[:, None] * size + cols[None, :]
    store_split(split, at, size * size, value.to(tl.float32), None)


def normalize_(split: Tensor, factor: Tensor, absmax: Tensor, sizes: Tensor, scale: float) -> None:
    """``split = scale * factor / s``, zero padded; s is the power of two below the absmax.

    Args:
        split: [B, 2, N, N] float16, written; N a multiple of 32.
        factor: [B, n, n] float32 with unit column stride, n <= N.
        absmax: [B] int32 from :func:`absmax_`.
        sizes: [B] int32: rows and columns that count.
        scale: A power of two.
    """
    batch, _, size, _ = split.shape
    normalize_kernel[(batch, (size // _TILE) ** 2)](
        split,
        factor,
        absmax,
        sizes,
        size,
        factor.stride(0),
        factor.stride(1),
        scale,
        BLOCK=_TILE,
        num_warps=4,
    )


@triton.jit
def measure_kernel(norms, ridge, squares, absmax, constants, count, power, BLOCK: tl.constexpr):
    """Norm, ridge and scales of one matrix from the squared norms of the tiles of S^2."""
    matrix = tl.program_id(0)
    squares += matrix.to(tl.int64) * count
    total = tl.zeros((), tl.float64)
    for start in range(0, count, BLOCK):  # pieces of one length: zero padding changes no bit
        at = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(squares + at, mask=at < count, other=0.0), axis=0)
    unit = unit_of(tl.load(absmax + matrix))
    norm = tl.sqrt(tl.sqrt(total))  # ||S^2||_F^(1/2)
    absolute, relative = tl.load(constants) / unit, tl.load(constants + 1) * norm
    rho = tl.where(relative < absolute, absolute, relative)  # keeps a NaN of the norm
    bound = norm + rho
    tl.store(ridge + matrix, rho * unit)
    tl.store(norms + matrix * 4, 1.0 / bound)
    tl.store(norms + matrix * 4 + 1, rho / bound)
    tl.store(norms + matrix * 4 + 2, unit)
    tl.store(norms + matrix * 4 + 3, tl.exp2(-tl.log2(bound * unit) / power))


def measure_(
    norms: Tensor, ridge: Tensor, squares: Tensor, absmax: Tensor, constants: Tensor, p: int
) -> None:
    """Ridge and scales of every matrix, left on the device.

    With b = ||S^2||_F^(1/2), rho = max(eps / s, relative_eps b) and c = b + rho.

    Args:
        norms: [B, 4] float64, written: 1 / c, rho / c, s, (c s)^(-1/p).
        ridge: [B] float64, written: rho s.
        squares: [B, tiles] float64: squared norms of the tiles of S^2.
        absmax: [B] int32 from :func:`absmax_`.
        constants: float64, beginning with eps and relative_eps.
        p: The root.
    """
    measure_kernel[(len(norms),)](
        norms, ridge, squares, absmax, constants, squares.shape[1], p, BLOCK=64, num_warps=1
    )


@triton.jit
def start_kernel(
    first_split,
    root_split,
    split,
    square,
    norms,
    constants,
    size,
    inverse_scale,
    first_scale,
    root_scale,
    BLOCK: tl.constexpr,
):
    """``M = S / c + r I`` and ``X = c0 I + c1 M + c2 M^2``, both scaled and split."""
    matrix = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rest = size * size
    base = matrix.to(tl.int64) * rest
    inverse = tl.load(norms + matrix * 4)
    low = tl.load(norms + matrix * 4 + 1)
    c0 = tl.load(constants + 2)
    c1 = tl.load(constants + 3)
    c2 = tl.load(constants + 4)
    inside = at < rest
    hi = tl.load(split + 2 * base + at, mask=inside, other=0.0).to(tl.float32)
    lo = tl.load(split + 2 * base + rest + at, mask=inside, other=0.0).to(tl.float32)
    S = (hi + lo) * inverse_scale
    S2 = tl.load(square + base + at, mask=inside, other=0.0)
    diagonal = at // size == at % size
    M = S * inverse.to(tl.float32) + tl.where(diagonal, low.to(tl.float32), 0.0)
    linear = ((c1 + 2.0 * c2 * low) * inverse).to(tl.float32)
    constant = (c0 + c1 * low + c2 * low * low).to(tl.float32)
    X = S * linear + S2 * (c2 * inverse * inverse).to(tl.float32)
    X += tl.where(diagonal, constant, 0.0)
    store_split(first_split + 2 * base, at, rest, M * first_scale, inside)
    store_split(root_split + 2 * base, at, rest, X * root_scale, inside)


def start_(
    first: Tensor,
    root: Tensor,
    split: Tensor,
    square: Tensor,
    norms: Tensor,
    constants: Tensor,
    *,
    scale: float,
    first_scale: float,
    root_scale: float,
) -> None:
    """Step 0, elementwise: ``M = S / c + (rho / c) I`` and ``X = c0 I + c1 M + c2 M^2``.

    Args:
        first: [B, 2, N, N] float16, written: M times ``first_scale``.
        root: The same: X times ``root_scale``.
        split: The same, read: S times ``scale``.
        square: [B, N, N] float32: S^2.
        norms: [B, 4] float64 from :func:`measure_`.
        constants: float64: eps, relative_eps, c0, c1, c2.
        scale: A power of two, as are the other two.
        first_scale: Of M.
        root_scale: Of X.
    """
    batch, _, size, _ = split.shape
    start_kernel[(batch, triton.cdiv(size * size, _ELEMENTS))](
        first,
        root,
        split,
        square,
        norms,
        constants,
        size,
        1.0 / scale,
        first_scale,
        root_scale,
        BLOCK=_ELEMENTS,
        num_warps=8,
    )
