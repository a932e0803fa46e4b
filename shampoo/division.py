"""How the blocks of parameters are divided among the ranks of their teams."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from shampoo.cost import CostModel
from shampoo.layout import Layout
from shampoo.ownership import assign_owners
from shampoo.workers import Team

# Nominal, not this machine's: ranks must decide alike, and a checkpoint must find its owners again
# on another machine.
_COSTS = CostModel()


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
    costs = [_COSTS.layout_seconds(share.layout, share.frequency) for share in shares]
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
