"""What an optimizer does with every parameter, and what that takes: as rows, and as a table."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shampoo.blocks.ownership import Owners
from shampoo.blocks.state_keys import COUNTS, PHASE, is_own, parse
from shampoo.distributed.process_groups import ProcessGroups
from shampoo.errors import shown_bytes
from shampoo.hyperparameters import Hyperparameters
from shampoo.preconditioner.choice import cost_of, kind_of, why_plain
from shampoo.preconditioner.footprint import block_state_bytes
from shampoo.preconditioner.grafted import Grafted
from shampoo.preconditioner.shampoo import Shampoo as ShampooKind
from shampoo.step.block_plan import BlockPlan
from shampoo.step.param_plan import PlannedParam
from shampoo.step.parameters import parameter_name

_COUNT_BYTES = 8  # of a count of steps


@dataclass(frozen=True)
class TensorRow:
    """What is done with one parameter.

    Attributes:
        name: the model's, or where it stands.
        group: index of its group.
        group_name: the group's ``"name"``, or its index.
        shape: of the parameter, whole.
        merged: its shape as it is cut; empty if it is not moved, as all that follows then is.
        grid: blocks along each merged dimension.
        sides: for each merged dimension, the sides of its blocks, the longest first.
        kind: what moves it: ``"shampoo"``, ``"kl_shampoo"``, ``"grafted"`` (the grafted method
            alone), ``"adagrad"``; ``"none"`` if nothing does.
        grafting: whose step length it has, ``"none"`` for its own.
        reason: why it is not preconditioned, empty if it is.
        diagonal: for each merged dimension, whether only the diagonal of its factor is kept.
        power: p, such that factors are raised to ``-1/p``; None without factors.
        start: the first step that is preconditioned; ``math.inf`` for never.
        frequency: steps between two refreshes; None without roots that are refreshed.
        early: the first steps that refresh all its roots, before multiples of the frequency do;
            empty with ``refresh_schedule="staggered"``.
        phases: when in a period roots of it are refreshed, ascending; with
            ``refresh_schedule="staggered"`` of those that this rank owns.
        owners: for each block, row-major in the grid, the global rank that owns it.
        state_bytes: of its state on this rank.
        bytes_by_rank: the same for all ranks that divide its blocks.
    """

    name: str
    group: int
    group_name: str
    shape: tuple[int, ...]
    merged: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()
    sides: tuple[tuple[int, ...], ...] = ()
    kind: str = "none"
    grafting: str = "none"
    reason: str = ""
    diagonal: tuple[bool, ...] = ()
    power: float | None = None
    start: float = math.inf
    frequency: int | None = None
    early: tuple[int, ...] = ()
    phases: tuple[int, ...] = ()
    owners: tuple[int, ...] = ()
    state_bytes: int = 0
    bytes_by_rank: Mapping[int, int] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        """How many blocks."""
        return len(self.owners)

    @property
    def rule(self) -> str:
        """What moves it and whose step length it has; or why it is not preconditioned."""
        if self.kind == "none":
            return f"not moved: {self.reason}"
        if self.reason:
            return f"{self.grafting if self.kind == Grafted.name else self.kind}: {self.reason}"
        graft = "no graft" if self.grafting == "none" else f"{self.grafting} graft"
        thin = [str(mode) for mode, is_diagonal in enumerate(self.diagonal) if is_diagonal]
        return f"{self.kind}, {graft}" + f", diagonal in {' and '.join(thin)}" * bool(thin)

    @property
    def refresh(self) -> str:
        """When its roots are refreshed."""
        if self.frequency is None:
            return "-"
        if self.start == math.inf:
            return "never"
        phases = f", phases {_ranges(self.phases)}" if self.phases not in ((), (0,)) else ""
        if len(self.early) < 2:
            return f"every {self.frequency}{phases}, from {self.start:.0f}"
        first = ", ".join(map(str, self.early[:4])) + ", ..." * (len(self.early) > 4)
        return f"every {self.frequency}, first at {first}"


@dataclass(frozen=True)
class GroupRow:
    """One parameter group; ``name`` is its ``"name"``, or its index."""

    name: str
    tensors: int
    numel: int
    lr: float
    weight_decay: float
    decoupled_weight_decay: bool


@dataclass(frozen=True)
class Explanation:
    """What an optimizer does: a row for each tensor, in the order of ``param_groups``, and totals.

    ``str()`` is a table. ``rank`` is the one that has been asked.
    """

    rank: int
    tensors: tuple[TensorRow, ...]
    groups: tuple[GroupRow, ...]

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(row.numel for row in self.tensors)

    @property
    def blocks(self) -> int:
        """Blocks of all tensors."""
        return sum(row.blocks for row in self.tensors)

    @property
    def state_bytes(self) -> int:
        """Of all state on this rank."""
        return sum(row.state_bytes for row in self.tensors)

    @property
    def bytes_by_rank(self) -> dict[int, int]:
        """Of all state on each rank that shares blocks with this one, and on itself."""
        total = {self.rank: 0}
        for row in self.tensors:
            for rank, held in row.bytes_by_rank.items():
                total[rank] = total.get(rank, 0) + held
        return dict(sorted(total.items()))

    def __str__(self) -> str:
        heads = ("name", "group", "shape", "merged", "blocks", "rule", "p", "refresh", "state")
        table = [(*heads, "owners"), *map(_cells, self.tensors)]
        lines = _aligned(table)
        lines += ["", *_aligned(list(self._group_cells())), "", *self._totals()]
        return "\n".join(lines)

    def _group_cells(self) -> Iterator[tuple[str, ...]]:
        yield "group", "tensors", "parameters", "lr", "weight decay"
        for group in self.groups:
            how = "" if group.decoupled_weight_decay else " (coupled)"
            decay = f"{group.weight_decay:.4g}{how}"
            yield group.name, f"{group.tensors:,}", f"{group.numel:,}", f"{group.lr:.4g}", decay

    def _totals(self) -> Iterator[str]:
        count, numel = len(self.tensors), max(1, self.numel)
        yield f"{count:,} tensors, {self.numel:,} parameters, {self.blocks:,} blocks"
        held = self.bytes_by_rank
        yield f"state on rank {self.rank}: {self.state_bytes:,} bytes" + (
            f" ({shown_bytes(self.state_bytes)})"
        )
        if len(held) > 1:
            total = sum(held.values())
            yield f"state on {len(held)} ranks: {shown_bytes(total)}, {_rate(total, numel)}"
        else:
            yield _rate(self.state_bytes, numel)


def _rate(held: int, numel: int) -> str:
    return f"{held / numel:.3g} bytes a parameter (AdamW in float32: 8)"


def _cells(row: TensorRow) -> tuple[str, ...]:
    blocks = "-"
    if row.grid:
        sides = " x ".join("|".join(map(str, sides)) for sides in row.sides)
        blocks = f"{_times(row.grid)} of {sides}"
    return (
        row.name,
        row.group_name,
        _times(row.shape),
        _times(row.merged) if row.grid else "-",
        blocks,
        row.rule,
        "-" if row.power is None else f"{row.power:.4g}",
        row.refresh,
        shown_bytes(row.state_bytes),
        _ranges(sorted(set(row.owners))) or "-",
    )


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes)) or "1"


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5] -> "0-2, 5"``; numbers ascend."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


@torch.no_grad()
def explain(
    groups: Sequence[dict[str, Any]],
    state: Mapping[Any, Any],
    process_groups: ProcessGroups,
    kept: Mapping[Tensor, Owners] | None,
) -> Explanation:
    """Explains an optimizer by a plan of its own, which allocates and changes nothing.

    Args:
        groups: ``optimizer.param_groups``.
        state: ``optimizer.state``.
        process_groups: who shares the work.
        kept: owners of blocks that are decided already.
    """
    # Copies: a plan notes in groups how refreshes are spread, and settles who divides the blocks,
    # which a rank that is asked alone, or too early, must not decide.
    groups = [{**group, "extra": dict(group["extra"])} for group in groups]
    process_groups = copy.deepcopy(process_groups)
    known: dict[Tensor, dict[str, Any]] = {
        param: {key: value for key, value in (entries or {}).items() if is_own(key)}
        for param, entries in state.items()
        if isinstance(param, Tensor)
    }
    values = [Hyperparameters.read(group) for group in groups]
    plan = BlockPlan(groups, known, process_groups, device="meta", kept=kept, is_partial=True)
    plan.assign_phases(groups, values)
    members = {(member.group, member.position): i for i, member in enumerate(plan.members)}
    held, phases = _held(plan)
    rows = []
    for index, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            row = TensorRow(
                name=parameter_name(group, index, position),
                group=index,
                group_name=group_name(group, index),
                shape=tuple(param.shape),
                reason="frozen" if param.numel() > 0 else "no elements",
            )
            place = members.get((index, position))
            if place is not None:
                member = plan.members[place]
                row = _row(row, member, values[index], param, held[place], phases[place])
            rows.append(row)
    ranks = plan.stepping_ranks
    return Explanation(
        rank=ranks.ranks[ranks.me],
        tensors=tuple(rows),
        groups=tuple(_group_row(group, index) for index, group in enumerate(groups)),
    )


def group_name(group: Mapping[str, Any], index: int) -> str:
    """The name of a parameter group, or its index."""
    return str(group.get("name", index))


def _group_row(group: Mapping[str, Any], index: int) -> GroupRow:
    return GroupRow(
        name=group_name(group, index),
        tensors=len(group["params"]),
        numel=sum(param.numel() for param in group["params"]),
        lr=float(group["lr"]),
        weight_decay=float(group["weight_decay"]),
        decoupled_weight_decay=group["decoupled_weight_decay"],
    )


def _held(plan: BlockPlan) -> tuple[list[int], list[tuple[int, ...]]]:
    """For every member, the bytes of its state on this rank, and the phases of its roots."""
    held, phases = [0] * len(plan.members), [set[int]() for _ in plan.members]
    for arena in plan.arenas:
        for member, key, view in arena.views():
            held[member] += view.nbytes
            named = parse(key)
            if named is not None and named.kind == PHASE:
                phases[member].add(int(view))
    return held, [tuple(sorted(each)) for each in phases]


def _row(
    row: TensorRow,
    member: PlannedParam,
    values: Hyperparameters,
    param: Tensor,
    held: int,
    phases: tuple[int, ...],
) -> TensorRow:
    """The row of a parameter that is moved."""
    layout, kind, team = member.layout, kind_of(member.layout), member.team
    tiles = layout.tiles
    sides = [
        sorted({tile.extent[mode] for tile in tiles}, reverse=True) for mode in range(layout.order)
    ]
    is_refreshed = any(cost_of(layout, tile.extent).refreshed for tile in tiles)
    counts = len(COUNTS) if values.geometry.capturable else 1
    by_rank = dict.fromkeys(team.ranks, counts * _COUNT_BYTES)
    for tile in tiles:
        each = block_state_bytes(layout, tile.extent, values, param.dtype)
        for block in tile.block_indices():
            by_rank[team.ranks[member.owners[block]]] += each
    by_rank[team.ranks[team.me]] = held  # what is there may be more than what is called for
    return TensorRow(
        name=row.name,
        group=row.group,
        group_name=row.group_name,
        shape=row.shape,
        merged=layout.dims,
        grid=tiles[0].counts,
        sides=tuple(map(tuple, sides)),
        kind=kind.name,
        grafting=values.geometry.grafting if kind.borrows else "none",
        reason=why_plain(row.shape, values.geometry) or "",
        diagonal=layout.diagonal,
        power=kind.power(values, layout.order) if isinstance(kind, ShampooKind) else None,
        start=values.start_preconditioning_step if kind.preconditions else math.inf,
        frequency=values.precondition_frequency if is_refreshed else None,
        early=values.early_refreshes if is_refreshed else (),
        phases=phases if values.is_staggered or not is_refreshed else (0,),
        owners=tuple(team.ranks[owner] for owner in member.owners),
        state_bytes=held,
        bytes_by_rank=by_rank,
    )
