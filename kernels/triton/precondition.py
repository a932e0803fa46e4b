# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, import-not-found"
"""Roots applied to every mode of stacks of blocks, three fp16 products for one in float32.

Replaces one float32 ``bmm`` per stack and mode, the copies around a middle mode, and a norm. A root
has entries over many orders of magnitude, so single TF32 products are wrong by per cents, while two
fp16 numbers for an entry, scaled by a power of two, hold 22 bits.

One launch each for the scales of all stacks and for all norms, and one for the n-th mode of those
whose kernels are compiled alike, by the sizes of each alone. Loses to ``torch.bmm`` on a few blocks
with d <= 128, where the launches for the scales weigh most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shampoo.kernels.triton.gram import layout_of, offsets, reach, unfolded
from shampoo.kernels.triton.stack_table import (
    Row,
    distance,
    entry,
    extent,
    place,
    row_of,
    strides_of,
    table_of,
    unit_or,
    vector_of,
)

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


def supports(
    outs: Sequence[Tensor],
    norms: Sequence[Tensor],
    grads: Sequence[Tensor],
    roots: Sequence[Tensor | None],
) -> bool:
    """Whether :func:`precondition_` takes these: full float32 roots, contiguous float32 results.

    It has no form for a mode that stays as it is.
    """
    return (
        all(
            out.dtype == torch.float32
            and out.is_contiguous()
            and out.numel() > 0
            and reach(out) < 2**31
            and grad.dim() > 1
            and grad.dtype in _DTYPES
            and grad.dtype == grads[0].dtype
            and reach(grad) < 2**31
            for out, grad in zip(outs, grads, strict=True)
        )
        and len({norm.dtype for norm in norms}) == 1
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


_ELEMENTS = 4096  # whose largest magnitude one program finds
_BLOCKS, _DIAGONALS = range(2)  # what a row of the table of scales is of

_SCALE_COLUMNS = tl.constexpr(12)
_ROOT_COLUMNS = tl.constexpr(23)
_NORM_COLUMNS = tl.constexpr(5)


@triton.jit
def scales_kernel(
    absmax,  # [slots] int32, raised: bits of the largest magnitude of every matrix
    grads,  # the first stack of blocks
    roots,  # float32, the first stack of roots
    table,  # [STACKS, 12]
    FLAT: tl.constexpr,
    STACKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Largest magnitudes of blocks, and of the diagonals of roots.

    The order of atomics does not matter to a maximum, and that of the bits of magnitudes is that of
    the magnitudes, NaN above all. No entry of a positive semi-definite matrix exceeds its largest
    diagonal entry.
    """
    row, program = row_of(table, _SCALE_COLUMNS, STACKS)
    pieces = entry(row, 3)
    matrix = program // pieces
    at = (program % pieces) * BLOCK + tl.arange(0, BLOCK)
    inside = at < entry(row, 4)
    first = tl.load(row + 5) + matrix.to(tl.int64) * tl.load(row + 6)
    if entry(row, 1) == 0:
        offset = at
        if not FLAT:
            after = entry(row, 8)
            inner = entry(row, 7)
            outer = (at // inner) * entry(row, 9)
            offset = outer + (at % inner // after) * entry(row, 10) + at % after * entry(row, 11)
        value = tl.load(grads + first + offset, mask=inside, other=0.0).to(tl.float32)
    else:
        value = tl.load(roots + first + at * entry(row, 9), mask=inside, other=0.0)
    bits = tl.abs(value).to(tl.int32, bitcast=True)
    tl.atomic_max(absmax + entry(row, 2) + matrix, tl.max(bits, axis=0), sem="relaxed")


@triton.jit
def apply_root_kernel(
    outs,  # [B, before, d, after] float32, the first of them
    blocks,  # [B, before, d, after], the first of them
    roots,  # [B, d, d] float32, symmetric, the first of them
    absmax,  # [slots] int32: of every block and root; of the results raised, unless LAST
    squares,  # [slots] float64, of every tile written if LAST
    table,  # [STACKS, 23]
    LAYOUT: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    HALF: tl.constexpr,
    LAST: tl.constexpr,
    STACKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of ``blocks x_k root``: rows are the other modes, columns the new mode k."""
    row, program = row_of(table, _ROOT_COLUMNS, STACKS)
    count = entry(row, 22)  # tiles of a block
    row_tiles = entry(row, 21)
    size = extent(row, 8, VECTOR)  # d
    others = extent(row, 9, VECTOR)  # before * after
    after = extent(row, 10, VECTOR if LAYOUT != 1 else 1)
    out_stride_before = extent(row, 12, VECTOR)
    out_stride_size = unit_or(row, 13, UNIT and LAYOUT == 1, VECTOR)
    out_stride_after = unit_or(row, 14, UNIT and LAYOUT != 1, VECTOR if LAYOUT == 1 else 1)
    stride_before = extent(row, 16, VECTOR)
    stride_size = unit_or(row, 17, UNIT and LAYOUT == 1, VECTOR)
    stride_after = unit_or(row, 18, UNIT and LAYOUT != 1, VECTOR if LAYOUT == 1 else 1)
    root_stride_row = extent(row, 20, VECTOR)
    matrix = (program // count).to(tl.int64)
    tile = program % count
    rows = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)
    cols = (tile // row_tiles) * COLS + tl.arange(0, COLS)
    block_scale, block_back = scale_of(tl.load(absmax + entry(row, 4) + matrix))
    root_scale, root_back = scale_of(tl.load(absmax + entry(row, 5) + matrix))
    source = blocks + place(row, 2, VECTOR) + matrix * place(row, 15, VECTOR)
    source += offsets(rows, after, stride_before, stride_after, LAYOUT)[:, None]
    factor = roots + place(row, 3, VECTOR) + matrix * place(row, 19, VECTOR)
    factor += cols[:, None] * root_stride_row
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
    target = outs + place(row, 1, VECTOR) + matrix * place(row, 11, VECTOR)
    target += cols[None, :] * out_stride_size
    target += offsets(rows, after, out_stride_before, out_stride_after, LAYOUT)[:, None]
    tl.store(target, value, mask=(rows < others)[:, None] & (cols < size)[None, :])
    # Without an axis, not along axis 0: Triton 3.6 follows a tile out of tensor memory (sm_100)
    # through its users, and dies of one that reduces a vector unless that is reshaped before.
    if LAST:
        wide = value.to(tl.float64)  # the square of a float32 may leave its range
        slot = tl.load(row + 7) + matrix * count + tile
        tl.store(squares + slot, tl.sum(tl.sum(wide * wide, axis=1)))
    else:
        bits = tl.abs(value).to(tl.int32, bitcast=True)
        slot = entry(row, 6) + matrix
        tl.atomic_max(absmax + slot, tl.max(tl.max(bits, axis=1)), sem="relaxed")


@triton.jit
def norm_kernel(norms, squares, table, STACKS: tl.constexpr, BLOCK: tl.constexpr):
    """``norm[b] = sqrt(sum squares[b])``, always in the same order."""
    row, matrix = row_of(table, _NORM_COLUMNS, STACKS)
    count = entry(row, 2)
    squares += tl.load(row + 1) + matrix.to(tl.int64) * count
    total = tl.zeros((), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(squares + at, mask=at < count, other=0.0), axis=0)
    norm = norms + tl.load(row + 3) + matrix * entry(row, 4)
    tl.store(norm, tl.sqrt(total).to(norms.dtype.element_ty))


class _Stack(NamedTuple):
    """One stack in a call."""

    out: Tensor
    grad: Tensor
    roots: Sequence[Tensor]
    slots: int  # where its magnitudes begin: of the blocks mode after mode, then of the roots
    squares: int  # and its squares
    scratch: int  # and its elements of what lies between two modes

    def last_config(self, config: LaunchConfig | None) -> tuple[int, LaunchConfig]:
        """Tiles of a block in its last mode, and how large they are."""
        size = self.out.shape[-1]
        own = launch_config(size) if config is None else config
        return tiles_of(self.out[0].numel() // size, size, own), own


def tiles_of(others: int, size: int, config: LaunchConfig) -> int:
    """Tiles of a result."""
    return -(-others // config.rows) * -(-size // config.cols)


def precondition_(
    outs: Sequence[Tensor],
    norms: Sequence[Tensor],
    grads: Sequence[Tensor],
    roots: Sequence[Tensor],
    *,
    config: LaunchConfig | None = None,
) -> None:
    """``out <- G x_1 X_1 ... x_o X_o`` and ``norm[b] <- |out_b|``, for every stack.

    Args:
        outs: S stacks, [B, d_1 .. d_o] float32, contiguous, written.
        norms: [S], [B] of one dtype, written.
        grads: [S], [B, d_1 .. d_o] float32, bfloat16 or float16, all of one.
        roots: One a mode of every stack: [B, d_k, d_k] float32 with unit column stride, positive
            semi-definite.
        config: The tiles of every mode; by the table of :func:`launch_config` by default.
    """
    stacks = _stacks_of(outs, grads, roots, config)
    device, (*_, last) = grads[0].device, stacks
    slots = last.slots + 2 * len(last.roots) * len(last.out)
    absmax = torch.zeros(slots, dtype=torch.int32, device=device)
    squares = torch.empty(
        last.squares + len(last.out) * last.last_config(config)[0],
        dtype=torch.float64,
        device=device,
    )
    between = [
        torch.empty(last.scratch + last.out.numel(), dtype=torch.float32, device=device)
        for _ in range(min(max(len(stack.roots) for stack in stacks) - 1, 2))
    ]
    _find_scales(absmax, stacks)
    for mode in range(max(len(stack.roots) for stack in stacks)):
        groups: dict[_Compiled, list[tuple[_Stack, Tensor, Tensor]]] = {}
        for stack in stacks:
            if mode < len(stack.roots):
                read = stack.grad if mode == 0 else _part(between[(mode - 1) % 2], stack)
                is_last = mode == len(stack.roots) - 1
                written = stack.out if is_last else _part(between[mode % 2], stack)
                views = unfolded(read, mode), unfolded(written, mode)
                compiled = _compiled_for(*views, stack.roots[mode], config, is_last)
                groups.setdefault(compiled, []).append((stack, *views))
        for compiled, members in groups.items():
            _apply(compiled, mode, members, absmax, squares)
    _find_norms(norms, squares, stacks, config)


def _stacks_of(
    outs: Sequence[Tensor],
    grads: Sequence[Tensor],
    roots: Sequence[Tensor],
    config: LaunchConfig | None,
) -> list[_Stack]:
    """The stacks of a call, with places for what is found of them."""
    stacks: list[_Stack] = []
    slots = squares = scratch = begin = 0
    for out, grad in zip(outs, grads, strict=True):
        order = grad.dim() - 1
        stack = _Stack(out, grad, roots[begin : begin + order], slots, squares, scratch)
        stacks.append(stack)
        begin += order
        slots += 2 * order * len(out)
        squares += len(out) * stack.last_config(config)[0]
        scratch += -(-out.numel() // 16) * 16  # so that all of them are aligned
    return stacks


def _part(between: Tensor, stack: _Stack) -> Tensor:
    """Where a stack lies in what is between two modes."""
    return between[stack.scratch : stack.scratch + stack.out.numel()].view(stack.out.shape)


def _find_scales(absmax: Tensor, stacks: Sequence[_Stack]) -> None:
    """Largest magnitudes of blocks and roots, where the first mode is to find them."""
    first_grad, first_root = stacks[0].grad, stacks[0].roots[0]
    # In any order of memory: a maximum does not ask. `held` keeps what had to be copied.
    held = [unfolded(stack.grad, 0) for stack in stacks]
    is_flat = all(view.is_contiguous() for view in held)
    rows: list[Row] = []
    programs = 0
    for stack, view in zip(stacks, held, strict=True):
        batch, count = len(view), view[0].numel()
        size, after = view.shape[2:]
        pieces = triton.cdiv(count, _ELEMENTS)
        batch_stride, *strides = strides_of(view)
        shape = batch_stride, size * after, after, *strides
        at = distance(view, first_grad)
        rows.append((programs, _BLOCKS, stack.slots, pieces, count, at, *shape))
        programs += batch * pieces
    for stack in stacks:
        order, batch = len(stack.roots), len(stack.out)
        for mode, root in enumerate(stack.roots):
            count, step = root.shape[1], root.stride(1) + root.stride(2)
            pieces = triton.cdiv(count, _ELEMENTS)
            slot, at = stack.slots + (order + mode) * batch, distance(root, first_root)
            shape = strides_of(root)[0], 0, 0, step, 0, 0
            rows.append((programs, _DIAGONALS, slot, pieces, count, at, *shape))
            programs += batch * pieces
    table = table_of(rows, absmax.device)
    scales_kernel[(programs,)](
        absmax,
        first_grad,
        first_root,
        table,
        FLAT=is_flat,
        STACKS=len(table),
        BLOCK=_ELEMENTS,
        num_warps=8,
    )


class _Compiled(NamedTuple):
    """What stacks that go together in one mode have in common."""

    config: LaunchConfig
    layout: int
    is_unit: bool  # whether what is innermost lies side by side
    vector: int
    is_half: bool
    is_last: bool


def _compiled_for(
    view: Tensor, written: Tensor, root: Tensor, config: LaunchConfig | None, is_last: bool
) -> _Compiled:
    _, before, size, after = view.shape
    layout = layout_of(before, after)
    inner = 2 if layout == 1 else 3
    is_unit = all(each.stride(inner) == 1 or each.shape[inner] == 1 for each in (view, written))
    numbers = [size, before * after, root.data_ptr() // 4, *strides_of(root)[:2]]
    for each in (view, written):
        numbers.append(each.data_ptr() // each.element_size())
        numbers += [stride for at, stride in enumerate(strides_of(each)) if at != inner]
    if layout == 2:
        numbers.append(after)
    vector = vector_of(numbers, view.element_size()) if is_unit else 1
    own = launch_config(size) if config is None else config
    return _Compiled(own, layout, is_unit, vector, view.dtype != torch.float32, is_last)


def _apply(
    compiled: _Compiled,
    mode: int,
    members: Sequence[tuple[_Stack, Tensor, Tensor]],
    absmax: Tensor,
    squares: Tensor,
) -> None:
    """One mode of stacks that go together."""
    (first, first_view, first_written), config = members[0], compiled.config
    first_root = first.roots[mode]
    rows: list[Row] = []
    programs = 0
    for stack, view, written in members:
        batch, before, size, after = view.shape
        order, root = len(stack.roots), stack.roots[mode]
        tiles = tiles_of(before * after, size, config)
        places = distance(written, first_written), distance(view, first_view)
        slots = [stack.slots + at * batch for at in (mode, order + mode, mode + 1)]
        strides = *strides_of(written), *strides_of(view), *strides_of(root)[:2]
        rows.append(
            (
                *(programs, *places, distance(root, first_root), *slots, stack.squares),
                *(size, before * after, after, *strides),
                *(triton.cdiv(before * after, config.rows), tiles),
            )
        )
        programs += batch * tiles
    table = table_of(rows, absmax.device)
    apply_root_kernel[(programs,)](
        first_written,
        first_view,
        first_root,
        absmax,
        squares,
        table,
        LAYOUT=compiled.layout,
        UNIT=compiled.is_unit,
        VECTOR=compiled.vector,
        HALF=compiled.is_half,
        LAST=compiled.is_last,
        STACKS=len(table),
        ROWS=config.rows,
        COLS=config.cols,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _find_norms(
    norms: Sequence[Tensor],
    squares: Tensor,
    stacks: Sequence[_Stack],
    config: LaunchConfig | None,
) -> None:
    rows: list[Row] = []
    programs = 0
    for norm, stack in zip(norms, stacks, strict=True):
        tiles, _ = stack.last_config(config)
        at = distance(norm, norms[0])
        rows.append((programs, stack.squares, tiles, at, *strides_of(norm)))
        programs += len(stack.out)
    table = table_of(rows, squares.device)
    norm_kernel[(programs,)](norms[0], squares, table, STACKS=len(table), BLOCK=64, num_warps=1)
