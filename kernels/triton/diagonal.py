# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, import-not-found"
"""The roots of :mod:`shampoo.kernels.reference.diagonal`, found and written without the host.

Replaces some fifty calls of torch, which work on all matrices as if any were diagonal. One pass
over the factors finds those that are, and those that are not finite; the other is over before it
begins where a matrix is neither. Powers are those of the reference but for roundings of float64.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from shampoo.kernels.reference.diagonal import NEGLIGIBLE

_ELEMENTS = 4096  # of a tile of the first pass
_BLOCK = 128  # values that are reduced at a time: one length, so that zero padding changes no bit
_TILE = 64


def supports(
    root: Tensor, ridge: Tensor, factor: Tensor, p: float, eps: float, relative_eps: float
) -> bool:
    """Whether :func:`diagonal_root_` takes these: float32 with unit column strides, not empty."""
    return (
        root.dtype == factor.dtype == torch.float32
        and factor.numel() > 0
        and root.stride(2) == factor.stride(2) == 1
        and ridge.is_contiguous()
    )


@triton.jit
def look_kernel(
    found,  # [B, tiles] int32
    factor,  # [B, n, n] float32
    size,  # n
    stride_b,
    stride_row,
    tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of some rows of a matrix: 0 if nothing stands beside the diagonal, else the bits of it.

    The bits of magnitudes are ordered as they are; on the diagonal they count where not finite.
    """
    matrix = tl.program_id(0) // tiles
    rows = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    factor += matrix.to(tl.int64) * stride_b
    most = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, size, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)
        inside = (rows[:, None] < size) & (cols[None, :] < size)
        at = rows[:, None].to(tl.int64) * stride_row + cols[None, :]
        value = tl.load(factor + at, mask=inside, other=0.0)
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        is_own = (rows[:, None] == cols[None, :]) & (bits < 0x7F800000)
        most = tl.maximum(most, tl.where(is_own, 0, bits))
    tl.store(found + tl.program_id(0), tl.max(tl.max(most, axis=1), axis=0))


@triton.jit
def overwrite_kernel(
    root,  # [B, n, n] float32
    ridge,  # [B] float64
    factor,  # [B, n, n] float32
    found,  # [B, tiles] int32
    constants,  # float64: -1 / p, eps, relative_eps
    size,
    root_stride_b,
    root_stride_row,
    stride_b,
    stride_diagonal,
    tiles,
    parts,
    NEGLIGIBLE: tl.constexpr,
    PSEUDO: tl.constexpr,  # whether eigenvalues of zero have no root
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Some rows of a root, if the matrix is diagonal or not finite."""
    matrix = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    most = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tiles, BLOCK):
        at = start + tl.arange(0, BLOCK)
        bits = tl.load(found + matrix.to(tl.int64) * tiles + at, mask=at < tiles, other=0)
        most = tl.maximum(most, bits)
    worst = tl.max(most, axis=0)
    if (worst > 0) & (worst < 0x7F800000):
        return
    factor += matrix.to(tl.int64) * stride_b
    root += matrix.to(tl.int64) * root_stride_b
    # The largest and the smallest eigenvalue, and the largest magnitude.
    high = tl.full((BLOCK,), float("-inf"), tl.float64)
    low = tl.full((BLOCK,), float("inf"), tl.float64)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < size
        value = tl.load(factor + at.to(tl.int64) * stride_diagonal, mask=inside, other=0.0)
        value = value.to(tl.float64)
        high = tl.maximum(high, tl.where(inside, value, float("-inf")))
        low = tl.minimum(low, tl.where(inside, value, float("inf")))
    highest = tl.max(high, axis=0)
    lowest = tl.min(low, axis=0)
    largest = tl.maximum(highest, -lowest)
    unit = tl.where(largest > 0.0, largest, 1.0)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(factor + at.to(tl.int64) * stride_diagonal, mask=at < size, other=0.0)
        square = value.to(tl.float64) / unit
        square *= square
        total += square * square
    norm = unit * tl.sqrt(tl.sqrt(tl.sum(total, axis=0)))
    own = tl.maximum(tl.load(constants + 2) * norm, tl.load(constants + 1))
    rows = part * TILE + tl.arange(0, TILE)
    value = tl.load(factor + rows.to(tl.int64) * stride_diagonal, mask=rows < size, other=0.0)
    value = value.to(tl.float64)
    if PSEUDO:
        cutoff = size * 1.1920928955078125e-07 * highest  # the machine epsilon of float32
        is_large = value > cutoff
        base = tl.where(is_large, value, 1.0)
        power = tl.where(is_large, tl.exp2(tl.log2(base) * tl.load(constants)), 0.0)
    else:
        own -= tl.where(lowest < -NEGLIGIBLE * own, lowest, 0.0)
        base = tl.where(own > 0.0, value + own, 1.0)
        power = tl.exp2(tl.log2(base) * tl.load(constants))
    is_diagonal = worst == 0
    tl.store(ridge + matrix, own, mask=is_diagonal & (part == 0))
    beside = tl.where(is_diagonal, 0.0, float("nan"))
    single = tl.where(is_diagonal, power.to(tl.float32), float("nan"))
    for start in range(0, size, TILE):
        cols = start + tl.arange(0, TILE)
        written = tl.where(rows[:, None] == cols[None, :], single[:, None], beside)
        at = rows[:, None].to(tl.int64) * root_stride_row + cols[None, :]
        tl.store(root + at, written, mask=(rows[:, None] < size) & (cols[None, :] < size))


def diagonal_root_(
    root: Tensor, ridge: Tensor, factor: Tensor, p: float, eps: float, relative_eps: float
) -> None:
    """Overwrites the roots of those matrices of a stack that are exactly diagonal, or not finite.

    A captured call must have run once before, which brings its numbers to the device.

    Args:
        root: [B, n, n] float32 with unit column stride, written where a matrix is of either kind.
        ridge: [B] float64, written where one is diagonal.
        factor: [B, n, n] float32 with unit column stride, read.
        p: The root, any real number > 0.
        eps: Absolute ridge.
        relative_eps: Relative ridge.
    """
    batch, size, _ = factor.shape
    columns = min(512, max(16, triton.next_power_of_2(size)))
    rows = _ELEMENTS // columns
    tiles, parts = triton.cdiv(size, rows), triton.cdiv(size, _TILE)
    found = torch.empty(batch, tiles, dtype=torch.int32, device=factor.device)
    look_kernel[(batch * tiles,)](
        found,
        factor,
        size,
        factor.stride(0),
        factor.stride(1),
        tiles,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=8,
    )
    overwrite_kernel[(batch * parts,)](
        root,
        ridge,
        factor,
        found,
        _constants(-1 / p, eps, relative_eps, factor.device),
        size,
        root.stride(0),
        root.stride(1),
        factor.stride(0),
        factor.stride(1) + 1,
        tiles,
        parts,
        NEGLIGIBLE=NEGLIGIBLE,
        PSEUDO=eps == 0 and relative_eps == 0,
        BLOCK=_BLOCK,
        TILE=_TILE,
        num_warps=4,
    )


@functools.cache  # without a limit: a CUDA graph reads them again as long as it lives
def _constants(exponent: float, eps: float, relative_eps: float, device: torch.device) -> Tensor:
    """Numbers in float64: what a launch takes as an argument is rounded to float32."""
    return torch.tensor([exponent, eps, relative_eps], dtype=torch.float64).to(device)
