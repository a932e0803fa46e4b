# mypy: disable-error-code="import-untyped, import-not-found"
"""What a call of :func:`shampoo.kernels.triton.precondition.precondition_` launches.

Worked out by the sizes of stacks and where they lie, without a look at their values, so that it
holds for as long as these stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from shampoo.kernels.triton.gram import layout_of, unfolded
from shampoo.kernels.triton.stack_table import Row, distance, strides_of, vector_of


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


ELEMENTS = 4096  # whose largest magnitude one program finds
_BLOCKS, _DIAGONALS = range(2)  # what a row of the table of scales is of


class _Stack(NamedTuple):
    """One stack in a call."""

    out: Tensor
    grad: Tensor  # unfolded for the first mode
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


class Table(NamedTuple):
    """Rows of a table, and how many programs work on all of them."""

    rows: tuple[Row, ...]
    programs: int


class Compiled(NamedTuple):
    """What stacks that go together in one mode have in common."""

    config: LaunchConfig
    layout: int
    is_unit: bool  # whether what is innermost lies side by side
    vector: int
    is_half: bool
    is_last: bool


class Launch(NamedTuple):
    """One mode of stacks that go together, by where the first of them lies."""

    compiled: Compiled
    mode: int
    first: int  # stack
    scratch: int  # its elements of what lies between two modes begin here
    root: int  # of all roots
    rows: tuple[Row, ...]
    programs: int


class Plan(NamedTuple):
    """All that a call launches, and the memory that it needs."""

    slots: int
    squares: int
    scratch: int
    buffers: int
    is_flat: bool
    scales: Table
    modes: tuple[Launch, ...]
    norms: Table


def scratch_of(numel: int, buffers: int, device: torch.device) -> list[Tensor]:
    """What lies between modes; torch gives no memory that is less aligned than a thread loads."""
    return [torch.empty(numel, dtype=torch.float32, device=device) for _ in range(buffers)]


def planned(
    outs: Sequence[Tensor],
    norms: Sequence[Tensor],
    blocks: Sequence[Tensor],
    roots: Sequence[Tensor],
    config: LaunchConfig | None,
) -> Plan:
    """The launches for stacks of blocks, [B, 1, d_1, d_2 ... d_o] each."""
    stacks = _stacks_of(outs, blocks, roots, config)
    (*_, last) = stacks
    orders = [len(stack.roots) for stack in stacks]
    begins = [0, *itertools.accumulate(orders)]
    scratch, buffers = last.scratch + last.out.numel(), min(max(orders) - 1, 2)
    between = scratch_of(scratch, buffers, outs[0].device)
    modes = []
    for mode in range(max(orders)):
        groups: dict[Compiled, list[tuple[int, Tensor, Tensor]]] = {}
        for at, stack in enumerate(stacks):
            if mode < len(stack.roots):
                is_last = mode == len(stack.roots) - 1
                written = stack.out if is_last else _part(between[mode % 2], stack)
                view = stack.grad if mode == 0 else _part(between[(mode - 1) % 2], stack)
                view = view if mode == 0 else unfolded(view, mode)
                views = view, unfolded(written, mode)
                compiled = _compiled_for(*views, stack.roots[mode], config, is_last)
                groups.setdefault(compiled, []).append((at, *views))
        for compiled, members in groups.items():
            first = members[0][0]
            together = [(stacks[at], read, written) for at, read, written in members]
            rows = _rows(compiled, mode, together)
            place = stacks[first].scratch, begins[first] + mode
            modes.append(Launch(compiled, mode, first, *place, *rows))
    return Plan(
        last.slots + 2 * len(last.roots) * len(last.out),
        last.squares + len(last.out) * last.last_config(config)[0],
        scratch,
        buffers,
        all(view.is_contiguous() for view in blocks),
        _scales_of(stacks),
        tuple(modes),
        _norms_of(norms, stacks, config),
    )


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
        order = out.dim() - 1
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


def _scales_of(stacks: Sequence[_Stack]) -> Table:
    """Largest magnitudes of blocks and roots, where the first mode is to find them.

    Blocks in any order of memory: a maximum does not ask.
    """
    first_grad, first_root = stacks[0].grad, stacks[0].roots[0]
    rows: list[Row] = []
    programs = 0
    for stack in stacks:
        view = stack.grad
        batch, count = len(view), view[0].numel()
        size, after = view.shape[2:]
        pieces = triton.cdiv(count, ELEMENTS)
        batch_stride, *strides = strides_of(view)
        shape = batch_stride, size * after, after, *strides
        at = distance(view, first_grad)
        rows.append((programs, _BLOCKS, stack.slots, pieces, count, at, *shape))
        programs += batch * pieces
    for stack in stacks:
        order, batch = len(stack.roots), len(stack.out)
        for mode, root in enumerate(stack.roots):
            count, step = root.shape[1], root.stride(1) + root.stride(2)
            pieces = triton.cdiv(count, ELEMENTS)
            slot, at = stack.slots + (order + mode) * batch, distance(root, first_root)
            shape = strides_of(root)[0], 0, 0, step, 0, 0
            rows.append((programs, _DIAGONALS, slot, pieces, count, at, *shape))
            programs += batch * pieces
    return Table(tuple(rows), programs)


def _compiled_for(
    view: Tensor, written: Tensor, root: Tensor, config: LaunchConfig | None, is_last: bool
) -> Compiled:
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
    return Compiled(own, layout, is_unit, vector, view.dtype != torch.float32, is_last)


def _rows(compiled: Compiled, mode: int, members: Sequence[tuple[_Stack, Tensor, Tensor]]) -> Table:
    """One mode of stacks that go together."""
    (first, first_view, first_written), config = members[0], compiled.config
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
                *(programs, *places, distance(root, first.roots[mode]), *slots, stack.squares),
                *(size, before * after, after, *strides),
                *(triton.cdiv(before * after, config.rows), tiles),
            )
        )
        programs += batch * tiles
    return Table(tuple(rows), programs)


def _norms_of(
    norms: Sequence[Tensor], stacks: Sequence[_Stack], config: LaunchConfig | None
) -> Table:
    """Where the squares of every stack are, and its norms."""
    rows: list[Row] = []
    programs = 0
    for norm, stack in zip(norms, stacks, strict=True):
        tiles, _ = stack.last_config(config)
        at = distance(norm, norms[0])
        rows.append((programs, stack.squares, tiles, at, *strides_of(norm)))
        programs += len(stack.out)
    return Table(tuple(rows), programs)
