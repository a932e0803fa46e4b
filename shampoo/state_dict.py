"""Checks a ``state_dict`` against the optimizer that is about to load it, before anything changes.

``torch.optim.Optimizer`` casts state to the dtype of its parameter, which would ruin float32
factors under bfloat16 parameters, so the state never passes through it: :func:`match` hands each
parameter the tensors of the file as they are, and the plan copies them into arenas of the dtype
that the hyper-parameters name.

Nothing here communicates: who owns which block is arithmetic, and loading may happen on one rank
before the others, or before there are others.
"""

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from shampoo.division import Owners
from shampoo.errors import BlockGridMismatchError, IncompleteCheckpointError
from shampoo.hyperparameters import AUTO, FORMER_DEFAULTS, Geometry, Hyperparameters
from shampoo.layout import Layout
from shampoo.names import parameter_name
from shampoo.state_keys import MOMENTS, parse
from shampoo.step_plan import Member, Plan
from shampoo.workers import Workers

logger = logging.getLogger(__name__)

Found = dict[Tensor, dict[str, Any]]


def match(
    groups: Sequence[dict[str, Any]],
    defaults: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    workers: Workers,
    kept: Mapping[Tensor, Owners] | None = None,
    strict: bool = True,
) -> Found:
    """The state that a checkpoint holds for every parameter of ``groups``, blocks of others aside.

    Args:
        groups: the optimizer's parameter groups; their parameters are matched in order.
        defaults: values of hyper-parameters that the checkpoint does not have.
        state_dict: what ``state_dict()`` returned when it was saved.
        workers: who shares the work now; blocks of other owners are not looked for.
        kept: owners of blocks that are decided already.
        strict: refuse a checkpoint without blocks that this rank owns. If not, parameters of which
            the checkpoint lacks a block, whoever owns it, start anew: all ranks decide alike if
            they load the same checkpoint.

    Raises:
        IncompleteCheckpointError: if the state of a parameter lacks blocks.
        BlockGridMismatchError: if a block has another shape than its hyper-parameters would cut.
        ValueError: if a saved hyper-parameter is out of range.
    """
    saved_groups = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    if [len(group["params"]) for group in saved_groups] != sizes:
        return {}  # torch's own load is about to raise, in words its users know
    found: Found = {}
    for group, saved in zip(groups, saved_groups, strict=True):
        for param, identity in zip(group["params"], saved["params"], strict=True):
            entries = state_dict["state"].get(identity, {})
            # Where a flattened checkpoint lacks a key, torch's set_optimizer_state_dict puts a {}.
            tensors = {key: value for key, value in entries.items() if torch.is_tensor(value)}
            if tensors:
                found[param] = tensors
    trial = [
        {**defaults, **FORMER_DEFAULTS, **saved, "params": group["params"]}
        for group, saved in zip(groups, saved_groups, strict=True)
    ]
    for saved, group in zip(saved_groups, trial, strict=True):
        Hyperparameters.read(group)
        if absent := sorted(defaults.keys() - saved.keys()):
            logger.warning(
                "shampoo: the checkpoint lacks %s; using the defaults", ", ".join(absent)
            )
    if found:
        check_blocks(groups, trial, found)
        _check_complete(trial, found, workers, kept, strict)
    return found


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
        if ours.large_dim_method == AUTO:  # nobody named one: it comes with the other values
            ours = replace(ours, large_dim_method=theirs.large_dim_method)
        if ours == theirs:
            continue
        for position, param in enumerate(group["params"]):
            if param in params and Layout.of(param.shape, ours) != Layout.of(param.shape, theirs):
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
    """The same with the word of who saved it, for the error about what is missing."""
    for group in state_dict["param_groups"]:
        group["extra"] = {**group["extra"], "rank": rank, "ranks": ranks}
    return state_dict


def _check_complete(
    groups: Sequence[dict[str, Any]],
    found: Found,
    workers: Workers,
    kept: Mapping[Tensor, Owners] | None,
    strict: bool,
) -> None:
    """Compares with a plan of the same groups that has shapes only; drops what is not for here."""
    expected = {param: dict(entries) for param, entries in found.items()}
    plan = Plan(groups, expected, workers, device="meta", kept=kept, is_partial=True)
    plan.check_methods([Hyperparameters.read(group) for group in groups])
    members = list(zip(plan.members, plan.planned(groups), strict=True))
    is_lacking = any(
        expected[param].keys() - found[param].keys() for _, param in members if param in found
    )
    if is_lacking or not strict:
        _settle_gaps(groups, plan, members, found, strict)
    for member, param in members:
        if param not in found:
            logger.warning(
                "shampoo: the checkpoint has no state for %s; it starts anew", member.name
            )
            continue
        entries = found[param]
        unexpected = sorted(entries.keys() - expected[param].keys())
        if unknown := [key for key in unexpected if not _is_of_another_owner(member, key)]:
            logger.warning("shampoo: ignoring unknown state of %s: %s", member.name, unknown)
        for key in unexpected:
            del entries[key]


def _settle_gaps(
    groups: Sequence[dict[str, Any]],
    plan: Plan,
    members: Sequence[tuple[Member, Tensor]],
    found: Found,
    strict: bool,
) -> None:
    """Raises if blocks of any owner are missing or, if not strict, lets their parameters go."""
    gaps: list[str] = []  # a word for every missing block
    total = 0
    for (member, param), keys in zip(members, _keys_of_all_owners(plan), strict=True):
        if param not in found:
            continue
        wanted: dict[str, list[str]] = {}
        for key in keys:
            block, _, name = key.rpartition(".")
            wanted.setdefault(block, []).append(name or key)
        before, total = len(gaps), total + len(wanted) - 1
        for block, names in wanted.items():
            prefix = f"{block}." if block else ""
            absent = [name for name in names if f"{prefix}{name}" not in found[param]]
            if absent:
                what = f" {block.replace('block', 'block ')}" if block else ""
                detail = f": {absent[0]}" if len(absent) < len(names) or not block else ""
                gaps.append(f"{member.name}{what}{detail}")
        if len(gaps) > before and not strict:
            del found[param]
    if not gaps:
        return
    extra = groups[0].get("extra", {})
    saved_by = f"; saved by rank {extra['rank']} of {extra['ranks']}" if "rank" in extra else ""
    complaint = f"{len(gaps)} of {total} blocks missing (first: {gaps[0]}){saved_by}"
    if strict:
        raise IncompleteCheckpointError(
            f"{complaint}. Use torch.distributed.checkpoint, or call consolidate_state_dict() on"
            " all ranks before saving. strict=False starts the parameters of missing blocks anew."
        )
    logger.warning("shampoo: %s; their parameters start anew", complaint)


def _keys_of_all_owners(plan: Plan) -> list[list[str]]:
    """The names of the whole state of every planned parameter."""
    keys: list[dict[str, None]] = [{} for _ in plan.members]
    for crew in plan.crews:
        own = crew[crew[0].team.me]
        for arena in crew:
            if arena is not own:
                arena.allocate(list(own.moments))  # of a plan on "meta": costs nothing
            for member, key, _ in arena.views(MOMENTS):
                keys[member][key] = None
    return [list(names) for names in keys]


def _is_of_another_owner(member: Member, key: str) -> bool:
    named = parse(key)
    if named is None or named.block >= len(member.owners):
        return False
    return member.owners[named.block] != member.team.me
