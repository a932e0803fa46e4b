"""Checks a ``state_dict`` against the optimizer that is about to load it, before anything changes.

``torch.optim.Optimizer`` casts state to the dtype of its parameter, which would ruin float32
factors under bfloat16 parameters, so the state never passes through it: :func:`match` hands each
parameter the tensors of the file as they are, and the plan copies them into arenas of the dtype
that the hyper-parameters name.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from shampoo.errors import BlockGridMismatchError, IncompleteCheckpointError
from shampoo.hyperparameters import Geometry, Hyperparameters
from shampoo.layout import Layout
from shampoo.step_plan import Owners, Plan, parameter_name
from shampoo.workers import Workers

logger = logging.getLogger(__name__)


def match(
    groups: Sequence[dict[str, Any]],
    defaults: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    workers: Workers,
    kept: Owners,
) -> dict[Tensor, dict[str, Any]]:
    """The state that a checkpoint holds for every parameter of ``groups``.

    Args:
        groups: the optimizer's parameter groups; their parameters are matched in order.
        defaults: values of hyper-parameters that the checkpoint does not have.
        state_dict: what ``state_dict()`` returned when it was saved.
        workers: who shares the work now; blocks of other owners are not looked for.
        kept: owners that were decided before.

    Raises:
        IncompleteCheckpointError: if the state of a parameter lacks blocks.
        BlockGridMismatchError: if a block has another shape than its hyper-parameters would cut.
        ValueError: if a saved hyper-parameter is out of range.
    """
    saved_groups = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    if [len(group["params"]) for group in saved_groups] != sizes:
        return {}  # torch's own load is about to raise, in words its users know
    found: dict[Tensor, dict[str, Any]] = {}
    for group, saved in zip(groups, saved_groups, strict=True):
        for param, identity in zip(group["params"], saved["params"], strict=True):
            if state_dict["state"].get(identity):
                found[param] = dict(state_dict["state"][identity])
    trial = [
        {**defaults, **saved, "params": group["params"]}
        for group, saved in zip(groups, saved_groups, strict=True)
    ]
    for saved, group in zip(saved_groups, trial, strict=True):
        Hyperparameters.read(group)
        if absent := sorted(defaults.keys() - saved.keys()):
            logger.warning(
                "shampoo: the checkpoint lacks %s; using the defaults", ", ".join(absent)
            )
    if found:
        _check_blocks(groups, trial, found)
        _check_complete(trial, found, workers, kept)
    return found


def _check_blocks(
    groups: Sequence[dict[str, Any]],
    trial: Sequence[dict[str, Any]],
    found: Mapping[Tensor, dict[str, Any]],
) -> None:
    """Refuses state that was cut otherwise than this optimizer was built to cut."""
    for index, (group, saved) in enumerate(zip(groups, trial, strict=True)):
        ours, theirs = Geometry.of(group), Geometry.of(saved)
        if ours == theirs:
            continue
        for position, param in enumerate(group["params"]):
            if param in found and Layout.of(param.shape, ours) != Layout.of(param.shape, theirs):
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


def _check_complete(
    groups: Sequence[dict[str, Any]],
    found: dict[Tensor, dict[str, Any]],
    workers: Workers,
    kept: Owners,
) -> None:
    """Compares with a plan of the same groups that has shapes only; drops what it does not know."""
    expected = {param: dict(entries) for param, entries in found.items()}
    plan = Plan(groups, expected, workers, device="meta", kept=kept)
    plan.check_methods([Hyperparameters.read(group) for group in groups])
    missing, total, first = 0, 0, ""
    for member, param in zip(plan.members, plan.planned(groups), strict=True):
        if param not in found:
            logger.warning(
                "shampoo: the checkpoint has no state for %s; it starts anew", member.name
            )
            continue
        entries = found[param]
        absent = [key for key in expected[param] if key not in entries]
        missing, total = missing + len(absent), total + len(expected[param])
        first = first or (f"{absent[0]} of {member.name}" if absent else "")
        if unknown := sorted(entries.keys() - expected[param].keys()):
            logger.warning("shampoo: ignoring unknown state of %s: %s", member.name, unknown)
            for key in unknown:
                del entries[key]
    if missing:
        raise IncompleteCheckpointError(
            f"{missing} of {total} state tensors are missing (first: {first}). The checkpoint is"
            " incomplete, perhaps one rank's share of a sharded run. Save the whole state, for"
            " example with torch.distributed.checkpoint, and load that."
        )
