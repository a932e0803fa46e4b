"""Checks a ``state_dict`` against the optimizer that is about to load it, before anything changes.

``torch.optim.Optimizer`` casts state to the dtype of its parameter, which would ruin float32
factors under bfloat16 parameters, so what is this optimizer's never passes through it:
:func:`match` hands each parameter the tensors of the file as they are, and the plan copies them
into arenas of the dtype that the hyper-parameters name. What others put under a parameter is
torch's to load, as it would for its own optimizers (:func:`foreign_state`).

Nothing here communicates: who owns which block is arithmetic, and loading may happen on one rank
before the others, or before there are others.
"""

import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from shampoo.blocks.entries import as_count, check_value, is_absent
from shampoo.blocks.layout import AUTO, AUTOMATIC, Geometry, is_automatic
from shampoo.blocks.ownership import Owners, Team
from shampoo.blocks.state_keys import (
    foreign,
    is_count,
    is_own,
    is_unknown,
    kinds_in,
    may_begin,
    parse,
)
from shampoo.distributed.process_groups import ProcessGroups
from shampoo.errors import (
    BlockGridMismatchError,
    ForeignCheckpointError,
    IncompleteCheckpointError,
)
from shampoo.hyperparameters import Hyperparameters
from shampoo.preconditioner.choice import layout_of
from shampoo.state.fillable import Blank
from shampoo.state.former import FORMER_DEFAULTS, complete, translate
from shampoo.step.block_plan import BlockPlan
from shampoo.step.param_plan import PlannedParam
from shampoo.step.parameters import parameter_name

logger = logging.getLogger(__name__)

Found = dict[Tensor, dict[str, Any]]

# Hyper-parameters that this optimizer's groups have had in every version, and no other's have.
_SIGNATURE = frozenset(("max_preconditioner_dim", "merge_dims"))


def match(
    groups: Sequence[dict[str, Any]],
    defaults: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    process_groups: ProcessGroups,
    kept: Mapping[Tensor, Owners] | None = None,
    strict: bool = True,
    is_full: bool = False,
    known: Container[str] = (),
) -> Found:
    """The state that a checkpoint holds for every parameter of ``groups``, blocks of others aside.

    A moment that the hyper-parameters of the checkpoint call for, and of which it has none in the
    whole group, begins at zero, as it does in a step: a schedule raised it before the save.

    Args:
        groups: the optimizer's parameter groups; their parameters are matched in order.
        defaults: values of hyper-parameters that the checkpoint does not have.
        state_dict: what ``state_dict()`` returned when it was saved.
        process_groups: who shares the work now; blocks of other owners are not looked for.
        kept: owners of blocks that are decided already.
        strict: refuse a checkpoint without blocks that this rank owns. If not, parameters of which
            the checkpoint lacks a block, whoever owns it, start anew: all ranks decide alike if
            they load the same checkpoint.
        is_full: whether it must hold the blocks of all ranks, of which other ranks' counts are
            here, and what this rank owns.
        known: names of state that is not ours and that this optimizer has already.

    Raises:
        ForeignCheckpointError: if it is another optimizer's.
        IncompleteCheckpointError: if the state of a parameter lacks blocks.
        BlockGridMismatchError: if a value has another shape or floating dtype than it has here.
        ValueError: if a saved hyper-parameter or count is out of range.
    """
    saved_groups = state_dict["param_groups"]
    check_origin(saved_groups, state_dict["state"], known)
    sizes = [len(group["params"]) for group in groups]
    if [len(group["params"]) for group in saved_groups] != sizes:
        return {}  # torch's own load is about to raise, in words its users know
    found: Found = {}
    unknown: list[str] = []
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        pairs = zip(group["params"], saved["params"], strict=True)
        for position, (param, identity) in enumerate(pairs):
            entries = state_dict["state"].get(identity, {})
            own, name = _own_entries(entries), parameter_name(group, index, position)
            for key in filter(is_count, own):
                own[key] = as_count(name, key, own[key])
            unknown += [f"{key} of {name}" for key in entries if is_unknown(key)]
            if own:
                found[param] = own
    saved_groups = [translate(dict(saved)) for saved in saved_groups]
    trial = [
        complete({**saved, "params": group["params"]}, defaults)
        for group, saved in zip(groups, saved_groups, strict=True)
    ]
    for group in trial:
        Hyperparameters.read(group)
    if absent := sorted(
        {name for saved in saved_groups for name in defaults.keys() - saved.keys()}
        - FORMER_DEFAULTS.keys()
    ):
        logger.warning("shampoo: the checkpoint lacks %s; using the defaults", ", ".join(absent))
    if unknown:
        logger.warning(
            "shampoo: keeping %d unknown values of state, which nothing uses: %s",
            *(len(unknown), _first(unknown)),
        )
    if found:
        check_blocks(groups, trial, found)
        _check_complete(trial, found, process_groups, kept, strict, is_full)
    return found


def _own_entries(entries: Any) -> dict[str, Any]:
    """What a file has brought of this optimizer's state of one parameter."""
    if not isinstance(entries, Mapping):
        return {}
    return {
        key: value
        for key, value in entries.items()
        if is_own(key) and not is_absent(value) and not isinstance(value, Blank)
    }


def foreign_state(state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """The part of a state that torch loads: what is not ours, under a parameter or beside them."""
    params = {identity for group in state_dict["param_groups"] for identity in group["params"]}
    found = {}
    for identity, entries in state_dict["state"].items():
        if identity in params and isinstance(entries, Mapping):
            entries = foreign(entries)
        if identity not in params or entries:
            found[identity] = entries
    return found


def check_origin(
    saved_groups: Iterable[Mapping[str, Any]],
    state: Mapping[Any, Any],
    known: Container[str] = (),
) -> None:
    """Refuses the state of another optimizer, before its hyper-parameters are taken for ours.

    Args:
        saved_groups: of the checkpoint.
        state: of the checkpoint, by whatever names its parameters have.
        known: names of state that is not ours and that this optimizer has already.

    Raises:
        ForeignCheckpointError: naming what it has.
    """
    entries = [each for each in state.values() if isinstance(each, Mapping)]
    keys = {key for each in entries for key in _own_entries(each)}
    if any(parse(key) is not None for key in keys):
        return
    others = {str(key) for each in entries for key in each if not is_own(key)}
    names = {name for group in saved_groups for name in group}
    # torch's set_state_dict lays a file over the groups and the blank state of this optimizer.
    is_laid_over = any(isinstance(value, Blank) for each in entries for value in each.values())
    if names >= _SIGNATURE and not (is_laid_over and any(key not in known for key in others)):
        return
    if has := sorted(others or keys):
        what = f"it has {_first(has)}; no block*"
    else:
        what = f"its groups have {_first(sorted(names - {'params'}))}; no {min(_SIGNATURE)}"
    raise ForeignCheckpointError(
        f"this is the state of another optimizer ({what}). Nothing has changed. Statistics of other"
        " methods cannot be converted: load it into the optimizer that saved it, or load the"
        " model's weights alone and let this optimizer start anew."
    )


def check_blocks(
    groups: Sequence[dict[str, Any]],
    saved_groups: Sequence[dict[str, Any]],
    params: Container[Tensor],
) -> None:
    """Refuses state that was cut otherwise than this optimizer was built to cut.

    Args:
        groups: the optimizer's parameter groups.
        saved_groups: as many of the checkpoint; what a :class:`Geometry` has is looked at.
        params: those that have state in the checkpoint.

    Raises:
        BlockGridMismatchError: with the values of both.
    """
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        ours, theirs = Geometry.of(group), Geometry.of(saved)
        # What nobody has named comes with the other values.
        if ours.large_dim_method == AUTO:
            ours = replace(ours, large_dim_method=theirs.large_dim_method)
        if is_automatic(group):
            ours = replace(ours, max_preconditioner_dim=theirs.max_preconditioner_dim)
        if ours == theirs:
            continue
        for position, param in enumerate(group["params"]):
            if param in params and layout_of(param.shape, ours) != layout_of(param.shape, theirs):
                name = parameter_name(group, index, position)
                differences = "; ".join(
                    f"{field.name}={getattr(theirs, field.name)!r},"
                    f" this optimizer uses {getattr(ours, field.name)!r}"
                    for field in fields(Geometry)
                    if getattr(ours, field.name) != getattr(theirs, field.name)
                )
                raise BlockGridMismatchError(
                    f"{name} was saved with {differences}. Build the optimizer with the values of"
                    " the checkpoint: statistics of other blocks cannot be converted."
                )


def signed(state_dict: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """The same with the word of who saved it, for the error about what is missing.

    Without what an optimizer knows of its own numbers, which it does not take from a file.
    """
    for group in state_dict["param_groups"]:
        group["extra"] = {**group["extra"], "rank": rank, "ranks": ranks}
        group["extra"].pop(AUTOMATIC, None)
    return state_dict


def renumbered(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Groups of a file, with whether somebody has named the number in those of the optimizer.

    A number under "auto" is the file's now, and the next file's after that.
    """
    found = [dict(saved) for saved in saved_groups]
    for group, saved in zip(groups, found, strict=False):  # torch refuses other lengths
        if "max_preconditioner_dim" in saved:
            number = saved["max_preconditioner_dim"] if is_automatic(group) else None
            saved["extra"] = {**saved.get("extra", {}), AUTOMATIC: number}
    return found


def _check_complete(
    groups: Sequence[dict[str, Any]],
    found: Found,
    process_groups: ProcessGroups,
    kept: Mapping[Tensor, Owners] | None,
    strict: bool,
    is_full: bool,
) -> None:
    """Compares with a plan of the same groups that has shapes only; drops what is not for here."""
    expected = {param: dict(entries) for param, entries in found.items()}
    plan = BlockPlan(groups, expected, process_groups, device="meta", kept=kept, is_partial=True)
    plan.check_methods([Hyperparameters.read(group) for group in groups])
    members = list(zip(plan.members, plan.planned, strict=True))
    beginnings = _Beginnings(groups, members, found, plan.stepping_ranks)
    wanted = _keys_of_all_owners(plan, is_full)
    is_lacking = any(
        beginnings.lacks(member, param, key)
        for (member, param), keys in zip(members, wanted, strict=True)
        if param in found
        for key in (keys if is_full else expected[param])
    )
    if is_lacking or not strict:
        _settle_gaps(groups, members, wanted, found, beginnings, strict)
    beginnings.say()
    anew = [member.name for member, param in members if param not in found]
    unknown: list[str] = []
    for member, param in members:
        for key, value in list(found.get(param, {}).items()):
            if key in expected[param]:
                found[param][key] = check_value(member.name, key, value, expected[param][key])
                continue
            del found[param][key]
            if not _is_of_another_owner(member, key):
                unknown.append(f"{key} of {member.name}")
    if anew:
        logger.warning(
            "shampoo: the checkpoint has no state for %d of %d parameters (%s); they start anew",
            *(len(anew), len(members), _first(anew)),
        )
    if unknown:
        logger.warning(
            "shampoo: ignoring %d unknown values of state: %s", len(unknown), _first(unknown)
        )


class _Beginnings:
    """Moments of which a group has none in a checkpoint, though it calls for them.

    Args:
        groups: with the hyper-parameters of the checkpoint.
        members: the planned parameters.
        found: the state of the checkpoint.
        stepping_ranks: the ranks that hold the parameters.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        members: Sequence[tuple[PlannedParam, Tensor]],
        found: Found,
        stepping_ranks: Team,
    ) -> None:
        self._found = found
        self._kinds: dict[int, set[str]] = {}
        for member, param in members:
            self._kinds.setdefault(member.group, set()).update(kinds_in(found.get(param, ())))
        self._said: dict[str, None] = {}
        extra = groups[0].get("extra", {})
        signature = extra.get("rank", 0), extra.get("ranks", 1)
        # A block of which a file has nothing may be another rank's, if another rank has saved it.
        self._is_own_file = signature[1] == 1 or signature == (
            stepping_ranks.ranks[stepping_ranks.me],
            stepping_ranks.size,
        )

    def lacks(self, member: PlannedParam, param: Tensor, key: str) -> bool:
        """Whether the state of a parameter cannot go on for want of a value."""
        if key in self._found[param]:
            return False
        named = parse(key)
        if named is None or not may_begin(key) or named.kind in self._kinds[member.group]:
            return True
        if not self._is_own_file:
            prefix = f"block{named.block}."
            if not any(other.startswith(prefix) for other in self._found[param]):
                return True
        self._said[named.kind] = None
        return False

    def say(self) -> None:
        """One line on what begins."""
        if self._said:
            logger.warning(
                "shampoo: the checkpoint calls for %s and has none in a group: it begins at zero",
                " and ".join(self._said),
            )


def _settle_gaps(
    groups: Sequence[dict[str, Any]],
    members: Sequence[tuple[PlannedParam, Tensor]],
    wanted: Sequence[Sequence[str]],
    found: Found,
    beginnings: "_Beginnings",
    strict: bool,
) -> None:
    """Raises if blocks of any owner are missing or, if not strict, lets their parameters go."""
    first = ""
    blocks = total = counts = known = 0
    for (member, param), keys in zip(members, wanted, strict=True):
        if param not in found:
            continue
        known, total = known + 1, total + member.layout.blocks
        absent = [key for key in keys if beginnings.lacks(member, param, key)]
        if not absent:
            continue
        gaps = {named.block: named for named in map(parse, reversed(absent)) if named is not None}
        blocks += len(gaps)
        counts += any(parse(key) is None for key in absent)
        first = first or f"{member.name}{_gap(absent[0], keys, absent)}"
        if not strict:
            del found[param]
    if not first:
        return
    missing = (
        f"{blocks} of {total} blocks" if blocks else f"counts of {counts} of {known} parameters"
    )
    extra = groups[0].get("extra", {})
    saved_by = f"; saved by rank {extra['rank']} of {extra['ranks']}" if "rank" in extra else ""
    complaint = f"{missing} missing (first: {first}){saved_by}"
    if strict:
        raise IncompleteCheckpointError(
            f"{complaint}. Use torch.distributed.checkpoint, or call consolidate_state_dict() on"
            " all ranks before saving. strict=False starts the parameters of missing blocks anew."
        )
    logger.warning("shampoo: %s; their parameters start anew", complaint)


def _gap(key: str, keys: Iterable[str], absent: Sequence[str]) -> str:
    """What is missing where a key is: the count, the block, or one tensor of it."""
    named = parse(key)
    if named is None:
        return f": {key}"
    prefix = f"block{named.block}."
    is_whole = all(other in absent for other in keys if other.startswith(prefix))
    return f" block {named.block}" + ("" if is_whole else f": {key.removeprefix(prefix)}")


def _keys_of_all_owners(plan: BlockPlan, is_full: bool) -> list[list[str]]:
    """The names of the whole state of every planned parameter.

    Args:
        is_full: of what other ranks own, name the counts alone.
    """
    keys: list[dict[str, None]] = [{} for _ in plan.members]
    for arenas_by_rank in plan.all_arenas:
        own = arenas_by_rank[arenas_by_rank[0].team.me]
        for arena in arenas_by_rank:
            if arena is not own:
                arena.allocate(list(own.moments))  # of a plan on "meta": costs nothing
            for member, key, _ in arena.views():
                if arena is own or not is_full or is_count(key):
                    keys[member][key] = None
    return [list(names) for names in keys]


def _first(names: Sequence[str]) -> str:
    """The first of many, for a line of a log."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def _is_of_another_owner(member: PlannedParam, key: str) -> bool:
    named = parse(key)
    if named is None or named.block >= len(member.owners):
        return False
    return member.owners[named.block] != member.team.me
