"""Where state lives: an arena per update rule, in it one stack per block shape.

An *arena* holds all blocks of one parameter group that share a rule and a device. Its
elementwise state is flat, block after block, so that one call moves all of it; a *stack* is the
run of its blocks that have one shape. Factors of one size and order sit in one
:class:`FactorStack` across all block shapes, so that one batched solver call refreshes them all.
What ``optimizer.state`` publishes are views of these tensors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shampoo.blocks.blocking import Tile
from shampoo.blocks.layout import FACTORED
from shampoo.blocks.ownership import Team
from shampoo.blocks.staggering import aligned_phases
from shampoo.blocks.state_keys import FACTOR_STATE
from shampoo.roots.refresh import PendingFlags, is_root


@dataclass
class FactorStack:
    """All factors of one size that belong to blocks of one order: K of them.

    A diagonal factor is kept as a vector and has no root: it is applied fresh at every step.
    """

    size: int
    order: int
    diagonal: bool
    count: int = 0
    factor: Tensor = field(init=False)  # [K, d, d], or [K, d] if diagonal
    root: Tensor = field(init=False)  # [K, d, d], all zero where there has been no root yet
    failures: Tensor = field(init=False)  # [K] int32, refreshes in a row without a valid root
    ready: Tensor = field(init=False)  # [K] bool, derived from root
    slot: Tensor = field(init=False)  # [K] int32 on the host, when in a period roots are refreshed
    owners: list[int] = field(default_factory=list)  # [K], the parameter by its place in the arena
    row_owners: Tensor = field(init=False)  # the same on the host
    pending: PendingFlags = field(init=False)  # verdicts on roots that are on their way to the host

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Makes the state, zero, once ``count`` is final."""
        shape = (self.count, self.size) if self.diagonal else (self.count, self.size, self.size)
        self.factor = torch.zeros(shape, dtype=dtype, device=device)
        if not self.diagonal:
            self.root = torch.zeros(shape, dtype=dtype, device=device)
            self.failures = torch.zeros(self.count, dtype=torch.int32, device=device)
            self.ready = torch.zeros(self.count, dtype=torch.bool, device=device)
            self.slot = torch.zeros(self.count, dtype=torch.int32, device="cpu")
            self.row_owners = torch.tensor(self.owners, dtype=torch.int64, device="cpu")
            self.pending = PendingFlags(self.count)
            self._seen = self._versions()

    def mark_ready(self) -> None:
        """Derives ``ready`` from ``root``."""
        if not self.diagonal:
            self.ready.copy_(is_root(self.root))
            self.mark_seen()

    def mark_seen(self) -> None:
        """Says that what has been written into roots and slots so far is known."""
        self._seen = self._versions()

    def is_edited(self) -> bool:
        """Whether somebody has written into roots or slots since: what follows from them is old."""
        return not self.diagonal and self._seen != self._versions()

    def _versions(self) -> tuple[int, ...]:
        # What was made in inference mode counts nothing.
        return tuple(
            0 if tensor.is_inference() else tensor._version for tensor in (self.root, self.slot)
        )


@dataclass(frozen=True)
class Placement:
    """A tile of one parameter and where its blocks lie."""

    member: int  # index of the parameter in the plan
    tile: Tile
    element: int  # of the arena, where its first block starts
    slot: int  # of the stack, of its first block

    @property
    def numel(self) -> int:
        """Elements of the tile."""
        return self.tile.blocks * self.tile.block_numel


@dataclass
class BlockStack:
    """All blocks of one shape in an arena, with the slice of a factor stack that each mode owns."""

    extent: tuple[int, ...]
    diagonal: tuple[bool, ...]
    tiles: list[tuple[int, Tile]] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    factors: list[tuple[FactorStack, int]] = field(default_factory=list)  # a mode: stack, first

    @property
    def count(self) -> int:
        """B: blocks in the stack."""
        return sum(tile.blocks for _, tile in self.tiles)


class Arena:
    """The state of one parameter group's blocks under one rule.

    Args:
        group: index of the parameter group.
        rule: ``factored``, ``grafted`` or ``adagrad`` (:mod:`shampoo.blocks.layout`).
        dtype: of statistics and directions.
        update_dtype: of momentum, at least as wide as the parameters.
        is_staggered: whether the slots of the factors are state.
        is_layerwise: whether directions are rescaled over whole parameters: LARS and LAMB.
        is_capturable: whether the device counts the steps, and the host only what it asked for.
        team: the ranks that divide the blocks of these parameters; those here are one rank's.
    """

    def __init__(
        self,
        group: int,
        rule: str,
        dtype: torch.dtype,
        update_dtype: torch.dtype,
        device: torch.device,
        is_staggered: bool,
        is_layerwise: bool,
        is_capturable: bool,
        team: Team,
    ) -> None:
        self.group = group
        self.rule = rule
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
        self.period: int | None = None  # over which the slots of the factors are spread
        # [members] int64 on the host: steps that each parameter has taken or, if capturable, asked
        # for. State shows them, so what is written there counts.
        self.steps = torch.empty(0, dtype=torch.int64)
        self.taken = torch.empty(0)  # [members], if capturable: on the device, without skipped ones
        self.moments: dict[str, Tensor] = {}
        self.factor_stacks: list[FactorStack] = []
        self._stacks: dict[tuple[tuple[int, ...], tuple[bool, ...]], BlockStack] = {}

    def enroll(self, member: int, blocks: int) -> None:
        """Says that a parameter belongs here, and how many blocks it has on all ranks."""
        self.first[member] = self.blocks
        self.blocks += blocks

    @property
    def members(self) -> list[int]:
        """Indices of all parameters, whoever owns their blocks."""
        return list(self.first)

    def add(self, member: int, tile: Tile, diagonal: tuple[bool, ...]) -> None:
        """Gives blocks of a parameter a place."""
        key = (tile.extent, diagonal)
        self._stacks.setdefault(key, BlockStack(*key)).tiles.append((member, tile))

    def assign_phases(self, period: int, arenas_by_rank: Sequence["Arena"]) -> None:
        """Spreads the refreshes of a period evenly over its steps, alike on the ranks of a team.

        Args:
            period: in steps.
            crew: the arenas of all positions of the team, this one among them.
        """
        self.period = period
        costs = [arena.root_costs() for arena in arenas_by_rank]
        slots = torch.tensor(aligned_phases(costs, period), dtype=torch.int32, device="cpu")
        for stack in self.stacks_with_roots():
            stack.slot.copy_(slots[: stack.count])
            stack.mark_seen()
            slots = slots[stack.count :]

    def root_costs(self) -> list[int]:
        """Of every root, d^3, the dearest first."""
        return [stack.size**3 for stack in self.stacks_with_roots() for _ in range(stack.count)]

    def stacks_with_roots(self) -> list[FactorStack]:
        """The stacks that have roots, largest first."""
        stacks = [stack for stack in self.factor_stacks if not stack.diagonal]
        return sorted(stacks, key=lambda stack: -stack.size)

    def place(self) -> None:
        """Lays out all blocks, once they are added."""
        by_size: dict[tuple[int, int, bool], FactorStack] = {}
        ranks = {member: rank for rank, member in enumerate(self.first)}
        element = 0
        for stack in self.stacks:
            slot = 0
            for member, tile in stack.tiles:
                stack.placements.append(Placement(member, tile, element, slot))
                element += tile.blocks * tile.block_numel
                slot += tile.blocks
            if self.rule == FACTORED:
                order = len(stack.extent)
                for size, diagonal in zip(stack.extent, stack.diagonal, strict=True):
                    key = (size, order, diagonal)
                    factors = by_size.setdefault(key, FactorStack(*key))
                    stack.factors.append((factors, factors.count))
                    factors.count += stack.count
                    for member, tile in stack.tiles:
                        factors.owners += [ranks[member]] * tile.blocks
        self.numel = element
        self.factor_stacks = list(by_size.values())

    def allocate(self, moments: Sequence[str]) -> None:
        """Makes the state of the blocks, zero, once they are placed."""
        # On the host, since they decide the schedule, and one for each parameter: one without a
        # gradient takes no step.
        self.steps = torch.zeros(len(self.members), dtype=torch.int64, device="cpu")
        counts = torch.tensor([*self.first.values(), self.blocks], device="cpu").diff()
        self.block_members = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
        self.block_members = self.block_members.to(self.device)
        if self.is_capturable:
            self.taken = torch.zeros_like(self.steps, device=self.device)
        for factors in self.factor_stacks:
            factors.allocate(self.dtype, self.device)
        for name in moments:
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

    def views(self, moments: Sequence[str]) -> Iterator[tuple[int, str, Tensor]]:
        """Every state tensor as ``member, key, view``, the moments as named."""
        for index, member in enumerate(self.members):
            if self.is_capturable:
                yield member, "step", self.taken[index]
            yield member, "calls" if self.is_capturable else "step", self.steps[index]
        for stack in self.stacks:
            for placed in stack.placements:
                size = placed.tile.block_numel
                for offset, block in enumerate(placed.tile.block_indices()):
                    start, slot = placed.element + offset * size, placed.slot + offset
                    for name in moments:
                        if name in self.moments:
                            view = self.moments[name][start : start + size].view(stack.extent)
                            yield placed.member, f"block{block}.{name}", view
                    for mode, (factors, first) in enumerate(stack.factors):
                        for name in FACTOR_STATE[: 1 if factors.diagonal else len(FACTOR_STATE)]:
                            if name != "slot" or self.is_staggered:
                                view = getattr(factors, name)[first + slot]
                                yield placed.member, f"block{block}.{name}{mode}", view
