"""All buffers of a plan, made at its first step, in which process groups come into being."""

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from shampoo.allgather import AllGather
from shampoo.blocking import merge_groups
from shampoo.exchange import Alone, Exchange, needs_weights
from shampoo.hyperparameters import Geometry, Hyperparameters
from shampoo.regions import Region, regions_of
from shampoo.router import Router
from shampoo.routes import Routed
from shampoo.segments import longest_segment
from shampoo.stacks import Arena
from shampoo.step_plan import Plan
from shampoo.workers import Team, Workers


@dataclass(frozen=True)
class Purpose:
    """What buffers are made for; they are made anew for another one.

    Attributes:
        weighted: by arena, whether weights travel to the owners of its blocks.
        world: the default process group, which ends in spite of this.
    """

    plan: Plan
    weighted: tuple[bool, ...]
    world: weakref.ref[dist.ProcessGroup] | None

    @classmethod
    def of(cls, plan: Plan, hyper: Sequence[Hyperparameters], workers: Workers) -> "Purpose":
        """What a step needs."""
        weighted = tuple(needs_weights(arena, hyper[arena.group]) for arena in plan.arenas)
        world = workers.world()
        return cls(plan, weighted, None if world is None else weakref.ref(world))


class Exchanges:
    """The exchange of every team of a plan.

    Args:
        params: the planned parameters, DTensors as they are.
        workers: whose process groups exist by now (:func:`join_groups`): nothing here communicates,
            so that a rank that fails can say so to those that have not.

    Attributes:
        by_team: in the order in which all ranks visit the teams they are in.
        squares: for every arena of the plan the norms that LARS and LAMB add up, [2, blocks]
            float64, None if it is not of these.
    """

    def __init__(self, purpose: Purpose, params: Sequence[Tensor], workers: Workers) -> None:
        plan = purpose.plan
        self.purpose = purpose
        self.by_team = _exchanges_of(purpose, params, workers)
        self.squares = [
            torch.empty(2, arena.blocks, dtype=torch.float64, device=arena.device)
            if arena.is_layerwise
            else None
            for arena in plan.arenas
        ]

    def close(self) -> None:
        """Lets go of a step's gradients."""
        for exchange in self.by_team.values():
            exchange.close()


def join_groups(plan: Plan, workers: Workers) -> None:
    """Makes the process groups of a plan, on all ranks in one order."""
    # Those of replicas first: all ranks make them together, in whatever order others are needed.
    for team in sorted(_teams(plan), key=lambda team: team.is_sharded):
        if not team.is_alone:
            workers.group(team)


def _teams(plan: Plan) -> dict[Team, list[list[Arena]]]:
    crews: dict[Team, list[list[Arena]]] = {}
    for crew in plan.crews:
        crews.setdefault(crew[0].team, []).append(crew)
    return {team: crews[team] for team in sorted(crews, key=lambda t: (t.ranks, t.is_sharded))}


def _exchanges_of(
    purpose: Purpose, params: Sequence[Tensor], workers: Workers
) -> dict[Team, Exchange]:
    plan = purpose.plan
    weighted = dict(zip(map(id, plan.arenas), purpose.weighted, strict=True))
    crews = _teams(plan)
    exchanges: dict[Team, Exchange] = {}
    for team in crews:
        arenas = [crew[team.me] for crew in crews[team]]
        dtypes = [arena.update_dtype for arena in arenas]
        dtype = workers.communication_dtype or functools.reduce(torch.promote_types, dtypes)
        if plan.holders.is_alone:
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
                max(longest_segment(arena) for arena in arenas),
                frozenset(index for index, arena in enumerate(arenas) if weighted[id(arena)]),
            )
        else:
            # Parts are sent when a rank gets there. Any other collective in between would meet
            # them in another order on each rank, and hang.
            overlap = workers.overlap and len(crews) == 1
            overlap = overlap and not any(arena.is_layerwise for arena in arenas)
            # One rank alone among others has nobody to send to, but must wait for their word before
            # it moves a parameter, and so keeps its directions in a buffer too.
            group = None if team.is_alone else workers.group(team)
            exchanges[team] = AllGather(crews[team], group, dtype, overlap)
    return exchanges


def _routed(plan: Plan, index: int, param: DTensor) -> Routed:
    member = plan.members[index]
    geometry = plan.geometry(member)
    regions = _regions(param, geometry)
    return Routed(index, list(member.blocks()), member.owners, regions)


def _regions(param: DTensor, geometry: Geometry) -> list[Region]:
    limit = geometry.max_preconditioner_dim
    return regions_of(param, merge_groups(param.shape, limit, geometry.merge_dims))
