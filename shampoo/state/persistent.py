"""What an optimizer keeps between steps, and how it is saved, copied and loaded.

Nothing here communicates but :meth:`Persistent.consolidate_state_dict`, and what torch calls for a
``full_state_dict``, in which all ranks take part anyway: frameworks save and load on one rank, or
before there are others (distributed.md, rule 16).
"""

import functools
import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from shampoo.blocks.layout import Geometry
from shampoo.blocks.ownership import Owners, Team
from shampoo.blocks.pattern_cache import Pattern
from shampoo.blocks.publication import TakenIn
from shampoo.blocks.state_keys import MOMENTS, is_own, parse
from shampoo.distributed.consensus import DeferredError
from shampoo.distributed.process_groups import ProcessGroups
from shampoo.errors import BlockGridMismatchError
from shampoo.preconditioner import KINDS
from shampoo.state.fillable import Blank, fillable_state
from shampoo.state.former import named_in, to_be_laid_under
from shampoo.state.gathering import Whole, consolidate
from shampoo.state.inquiry import flattened_file, flattening_caller, inquiry, remedy_of_caller
from shampoo.state.loading import check_origin, foreign_state, match, renumbered, signed
from shampoo.step import capture
from shampoo.step.block_plan import BlockPlan
from shampoo.step.distributors import Distributors
from shampoo.step.group_reader import GroupReader
from shampoo.step.left_out import LeftOut
from shampoo.step.parameters import check_distinct, flat_error
from shampoo.step.ridge_watch import RidgeWatch
from shampoo.step.verdict import LateVerdicts
from shampoo.step.versions import mark_replayed

logger = logging.getLogger(__name__)


class Persistent(Optimizer):
    """The part of an optimizer that outlives a step: its plan, and the state under it."""

    # On the class, so that an unpickled or copied optimizer, which has none, starts without.
    _plan: BlockPlan | None = None
    _kept: dict[Tensor, Owners] | None = None  # owners of blocks in a plan that is no more
    _kinds: dict[Tensor, str] | None = None  # that its state was made by
    _distributors: Distributors | None = None  # buffers of the plan
    _on_device: capture.DeviceState | None = None  # of the plan, if it is capturable
    _late: LateVerdicts | None = None  # of the plan, if the host would wait for its device
    _incoming: dict[Tensor, dict[str, Any]] | None = None
    _damage: str = ""  # why this rank cannot go on until it has loaded a checkpoint
    _consolidated: Whole | None = None  # empty where another rank has got it
    _was_skipped: bool = False  # the last step, as far as the host has heard
    _has_warned: bool = False  # of a state that holds some blocks only
    _taken: TakenIn | None = None  # by a step that may still be refused
    _process_groups: ProcessGroups

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups; to torch, which takes a flattened file apart, what that names."""
        try:
            groups: list[dict[str, Any]] = self.__dict__["param_groups"]
        except KeyError as error:
            raise AttributeError("param_groups") from error
        file = flattened_file()
        return groups if file is None else named_in(file, groups)

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.__dict__["param_groups"] = groups

    def _fill_groups(self) -> None:
        """Gives groups that an older version saved what they lack."""
        raise NotImplementedError

    def _current_plan(self, is_current: bool | None = None) -> BlockPlan:
        """The plan, of what ``state`` shows: what was put there since is what trains.

        Rebuilt if parameters were added, swapped, unfrozen or moved since.

        Args:
            is_current: whether the plan still holds, for a caller that has asked it.
        """
        plan = self._plan
        if is_current is None and plan is not None:
            geometries = [Geometry.of(group) for group in self.param_groups]
            is_current = plan.is_current(self.param_groups, geometries, self._process_groups)
        if plan is None or not is_current or not plan.is_intact(self.state):
            capture.check_warm(False)
            is_capturable = capture.is_capturable(self.param_groups)
            taken = plan.take_in(self.state) if plan is not None and is_current else None
            if plan is not None and taken is not None:
                self._taken = taken
                if self._on_device is not None:
                    self._on_device.settle(plan)
                return plan
            plan = self._make_plan(is_capturable)
        return plan

    @torch.no_grad()
    def _make_plan(self, is_capturable: bool) -> BlockPlan:
        """A plan of what is there, in place of the one before."""
        check_distinct(self.param_groups)  # frameworks write into the lists
        if module := flattening_caller():
            raise flat_error(f"what {module} makes of parameters")
        self._settle_skipped()
        before, made_by = dict(self.state), self._made_by() or {}
        plan = BlockPlan(self.param_groups, self.state, self._process_groups, kept=self._owners())
        try:
            _check_kinds(plan, made_by, before)
            is_counted = is_capturable and bool(plan.arenas)
            self._on_device = capture.DeviceState(plan) if is_counted else None
            is_late = not is_capturable and LateVerdicts.suit(plan)
            self._late = LateVerdicts(plan) if is_late else None
        except (BlockGridMismatchError, ValueError):
            self.state.clear()  # of what the plan has put in place of the entries before
            self.state.update(before)
            raise
        live = set(self._all_params())
        dead = [
            param
            for param, entries in self.state.items()
            if isinstance(param, Tensor) and param not in live and any(map(is_own, entries or ()))
        ]
        for param in dead:
            del self.state[param]
        if dead:
            logger.warning(
                "shampoo: %d parameters were replaced; their state is dropped", len(dead)
            )
            plan.mark_shown(self.state)
        # Only now: what could not be captured must not be taken for it. And what knows the memory
        # of the plan before lets go of it.
        self._plan, self._distributors = plan, None
        self._ridges.forget()
        return plan

    @functools.cached_property
    def _reader(self) -> GroupReader:
        """What has been read of the groups; a copy reads them anew."""
        return GroupReader()

    @functools.cached_property
    def _left_out(self) -> LeftOut:
        """Steps that were left out since this optimizer was made, copied or loaded."""
        return LeftOut()

    @functools.cached_property
    def _ridges(self) -> RidgeWatch:
        """What has been said of ``eps``; a copy says it again."""
        return RidgeWatch()

    def _take_back(
        self,
        state: dict[Any, Any],
        plan: BlockPlan | None,
        on_device: capture.DeviceState | None,
        late: LateVerdicts | None,
    ) -> None:
        """Undoes what a step that is refused has made of the state: its plan, its views.

        Args:
            state: what stood in ``state`` before.
            plan: the one before.
            on_device: what counted its steps.
            late: what decided on them.
        """
        if self._plan is not plan:
            self.state.clear()
            self.state.update(state)
            self._plan, self._on_device, self._late = plan, on_device, late
            self._distributors = None
        elif self._taken is not None:
            self._taken.undo(self.state)

    def _made_by(self) -> dict[Tensor, str] | None:
        """The kinds of preconditioner that have made the state."""
        plan = self._plan
        if plan is None:
            return self._kinds
        kinds = [member.layout.kind for member in plan.members]
        return dict(zip(plan.planned, kinds, strict=True))

    def _owners(self) -> dict[Tensor, Owners] | None:
        """Who owns the blocks that have state, on this rank or another."""
        return self._kept if self._plan is None else self._plan.owners()

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because a gradient was not finite. Waits for a device that decides it."""
        self._settle_skipped()
        return max(int(group["extra"]["skipped_steps"]) for group in self.param_groups)

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last ``step()`` was skipped: a gradient was not finite, or too large.

        Waits for a device that decides it. After a replay of a graph, of the step replayed.
        """
        self._settle_late()
        if self._on_device is not None:
            return bool(self._on_device.is_skipped)
        return self._was_skipped

    def _count_skipped(self, complaint: str) -> None:
        self._was_skipped = True
        for group in self.param_groups:
            group["extra"]["skipped_steps"] += 1
        count = self.skipped_steps
        if count & (count - 1) == 0:  # 1, 2, 4, 8 ...: a run that skips for ever stays readable
            logger.warning("shampoo: step skipped, %s; %d skipped so far", complaint, count)

    def replayed(self, present: Pattern | None = None) -> None:
        """Says that a graph with one step was replayed, for which ``step()`` was not called.

        Args:
            present: which of the planned parameters have a gradient in it, None for those that had
                one in the last step.

        Raises:
            RuntimeError: if no step has been taken with these parameters.
        """
        plan = self._plan
        if plan is None or not plan.present:
            raise RuntimeError(
                "replayed() before any step() with the parameters that are there now: a graph of a"
                " step is captured in one. Take it and capture it again."
            )
        plan.count_replayed(plan.present if present is None else present)
        mark_replayed(plan.planned)

    def _settle_late(self) -> None:
        """Hears what has become of the last step, where a device has decided it."""
        if self._late is not None and (complaint := self._late.settle()):
            self._count_skipped(complaint)

    def _settle_skipped(self) -> None:
        """Adds what the device has counted since to ``extra``."""
        self._settle_late()
        if self._on_device is not None:
            skipped = int(self._on_device.skipped)
            self._on_device.skipped.zero_()
            for group in self.param_groups:
                group["extra"]["skipped_steps"] += skipped

    def __getstate__(self) -> dict[str, Any]:
        """Called by torch when it copies and pickles.

        Published state are views, each of which would be pickled with all of its arena.
        """
        self._settle_skipped()
        state = super().__getstate__()
        state["_process_groups"], state["_kept"] = self._process_groups, self._owners()
        state["_kinds"] = self._made_by()
        # A defaultdict as torch has it, for wrappers that fill the entries of a copy.
        state["state"] = defaultdict(
            dict, {param: _apart(entries) for param, entries in self.state.items()}
        )
        return state

    def state_dict(self) -> dict[str, Any]:
        """The state of the blocks that this rank owns, or of all after a consolidation.

        Saved and loaded by every rank, by ``torch.distributed.checkpoint``, or by one rank after
        :meth:`consolidate_state_dict`. Does not communicate, but waits for a device that decides
        which steps are taken. Where ``get_state_dict`` of torch calls it for a ``full_state_dict``,
        it is the state of all blocks, which all ranks must ask for together.
        """
        self._settle_skipped()
        stepping_ranks = self._process_groups.stepping_ranks(self._all_params())
        inquirer = inquiry()
        ranks, published = stepping_ranks.size, self._consolidated or None
        # With cpu_offload torch keeps it on the first rank alone, which may not be one of these.
        is_kept = not inquirer.on_first_rank or 0 in stepping_ranks.ranks
        if inquirer.is_to_fill:
            if inquirer.file and not inquirer.is_broadcast:
                # Here, since torch fails on names of groups that it does not find in ours.
                check_origin(inquirer.file["param_groups"], inquirer.file["state"])
            published = self._fillable_state(inquirer.on_host, inquirer.brought)
        elif inquirer.is_full and is_kept and not stepping_ranks.is_alone:
            published = self._gather(stepping_ranks, 0 if inquirer.on_first_rank else None)
        elif self._consolidated is None and not inquirer.is_by_checkpoint:
            self._warn_of_a_part(stepping_ranks)
        rank = stepping_ranks.ranks[stepping_ranks.me]
        if published is None:
            return signed(super().state_dict(), rank, ranks)
        own = self.state
        self.state = defaultdict(dict, {**own, **published})
        try:
            found = signed(super().state_dict(), rank, 1)
        finally:
            self.state = own
        if inquirer.is_to_fill:
            to_be_laid_under(inquirer.file, found["param_groups"])
        return found

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _fillable_state(
        self, on_host: bool = False, brought: Mapping[Tensor, Mapping[str, Any]] | None = None
    ) -> Whole:
        """Blank values of all that this rank may find in a whole state."""
        groups, process_groups, kept = self.param_groups, self._process_groups, self._owners()
        return fillable_state(groups, self.state, process_groups, kept, on_host, brought or {})

    def fillable_moments(self) -> dict[Tensor, dict[str, Tensor]]:
        """Blank moments of every kind, called for or not, for the blocks that this rank owns.

        By parameter and key, for what loads by names: a file may have what this optimizer calls for
        once it has taken on the hyper-parameters of the file. Do not write into them.
        """
        return {
            param: {
                key: value
                for key, value in entries.items()
                if isinstance(value, Blank) and (named := parse(key)) and named.kind in MOMENTS
            }
            for param, entries in self._fillable_state().items()
            if isinstance(entries, Mapping)
        }

    def _warn_of_a_part(self, stepping_ranks: Team) -> None:
        """Says, once, that a state is not what a user of one file would take it for."""
        owners = [
            (team, owner) for team, all_of in (self._owners() or {}).values() for owner in all_of
        ]
        part = sum(owner == team.me for team, owner in owners)
        if part < len(owners) and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "shampoo: state_dict() on rank %d holds %d of %d blocks, those that this rank owns."
                " To save from one rank, %s; or use"
                " shampoo.checkpoint or torch.distributed.checkpoint, in which all ranks save.",
                *(stepping_ranks.ranks[stepping_ranks.me], part, len(owners)),
                remedy_of_caller() or "call consolidate_state_dict() on all ranks first",
            )

    def _gather(self, stepping_ranks: Team, to: int | None) -> Whole | None:
        """The whole state on one rank, or on all."""
        plan, deferred = None, DeferredError(is_shared=True)
        with deferred:
            plan = self._current_plan()
        consensus = self._process_groups.consensus(stepping_ranks, self._all_params()[0].device)
        consensus.check(deferred)
        assert plan is not None
        params = plan.planned
        group = self._process_groups.group(stepping_ranks).live()
        with torch.no_grad():
            return consolidate(plan, params, self.state, group, to, consensus)

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gathers the whole state in host memory of one rank, for saving from that rank only.

        All ranks that hold the parameters must call it. Until the next ``step()`` or load,
        ``state_dict()`` on rank ``to`` is that of a single process, which any number of ranks, or
        none, can load. With a state too large for one host use ``torch.distributed.checkpoint``.

        Args:
            to: the global rank that receives.

        Raises:
            ValueError: if ``to`` does not hold the parameters.
            ShampooDistributedError: on all ranks if one of them has failed; nothing was gathered.
        """
        stepping_ranks = self._process_groups.stepping_ranks(self._all_params())
        if stepping_ranks.is_alone:
            return  # the state is whole
        if to not in stepping_ranks.ranks:
            raise ValueError(f"Invalid to={to!r}. Must be one of the ranks {stepping_ranks.ranks}.")
        self._consolidated = None  # its memory is free before as much is asked for
        self._consolidated = self._gather(stepping_ranks, to) or {}

    def load_state_dict(self, state_dict: dict[str, Any], *, strict: bool = True) -> None:
        """Loads what ``state_dict()`` returned; training continues bit for bit.

        Statistics keep the dtype of ``preconditioner_dtype`` whatever the parameters are. Values of
        hyper-parameters come from the checkpoint, as for every ``torch.optim`` optimizer.

        Args:
            state_dict: loaded, for example, by ``torch.load(path, weights_only=True)``. Where ranks
                divide the blocks, each keeps its own, so that the state of a single process, or a
                consolidated one, suits any number of ranks. Does not communicate.
            strict: if False, parameters of which blocks are missing start anew at step 0, with
                grafting only, instead of raising. All ranks must then load the same state.

        Raises:
            IncompleteCheckpointError: if blocks are missing.
            BlockGridMismatchError: if blocks have other shapes or floating dtypes.
            ForeignCheckpointError: for the state of another optimizer.
            ValueError: for other numbers of groups or parameters, or a value out of range.
                In every case the optimizer is as it was.
        """
        inquirer = inquiry()

        def keep_state(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            # torch broadcasts the file of one rank: what one rank lacks in it, all must refuse.
            stepping_ranks = self._process_groups.stepping_ranks(self._all_params())
            deferred = DeferredError(
                is_shared=inquirer.is_broadcast and not stepping_ranks.is_alone
            )
            with deferred:
                self._incoming = match(
                    *(self.param_groups, self.defaults, incoming, self._process_groups),
                    *(self._owners(), strict, inquirer.is_full, self._foreign_names()),
                )
            if inquirer.is_broadcast and not stepping_ranks.is_alone:
                device = self._all_params()[0].device
                self._process_groups.consensus(stepping_ranks, device).check(deferred)
            groups = renumbered(self.param_groups, incoming["param_groups"])
            return {**incoming, "state": foreign_state(incoming), "param_groups": groups}

        # Registered now, so that it sees what the user's own hooks make of the state.
        hook = self.register_load_state_dict_pre_hook(keep_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._incoming = None

    def _foreign_names(self) -> set[str]:
        """The names of state that others have put under parameters."""
        entries = [each for each in self.state.values() if isinstance(each, Mapping)]
        return {key for each in entries for key in each if not is_own(key)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by torch when it loads, copies and unpickles; the plan is made anew."""
        super().__setstate__(state)
        self._fill_groups()
        if "_process_groups" not in self.__dict__:
            self._process_groups = ProcessGroups()  # a pickle of a version before there were any
        # A checkpoint that is loaded has been looked at, and brings its kinds.
        self._kinds = self._made_by() if self._incoming is None else None
        self._kept = self._owners()
        self._plan = self._distributors = self._on_device = self._late = self._consolidated = None
        self._damage = ""
        self.__dict__.pop("_left_out", None)
        if self._incoming is not None:
            for param, entries in self._incoming.items():
                self.state[param] = {**entries, **self.state.get(param, {})}
            if self._incoming:
                self._current_plan()


def _check_kinds(plan: BlockPlan, made_by: Mapping[Tensor, str], state: Mapping[Any, Any]) -> None:
    """Refuses state that another kind of preconditioner has made, though it may look alike.

    Args:
        plan: a new one.
        made_by: the kinds of the one before, by parameter.
        state: what it was made of.
    """
    for member, param in zip(plan.members, plan.planned, strict=True):
        was, now = made_by.get(param, member.layout.kind), member.layout.kind
        is_other = was != now and KINDS[was].preconditions and KINDS[now].preconditions
        if is_other and any(map(is_own, state.get(param) or ())):
            raise BlockGridMismatchError(
                f"{member.name} has state of preconditioner={was!r}, and its group says {now!r}"
                " now. It cannot change once training has begun: set it back, or clear"
                " optimizer.state[parameter] to start the parameter anew."
            )


def _apart(entries: Any) -> Any:
    """What is under a key of the state, with tensors of its own in the place of views."""
    if not isinstance(entries, Mapping):
        return entries
    return {
        key: value.clone() if is_own(key) and isinstance(value, Tensor) else value
        for key, value in entries.items()
    }
