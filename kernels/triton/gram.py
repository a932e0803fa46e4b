# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, import-not-found"
"""Exponential averages of Gram matrices, upper tiles only, of many stacks in a launch.

Replaces one ``baddbmm_`` per stack and mode, and the copy that unfolding a middle mode costs. Every
tile pair is computed once, so it moves half of the bytes of the factor; where d <= 256 and there
are few blocks, too few tiles are left to fill a GPU and cuBLAS is as fast.

Stacks whose kernels are compiled alike go together: those of one size of tiles and one order of
memory. The arithmetic of a stack follows its own sizes, never what goes with it.

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
from shampoo.kernels.triton.stack_table import (
    Plans,
    Row,
    distance,
    entry,
    extent,
    layout_in_memory,
    place,
    row_of,
    strides_of,
    table_of,
    unit_or,
    vector_of,
)

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


def supports(
    factors: Sequence[Tensor],
    grads: Sequence[Tensor],
    modes: Sequence[int],
    beta: Number,
    weight: Number,
) -> bool:
    """Whether :func:`gram_ema_` takes these: full float32 factors, blocks below 2^31 elements.

    Both numbers of the host, or both one float64 on the device of the factors.
    """
    return all(
        factor.dim() == 3
        and factor.dtype == torch.float32
        and grad.dtype in _DTYPES
        and grad.numel() > 0
        and reach(grad) < 2**31
        and _are_readable((beta, weight), factor.device)
        for factor, grad in zip(factors, grads, strict=True)
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


_COLUMNS = 14
_COLUMNS_OF_A_ROW = tl.constexpr(_COLUMNS)


# Numbers on the device are cut from one tensor, 8 bytes apart: one kernel for all their places.
@triton.jit(do_not_specialize_on_alignment=("beta", "weight"))
def gram_ema_kernel(
    factors,  # [B, d, d] float32, the first of them
    grads,  # [B, before, d, after], the first of them
    table,  # [STACKS, 14]
    beta,  # as weight float32, or if ON_DEVICE a pointer to float64
    weight,
    LAYOUT: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    UPCAST: tl.constexpr,
    STACKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One upper tile of ``beta A + weight mat(G) mat(G)^T`` and its mirror image."""
    row, program = row_of(table, _COLUMNS_OF_A_ROW, STACKS)
    count = entry(row, 13)  # tiles of a factor
    size = extent(row, 3, VECTOR)  # d
    depth = extent(row, 4, VECTOR)  # before * after
    after = extent(row, 5, VECTOR if LAYOUT != 1 else 1)
    factor_stride_row = extent(row, 7, VECTOR)
    factor_stride_col = unit_or(row, 8, UNIT, 1)
    stride_before = extent(row, 10, VECTOR)
    stride_size = unit_or(row, 11, UNIT and LAYOUT == 1, VECTOR)
    stride_after = unit_or(row, 12, UNIT and LAYOUT != 1, VECTOR if LAYOUT == 1 else 1)
    matrix = (program // count).to(tl.int64)
    row_tile, col_tile = triangle(program % count)
    rows = row_tile * BLOCK + tl.arange(0, BLOCK)
    cols = col_tile * BLOCK + tl.arange(0, BLOCK)
    grad = grads + place(row, 2, VECTOR) + matrix * place(row, 9, VECTOR)
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
    factor = factors + place(row, 1, VECTOR) + matrix * place(row, 6, VECTOR)
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


class _Compiled(NamedTuple):
    """What stacks that go together have in common."""

    config: LaunchConfig
    layout: int
    is_unit: bool  # whether what is innermost lies side by side
    vector: int
    dtype: torch.dtype


class _Launch(NamedTuple):
    """Stacks that go together: which is the first, their table, and all of their programs."""

    compiled: _Compiled
    first: int
    rows: tuple[Row, ...]
    programs: int


_plans: Plans[list[_Launch]] = Plans()


def gram_ema_(
    factors: Sequence[Tensor],
    grads: Sequence[Tensor],
    modes: Sequence[int],
    beta: Number,
    weight: Number,
    *,
    config: LaunchConfig | None = None,
) -> None:
    """``A_k <- beta A_k + weight mat_k(G) mat_k(G)^T``, bitwise symmetric, for every stack.

    Only the upper triangle of A_k is read, which must be symmetric.

    Args:
        factors: S stacks, [B, d_k, d_k] float32, read and written.
        grads: [S], [B, d_1 .. d_o] float32, bfloat16 or float16, any order; not copied.
        modes: [S], k, from 0.
        beta: Decay; a float, or 0-d float64 on the device, which gives the same bits.
        weight: Of the new Gram matrix; as ``beta``.
        config: The tiles; by the table of :func:`launch_config` by default.
    """
    key = layout_in_memory(factors), layout_in_memory(grads), tuple(modes), config
    launches, copies = _plans.get(key), dict[int, Tensor]()
    if launches is None:
        launches, copies = _planned(factors, grads, modes, config)
        if not copies:  # whose addresses are others every time
            _plans.keep(key, launches)
    for launch in launches:
        first = launch.first
        _launch(launch, factors[first], copies.get(first, grads[first]), beta, weight)


def _planned(
    factors: Sequence[Tensor],
    grads: Sequence[Tensor],
    modes: Sequence[int],
    config: LaunchConfig | None,
) -> tuple[list[_Launch], dict[int, Tensor]]:
    """The launches of a call, and the blocks that could not be unfolded without a copy."""
    groups: dict[_Compiled, list[int]] = {}
    views = [unfolded(grad, mode) for grad, mode in zip(grads, modes, strict=True)]
    for at, (factor, view) in enumerate(zip(factors, views, strict=True)):
        own = launch_config(view.shape[2], view.dtype, view.device) if config is None else config
        groups.setdefault(_compiled_for(factor, view, own), []).append(at)
    launches = [
        _Launch(compiled, members[0], *_rows(compiled, [(factors[s], views[s]) for s in members]))
        for compiled, members in groups.items()
    ]
    both = enumerate(zip(views, grads, strict=True))
    return launches, {at: v for at, (v, grad) in both if v.data_ptr() != grad.data_ptr()}


def _compiled_for(factor: Tensor, view: Tensor, config: LaunchConfig) -> _Compiled:
    _, before, size, after = view.shape
    layout = layout_of(before, after)
    inner = 2 if layout == 1 else 3
    is_unit = factor.stride(2) == 1 and (view.stride(inner) == 1 or view.shape[inner] == 1)
    numbers = [factor.data_ptr() // 4, *strides_of(factor)[:2], size, before * after]
    numbers += [view.data_ptr() // view.element_size()]
    numbers += [stride for at, stride in enumerate(strides_of(view)) if at != inner]
    if layout == 2:
        numbers.append(after)
    vector = vector_of(numbers, view.element_size()) if is_unit else 1
    return _Compiled(config, layout, is_unit, vector, view.dtype)


def _rows(
    compiled: _Compiled, stacks: Sequence[tuple[Tensor, Tensor]]
) -> tuple[tuple[Row, ...], int]:
    """The table of stacks that go together, and how many programs work on them."""
    first_factor, first_view = stacks[0]
    rows: list[Row] = []
    programs = 0
    for factor, view in stacks:
        batch, before, size, after = view.shape
        edge = triton.cdiv(size, compiled.config.block)
        count = edge * (edge + 1) // 2
        places = distance(factor, first_factor), distance(view, first_view)
        sizes = size, before * after, after
        strides = *strides_of(factor), *strides_of(view)
        rows.append((programs, *places, *sizes, *strides, count))
        programs += batch * count
    return tuple(rows), programs


def _launch(launch: _Launch, factor: Tensor, grad: Tensor, beta: Number, weight: Number) -> None:
    """One launch, by where its first stack lies."""
    compiled, config = launch.compiled, launch.compiled.config
    table = table_of(launch.rows, grad.device)
    gram_ema_kernel[(launch.programs,)](
        factor,
        grad,
        table,
        beta,
        weight,
        LAYOUT=compiled.layout,
        UNIT=compiled.is_unit,
        VECTOR=compiled.vector,
        ON_DEVICE=isinstance(beta, Tensor),
        UPCAST=INTERPRETED and compiled.dtype == torch.bfloat16,
        STACKS=len(table),
        BLOCK=config.block,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
    )
