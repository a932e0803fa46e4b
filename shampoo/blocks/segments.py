"""Which blocks move together in one step.

A *segment* is a run of consecutive blocks of an arena, short enough for its gradient and direction
to stay in cache (on a CPU) or in a bounded workspace (on a GPU). Everything in it is a view made
once; the step only calls ops on them. Which gradients are there may be different in every step:
then segments are *narrowed* to the blocks that are active, by a few operations on their tables.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from shampoo.blocks.rows import Copies, Rows, put, take
from shampoo.blocks.stacks import Arena, BlockStack, FactorStack, Placement
from shampoo.blocks.statistics import Mode, Readiness, Statistics
from shampoo.ops.transit import is_near

# Elements of a segment. On a CPU the gradient, its direction and the moments of a segment should
# stay in the last level cache between the passes over them; on a GPU launches should be few.
CPU_SEGMENT = 1 << 20
GPU_SEGMENT = 3 << 24  # with a third of it, GPT-2 124M has twice the launches

# From this many elements of a block, runs of active blocks are worked on one after another, as
# views; smaller blocks are copied together, which is cheaper than a call for every run.
_LARGE_BLOCK = 1 << 14


@dataclass
class Part:
    """The blocks of one stack in a segment: B of them, of shape d_1 .. d_o, R of them active."""

    grad: Tensor  # [B, d_1 .. d_o]
    direction: Tensor  # [B, d_1 .. d_o]
    exp_avg: Tensor | None  # [B, d_1 .. d_o]
    elements: slice  # of the segment, where the B blocks lie
    statistics: Statistics  # of the B blocks
    readiness: Readiness  # of the blocks of the whole part
    rows: Rows = None  # [R], which of the B blocks are active; None for all
    is_whole: bool = True  # whether it has all blocks that the arena has in its place
    # A mode that is refreshed: [B] bool, whether it has been.
    flags: tuple[Tensor, ...] = field(init=False)
    blocks: slice = field(init=False)  # of the active blocks of the segment, the R that are here

    def __post_init__(self) -> None:
        modes = self.statistics.modes
        self.flags = tuple(mode.ready for mode in modes if mode.ready is not None)
        self.blocks = self.statistics.blocks

    def is_ready(self) -> bool:
        """Whether every mode of every active block is known to be ready.

        A GPU is asked only while some block is still to be refreshed; it is never asked for a part
        whose blocks change from step to step.
        """
        if self.is_whole or self.readiness.is_known:
            return self.readiness.ask(self.flags)
        is_here = is_near(self.grad.device)
        return is_here and all(bool(take(flags, self.rows).all()) for flags in self.flags)

    def of(self, flat: Tensor) -> Tensor:
        """The blocks in a tensor that has the elements of the segment, [B, d_1 * .. * d_o]."""
        return flat[self.elements].view(len(self.grad), -1)

    def take(self, stack: Tensor) -> Tensor:
        """The active blocks of a stack: itself, or a copy."""
        return take(stack, self.rows)

    def put(self, stack: Tensor, taken: Tensor) -> None:
        """Puts back what has become of the active blocks."""
        put(stack, self.rows, taken)

    def narrowed(self, active: Tensor, first: int) -> list["Part"]:
        """The active blocks alone.

        Args:
            active: [B] bool on the host.
            first: how many active blocks the segment has before these.
        """
        rows = active.nonzero()[:, 0]
        count = len(rows)
        if count == 0:
            return []
        if count == len(active):
            return [self._narrow(slice(0, count), first)]
        if self.grad[0].numel() < _LARGE_BLOCK:
            part = Part(
                self.grad,
                self.direction,
                self.exp_avg,
                self.elements,
                replace(self.statistics, blocks=slice(first, first + count)),
                self.readiness,
                rows.to(self.grad.device, non_blocking=True),
                is_whole=False,
            )
            return [part]
        return [self._narrow(slice(*run), first + done) for done, run in _runs(rows)]

    def _narrow(self, run: slice, first: int) -> "Part":
        size = self.grad[0].numel()
        start = self.elements.start
        return Part(
            self.grad[run],
            self.direction[run],
            None if self.exp_avg is None else self.exp_avg[run],
            slice(start + run.start * size, start + run.stop * size),
            self.statistics.narrowed(run, first),
            self.readiness,
            is_whole=False,
        )


def _runs(rows: Tensor) -> list[tuple[int, tuple[int, int]]]:
    """Neighbours among ascending rows, joined: how many rows come before, and ``start, stop``."""
    listed = rows.tolist()
    runs, begin = [], 0
    for at in range(1, len(listed) + 1):
        if at == len(listed) or listed[at] != listed[at - 1] + 1:
            runs.append((begin, (listed[begin], listed[at - 1] + 1)))
            begin = at
    return runs


@dataclass(frozen=True)
class BlockIndex:
    """What the B blocks of a segment belong to."""

    param_index: Tensor  # [B], the parameter by its place in the arena
    places: Tensor  # [B], the place among the blocks of all of the arena's parameters
    members: Tensor  # [B] on the host, the parameter as the segment's ``tiles`` number it


@dataclass(frozen=True, eq=False)  # known by identity: distributors keep tables for each
class Segment:
    """A run of blocks with the views and tables that the ops take; R of the blocks are active."""

    start: int  # the element of the arena at which it begins
    placements: tuple[Placement, ...]
    members: list[int]  # parameters, in the order in which ``tiles`` numbers them
    tiles: Tensor  # [T, 2 + 4 K], of the active blocks
    grad: Tensor
    direction: Tensor
    norm: Tensor  # [R], of the grafted direction
    scale: Tensor  # [R]
    moments: dict[str, Tensor]
    parts: list[Part]
    blocks: "BlockIndex"
    readiness: Readiness = field(default_factory=Readiness)
    active: Rows = None  # [R] on the host, which of the blocks are active; None for all
    whole: "Segment | None" = None  # what this one is a part of

    def is_known_ready(self) -> bool:
        """Whether all blocks are known, without asking a device, to be ready."""
        if self.readiness.is_known:
            return True
        for part in self.parts:
            if not part.readiness.is_known:
                return False
        self.readiness.is_known = True
        return True

    @property
    def key(self) -> "Segment":
        """What all narrowed forms of a segment have in common."""
        return self.whole or self

    @functools.cached_property
    def param_index(self) -> Tensor:
        """[R], for every active block its parameter, by its place in the arena."""
        return take(self.blocks.param_index, self._active_rows)

    @functools.cached_property
    def places(self) -> Tensor:
        """[R], for every active block its place among those of all of the arena's parameters."""
        return take(self.blocks.places, self._active_rows)

    @functools.cached_property
    def _active_rows(self) -> Rows:
        """``active`` on the device of the segment."""
        if self.active is None:
            return None
        return self.active.to(self.grad.device, non_blocking=True)

    @functools.cached_property
    def packed(self) -> Tensor:
        """``tiles`` of the active blocks in the memory of the segment itself."""
        if self.whole is None:  # neighbours of one size join
            rows = [
                [0, at, len(self.grad), at, len(part.grad), part.grad[0].numel()]
                for part in self.parts
                for at in [part.elements.start]
            ]
            return torch.tensor(rows, dtype=torch.int64, device="cpu")
        order = (self.tiles.shape[1] - 2) // 4
        grid, extent = self.tiles[:, 2 + 2 * order :].view(-1, 2, order).unbind(1)
        blocks, size = grid.prod(1), extent.prod(1)
        offset, zero = self.tiles[:, 1], torch.zeros_like(blocks)
        numel = torch.full_like(blocks, len(self.grad))
        return torch.stack((zero, offset, numel, offset, blocks, size), dim=1)

    def narrowed(self, present: Sequence[bool]) -> "Segment | None":
        """The same without the blocks of parameters that have no gradient; None if all are such.

        Args:
            present: for every parameter of the plan, whether it has a gradient.
        """
        here = [present[member] for member in self.members]
        if all(here):
            return self
        if not any(here):
            return None
        is_here = torch.tensor(here, device="cpu")
        active = is_here[self.blocks.members]
        parts: list[Part] = []
        count = 0
        for part in self.parts:
            narrow = part.narrowed(active[part.blocks], count)
            count = narrow[-1].blocks.stop if narrow else count
            parts += narrow
        return Segment(
            self.start,
            self.placements,
            self.members,
            self.tiles[is_here[self.tiles[:, 0]]],
            self.grad,
            self.direction,
            self.norm[:count],
            self.scale[:count],
            self.moments,
            parts,
            self.blocks,
            active=active.nonzero()[:, 0],
            whole=self,
        )


@dataclass(frozen=True)
class FactorRows:
    """Factors of one stack that are refreshed together."""

    stack: FactorStack
    where: slice | Tensor  # ascending; a tensor, [R] int64, is on the host

    @functools.cached_property
    def param_index(self) -> Tensor:
        """[R], the parameters of the factors, by their places in the arena."""
        param_index = self.stack.row_params[self.where]
        return param_index.to(self.stack.ready.device, non_blocking=True)

    @functools.cached_property
    def rows(self) -> Tensor:
        """``where`` as rows to be copied together, on the device of the stack."""
        assert isinstance(self.where, Tensor)
        return self.where.to(self.stack.ready.device, non_blocking=True)

    def take(self, state: Tensor) -> Tensor:
        """These rows of the stack's state: a view, or a copy."""
        return state[self.where] if isinstance(self.where, slice) else take(state, self.rows)

    def taken(self) -> "TakenRows":
        """What a kind refreshes, to be put back by :meth:`put_back`."""
        stack = self.stack
        if isinstance(self.where, slice):
            state = {name: tensor[self.where] for name, tensor in stack.state.items()}
            found = None if stack.found is None else stack.found[:, self.where]
            return TakenRows(stack, self.where, state, stack.ready[self.where], found)
        copies = Copies(stack.state, self.rows)
        found = None if stack.found is None else stack.found.index_select(1, self.rows)
        return TakenRows(stack, self.where, copies, take(stack.ready, self.rows), found)

    def put_back(self, taken: "TakenRows") -> None:
        """Puts back what has become of rows that were copied."""
        if isinstance(taken.state, Copies):
            moved = [each.name for each in self.stack.declared if not each.moves_every_step]
            taken.state.put_back(moved)
            put(self.stack.ready, self.rows, taken.ready)
            if self.stack.found is not None and taken.found is not None:
                self.stack.found.index_copy_(1, self.rows, taken.found)


@dataclass(frozen=True)
class TakenRows:
    """K factors of one size, as a kind refreshes them.

    Attributes:
        stack: they are rows of; for what all of its rows have in common.
        where: which rows of it.
        state: by name, [K, *shape(d)], to be written in place.
        ready: [K] bool, likewise.
        found: [n, K] float64, likewise: what is found of each; None where nobody records it.
    """

    stack: FactorStack
    where: slice | Tensor
    state: dict[str, Tensor]
    ready: Tensor
    found: Tensor | None = None


Phases = tuple[int | None, ...]


@dataclass(frozen=True)
class ActiveBlocks:
    """What one arena does in a step with a given pattern of gradients."""

    arena: Arena
    present: tuple[bool, ...]  # for every parameter of the arena
    segments: list[Segment]
    _rows: dict[int, list[FactorRows]] = field(default_factory=dict)  # by phase
    # By phases. For ever, if capturable: a graph may read the tables of any of them.
    _rows_by_param: dict[Phases, list[FactorRows]] = field(default_factory=dict)

    @functools.cached_property
    def present_params(self) -> list[int]:
        """The parameters with a gradient, by their places in the arena."""
        return [index for index, is_here in enumerate(self.present) if is_here]

    @functools.cached_property
    def is_here(self) -> Tensor:
        """``present`` on the device of the arena."""
        return torch.tensor(self.present, device="cpu").to(self.arena.device, non_blocking=True)

    def rows_of_phase(self, phase: int) -> list[FactorRows]:
        """The factors of parameters with a gradient that are refreshed in one phase."""
        if phase not in self._rows:
            active = torch.tensor(self.present, device="cpu")
            self._rows[phase] = [
                rows
                for stack in self.arena.refreshed_stacks()
                for rows in _factor_rows(stack, active[stack.row_params] & (stack.phase == phase))
            ]
        return self._rows[phase]

    def rows_by_param(self, phases: Phases) -> list[FactorRows]:
        """The factors that are refreshed where parameters differ in how many steps they have taken.

        Args:
            phases: for every parameter of the arena, the one that is due, None if there is none or
                the parameter has no gradient.
        """
        if phases not in self._rows_by_param:
            if not self.arena.is_capturable:
                self._rows_by_param.clear()  # they hardly come again
            self._rows_by_param[phases] = self._rows_of(phases)
        return self._rows_by_param[phases]

    def _rows_of(self, phases: Phases) -> list[FactorRows]:
        due = torch.tensor([-1 if phase is None else phase for phase in phases], device="cpu")
        return [
            rows
            for stack in self.arena.refreshed_stacks()
            for rows in _factor_rows(stack, due[stack.row_params] == stack.phase)
        ]


def _factor_rows(stack: FactorStack, due: Tensor) -> list[FactorRows]:
    """The rows of a stack that are due, [K] bool, in few pieces: solvers want long batches."""
    rows = due.nonzero()[:, 0]
    if len(rows) == 0:
        return []
    runs = _runs(rows)
    if len(runs) == 1 or stack.size**2 >= _LARGE_BLOCK:
        return [FactorRows(stack, slice(*run)) for _, run in runs]
    # Copied together, in pieces, so that not all of a model's factors are held twice.
    most = max(1, _LARGE_BLOCK * 256 // stack.size**2)
    return [FactorRows(stack, piece) for piece in torch.split(rows, most)]


def segment_limit(device: torch.device) -> int:
    """Elements that a segment has at most, unless it is a single tile."""
    return CPU_SEGMENT if device.type in ("cpu", "meta") else GPU_SEGMENT


def longest_segment(arena: Arena) -> int:
    """Elements of workspace that the segments of an arena need."""
    if arena.is_layerwise:
        return arena.numel  # every segment has a place of its own
    return min(arena.numel, max(segment_limit(arena.device), arena.largest_tile))


def workspace_of(arenas: Sequence[Arena]) -> Tensor:
    """``[2, W]`` for the segments of arenas of one device and dtype, which take turns.

    Both rows begin a cache line: a GPU moves four elements at once where all memory of a call
    allows it, and bits of a BLAS may follow the alignment of a gradient, which may lie in either.
    """
    width = -(-max(map(longest_segment, arenas)) // 16) * 16
    return torch.empty(2, width, dtype=arenas[0].dtype, device=arenas[0].device)


def segments_of(arena: Arena, workspace: Tensor) -> list[Segment]:
    """Cuts the blocks of an arena into segments.

    Args:
        workspace: ``[2, W]``, for gradients and directions: all segments use its start in turn, but
            those of LARS and LAMB, which all wait for a sum.
    """
    limit, shared = segment_limit(arena.device), not arena.is_layerwise
    runs: list[list[tuple[BlockStack, Placement]]] = []
    numel = 0
    for stack in arena.stacks:
        for placed in stack.placements:
            is_cut = not runs or placed.element in arena.cuts
            if is_cut or numel + placed.numel > limit:
                runs.append([])
                numel = 0
            runs[-1].append((stack, placed))
            numel += placed.numel
    return [_segment(arena, run, workspace, shared) for run in runs]


def _segment(
    arena: Arena, run: list[tuple[BlockStack, Placement]], workspace: Tensor, shared: bool
) -> Segment:
    first, last = run[0][1], run[-1][1]
    start, stop = first.element, last.element + last.numel
    offset = 0 if shared else start
    grad, direction = (row[offset : offset + stop - start] for row in workspace)
    moments = {name: tensor[start:stop] for name, tensor in arena.moments.items()}
    members = sorted({placed.member for _, placed in run})
    numbers = {member: number for number, member in enumerate(members)}
    order = max(len(stack.extent) for stack, _ in run)
    index_of = {member: index for index, member in enumerate(arena.members)}
    rows: list[list[int]] = []
    param_index: list[int] = []
    places: list[int] = []
    block_members: list[int] = []
    parts: list[Part] = []
    for stack, tiles in _by_stack(run):
        before = len(param_index)
        for placed in tiles:
            blocks, number = placed.tile.blocks, numbers[placed.member]
            rows.append(placed.tile.row(number, placed.element - start, order))
            param_index += [index_of[placed.member]] * blocks
            block_members += [number] * blocks
            base = arena.first[placed.member]
            places += [base + index for index in placed.tile.block_indices()]
        count = len(param_index) - before
        size, at = tiles[0].tile.block_numel, tiles[0].element - start
        elements = slice(at, at + count * size)
        shape = (count, *stack.extent)
        row = tiles[0].row
        own_state = {
            state.name: moments[state.name][elements].view(shape)
            for state in arena.kind.block_state
        }
        exp_avg, readiness = moments.get("exp_avg"), Readiness()
        parts.append(
            Part(
                grad=grad[elements].view(shape),
                direction=direction[elements].view(shape),
                exp_avg=None if exp_avg is None else exp_avg[elements].view(shape),
                elements=elements,
                statistics=Statistics(
                    stack.extent,
                    tuple(Mode.of(factors, row, count) for factors in stack.factors),
                    own_state,
                    slice(before, before + count),
                    readiness,
                ),
                readiness=readiness,
            )
        )
    norm = torch.zeros(len(param_index), dtype=arena.dtype, device=arena.device)
    return Segment(
        start,
        tuple(placed for _, placed in run),
        members,
        torch.tensor(rows, dtype=torch.int64, device="cpu"),
        grad,
        direction,
        norm,
        torch.ones_like(norm),
        moments,
        parts,
        BlockIndex(
            _table(param_index).to(arena.device, non_blocking=True),
            _table(places).to(arena.device, non_blocking=True),
            _table(block_members),
        ),
    )


def _table(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _by_stack(
    run: list[tuple[BlockStack, Placement]],
) -> list[tuple[BlockStack, list[Placement]]]:
    grouped: list[tuple[BlockStack, list[Placement]]] = []
    for stack, placed in run:
        if not grouped or grouped[-1][0] is not stack:
            grouped.append((stack, []))
        grouped[-1][1].append(placed)
    return grouped
