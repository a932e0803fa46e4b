"""What a checkpoint and an optimizer of this package have to agree on before one is read."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from shampoo.blocks.layout import AUTO, Geometry, is_automatic, take_dim
from shampoo.blocks.state_keys import is_own, may_begin
from shampoo.checkpoint.reading import read_into
from shampoo.checkpoint.states import states_of
from shampoo.optimizer import Shampoo
from shampoo.preconditioner.choice import layout_of
from shampoo.state.former import FORMER_DEFAULTS, FORMER_NAMES
from shampoo.state.loading import check_blocks

_GEOMETRY = frozenset(field.name for field in fields(Geometry))
Groups = list[dict[str, Any]]  # as they are saved: their params are names


class Former(NamedTuple):
    """What groups are given once a checkpoint has been read that says nothing of it.

    Attributes:
        groups: of what is asked for, those of :class:`shampoo.Shampoo`.
        values: by name.
    """

    groups: Groups
    values: dict[str, Any]


@contextmanager
def asking(
    model: nn.Module, optimizers: Sequence[Optimizer], place: Path, metadata: Metadata
) -> Iterator[tuple[dict[str, Any], Former]]:
    """What DCP is to fill from a checkpoint, of which the optimizers take on how blocks are cut.

    Within, frozen parameters of which there is a state require gradients: DCP would drop it, and a
    run that unfreezes them later would go on otherwise than the one that was saved.

    Raises:
        BlockGridMismatchError: if blocks were cut otherwise.
    """
    values, names = former_values(metadata)
    saved_groups, saved_states = _saved_groups(place, metadata), _saved_states(metadata)
    states = states_of(model, optimizers)
    ours = [each for each in optimizers if isinstance(each, Shampoo)]
    named = _divided(states["optimizer"]["param_groups"], optimizers)
    cuts = {each: check_cuts(each, named[each], saved_groups, values) for each in ours}
    is_to_be_made_anew = [adopt(each, cuts[each]) for each in ours]
    frozen = {each: _frozen(each, named[each], saved_states) for each in optimizers}
    try:
        for each, params in frozen.items():
            for param in params:
                param.requires_grad_(True)
            if any(param not in each.state for param in params):
                each.state.clear()  # the inert step of states_of makes all of it
                is_to_be_made_anew.append(True)
        if any(is_to_be_made_anew):
            states = states_of(model, optimizers)
            named = _divided(states["optimizer"]["param_groups"], optimizers)
        asked = states["optimizer"]["state"]
        for name in {name for group in saved_groups for name in group.get("params", ())}:
            if name not in saved_states:  # it was frozen so far, and starts anew
                asked[name] = {}
        groups: Groups = []
        for each in ours:
            _ask_for_what_is_saved(each, asked, named[each], saved_states)
            groups += named[each]
        for group in groups:
            for name in values:
                del group[name]
            group.update(dict.fromkeys(names))  # DCP puts what was saved there
        yield states, Former(groups, values)
    finally:
        for params in frozen.values():
            for param in params:
                param.requires_grad_(False)


def _frozen(optimizer: Optimizer, named: Groups, saved: Mapping[str, Any]) -> list[Tensor]:
    """Parameters of which there is a state, though they are not trained now."""
    return [
        param
        for name, param in _params_by_name(optimizer, named)
        if name in saved and not param.requires_grad
    ]


def _params_by_name(optimizer: Optimizer, named: Groups) -> Iterator[tuple[str, Tensor]]:
    for group, names in zip(optimizer.param_groups, named, strict=True):
        yield from zip(names["params"], group["params"], strict=True)


def _divided(groups: Groups, optimizers: Sequence[Optimizer]) -> dict[Optimizer, Groups]:
    """The groups of each optimizer among those of all."""
    rest = iter(groups)
    return {each: [next(rest) for _ in each.param_groups] for each in optimizers}


def _saved_groups(place: Path, metadata: Metadata) -> Groups:
    """Names of parameters, and what decides the shapes of their blocks, of all groups of a file."""
    paths = [
        path
        for path in (metadata.planner_data or {}).values()
        if len(path) == 4 and path[:2] == ("optimizer", "param_groups")
    ]
    groups: Groups = [{} for _ in {path[2] for path in paths}]
    for _, _, index, name in paths:
        is_wanted = name == "params" or name in _GEOMETRY
        if is_wanted and index in range(len(groups)):  # an index is what somebody has written
            groups[index][name] = None  # DCP replaces what it finds by what was saved
    read_into({"optimizer": {"param_groups": groups}}, place, metadata)
    return groups


def _saved_states(metadata: Metadata) -> dict[str, dict[str, Any]]:
    """What there is in the files of each parameter, by names."""
    saved: dict[str, dict[str, Any]] = {}
    for flat, path in (metadata.planner_data or {}).items():
        if len(path) == 4 and path[:2] == ("optimizer", "state"):
            saved.setdefault(path[2], {})[path[3]] = metadata.state_dict_metadata[flat]
    return saved


def former_values(metadata: Metadata) -> tuple[dict[str, Any], list[str]]:
    """With what a checkpoint was trained of which it says nothing, since there was one way only.

    Beside it the names in the checkpoint of arguments that are no more.
    """
    paths = (metadata.planner_data or {}).values()
    named = {path[-1] for path in paths if path[:2] == ("optimizer", "param_groups")}
    former = {name: value for name, value in FORMER_DEFAULTS.items() if name not in named}
    return former, [name for name in FORMER_NAMES if name in named]


def check_cuts(
    optimizer: Shampoo,
    named: Sequence[Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any]],
    former: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Compares what decides the shapes of blocks; DCP could only say that some size differs.

    Args:
        named: the optimizer's groups, whose ``params`` are names.
        saved_groups: those of the checkpoint, of other optimizers too.
        former: values for what the checkpoint does not say.

    Returns:
        For every group what it takes from the checkpoint, since nobody has named another.
    """
    saved = [{**group, **former} for group in saved_groups]
    saved = [group for group in saved if group.keys() >= _GEOMETRY]  # another optimizer's have none
    group_of = {name: group for group in saved for name in group["params"]}
    cuts = []
    for group, names in zip(
        optimizer.param_groups, (each["params"] for each in named), strict=True
    ):
        first = next((group_of[name] for name in names if name in group_of), group)
        cut = {}
        if group["large_dim_method"] == AUTO:
            cut["large_dim_method"] = first["large_dim_method"]
        if is_automatic(group):
            cut["max_preconditioner_dim"] = first["max_preconditioner_dim"]
        cuts.append(cut)
        group = {**group, **cut}
        for param, name in zip(group["params"], names, strict=True):
            if name in group_of:  # if not, DCP says so
                alone = {**group, "params": [param], "param_names": [name]}
                check_blocks([alone], [group_of[name]], optimizer.state)
    return cuts


def adopt(optimizer: Shampoo, cuts: Sequence[Mapping[str, Any]]) -> bool:
    """Gives groups these values of a checkpoint; whether that cuts parameters otherwise.

    DCP reads into the tensors that it finds. Where these are of other blocks the state is dropped,
    and the inert step of :func:`states_of` makes it anew.
    """
    is_cut_otherwise = False
    for group, cut in zip(optimizer.param_groups, cuts, strict=True):
        before = Geometry.of(group)
        group.update(cut)
        if "max_preconditioner_dim" in cut:
            take_dim(group, cut["max_preconditioner_dim"])
        is_cut_otherwise |= any(
            layout_of(param.shape, before) != layout_of(param.shape, Geometry.of(group))
            for param in group["params"]
            if param.numel() > 0
        )
    if is_cut_otherwise:
        optimizer.state.clear()
    return is_cut_otherwise


def _ask_for_what_is_saved(
    optimizer: Shampoo,
    asked: dict[str, Any],
    named: Groups,
    saved: Mapping[str, Mapping[str, Any]],
) -> None:
    """Adds what is in the files, and takes away what may begin at zero and is not.

    DCP reads what it is asked for. A schedule may have raised momentum or beta1 on either side of
    the save, and what wrappers keep under parameters a new optimizer does not have.

    Args:
        asked: the states of all parameters by names, in which DCP is about to load.
        named: the optimizer's groups, whose ``params`` are names.
        saved: what there is in the files.
    """
    moments = optimizer.fillable_moments()
    for name, param in _params_by_name(optimizer, named):
        if name not in saved:
            continue  # if its state is asked for, DCP says so
        entries, found = asked.setdefault(name, {}), saved[name]
        for key, blank in moments.get(param, {}).items():
            if key in found and key not in entries:
                entries[key] = torch.empty(blank.shape, dtype=blank.dtype, device=blank.device)
            elif key in entries and key not in found and may_begin(key):
                del entries[key]
        for key in found.keys() - entries.keys():
            if not is_own(key):
                entries[key] = _room_for(found[key], param)


def _room_for(saved: Any, param: Tensor) -> Any:
    """What DCP puts a value of somebody else's into."""
    if not isinstance(saved, TensorStorageMetadata):
        return None  # an object, of which it makes another
    if saved.size == param.shape:  # as its parameter is sharded, as torch's own state is
        return torch.empty_like(param, dtype=saved.properties.dtype, requires_grad=False)
    return torch.empty(saved.size, dtype=saved.properties.dtype, device=param.device)
