# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, import-not-found"
"""The candidates of :mod:`shampoo.kernels.reference.keep_roots` taken as roots, in one launch.

Replaces some twenty calls of torch, two of which write all roots whether they changed or not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shampoo.kernels.reference.keep_roots import FAILED, LEFT, PASSED

_ELEMENTS = 4096  # of a tile
_BLOCK = 128


def supports(
    root: Tensor,
    outcome: Tensor,
    failures: Tensor,
    ready: Tensor,
    candidate: Tensor,
    ok: Tensor,
    accepted: Tensor | None = None,
) -> bool:
    """Whether :func:`keep_roots_` takes these: floats with unit column strides, not empty."""
    return (
        root.dtype == candidate.dtype
        and root.dtype in (torch.float32, torch.float64)
        and root.numel() > 0
        and root.stride(2) == candidate.stride(2) == 1
        and all(each.is_contiguous() for each in (outcome, failures, ready, ok))
    )


@triton.jit
def keep_kernel(
    root,  # [B, n, n]
    outcome,  # [B] uint8
    failures,  # [B] int32
    ready,  # [B] bool
    candidate,  # [B, n, n]
    ok,  # [B] bool
    accepted,  # bool, or nothing that is read
    size,  # n
    stride_b,
    stride_row,
    candidate_stride_b,
    candidate_stride_row,
    tiles,
    GATED: tl.constexpr,  # whether it is up to the device if anything is accepted
    PASSED: tl.constexpr,
    FAILED: tl.constexpr,
    LEFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some rows of a root; the first program of a matrix writes what is remembered of it."""
    matrix = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    root += matrix.to(tl.int64) * stride_b
    candidate += matrix.to(tl.int64) * candidate_stride_b
    passed = tl.load(ok + matrix).to(tl.int32)
    taken = tl.full((), 1, tl.int32)
    if GATED:
        taken = tl.load(accepted).to(tl.int32)
    kept = passed * taken
    if tile == 0:
        # Of what is the root from now on: other programs write no root that stays.
        largest = tl.full((BLOCK,), float("-inf"), root.dtype.element_ty)
        strange = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            place = at.to(tl.int64)
            new = at < size * kept
            old = (at >= size * kept) & (at < size)
            value = tl.load(candidate + place * (candidate_stride_row + 1), mask=new, other=0.0)
            value += tl.load(root + place * (stride_row + 1), mask=old, other=0.0)
            largest = tl.maximum(largest, tl.where(at < size, value, float("-inf")))
            strange += (value != value).to(tl.int32)
        is_root = (tl.max(largest, axis=0) > 0.0) & (tl.sum(strange, axis=0) == 0)
        tl.store(ready + matrix, is_root)
        verdict = tl.where(passed != 0, PASSED, FAILED)
        tl.store(outcome + matrix, tl.where(taken != 0, verdict, LEFT).to(tl.uint8))
        count = tl.load(failures + matrix)
        counted = tl.where(passed != 0, 0, count + 1)
        tl.store(failures + matrix, tl.where(taken != 0, counted, count))
    if kept != 0:
        rows = tile * ROWS + tl.arange(0, ROWS)
        for start in range(0, size, COLUMNS):
            cols = start + tl.arange(0, COLUMNS)
            inside = (rows[:, None] < size) & (cols[None, :] < size)
            source = rows[:, None].to(tl.int64) * candidate_stride_row + cols[None, :]
            target = rows[:, None].to(tl.int64) * stride_row + cols[None, :]
            tl.store(root + target, tl.load(candidate + source, mask=inside), mask=inside)


def keep_roots_(
    root: Tensor,
    outcome: Tensor,
    failures: Tensor,
    ready: Tensor,
    candidate: Tensor,
    ok: Tensor,
    accepted: Tensor | None = None,
) -> None:
    """Takes the candidates that passed their check as roots; the others leave theirs, and count.

    Args:
        root: [B, n, n] with unit column stride, written where a candidate passed.
        outcome: [B] uint8, written.
        failures: [B] int32, in and out.
        ready: [B] bool, written.
        candidate: [B, n, n] with unit column stride, read.
        ok: [B] bool, read.
        accepted: 0-d bool, read; None stands for True.
    """
    batch, size, _ = root.shape
    columns = min(512, max(16, triton.next_power_of_2(size)))
    rows = _ELEMENTS // columns
    tiles = triton.cdiv(size, rows)
    keep_kernel[(batch * tiles,)](
        root,
        outcome,
        failures,
        ready,
        candidate,
        ok,
        ok if accepted is None else accepted,
        size,
        root.stride(0),
        root.stride(1),
        candidate.stride(0),
        candidate.stride(1),
        tiles,
        GATED=accepted is not None,
        PASSED=PASSED,
        FAILED=FAILED,
        LEFT=LEFT,
        ROWS=rows,
        COLUMNS=columns,
        BLOCK=_BLOCK,
        num_warps=8,
    )
