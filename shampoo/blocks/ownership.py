"""Which rank owns which block: greedy longest processing time (distributed.md 2.1)."""

import functools
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from shampoo.blocks.cost import ACCELERATOR, Cost
from shampoo.blocks.layout import Layout

# Nominal, not this machine's: ranks must decide alike, and a checkpoint must find its owners again
# on another machine.
_COSTS = ACCELERATOR


@dataclass(frozen=True)
class Team:
    """Ranks that divide the blocks of some parameters among them.

    Attributes:
        ranks: global ranks, ascending: the order of their process group.
        me: position of this rank in ``ranks``.
        is_sharded: whether each rank holds but a part of the parameters.
    """

    ranks: tuple[int, ...]
    me: int
    is_sharded: bool = False

    @functools.cached_property
    def size(self) -> int:
        """How many ranks."""
        return len(self.ranks)

    @functools.cached_property
    def is_alone(self) -> bool:
        """Whether there is nobody to share with."""
        return self.size == 1


ALONE = Team((0,), 0)  # without a process group


# The team that divided the blocks of a parameter, and the owner of each.
Owners = tuple[Team, tuple[int, ...]]


@dataclass(frozen=True)
class Share:
    """The blocks of one parameter, to be divided."""

    group: int
    param: Tensor
    layout: Layout
    team: Team
    frequency: int  # precondition_frequency
    cost_of: Callable[[tuple[int, ...]], Cost]  # the work of a block, by its sides


def divide(shares: Sequence[Share], kept: Mapping[Tensor, Owners] | None = None) -> list[list[int]]:
    """The owner of every block: its position in the team of its parameter.

    Group by group, so that a group that is added later does not move the blocks before it.

    Args:
        shares: in the order of groups and parameters.
        kept: owners that were decided before, by parameter; these stay if their team and the number
            of blocks do.

    Returns:
        For every share, [blocks], in row-major order of its grid of blocks.
    """
    loads: dict[Team, list[float]] = {}
    costs = [
        _COSTS.grid_seconds(share.layout.tiles, share.frequency, share.cost_of) for share in shares
    ]
    owners: list[list[int]] = [[0] * len(cost) for cost in costs]
    pending: dict[tuple[int, Team], list[int]] = {}
    for index, share in enumerate(shares):
        if share.team.is_alone:
            continue
        load = loads.setdefault(share.team, [0.0] * share.team.size)
        team, stays = (kept or {}).get(share.param, (None, ()))
        # A checkpoint may have brought another large_dim_method, and so another grid.
        if team == share.team and len(stays) == len(costs[index]):
            owners[index] = list(stays)
            for owner, cost in zip(owners[index], costs[index], strict=True):
                load[owner] += cost
        else:
            pending.setdefault((share.group, share.team), []).append(index)
    for (_, team), indices in pending.items():
        joined = [cost for index in indices for cost in costs[index]]
        assigned = iter(assign_owners(joined, team.size, loads[team]))
        for index in indices:
            owners[index] = [next(assigned) for _ in costs[index]]
    return owners


def assign_owners(costs: Sequence[float], ranks: int, loads: list[float]) -> list[int]:
    """Gives every block to the rank with the least work so far, the dearest block first.

    Ties between blocks go by their index, ties between ranks by theirs, so that all ranks decide
    alike without a word. Called for one parameter group after the other with the same ``loads``,
    it places later groups on top of earlier ones, whose owners stay.

    Args:
        costs: [B], of the blocks, in any unit.
        ranks: how many may own blocks, >= 1.
        loads: [ranks], in and out: what each rank has been given.

    Returns:
        [B], the owner of every block. No rank is given more than ``mean + (1 - 1/ranks) * dearest``
        when ``loads`` was equal before.

    Raises:
        ValueError: for ``ranks < 1``, a load list of another length, or a cost that is negative or
            not finite; ``loads`` is as before.
    """
    if ranks < 1:
        raise ValueError(f"Invalid ranks={ranks}. Must be >= 1.")
    if len(loads) != ranks:
        raise ValueError(f"Invalid loads of length {len(loads)}. Must have ranks={ranks} entries.")
    for index, cost in enumerate(costs):
        if not 0.0 <= cost < math.inf:
            raise ValueError(f"Invalid cost {cost} of block {index}. Must be finite and >= 0.0.")
    owners = [0] * len(costs)
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    for index in sorted(range(len(costs)), key=lambda entry: -costs[entry]):
        load, rank = heap[0]
        owners[index] = rank
        heapq.heapreplace(heap, (load + costs[index], rank))
    for load, rank in heap:
        loads[rank] = load
    return owners
