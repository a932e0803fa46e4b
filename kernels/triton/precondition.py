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

import torch
import triton
import triton.language as tl
from torch import Tensor

from shampoo.kernels.triton.gram import offsets, reach, unfolded
from shampoo.kernels.triton.precondition_plan import (
    ELEMENTS,
    Launch,
    LaunchConfig,
    Plan,
    planned,
    scratch_of,
)
from shampoo.kernels.triton.stack_table import (
    Plans,
    entry,
    extent,
    layout_in_memory,
    place,
    row_of,
    table_of,
    unit_or,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


_plans: Plans[Plan] = Plans()


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
    key = *map(layout_in_memory, (outs, norms, grads, roots)), config
    plan, blocks = _plans.get(key), grads
    if plan is None:
        blocks = [unfolded(grad, 0) for grad in grads]
        plan = planned(outs, norms, blocks, roots, config)
        # A copy that unfolding took lies elsewhere every time.
        if all(map(_is_in_place, blocks, grads)):
            _plans.keep(key, plan)
    device = grads[0].device
    absmax = torch.zeros(plan.slots, dtype=torch.int32, device=device)
    squares = torch.empty(plan.squares, dtype=torch.float64, device=device)
    between = scratch_of(plan.scratch, plan.buffers, device)
    table = table_of(plan.scales.rows, device)
    scales_kernel[(plan.scales.programs,)](
        absmax,
        blocks[0],
        roots[0],
        table,
        FLAT=plan.is_flat,
        STACKS=len(table),
        BLOCK=ELEMENTS,
        num_warps=8,
    )
    for launch in plan.modes:
        mode, at = launch.mode, launch.scratch
        read = blocks[launch.first] if mode == 0 else between[(mode - 1) % 2][at:]
        is_last = launch.compiled.is_last
        written = outs[launch.first] if is_last else between[mode % 2][at:]
        _apply(launch, written, read, roots[launch.root], absmax, squares)
    table = table_of(plan.norms.rows, device)
    count = len(table)
    norm_kernel[(plan.norms.programs,)](
        norms[0], squares, table, STACKS=count, BLOCK=64, num_warps=1
    )


def _is_in_place(view: Tensor, grad: Tensor) -> bool:
    return view.data_ptr() == grad.data_ptr()


def _apply(
    launch: Launch,
    written: Tensor,
    read: Tensor,
    root: Tensor,
    absmax: Tensor,
    squares: Tensor,
) -> None:
    """One launch of :func:`apply_root_kernel`, by where its first stack lies."""
    compiled, config = launch.compiled, launch.compiled.config
    table = table_of(launch.rows, absmax.device)
    apply_root_kernel[(launch.programs,)](
        written,
        read,
        root,
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
