"""Which parameters an optimizer moves and where their blocks lie.

A plan is built lazily, at the first step or by a load that brings state, because frameworks replace
parameters after construction; it is never trusted without :meth:`BlockPlan.is_current`. Building
one is local and deterministic: groups, parameters and blocks in their order decide everything.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from shampoo.blocks.declared import FAILURES
from shampoo.blocks.entries import check_value, is_absent
from shampoo.blocks.layout import Geometry
from shampoo.blocks.ownership import Owners, Team
from shampoo.blocks.pattern_cache import Pattern, PatternCache
from shampoo.blocks.publication import Publication, State, TakenIn
from shampoo.blocks.segments import ActiveBlocks, Segment, segment_limit, segments_of, workspace_of
from shampoo.blocks.stacks import Arena
from shampoo.blocks.state_keys import MOMENTS, PHASE, is_lasting, is_own, kinds_in, parse
from shampoo.distributed.consensus import digest
from shampoo.distributed.process_groups import ProcessGroups
from shampoo.errors import IncompleteCheckpointError, RootFailureError
from shampoo.grafting import grafting_of
from shampoo.hyperparameters import Hyperparameters
from shampoo.preconditioner import KINDS
from shampoo.step.gradients import Form, form_of, square_limit
from shampoo.step.param_plan import PlannedParam, plan_params

logger = logging.getLogger(__name__)

Published = list[tuple[Tensor, str, Tensor]]


class BlockPlan:
    """The arenas of all parameter groups; publishes their state.

    Args:
        groups: ``optimizer.param_groups``.
        state: ``optimizer.state``. What it holds for a planned parameter is copied into the arenas,
            and replaced by views of them.
        process_groups: who shares the work.
        kept: owners of blocks in the plan that this one replaces (:meth:`owners`).
        device: where to put state instead of beside the parameters; ``"meta"`` makes a plan whose
            views have shapes and dtypes only.
        is_partial: whether blocks may be missing from the state of a parameter.

    Raises:
        BlockGridMismatchError: if a tensor of ``state`` does not fit its block.
        IncompleteCheckpointError: if the state of a parameter lacks a block that this rank owns.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        state: State,
        process_groups: ProcessGroups,
        device: str | None = None,
        kept: Mapping[Tensor, Owners] | None = None,
        is_partial: bool = False,
    ) -> None:
        self._geometries = [Geometry.of(group) for group in groups]
        self._replicas = process_groups.replicas()
        self._workspaces: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._segments: list[list[Segment]] | None = None  # by arena
        self._actives: PatternCache[list[ActiveBlocks]] = PatternCache()
        self.present: Pattern = ()  # of the last step
        # Of the hyper-parameters that were found to suit, and for which all has been made.
        self._checked = self._followed = -1
        self.members, self._seen = plan_params(
            groups, self._geometries, state, process_groups, kept
        )
        params = self.planned
        self.stepping_ranks = process_groups.stepping_ranks(
            [param for group in groups for param in group["params"]]
        )
        # Whether teams may work out the same, each for itself: groups of trainers, or columns of a
        # mesh with what tensor parallelism does not divide.
        self.is_redundant = any(
            member.team.size < self.stepping_ranks.size for member in self.members
        )
        self.all_arenas = self._place(groups, params, device)
        self.arenas = [
            arenas_by_rank[arenas_by_rank[0].team.me] for arenas_by_rank in self.all_arenas
        ]
        published: Published = []
        for arena in self.arenas:
            group = groups[arena.group]
            arena.allocate(_moments_of(arena, group, params, state))
            views = self._fill(arena, params, state)
            if arena.is_staggered and PHASE in _kinds(arena, params, state):
                arena.period = group.get("extra", {}).get("refresh_period")
            published += views
        if not is_partial:
            self._check_whole(published, state)
        self._settle_arenas()
        views_of: dict[Tensor, dict[str, Tensor]] = {param: {} for param in params}
        for param, name, view in published:
            views_of[param][name] = view
        names = [member.name for member in self.members]
        self._publication = Publication(params, names, list(views_of.values()))
        # Only now, when all of it is known to fit: a plan that cannot be built leaves no trace.
        self._publication.publish(state)

    def owners(self) -> dict[Tensor, Owners]:
        """Who owns the blocks of every planned parameter."""
        return {
            param: (member.team, member.owners)
            for param, member in zip(self.planned, self.members, strict=True)
        }

    def _place(
        self,
        groups: Sequence[dict[str, Any]],
        params: Sequence[Tensor],
        device: str | None,
    ) -> list[list[Arena]]:
        """One arena for every position of a team, since all must know where all directions lie.

        Only this rank's own will have state.
        """
        all_arenas: dict[tuple[int, str, torch.dtype, torch.device, Team], list[Arena]] = {}
        for index, (member, param) in enumerate(zip(self.members, params, strict=True)):
            geometry, team = self._geometries[member.group], member.team
            place = torch.device(device) if device else param.device
            wide = torch.promote_types(param.dtype, geometry.dtype)
            kind, diagonal = KINDS[member.layout.kind], member.layout.diagonal
            grafting = grafting_of(geometry.grafting, kind.borrows)
            key = (member.group, kind.name, wide, place, team)
            if key not in all_arenas:
                all_arenas[key] = [
                    Arena(
                        member.group,
                        kind,
                        geometry.dtype,
                        wide,
                        place,
                        is_staggered=geometry.refresh_schedule == "staggered",
                        is_layerwise=grafting.layerwise,
                        is_capturable=geometry.capturable,
                        team=team,
                    )
                    for _ in team.ranks
                ]
            for arena in all_arenas[key]:
                arena.enroll(index, member.layout.blocks)
            if team.is_alone:
                for tile in member.layout.tiles:
                    most = max(1, segment_limit(place) // tile.block_numel)
                    for part in tile.split(most):
                        all_arenas[key][0].add(index, part, diagonal)
            else:
                for block, tile in member.blocks():
                    all_arenas[key][member.owners[block]].add(index, tile, diagonal)
        for arenas_by_rank in all_arenas.values():
            for arena in arenas_by_rank:
                arena.place()
        return list(all_arenas.values())

    @functools.cached_property
    def planned(self) -> list[Tensor]:
        """The planned parameters, in plan order."""
        return [param for seen in self._seen for param in seen.planned]

    @functools.cached_property
    def forms(self) -> list[Form | None]:
        """What gradients of the planned parameters must be like."""
        return list(map(form_of, self.planned))

    def is_current(
        self,
        groups: Sequence[dict[str, Any]],
        geometries: Sequence[Geometry],
        process_groups: ProcessGroups,
    ) -> bool:
        """Whether the plan still holds: same parameters, same geometry, same ranks.

        Args:
            groups: ``optimizer.param_groups``.
            geometries: of the groups.
            process_groups: who shares the work.
        """
        if geometries != self._geometries or process_groups.replicas() != self._replicas:
            return False
        for group, seen in zip(groups, self._seen, strict=True):
            if not seen.still(group["params"]):
                return False
        return True

    @torch.no_grad()
    def take_in(self, state: State) -> TakenIn | None:
        """Makes what ``state`` shows, whoever put it there, what trains.

        Returns:
            What has changed; None, with nothing changed, if that calls for a new plan.

        Raises:
            BlockGridMismatchError: for a value of another shape or dtype. Nothing has changed.
        """
        taken = self._publication.take_in(state)
        if taken is not None and (taken.count > 0 or self._is_edited()):
            self._settle_arenas()
            self._forget_segments()
        return taken

    def mark_shown(self, state: State) -> None:
        """Says that what is in ``state`` beside the planned parameters is known."""
        self._publication.mark_shown(state)

    def is_intact(self, state: State) -> bool:
        """Whether ``state`` shows what trains, so that :meth:`take_in` has nothing to do."""
        return self._publication.is_intact(state) and not self._is_edited()

    def _is_edited(self) -> bool:
        for arena in self.arenas:
            for stack in arena.factor_stacks:
                if stack.is_edited():
                    return True
        return False

    def _settle_arenas(self) -> None:
        """Derives what follows from the state of arenas."""
        for arena in self.arenas:
            for factors in arena.factor_stacks:
                factors.mark_ready()

    def _forget_segments(self) -> None:
        """Lets segments be made anew: memory, roots or phases are others."""
        self._segments = None
        self._actives.clear()

    @property
    def step(self) -> int:
        """How many steps the oldest blocks have taken; 0 means that no block has taken one."""
        return max((int(arena.steps.max()) for arena in self.arenas), default=0)

    def counts(self) -> list[int]:
        """How many steps every planned parameter has taken or, if capturable, asked for."""
        counts = [0] * len(self.members)
        for arena in self.arenas:
            for member, count in zip(arena.first, arena.counts(), strict=True):
                counts[member] = count
        return counts

    def count_step(self, present: Pattern) -> None:
        """The parameters with a gradient have taken one more step."""
        for arena in self.arenas:
            if False not in present:
                arena.steps += 1
            else:
                here = [present[member] for member in arena.first]
                arena.steps += torch.tensor(here, device="cpu")

    def count_replayed(self, present: Pattern) -> None:
        """A graph has taken a step with these gradients; what it wrote into roots is known."""
        self.count_step(present)
        for arena in self.arenas:
            for stack in arena.refreshed_stacks():
                stack.mark_seen()

    @functools.cached_property
    def digest(self) -> int:
        """62 bits of :meth:`entries`."""
        return digest(repr(self.entries()))

    def entries(self) -> list[dict[str, str]]:
        """What ranks that train together must have planned alike, parameter by parameter."""
        return [
            {
                # Before the name, which holds the shape where a parameter has no other.
                "shape": str(tuple(param.shape)),
                "name": member.name,
                "dtype": str(param.dtype),
                **{
                    field.name: str(getattr(self.geometry(member), field.name))
                    for field in fields(Geometry)
                },
                "placements": str(getattr(param, "placements", "none, it is no DTensor")),
                "ranks that divide its blocks": str(member.team.size),
                "owners of its blocks": str(member.owners),
            }
            for member, param in zip(self.members, self.planned, strict=True)
        ]

    @functools.cached_property
    def square_limits(self) -> list[float]:
        """For every parameter the magnitude from which its gradient cannot be squared."""
        return [
            square_limit(member.layout.numel, self.geometry(member).dtype)
            for member in self.members
        ]

    def follow(
        self,
        groups: Sequence[dict[str, Any]],
        hyperparameters: Sequence[Hyperparameters],
        state: State,
        revision: int,
    ) -> None:
        """Makes what the hyper-parameters call for, if others than learning rates have changed.

        Args:
            groups: ``optimizer.param_groups``.
            hyperparameters: of the groups.
            state: ``optimizer.state``.
            revision: of the hyper-parameters.
        """
        if revision != self._followed:
            self._add_missing_moments(hyperparameters, state)
            self.assign_phases(groups, hyperparameters)
            self._followed = revision

    def _add_missing_moments(
        self, hyperparameters: Sequence[Hyperparameters], state: State
    ) -> None:
        """Makes the buffers that a change of betas or momentum has called for since the build."""
        for arena in self.arenas:
            values = hyperparameters[arena.group]
            for name, needed in (
                ("exp_avg", values.has_exp_avg),
                ("momentum", values.momentum > 0),
            ):
                if needed and name not in arena.moments:
                    arena.add_moment(name)
                    for member, key, view in arena.views((name,)):
                        named = parse(key)
                        if named is not None and named.kind == name:
                            self._publication.add(self.planned[member], key, view, state)
                    self._forget_segments()

    def check(self, hyperparameters: Sequence[Hyperparameters], revision: int) -> None:
        """Refuses a step with values, or from a state, that cannot be stepped with.

        Args:
            hyperparameters: of the groups.
            revision: theirs.

        Raises:
            ValueError: if a root method cannot take the power that it would meet, or if somebody
                has written a count of steps that cannot be one.
            RootFailureError: if a factor has failed for longer than its group allows.
        """
        if revision != self._checked:
            self.check_methods(hyperparameters)
            self._checked = revision
        self._check_counts()
        for arena in self.arenas:
            most = hyperparameters[arena.group].max_root_failures
            if most is not None:
                self._check_roots(arena, most)

    def check_methods(self, hyperparameters: Sequence[Hyperparameters]) -> None:
        """Raises ValueError if a kind of preconditioner cannot take the values of its group."""
        for arena in self.arenas:
            values = hyperparameters[arena.group]
            for order in {len(stack.extent) for stack in arena.stacks}:
                KINDS[arena.kind.name].check(values, order)

    def _check_counts(self) -> None:
        for arena in self.arenas:
            if min(arena.steps.tolist()) >= 0:
                continue
            counts = arena.counts()
            count = min(counts)
            member = arena.members[counts.index(count)]
            raise ValueError(
                f"Invalid step={count} in the state of {self.members[member].name}. Must be >= 0:"
                " write what it was, or remove the entry to start the parameter anew."
            )

    def _check_roots(self, arena: Arena, most: int) -> None:
        stacks = [stack for stack in arena.factor_stacks if FAILURES in stack.state]
        if all(int(stack[FAILURES].max()) <= most for stack in stacks):
            return
        member, named, count = next(
            (member, named, int(view))
            for member, key, view in arena.views(())
            if (named := parse(key)) and named.kind == FAILURES and int(view) > most
        )
        name = stacks[0].declared[0].name  # of what has failed to give a root
        raise RootFailureError(
            f"{named._replace(kind=name)} of {self.members[member].name} has had no valid root for"
            f" {count} refreshes in a row, more than max_root_failures={most}. Load a checkpoint"
            " from before, or set max_root_failures=None to go on with the last valid root."
        )

    def assign_phases(
        self, groups: Sequence[dict[str, Any]], hyperparameters: Sequence[Hyperparameters]
    ) -> None:
        """Spreads the refreshes of staggered groups anew if their period is not the one it was."""
        for arena, arenas_by_rank in zip(self.arenas, self.all_arenas, strict=True):
            period = hyperparameters[arena.group].precondition_frequency
            if arena.is_staggered and arena.period != period:
                arena.assign_phases(period, arenas_by_rank)
                groups[arena.group]["extra"]["refresh_period"] = period
                self._actives.clear()

    def select(self, present: Pattern) -> list[ActiveBlocks]:
        """The segments of every arena, narrowed to parameters that have a gradient."""
        if self._segments is None:
            self._segments = [segments_of(arena, self._workspace(arena)) for arena in self.arenas]
        segments = self._segments

        def make(present: Pattern) -> list[ActiveBlocks]:
            return [
                ActiveBlocks(
                    arena,
                    tuple(present[member] for member in arena.first),
                    [narrow for each in whole if (narrow := each.narrowed(present)) is not None],
                )
                for arena, whole in zip(self.arenas, segments, strict=True)
            ]

        return self._actives.get(present, make)

    def has_selected(self, present: Pattern) -> bool:
        """Whether the segments for these gradients are there."""
        return present in self._actives

    def geometry(self, member: PlannedParam) -> Geometry:
        """What decides how a parameter is cut."""
        return self._geometries[member.group]

    def _workspace(self, arena: Arena) -> Tensor:
        """``[2, W]``, shared by all arenas of a device and dtype."""
        key = (arena.device, arena.dtype)
        if key not in self._workspaces:
            alike = [other for other in self.arenas if (other.device, other.dtype) == key]
            self._workspaces[key] = workspace_of(alike)
        return self._workspaces[key]

    def _fill(self, arena: Arena, params: Sequence[Tensor], state: State) -> Published:
        """Copies what ``state`` holds into the arena; returns the views to publish in its place."""
        published: Published = []
        for member, key, view in arena.views():
            param = params[member]
            known = state.get(param) or {}
            # Where the device counts the steps taken, the schedule follows the calls.
            value = known.get("step") if key == "calls" and key not in known else known.get(key)
            if value is not view and not is_absent(value):
                if key.endswith(".momentum") and isinstance(value, Tensor):
                    value = value.to(view.dtype)  # which follows that of the parameter
                view.copy_(check_value(self.members[member].name, key, value, view))
            published.append((param, key, view))
        return published

    def _check_whole(self, published: Published, state: State) -> None:
        """Refuses to go on without a part of what a parameter cannot go on without."""
        names = {
            param: member.name
            for param, member in zip(self.planned, self.members, strict=True)
            if any(map(is_own, state.get(param) or ()))
        }
        for param, key, _ in published:
            # What else is missing may be new, called for by a change of betas or momentum.
            is_needed = key == "step" or is_lasting(key)
            if param in names and key not in state[param] and is_needed:
                raise IncompleteCheckpointError(
                    f"{key} of {names[param]} is missing: it was removed from optimizer.state, of"
                    " which an entry is all there or nothing of it (remove all of it to start the"
                    " parameter anew), or the ranks that divide the blocks are not those that"
                    " divided them when this optimizer was copied or last stepped (save with"
                    " shampoo.checkpoint before the ranks change, and load that)."
                )


def _moments_of(
    arena: Arena, group: dict[str, Any], params: Sequence[Tensor], state: State
) -> list[str]:
    """The buffers an arena needs: by its group's values, or because a checkpoint brings them."""
    is_needed = {
        "exp_avg": Hyperparameters.read(group).has_exp_avg,
        "exp_avg_sq": grafting_of(group["grafting"], arena.kind.borrows).second_moment,
        "momentum": float(group["momentum"]) > 0,
    }
    brought = _kinds(arena, params, state)
    return [name for name in MOMENTS if is_needed[name] or name in brought]


def _kinds(arena: Arena, params: Sequence[Tensor], state: State) -> set[str]:
    """The kinds of state that the parameters of an arena bring."""
    return kinds_in(key for member in arena.members for key in state.get(params[member]) or {})
