"""All buffers of a plan, made at its first step, in which process groups come into being."""

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo.blocks.blocking import merge_groups
from shampoo.blocks.layout import Geometry
from shampoo.blocks.ownership import Team
from shampoo.blocks.segments import longest_segment
from shampoo.blocks.stacks import Arena
from shampoo.distributed.all_gather import AllGatherDistributor
from shampoo.distributed.all_to_all import AllToAllDistributor
from shampoo.distributed.distributor import Distributor, SingleProcess, needs_weights
from shampoo.distributed.pieces import ShardedParam
from shampoo.distributed.process_groups import ProcessGroups, check_backend
from shampoo.distributed.shard_regions import Region, regions_of
from shampoo.dtensor import is_dtensor
from shampoo.hyperparameters import Hyperparameters
from shampoo.step.block_plan import BlockPlan

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class DistributorsKey:
    """What distributors are made for; they are made anew for another key.

    Attributes:
        weighted: by arena, whether weights travel to the owners of its blocks.
        world: the default process group, which ends in spite of this.
    """

    plan: BlockPlan
    weighted: tuple[bool, ...]
    world: weakref.ref[dist.ProcessGroup] | None

    @classmethod
    def of(
        cls, plan: BlockPlan, hyper: Sequence[Hyperparameters], process_groups: ProcessGroups
    ) -> "DistributorsKey":
        """What a step needs."""
        weighted = tuple(
            needs_weights(arena.is_layerwise, hyper[arena.group]) for arena in plan.arenas
        )
        world = process_groups.world()
        return cls(plan, weighted, None if world is None else weakref.ref(world))


class Distributors:
    """The distributor of every team of a plan.

    Args:
        params: the planned parameters, DTensors as they are.
        process_groups: which exist by now (:func:`join_groups`): nothing here communicates, so that
            a rank that fails can say so to those that have not.

    Attributes:
        revision: of hyper-parameters with which the key is known to agree.
        devices: of the plan's arenas.
        by_team: in the order in which all ranks visit the teams they are in.
        squares: for every arena of the plan the norms that LARS and LAMB add up, [2, blocks]
            float64, None if it is not of these.
    """

    def __init__(
        self, key: DistributorsKey, params: Sequence[Tensor], process_groups: ProcessGroups
    ) -> None:
        plan = key.plan
        self.key = key
        self.revision = -1
        self.by_team = _distributors_of(key, params, process_groups)
        self.devices = list({arena.device: None for arena in plan.arenas})
        self.squares = [
            torch.empty(2, arena.blocks, dtype=torch.float64, device=arena.device)
            if arena.is_layerwise
            else None
            for arena in plan.arenas
        ]

    def is_for(self, plan: BlockPlan, world: dist.ProcessGroup | None, revision: int) -> bool:
        """Whether they are surely what a step needs, seen from far.

        Args:
            world: the default process group.
            revision: of the hyper-parameters.
        """
        own = None if self.key.world is None else self.key.world()
        is_same_world = own is world and (self.key.world is None) == (world is None)
        return plan is self.key.plan and is_same_world and revision == self.revision


def join_groups(plan: BlockPlan, process_groups: ProcessGroups) -> None:
    """Makes the process groups of a plan, on all ranks in one order."""
    # Those of replicas first: all ranks make them together, in whatever order others are needed.
    for team in sorted(_teams(plan), key=lambda team: team.is_sharded):
        if not team.is_alone:
            process_groups.group(team)


def _teams(plan: BlockPlan) -> dict[Team, list[list[Arena]]]:
    all_arenas: dict[Team, list[list[Arena]]] = {}
    for arenas_by_rank in plan.all_arenas:
        all_arenas.setdefault(arenas_by_rank[0].team, []).append(arenas_by_rank)
    return {
        team: all_arenas[team] for team in sorted(all_arenas, key=lambda t: (t.ranks, t.is_sharded))
    }


def _distributors_of(
    key: DistributorsKey, params: Sequence[Tensor], process_groups: ProcessGroups
) -> dict[Team, Distributor]:
    plan = key.plan
    weighted = dict(zip(map(id, plan.arenas), key.weighted, strict=True))
    all_arenas = _teams(plan)
    distributors: dict[Team, Distributor] = {}
    for team in all_arenas:
        arenas = [arenas_by_rank[team.me] for arenas_by_rank in all_arenas[team]]
        if not team.is_alone:
            for device in dict.fromkeys(arena.device for arena in arenas):
                check_backend(process_groups.group(team).live(), device)
        dtypes = [arena.update_dtype for arena in arenas]
        dtype = process_groups.communication_dtype or functools.reduce(torch.promote_types, dtypes)
        if plan.stepping_ranks.is_alone:
            distributors[team] = SingleProcess()
        elif team.is_sharded:
            members = [
                (member, params[member])
                for member in sorted(member for arena in arenas for member in arena.members)
            ]
            distributors[team] = AllToAllDistributor(
                arenas,
                [_sharded(plan, member, param) for member, param in members if is_dtensor(param)],
                process_groups.group(team),
                functools.reduce(torch.promote_types, (param.dtype for _, param in members)),
                dtype,
                max(longest_segment(arena) for arena in arenas),
                frozenset(index for index, arena in enumerate(arenas) if weighted[id(arena)]),
            )
        else:
            # Parts are sent when a rank gets there. Any other collective in between would meet
            # them in another order on each rank, and hang.
            overlap = process_groups.overlap and len(all_arenas) == 1
            overlap = overlap and not any(arena.is_layerwise for arena in arenas)
            # One rank alone among others has nobody to send to, but must wait for their status
            # before it moves a parameter, and so keeps its directions in a buffer too.
            group = None if team.is_alone else process_groups.group(team)
            distributors[team] = AllGatherDistributor(all_arenas[team], group, dtype, overlap)
    return distributors


def _sharded(plan: BlockPlan, index: int, param: "DTensor") -> ShardedParam:
    member = plan.members[index]
    geometry = plan.geometry(member)
    regions = _regions(param, geometry)
    return ShardedParam(index, list(member.blocks()), member.owners, regions)


def _regions(param: "DTensor", geometry: Geometry) -> list[Region]:
    limit = geometry.max_preconditioner_dim
    return regions_of(param, merge_groups(param.shape, limit, geometry.merge_dims))
