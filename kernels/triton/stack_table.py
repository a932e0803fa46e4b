# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, import-not-found"
"""Tables of stacks, so that one launch takes many: where each lies, its sizes and strides.

A row is a stack: the first program of the grid that works on it, then whatever the kernel wants to
know. Places are distances in elements from the first stack, whose address travels as an argument,
so that stacks that lie in one tensor have the same table wherever that is. A table is copied to the
device when it is first seen, and kept: the memory of state stays where it is from step to step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

Row = tuple[int, ...]

_BYTES = 16  # that a thread loads at once
_ALIGNED = (
    32  # bytes that can matter of an address: as many elements of float32 as of half precision
)
_END = 2**62  # where no stack begins
_MOST = 256  # tables that are kept
_LEAST_ROWS = 16  # fewer would make kernels of their own

Key = tuple[tuple[Row, ...], torch.device]


class _Known(NamedTuple):
    """A table; on a GPU with the stream on which it was copied, and the event after that."""

    table: Tensor
    copied: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None


_tables: OrderedDict[Key, _Known] = OrderedDict()
_of_graphs: dict[Key, Tensor] = {}  # which read them as long as they are replayed: for good


def table_of(rows: Sequence[Row], device: torch.device) -> Tensor:
    """The table on a device, [R, columns] int64, R a power of two; rows without a stack at its end.

    Args:
        rows: of equal length, by their first entry, which ascends from 0.
        device: where the stacks are.
    """
    key = (tuple(rows), device)
    known = _tables.get(key)
    if known is not None:
        _tables.move_to_end(key)
        if _is_captured(device):  # after steps on its stream, which have waited
            _of_graphs[key] = known.table
        elif known.copied is not None:
            _follow(known.table, *known.copied, torch.cuda.current_stream(device))
        return known.table
    length = max(_LEAST_ROWS, triton.next_power_of_2(len(rows)))
    padded = [*rows, *[(_END, *[0] * (len(rows[0]) - 1))] * (length - len(rows))]
    if _is_captured(device):
        return _captured(padded, device)
    table = torch.tensor(padded, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        _tables[key] = _Known(table, (stream, stream.record_event()))
    else:
        _tables[key] = _Known(table)
    if len(_tables) > _MOST:
        _tables.popitem(last=False)
    return table


Plan = TypeVar("Plan")


class Plans(Generic[Plan]):
    """What launchers have worked out of their arguments: the latest, by all that it depends on.

    Args:
        most: how many are kept.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._known: OrderedDict[Hashable, Plan] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: Hashable) -> Plan | None:
        """The plan for a key, if it is known."""
        found = self._known.get(key)
        if found is not None:
            self._known.move_to_end(key)
        return found

    def keep(self, key: Hashable, plan: Plan) -> None:
        """Keeps a plan, and drops the one that was asked for longest ago."""
        self._known[key] = plan
        if len(self._known) > self._most:
            self._known.popitem(last=False)


def layout_in_memory(tensors: Sequence[Tensor]) -> Hashable:
    """All that a plan depends on of tensors whose values are not read: never their addresses alone.

    Where they lie counts from the first of them, so that what moves as one has the same plan; of
    its address, how it is aligned.
    """
    base = tensors[0].data_ptr()
    each = [(t.data_ptr() - base, t.shape, t.stride(), t.dtype) for t in tensors]
    return base % _ALIGNED, tensors[0].device, tuple(each)


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _follow(
    table: Tensor,
    copied_on: torch.cuda.Stream,
    copied: torch.cuda.Event,
    stream: torch.cuda.Stream,
) -> None:
    """Lets another stream read a table once it is there, and its memory wait for that."""
    if stream != copied_on:
        stream.wait_event(copied)
        table.record_stream(stream)


def _captured(rows: Sequence[Row], device: torch.device) -> Tensor:
    """A table that a graph makes anew in every replay, from the arguments of its launches.

    A copy would read memory of the host, which is gone by then. Numbers go through float64, which
    holds the end, a power of two, and every distance up to 2^53.
    """
    numbers = [float(number) for row in rows for number in row]
    zero = torch.zeros((), dtype=torch.float64, device=device)
    each = torch._foreach_add([zero] * len(numbers), numbers)
    return torch.stack(each).to(torch.int64).view(len(rows), -1)


def distance(tensor: Tensor, first: Tensor) -> int:
    """How many elements of its dtype a tensor lies behind another one."""
    return (tensor.data_ptr() - first.data_ptr()) // tensor.element_size()


def strides_of(tensor: Tensor) -> list[int]:
    """The strides, 0 where there is one index, so that no stride counts that is never used."""
    return [
        stride if size > 1 else 0
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]


def vector_of(numbers: Sequence[int], element_size: int) -> int:
    """How many elements may be loaded at once where all of these numbers count elements; or 1."""
    vector = _BYTES // element_size
    return vector if all(number % vector == 0 for number in numbers) else 1


@triton.jit
def row_of(table, COLUMNS: tl.constexpr, STACKS: tl.constexpr):
    """The row of the stack that this program works on, and which of the stack's programs it is."""
    program = tl.program_id(0)
    first = tl.load(table + tl.arange(0, STACKS) * COLUMNS)
    row = table + (tl.sum((first <= program).to(tl.int32), axis=0) - 1) * COLUMNS
    return row, program - tl.load(row).to(tl.int32)


@triton.jit
def entry(row, AT: tl.constexpr):
    """A number of a stack that 32 bits hold."""
    return tl.load(row + AT).to(tl.int32)


@triton.jit
def place(row, AT: tl.constexpr, VECTOR: tl.constexpr):
    """A place, or the distance of one matrix to the next, known to be a multiple of VECTOR."""
    return tl.multiple_of(tl.load(row + AT), VECTOR)


@triton.jit
def extent(row, AT: tl.constexpr, VECTOR: tl.constexpr):
    """A size or stride inside of a block, known to be a multiple of VECTOR."""
    return tl.multiple_of(tl.load(row + AT).to(tl.int32), VECTOR)


@triton.jit
def unit_or(row, AT: tl.constexpr, UNIT: tl.constexpr, VECTOR: tl.constexpr):
    """A stride, which is 1 if UNIT."""
    if UNIT:
        return 1
    else:
        return tl.multiple_of(tl.load(row + AT).to(tl.int32), VECTOR)
