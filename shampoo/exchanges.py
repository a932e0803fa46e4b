"""The exchange of every team of a plan, made at the first step: process groups come into being."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shampoo.allgather import AllGather
from shampoo.blocking import merge_groups
from shampoo.exchange import Alone, Exchange
from shampoo.hyperparameters import Geometry
from shampoo.regions import Region, regions_of
from shampoo.router import Router
from shampoo.routes import Routed
from shampoo.stacks import Arena
from shampoo.step_plan import Plan
from shampoo.workers import Team, Workers


def exchanges_of(plan: Plan, params: Sequence[Tensor], workers: Workers) -> dict[Team, Exchange]:
    """One exchange for each team, in the order in which all ranks visit those they are in.

    Args:
        params: the planned parameters, DTensors as they are.
    """
    crews: dict[Team, list[list[Arena]]] = {}
    for crew in plan.crews:
        crews.setdefault(crew[0].team, []).append(crew)
    exchanges: dict[Team, Exchange] = {}
    for team in sorted(crews, key=lambda team: (team.ranks, team.is_sharded)):
        arenas = [crew[team.me] for crew in crews[team]]
        dtypes = [arena.update_dtype for arena in arenas]
        dtype = workers.communication_dtype or functools.reduce(torch.promote_types, dtypes)
        if team.is_alone:
            exchanges[team] = Alone()
        elif team.is_sharded:
            members = [
                (member, params[member])
                for member in sorted(member for arena in arenas for member in arena.members)
            ]
            exchanges[team] = Router(
                arenas,
                [
                    _routed(plan, member, param)
                    for member, param in members
                    if isinstance(param, DTensor)
                ],
                workers.group(team),
                functools.reduce(torch.promote_types, (param.dtype for _, param in members)),
                dtype,
                max(plan.longest_segment(arena) for arena in arenas),
            )
        else:
            # Parts are sent when a rank gets there. Any other collective in between would meet
            # them in another order on each rank, and hang.
            overlap = workers.overlap and len(crews) == 1
            overlap = overlap and not any(arena.is_layerwise for arena in arenas)
            exchanges[team] = AllGather(crews[team], workers.group(team), dtype, overlap)
    return exchanges


def _routed(plan: Plan, index: int, param: DTensor) -> Routed:
    member = plan.members[index]
    geometry = plan.geometry(member)
    regions = _regions(param, geometry)
    return Routed(index, list(member.blocks()), member.owners, regions)


def _regions(param: DTensor, geometry: Geometry) -> list[Region]:
    limit = geometry.max_preconditioner_dim
    return regions_of(param, merge_groups(param.shape, limit, geometry.merge_dims))
