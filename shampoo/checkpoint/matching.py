"""What a checkpoint and an optimizer of this package have to agree on before one is read."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from shampoo.blocks.layout import AUTO, Geometry, is_automatic, take_dim
from shampoo.blocks.state_keys import is_own, may_begin
from shampoo.checkpoint.reading import read_into
from shampoo.optimizer import Shampoo
from shampoo.preconditioner.choice import layout_of
from shampoo.state.former import FORMER_DEFAULTS, FORMER_NAMES
from shampoo.state.loading import check_blocks


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
    place: Path,
    metadata: Metadata,
    former: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Compares what decides the shapes of blocks; DCP could only say that some size differs.

    Args:
        named: the optimizer's groups, whose ``params`` are names.
        former: values for what the checkpoint does not say.

    Returns:
        For every group what it takes from the checkpoint, since nobody has named another.
    """
    # DCP replaces what it finds in these by what was saved.
    saved: list[dict[str, Any]] = [
        {
            "params": [],
            **{k: v for k, v in asdict(Geometry.of(group)).items() if k not in former},
        }
        for group in optimizer.param_groups
    ]
    read_into({"optimizer": {"param_groups": saved}}, place, metadata)
    saved = [{**group, **former} for group in saved]
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


def ask_for_what_is_saved(optimizer: Shampoo, asked: dict[str, Any], metadata: Metadata) -> None:
    """Adds what is in the files, and takes away what may begin at zero and is not.

    DCP reads what it is asked for. A schedule may have raised momentum or beta1 on either side of
    the save, and what wrappers keep under parameters a new optimizer does not have.

    Args:
        asked: the state of the optimizer by names, in which DCP is about to load.
    """
    saved: dict[str, dict[str, Any]] = {}
    for flat, path in (metadata.planner_data or {}).items():
        if len(path) == 4 and path[:2] == ("optimizer", "state"):
            saved.setdefault(path[2], {})[path[3]] = metadata.state_dict_metadata[flat]
    moments = optimizer.fillable_moments()
    for group, named in zip(optimizer.param_groups, asked["param_groups"], strict=True):
        for param, name in zip(group["params"], named["params"], strict=True):
            if name not in saved:
                continue  # if its state is asked for, DCP says so
            entries, found = asked["state"].setdefault(name, {}), saved[name]
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
