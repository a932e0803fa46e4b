"""Memory, balance, traffic and step time of one sharding, computed from shapes."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shampoo.blocks.cost import CostModel
from shampoo.blocks.layout import Layout
from shampoo.blocks.ownership import Share, Team, divide
from shampoo.blocks.staggering import aligned_phases
from shampoo.distributed.all_gather import slice_length
from shampoo.distributed.distributor import needs_weights
from shampoo.grafting import grafting_of
from shampoo.hyperparameters import Hyperparameters
from shampoo.planner.report import PlanReport, StepSeconds
from shampoo.planner.traffic import Rows
from shampoo.preconditioner.choice import cost_of, kind_of, layout_of
from shampoo.preconditioner.footprint import block_state_bytes

_STEP_BYTES = 8  # the step counter of a parameter, on every rank


@dataclass(frozen=True)
class Tensor:
    """A trained parameter with at least one element."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Groups = Sequence[tuple[Hyperparameters, Sequence[Tensor]]]


@dataclass(frozen=True)
class Setting:
    """Ranks, links and machine: everything but the tensors and how they are cut."""

    layout: str
    world_size: int
    owners: int  # ranks that share the blocks
    shards: int  # of every parameter; 1 if it is replicated
    communication_dtype: torch.dtype | None
    devices_per_node: int
    island_bandwidth: float  # bytes a second that a rank receives
    network_bandwidth: float
    cost_model: CostModel  # of seconds; owners are those of every machine

    @property
    def bandwidth(self) -> float:
        """Of an exchange among the owners; across nodes the slower links decide."""
        is_island = self.owners <= self.devices_per_node
        return self.island_bandwidth if is_island else self.network_bandwidth


@dataclass(frozen=True)
class _Block:
    """What all blocks of one shape, kind and dtype have in common."""

    numel: int
    ordinary: float
    refresh: float
    seconds: float  # a step, the refreshes spread over their period
    state_bytes: int
    refreshed: tuple[tuple[int, int], ...]  # sides, and how many inverse roots each comes to
    needs_weights: bool  # at the owner


class _Blocks:
    """All blocks in the order of groups, tensors and grids, and their owners."""

    def __init__(self, groups: Groups, setting: Setting) -> None:
        self.setting = setting
        self.each: list[_Block] = []
        self.tensors: list[tuple[Tensor, Layout, int]] = []  # with the index of its first block
        self.factored = self.diagonal = 0
        team = Team(tuple(range(setting.owners)), 0, setting.layout != "ddp")
        shares = []
        for index, (values, tensors) in enumerate(groups):
            for tensor in tensors:
                layout = layout_of(tensor.shape, values.geometry)
                param = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                frequency, work = values.precondition_frequency, functools.partial(cost_of, layout)
                shares.append(Share(index, param, layout, team, frequency, work))
                self.tensors.append((tensor, layout, len(self.each)))
                self.each += self._blocks(tensor, layout, values)
                if kind_of(layout).preconditions:
                    self.factored += layout.blocks
                    self.diagonal += layout.blocks * any(layout.diagonal)
        self.owners = [owner for owners in divide(shares) for owner in owners]
        dtypes = [tensor.dtype for tensor, _, _ in self.tensors]
        computed = functools.reduce(torch.promote_types, dtypes, groups[0][0].geometry.dtype)
        self.gradient_itemsize = functools.reduce(torch.promote_types, dtypes).itemsize
        self.direction_itemsize = (setting.communication_dtype or computed).itemsize

    def _blocks(self, tensor: Tensor, layout: Layout, values: Hyperparameters) -> list[_Block]:
        model, frequency = self.setting.cost_model, values.precondition_frequency
        by_block: dict[int, _Block] = {}
        grafting = grafting_of(values.geometry.grafting, kind_of(layout).borrows)
        for tile in layout.tiles:
            cost = cost_of(layout, tile.extent)
            block = _Block(
                numel=tile.block_numel,
                ordinary=model.ordinary_seconds(cost),
                refresh=model.refresh_seconds(cost),
                seconds=model.block_seconds(cost, frequency),
                state_bytes=block_state_bytes(layout, tile.extent, values, tensor.dtype),
                refreshed=cost.refreshed,
                needs_weights=needs_weights(grafting.layerwise, values),
            )
            by_block |= dict.fromkeys(tile.block_indices(), block)
        return [by_block[index] for index in range(len(by_block))]

    def per_owner(self, part: str) -> list[Any]:
        """[owners], a field of the blocks summed over those of each."""
        sums: list[Any] = [0] * self.setting.owners
        for block, owner in zip(self.each, self.owners, strict=True):
            sums[owner] += getattr(block, part)
        return sums

    def update_bytes(self, numel: int, tensor: Tensor) -> int:
        """Of moving ``numel`` elements of a tensor: direction read, weight read and written."""
        return numel * (self.direction_itemsize + 2 * tensor.dtype.itemsize)


@dataclass(frozen=True)
class _Exchange:
    """What moves in a step: bytes received by each owner, buffers, parameter bytes written."""

    received: tuple[int, ...]
    buffer: int
    updated: int
    padding: float = 1.0
    locality: float | None = None
    best_locality: float | None = None
    holders: float | None = None


def _all_gather(blocks: _Blocks) -> _Exchange:
    """Directions of replicated parameters, without overlap
    (:mod:`shampoo.distributed.all_gather`)."""
    owners, itemsize = blocks.setting.owners, blocks.direction_itemsize
    updated = sum(blocks.update_bytes(tensor.numel, tensor) for tensor, _, _ in blocks.tensors)
    if owners == 1:
        return _Exchange((0,), 0, updated)
    numels = blocks.per_owner("numel")
    longest = itemsize * slice_length(max(numels))
    padding = owners * longest / (sum(numels) * itemsize)
    return _Exchange(((owners - 1) * longest,) * owners, owners * longest, updated, padding)


def _all_to_all(blocks: _Blocks) -> _Exchange:
    """Gradients to owners, directions to the holders of rows
    (:mod:`shampoo.distributed.all_to_all`).

    Not counted: the status that each rank sends to every other in both exchanges, one element.
    A rank's shard is its rank modulo the shards: replicas of HSDP are the outer mesh dimension.
    """
    setting, replicas = blocks.setting, blocks.setting.owners // blocks.setting.shards
    going = blocks.direction_itemsize
    received, buffers, updated = ([0] * setting.owners for _ in range(3))
    on_owner = on_best = holders = 0
    alike: dict[tuple[Any, ...], list[int]] = {}
    for tensor, layout, first in blocks.tensors:
        alike.setdefault((tensor.shape, tensor.dtype, layout), []).append(first)
    for (shape, dtype, layout), starts in alike.items():
        tensor = Tensor("", shape, dtype)
        coming = blocks.gradient_itemsize * (1 + blocks.each[starts[0]].needs_weights)
        rows = Rows.of(shape, layout, setting.shards)
        for rank, local in enumerate(rows.local_numels() * replicas):
            received[rank] += len(starts) * local * going
            # Of the holders of a piece, one sends its gradient: they take turns.
            buffers[rank] += len(starts) * local * (going + coming // replicas)
            updated[rank] += len(starts) * blocks.update_bytes(local, tensor)
        spans = rows.spans()
        on_best += len(starts) * sum(span.largest_piece for span in spans)
        holders += len(starts) * sum(span.holders for span in spans)
        for first in starts:
            for index, span in enumerate(spans, start=first):
                owner = blocks.owners[index]
                local = span.on(owner % setting.shards)
                received[owner] += (span.numel - local) * coming - local * going
                buffers[owner] += span.numel * (coming + going * replicas)
                on_owner += local
    numel = sum(tensor.numel for tensor, _, _ in blocks.tensors)
    return _Exchange(
        tuple(received),
        buffer=max(buffers),
        updated=max(updated),
        locality=on_owner / numel,
        best_locality=on_best / numel,
        holders=holders / len(blocks.each),
    )


def _phase_seconds(blocks: _Blocks, frequency: int) -> tuple[StepSeconds, int]:
    """Compute of a step when refreshes are staggered, and how many phases of a period are used."""
    refreshed: list[list[tuple[int, int]]] = [[] for _ in range(blocks.setting.owners)]
    for block, owner in zip(blocks.each, blocks.owners, strict=True):
        refreshed[owner] += block.refreshed
    for owned in refreshed:
        owned.sort(reverse=True)
    phases = aligned_phases([[side**3 for side, _ in owned] for owned in refreshed], frequency)
    seconds = {
        each: blocks.setting.cost_model.root_seconds(*each)
        for owned in refreshed
        for each in set(owned)
    }
    ordinary = blocks.per_owner("ordinary")
    # A rank without a root in a phase still takes its ordinary step.
    rest = max(ordinary)
    longest: dict[int, float] = {}  # by phase: a period may have far more steps than roots
    for start, owned in zip(ordinary, refreshed, strict=True):
        refreshing: dict[int, float] = {}
        for each, phase in zip(owned, phases, strict=False):
            refreshing[phase] = refreshing.get(phase, start) + seconds[each]
        for phase, taken in refreshing.items():
            longest[phase] = max(longest.get(phase, rest), taken)
    total = sum(longest.values()) + (frequency - len(longest)) * rest
    return StepSeconds(total / frequency, max(longest.values(), default=rest)), len(set(phases))


def forecast(groups: Groups, setting: Setting) -> PlanReport:
    """Cuts, assigns and adds up. Recommends what was asked for."""
    blocks = _Blocks(groups, setting)
    values, _ = groups[0]
    distributor = _all_gather(blocks) if setting.layout == "ddp" else _all_to_all(blocks)
    frequency = values.precondition_frequency
    ordinary, refreshes = blocks.per_owner("ordinary"), blocks.per_owner("refresh")
    update = distributor.updated * setting.cost_model.byte
    wire = max(distributor.received) / setting.bandwidth
    refresh = max(map(sum, zip(ordinary, refreshes, strict=True)))
    together = (max(ordinary) * (frequency - 1) + refresh) / frequency
    staggered, phases = _phase_seconds(blocks, frequency)
    steps = _STEP_BYTES * len(blocks.tensors)
    return PlanReport(
        layout=setting.layout,
        world_size=setting.world_size,
        owners=setting.owners,
        numel=sum(tensor.numel for tensor, _, _ in blocks.tensors),
        tensors=len(blocks.tensors),
        blocks=len(blocks.each),
        factored_blocks=blocks.factored,
        diagonal_blocks=blocks.diagonal,
        max_preconditioner_dim=values.geometry.max_preconditioner_dim,
        precondition_frequency=frequency,
        state_bytes=tuple(steps + size for size in blocks.per_owner("state_bytes")),
        compute_seconds=tuple(blocks.per_owner("seconds")),
        traffic_bytes=distributor.received,
        buffer_bytes=distributor.buffer,
        padding=distributor.padding,
        locality=distributor.locality,
        best_locality=distributor.best_locality,
        holders=distributor.holders,
        update_seconds=update,
        exchange_seconds=wire,
        together=StepSeconds(together + update + wire, refresh + update + wire),
        staggered=StepSeconds(staggered.mean + update + wire, staggered.worst + update + wire),
        refresh_slots=phases,
        recommended_block=values.geometry.max_preconditioner_dim,
        recommended_group=setting.owners,
        cost_model=setting.cost_model.machine,
        notes=(),
    )
