"""Memory, balance, traffic and step time of one sharding, computed from shapes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shampoo.cost import CostModel
from shampoo.grafting import GRAFTING
from shampoo.hyperparameters import Hyperparameters
from shampoo.layout import ADAGRAD, FACTORED, Layout
from shampoo.ownership import aligned_slots, assign_owners
from shampoo.report import PlanReport, StepSeconds
from shampoo.traffic import SLICE_HEADER, Rows, slice_bytes

_STEP_BYTES = 8  # the step counter of a parameter, on every rank
_COUNTER_BYTES = 4  # of a factor: failures, and its slot if staggered


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
    cost_model: CostModel

    @property
    def bandwidth(self) -> float:
        """Of an exchange among the owners; across nodes the slower links decide."""
        is_island = self.owners <= self.devices_per_node
        return self.island_bandwidth if is_island else self.network_bandwidth


def block_state_bytes(
    extent: Sequence[int],
    diagonal: Sequence[bool],
    rule: str,
    values: Hyperparameters,
    dtype: torch.dtype,
) -> int:
    """Bytes of a block's state (algorithm.md 7.1), for a parameter of ``dtype``."""
    size = values.geometry.dtype.itemsize
    wide = torch.promote_types(dtype, values.geometry.dtype).itemsize
    second_moment = rule == ADAGRAD or GRAFTING[values.geometry.grafting].second_moment
    per_element = size * (values.has_exp_avg + second_moment) + wide * (values.momentum > 0)
    total = per_element * math.prod(extent)
    if rule == FACTORED:
        counters = _COUNTER_BYTES * (1 + values.is_staggered)
        for side, is_diagonal in zip(extent, diagonal, strict=True):
            total += size * side if is_diagonal else 2 * size * side * side + counters
    return total


@dataclass(frozen=True)
class _Kind:
    """What all blocks of one shape, rule and dtype have in common."""

    numel: int
    ordinary: float
    root: float
    state_bytes: int
    parameter_itemsize: int
    direction_itemsize: int

    @property
    def slice_bytes(self) -> int:
        return slice_bytes(self.numel, self.direction_itemsize)


class _Blocks:
    """All blocks in wire order: groups, their tensors, row-major in each; and their owners."""

    def __init__(self, groups: Groups, setting: Setting) -> None:
        self.setting = setting
        self.kinds: list[_Kind] = []
        self.tensors: list[tuple[Tensor, Layout, int]] = []  # with the index of its first block
        self.owners: list[int] = []
        self.loads = [0.0] * setting.owners
        self.factored = 0
        model = setting.cost_model
        for values, tensors in groups:
            costs: list[float] = []
            for tensor in tensors:
                layout = Layout.of(tensor.shape, values.geometry)
                self.tensors.append((tensor, layout, len(self.kinds)))
                self.kinds += self._kinds(tensor, layout, values)
                costs += model.layout_seconds(layout, values.precondition_frequency)
                if layout.rule == FACTORED:
                    self.factored += sum(tile.blocks for tile in layout.tiles)
            self.owners += assign_owners(costs, setting.owners, self.loads)

    def _kinds(self, tensor: Tensor, layout: Layout, values: Hyperparameters) -> list[_Kind]:
        model = self.setting.cost_model
        directions = self.setting.communication_dtype or tensor.dtype
        by_block: dict[int, _Kind] = {}
        for tile in layout.tiles:
            block = (tile.extent, layout.diagonal, layout.rule)
            kind = _Kind(
                numel=tile.block_numel,
                ordinary=model.ordinary_seconds(*block),
                root=model.root_seconds(*block),
                state_bytes=block_state_bytes(*block, values, tensor.dtype),
                parameter_itemsize=tensor.dtype.itemsize,
                direction_itemsize=directions.itemsize,
            )
            by_block |= dict.fromkeys(tile.block_indices(), kind)
        return [by_block[index] for index in range(len(by_block))]

    def per_owner(self, part: str) -> list[Any]:
        """[owners], a field of the kinds summed over the blocks of each."""
        sums: list[Any] = [0] * self.setting.owners
        for kind, owner in zip(self.kinds, self.owners, strict=True):
            sums[owner] += getattr(kind, part)
        return sums


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


def _update_bytes(numel: int, tensor: Tensor, directions: torch.dtype | None) -> int:
    """Of writing ``numel`` elements: direction read, weight read and written."""
    return numel * ((directions or tensor.dtype).itemsize + 2 * tensor.dtype.itemsize)


def _all_gather(blocks: _Blocks) -> _Exchange:
    """Directions of replicated parameters (distributed.md 3.2)."""
    setting = blocks.setting
    updated = sum(
        _update_bytes(tensor.numel, tensor, setting.communication_dtype)
        for tensor, _, _ in blocks.tensors
    )
    if setting.owners == 1:
        return _Exchange((0,), 0, updated)
    slices = [SLICE_HEADER + size for size in blocks.per_owner("slice_bytes")]
    payload = sum(kind.numel * kind.direction_itemsize for kind in blocks.kinds)
    received, buffer = (setting.owners - 1) * max(slices), setting.owners * max(slices)
    return _Exchange((received,) * setting.owners, buffer, updated, buffer / payload)


def _all_to_all(blocks: _Blocks) -> _Exchange:
    """Gradients to owners, directions to the holders of rows (distributed.md 3.1).

    A rank's shard is its rank modulo the shards: replicas of HSDP are the outer mesh dimension.
    """
    setting = blocks.setting
    received, updated = [0] * setting.owners, [0] * setting.owners
    numel = on_owner = on_best = holders = 0
    alike: dict[tuple[Any, ...], list[tuple[Tensor, int]]] = {}
    for tensor, layout, first in blocks.tensors:
        alike.setdefault((tensor.shape, tensor.dtype, layout), []).append((tensor, first))
    for (shape, dtype, layout), members in alike.items():
        tensor, count = members[0][0], len(members)
        sent = (setting.communication_dtype or dtype).itemsize
        rows = Rows.of(shape, layout, setting.shards)
        for rank, shard in enumerate(rows.local_numels() * (setting.owners // setting.shards)):
            received[rank] += count * shard * sent
            updated[rank] += count * _update_bytes(shard, tensor, setting.communication_dtype)
        spans = rows.spans()
        numel += count * tensor.numel
        on_best += count * sum(span.largest_piece for span in spans)
        holders += count * sum(span.holders for span in spans)
        for _, first in members:
            for index, span in enumerate(spans, start=first):
                owner = blocks.owners[index]
                local = span.on(owner % setting.shards)
                received[owner] += (span.numel - local) * dtype.itemsize - local * sent
                on_owner += local
    return _Exchange(
        tuple(received),
        buffer=2 * max(received),
        updated=max(updated),
        locality=on_owner / numel,
        best_locality=on_best / numel,
        holders=holders / len(blocks.kinds),
    )


def _slot_seconds(blocks: _Blocks, frequency: int) -> tuple[StepSeconds, int]:
    """Compute of a step when refreshes are staggered, and how many slots of a period are used."""
    roots = [kind.root for kind in blocks.kinds]
    slots = aligned_slots(roots, blocks.owners, frequency)
    ordinary = blocks.per_owner("ordinary")
    refreshing: dict[tuple[int, int], float] = {}
    for root, owner, slot in zip(roots, blocks.owners, slots, strict=True):
        key = (slot, owner)
        refreshing[key] = refreshing.get(key, 0.0) + root
    # A rank without a root in a slot still takes its ordinary step.
    longest = [max(ordinary)] * frequency
    for (slot, owner), seconds in refreshing.items():
        longest[slot] = max(longest[slot], ordinary[owner] + seconds)
    used = len({slot for root, slot in zip(roots, slots, strict=True) if root > 0.0})
    return StepSeconds(sum(longest) / frequency, max(longest)), used


def forecast(groups: Groups, setting: Setting) -> PlanReport:
    """Cuts, assigns and adds up. Recommends what was asked for."""
    blocks = _Blocks(groups, setting)
    values, _ = groups[0]
    exchange = _all_gather(blocks) if setting.layout == "ddp" else _all_to_all(blocks)
    frequency = values.precondition_frequency
    ordinary, roots = blocks.per_owner("ordinary"), blocks.per_owner("root")
    update = exchange.updated * setting.cost_model.byte
    wire = max(exchange.received) / setting.bandwidth
    refresh = max(map(sum, zip(ordinary, roots, strict=True)))
    together = (max(ordinary) * (frequency - 1) + refresh) / frequency
    staggered, slots = _slot_seconds(blocks, frequency)
    steps = _STEP_BYTES * len(blocks.tensors)
    return PlanReport(
        layout=setting.layout,
        world_size=setting.world_size,
        owners=setting.owners,
        numel=sum(tensor.numel for tensor, _, _ in blocks.tensors),
        tensors=len(blocks.tensors),
        blocks=len(blocks.kinds),
        factored_blocks=blocks.factored,
        max_preconditioner_dim=values.geometry.max_preconditioner_dim,
        precondition_frequency=frequency,
        state_bytes=tuple(steps + size for size in blocks.per_owner("state_bytes")),
        compute_seconds=tuple(blocks.loads),
        traffic_bytes=exchange.received,
        buffer_bytes=exchange.buffer,
        padding=exchange.padding,
        locality=exchange.locality,
        best_locality=exchange.best_locality,
        holders=exchange.holders,
        update_seconds=update,
        exchange_seconds=wire,
        together=StepSeconds(together + update + wire, refresh + update + wire),
        staggered=StepSeconds(staggered.mean + update + wire, staggered.worst + update + wire),
        refresh_slots=slots,
        recommended_block=values.geometry.max_preconditioner_dim,
        recommended_group=setting.owners,
        cost_model=setting.cost_model.machine,
        notes=(),
    )
