"""Where state lives: an arena per kind of preconditioner, in it one stack per block shape.

An *arena* holds all blocks of one parameter group that share a kind and a device. Its
elementwise state is flat, block after block, so that one call moves all of it; a *stack* is the
run of its blocks that have one shape. What the kind keeps for modes of one size and order sits in
one :class:`FactorStack` across all block shapes, so that one batched call refreshes them all.
What ``optimizer.state`` publishes are views of these tensors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shampoo.blocks.blocking import Tile
from shampoo.blocks.declared import NONE, Kind, ModeState
from shampoo.blocks.ownership import Team
from shampoo.blocks.staggering import aligned_phases
from shampoo.blocks.state_keys import MOMENTS, PHASE


@dataclass
class FactorStack:
    """What a kind keeps for the modes of one size of blocks of one order: K of them.

    Attributes:
        size: d, the side of the modes.
        order: of the blocks.
        mode: how they are kept, a key of the kind's ``mode_state``.
        kind: that keeps them.
        count: K.
        state: by name, [K, *shape(d)], as the kind declares it.
        ready: [K] bool, whether each has been refreshed; derived from the state.
        phase: [K] int32 on the host, when in a period each is refreshed.
        param_index: [K], the parameter by its place in the arena.
        row_params: the same on the host.
        declared: what is kept for each mode; there is something.
        is_refreshed: whether there is something to refresh, and so flags and phases.
        memory: what the kind remembers between refreshes and no checkpoint holds.
        found: [n, K] float64, what its refreshes find of each; None where nobody records it.
    """

    size: int
    order: int
    mode: str
    kind: Kind
    count: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)
    ready: Tensor = field(init=False)
    phase: Tensor = field(init=False)
    param_index: list[int] = field(default_factory=list)
    row_params: Tensor = field(init=False)
    memory: object = None
    found: Tensor | None = None
    declared: tuple[ModeState, ...] = field(init=False)
    is_refreshed: bool = field(init=False)

    def __post_init__(self) -> None:
        self.declared = self.kind.mode_state[self.mode]
        self.is_refreshed = any(state.decides_ready for state in self.declared)

    def __getitem__(self, name: str) -> Tensor:
        """What is kept under a name, [K, *shape(d)]."""
        return self.state[name]

    @property
    def statistic(self) -> Tensor:
        """[K, ...], the tensor to which a ridge is added."""
        return self.state[self.declared[0].name]

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Makes the state, zero, once ``count`` is final."""
        for state in self.declared:
            shape = (self.count, *state.shape(self.size))
            self.state[state.name] = torch.zeros(shape, dtype=state.dtype or dtype, device=device)
        if self.is_refreshed:
            self.ready = torch.zeros(self.count, dtype=torch.bool, device=device)
            self.phase = torch.zeros(self.count, dtype=torch.int32, device="cpu")
            self.row_params = torch.tensor(self.param_index, dtype=torch.int64, device="cpu")
            deciding = [self.state[each.name] for each in self.declared if each.decides_ready]
            self.memory = self.kind.memory(self.count)
            self._watched = (*deciding, self.phase)
            self._seen = self._versions()

    def mark_ready(self) -> None:
        """Derives ``ready`` from the state."""
        if self.is_refreshed:
            self.ready.copy_(self.kind.are_ready(self.state))
            self.mark_seen()

    def mark_seen(self) -> None:
        """Says that what has been written so far into what decides, and into phases, is known.

        Only of what is refreshed.
        """
        self._seen = self._versions()

    def is_edited(self) -> bool:
        """Whether somebody has written into it since: what follows from it is old."""
        return self.is_refreshed and self._seen != self._versions()

    def _versions(self) -> list[int]:
        versions = []
        for tensor in self._watched:  # what was made in inference mode counts nothing
            versions.append(0 if tensor.is_inference() else tensor._version)
        return versions


@dataclass(frozen=True)
class Placement:
    """A tile of one parameter and where its blocks lie."""

    member: int  # index of the parameter in the plan
    tile: Tile
    element: int  # of the arena, where its first block starts
    row: int  # of the stack, of its first block

    @property
    def numel(self) -> int:
        """Elements of the tile."""
        return self.tile.blocks * self.tile.block_numel


@dataclass
class BlockStack:
    """All blocks of one shape in an arena, with the rows of a factor stack that each mode owns."""

    extent: tuple[int, ...]
    modes: tuple[str, ...]  # how each is kept
    tiles: list[tuple[int, Tile]] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    # A mode: the stack and the first row in it, None where nothing is kept.
    factors: list[tuple[FactorStack, int] | None] = field(default_factory=list)

    @property
    def count(self) -> int:
        """B: blocks in the stack."""
        return sum(tile.blocks for _, tile in self.tiles)


class Arena:
    """The state of one parameter group's blocks of one kind.

    Args:
        group: index of the parameter group.
        kind: of preconditioner, which says what there is beside the moments.
        dtype: of statistics and directions.
        update_dtype: of momentum, at least as wide as the parameters.
        is_staggered: whether the phases of what is refreshed are state.
        is_layerwise: whether directions are rescaled over whole parameters: LARS and LAMB.
        is_capturable: whether the device counts the steps, and the host only what it asked for.
        team: the ranks that divide the blocks of these parameters; those here are one rank's.
    """

    def __init__(
        self,
        group: int,
        kind: Kind,
        dtype: torch.dtype,
        update_dtype: torch.dtype,
        device: torch.device,
        is_staggered: bool,
        is_layerwise: bool,
        is_capturable: bool,
        team: Team,
    ) -> None:
        self.group = group
        self.kind = kind
        self.dtype = dtype
        self.update_dtype = update_dtype
        self.device = device
        self.is_staggered = is_staggered
        self.is_layerwise = is_layerwise
        self.is_capturable = is_capturable
        self.team = team
        # All parameters, whoever owns their blocks: their first blocks among those of all.
        self.first: dict[int, int] = {}
        self.blocks = 0
        self.block_members = torch.empty(0)  # [blocks], to which parameter each belongs
        self.numel = 0
        self.cuts: frozenset[int] = frozenset()  # elements at which a segment must end
        self.period: int | None = None  # over which the phases of factors are spread
        # [members] int64 on the host: steps that each parameter has taken or, if capturable, asked
        # for. State shows them, so what is written there counts.
        self.steps = torch.empty(0, dtype=torch.int64)
        self.taken = torch.empty(0)  # [members], if capturable: on the device, without skipped ones
        self.moments: dict[str, Tensor] = {}
        self.factor_stacks: list[FactorStack] = []
        self._stacks: dict[tuple[tuple[int, ...], tuple[str, ...]], BlockStack] = {}

    def enroll(self, member: int, blocks: int) -> None:
        """Says that a parameter belongs here, and how many blocks it has on all ranks."""
        self.first[member] = self.blocks
        self.blocks += blocks

    @property
    def members(self) -> list[int]:
        """Indices of all parameters, whoever owns their blocks."""
        return list(self.first)

    def add(self, member: int, tile: Tile, diagonal: Sequence[bool]) -> None:
        """Gives blocks of a parameter a place.

        Args:
            diagonal: [o], for which sides a matrix would take too much memory.
        """
        key = (tile.extent, self.kind.modes(tile.extent, diagonal))
        self._stacks.setdefault(key, BlockStack(*key)).tiles.append((member, tile))

    def assign_phases(self, period: int, arenas_by_rank: Sequence["Arena"]) -> None:
        """Spreads the refreshes of a period evenly over its steps, alike on the ranks of a team.

        Args:
            period: in steps.
            arenas_by_rank: the arenas of all positions of the team, this one among them.
        """
        self.period = period
        costs = [arena.refresh_costs() for arena in arenas_by_rank]
        phases = torch.tensor(aligned_phases(costs, period), dtype=torch.int32, device="cpu")
        for stack in self.refreshed_stacks():
            stack.phase.copy_(phases[: stack.count])
            stack.mark_seen()
            phases = phases[stack.count :]

    def refresh_costs(self) -> list[int]:
        """Of everything that is refreshed, d^3, the dearest first."""
        return [stack.size**3 for stack in self.refreshed_stacks() for _ in range(stack.count)]

    def refreshed_stacks(self) -> list[FactorStack]:
        """The stacks that are refreshed, largest first."""
        stacks = [stack for stack in self.factor_stacks if stack.is_refreshed]
        return sorted(stacks, key=lambda stack: -stack.size)

    def place(self) -> None:
        """Lays out all blocks, once they are added."""
        by_size: dict[tuple[int, int, str], FactorStack] = {}
        places = {member: place for place, member in enumerate(self.first)}
        element = 0
        for stack in self.stacks:
            row = 0
            for member, tile in stack.tiles:
                stack.placements.append(Placement(member, tile, element, row))
                element += tile.blocks * tile.block_numel
                row += tile.blocks
            order = len(stack.extent)
            for size, mode in zip(stack.extent, stack.modes, strict=True):
                if mode == NONE:
                    stack.factors.append(None)
                    continue
                key = (size, order, mode)
                factors = by_size.setdefault(key, FactorStack(*key, self.kind))
                stack.factors.append((factors, factors.count))
                factors.count += stack.count
                for member, tile in stack.tiles:
                    factors.param_index += [places[member]] * tile.blocks
        self.numel = element
        self.factor_stacks = list(by_size.values())

    def allocate(self, moments: Sequence[str] = MOMENTS) -> None:
        """Makes the state of the blocks, zero, once they are placed.

        Args:
            moments: the elementwise state that there is beside that of the kind.
        """
        # On the host, since they decide the schedule, and one for each parameter: one without a
        # gradient takes no step.
        self.steps = torch.zeros(len(self.members), dtype=torch.int64, device="cpu")
        counts = torch.tensor([*self.first.values(), self.blocks], device="cpu").diff()
        self.block_members = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
        self.block_members = self.block_members.to(self.device, non_blocking=True)
        if self.is_capturable:
            self.taken = torch.zeros_like(self.steps, device=self.device)
        for factors in self.factor_stacks:
            factors.allocate(self.dtype, self.device)
        for name in (*moments, *(state.name for state in self.kind.block_state)):
            self.add_moment(name)

    def add_moment(self, name: str) -> None:
        """Makes one kind of elementwise state, zero, unless it is there."""
        if name not in self.moments:
            dtype = self.update_dtype if name == "momentum" else self.dtype
            self.moments[name] = torch.zeros(self.numel, dtype=dtype, device=self.device)

    @property
    def stacks(self) -> list[BlockStack]:
        """The stacks in the order in which their blocks lie in the arena."""
        return list(self._stacks.values())

    @property
    def largest_tile(self) -> int:
        """Elements of the largest tile, the least that a segment holds."""
        sizes = [placed.numel for stack in self.stacks for placed in stack.placements]
        return max(sizes, default=0)

    def counts(self) -> list[int]:
        """[members], how many steps each parameter has taken or, if capturable, asked for."""
        return self.steps.tolist()

    def views(self, elementwise: Sequence[str] | None = None) -> Iterator[tuple[int, str, Tensor]]:
        """Every state tensor as ``member, key, view``.

        Args:
            elementwise: names of elementwise state, the only such to show; None for all there is.
        """
        for index, member in enumerate(self.members):
            if self.is_capturable:
                yield member, "step", self.taken[index]
            yield member, "calls" if self.is_capturable else "step", self.steps[index]
        names = (*MOMENTS, *(state.name for state in self.kind.block_state))
        flat = {
            name: self.moments[name]
            for name in names
            if name in self.moments and (elementwise is None or name in elementwise)
        }
        for stack in self.stacks:
            kept = [
                (mode, first, self._kept(factors))
                for mode, (factors, first) in _there(stack.factors)
            ]
            for placed in stack.placements:
                size = placed.tile.block_numel
                for offset, block in enumerate(placed.tile.block_indices()):
                    start, row = placed.element + offset * size, placed.row + offset
                    for name, tensor in flat.items():
                        view = tensor[start : start + size].view(stack.extent)
                        yield placed.member, f"block{block}.{name}", view
                    for mode, first, tensors in kept:
                        for name, tensor in tensors.items():
                            yield placed.member, f"block{block}.{name}{mode}", tensor[first + row]

    def _kept(self, factors: FactorStack) -> dict[str, Tensor]:
        """What of a stack is state: by name, as declared, and phases where they are spread."""
        is_spread = self.is_staggered and factors.is_refreshed
        return {**factors.state, PHASE: factors.phase} if is_spread else factors.state


def _there(
    factors: Sequence[tuple[FactorStack, int] | None],
) -> Iterator[tuple[int, tuple[FactorStack, int]]]:
    """The modes for which something is kept, with their numbers."""
    for mode, each in enumerate(factors):
        if each is not None:
            yield mode, each
