"""State of ``DistributedShampoo`` under the names of this optimizer.

There, under a parameter: ``step``, and for every block ``block_{k}``, row-major in the same grid as
here, with ``shampoo`` (``factor_matrices`` and ``inv_factor_matrices`` by mode, symmetric, whole or
the upper triangle row after row), ``adagrad``, the second moment of the grafted method,
``filtered_grad``, the average of gradients without bias correction, and ``momentum_buffer``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo.blocks.layout import Geometry
from shampoo.dtensor import is_dtensor
from shampoo.errors import (
    BlockGridMismatchError,
    ForeignCheckpointError,
    IncompleteCheckpointError,
    require,
    shown,
)
from shampoo.grafting import GRAFTING
from shampoo.hyperparameters import dtype_name
from shampoo.migrate.arguments import ARGUMENTS, from_distributed_shampoo
from shampoo.optimizer import Shampoo
from shampoo.preconditioner.choice import layout_of
from shampoo.preconditioner.shampoo import Shampoo as Kind
from shampoo.state.loading import check_blocks
from shampoo.step.parameters import parameter_name

_BLOCK = re.compile(r"block_(0|[1-9]\d*)")
_OF_A_SCHEDULE = ("initial_lr",)  # which torch puts into groups
_FACTORS = ("factor_matrices", "inv_factor_matrices")
# Its names of what a block keeps beside its factors, and ours.
_MOMENTS = {"filtered_grad": "exp_avg", "adagrad": "exp_avg_sq", "momentum_buffer": "momentum"}
_ASKED_FOR_BY = {
    "filtered_grad": "betas",
    "adagrad": "grafting",
    "momentum_buffer": "momentum",
}


def load_distributed_shampoo(optimizer: Shampoo, *state_dicts: Mapping[str, Any]) -> None:
    """Loads what ``DistributedShampoo.state_dict()`` returned; the run goes on as it would there.

    Values of hyper-parameters come with it where its groups have their configurations, translated
    by :func:`from_distributed_shampoo`; an optimizer that was built with other ones is refused
    where the blocks would differ. Roots are taken as they are, so the next step is that of the
    other optimizer up to rounding, and moments become ``preconditioner_dtype``.

    Args:
        optimizer: with the same parameters, in the same groups and order.
        *state_dicts: one, of a run without DDP; of a run with it those of all ranks, of which each
            holds some blocks. All ranks of this run load the same, and keep what they own. Read by
            ``torch.load(path, weights_only=False)`` where the other package is installed, for the
            configurations are objects of it; without them (``del group[name]`` there, but for
            ``params``) any reader does, and the values are those of ``optimizer``.

    Raises:
        ForeignCheckpointError: for the state of another optimizer.
        IncompleteCheckpointError: if blocks are missing, or what a block needs.
        BlockGridMismatchError: if factors are of other blocks, or none that are kept here.
        ValueError: for other numbers of parameters, arguments without a counterpart, and moments
            that the hyper-parameters do not call for.
            In every case the optimizer is as it was.
    """
    require(bool(state_dicts), "state_dicts", state_dicts, "one at least")
    for state_dict in state_dicts:
        _check_origin(state_dict)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    for state_dict in state_dicts:
        theirs = [len(group["params"]) for group in state_dict["param_groups"]]
        require(theirs == sizes, "numbers of parameters by group", theirs, f"{sizes}, as here")
    everyone = [group["params"] for group in optimizer.param_groups]
    saved = [
        [state_dict["param_groups"][i] for state_dict in state_dicts] for i in range(len(sizes))
    ]
    values = [
        _values(group, files[0]) for group, files in zip(optimizer.param_groups, saved, strict=True)
    ]
    check_blocks(optimizer.param_groups, values, {param for params in everyone for param in params})
    state: dict[int, dict[str, Any]] = {}
    groups, identity = [], 0
    for index, group in enumerate(optimizer.param_groups):
        groups.append({**values[index], "params": list(range(identity, identity + sizes[index]))})
        for position, param in enumerate(group["params"]):
            if param.numel():
                name = parameter_name(group, index, position)
                pairs = zip(state_dicts, saved[index], strict=True)
                found = [each["state"].get(of["params"][position], {}) for each, of in pairs]
                state[identity] = _translated(name, param, values[index], found)
            identity += 1
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_origin(state_dict: Mapping[str, Any]) -> None:
    entries = [each for each in state_dict.get("state", {}).values() if isinstance(each, Mapping)]
    keys = {str(key) for each in entries for key in each}
    if any("block_" in key for key in keys):
        return
    raise ForeignCheckpointError(
        f"this is no state of DistributedShampoo (it has {shown(sorted(keys)[:3])}; no block_0)."
        " Nothing has changed. What Shampoo has saved is for load_state_dict()."
    )


def _values(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a group: those of the file, if it has them as they were given."""
    values = dict(group)
    if "preconditioner_config" in saved:
        given = {name: value for name, value in saved.items() if name in ARGUMENTS}
        values.update(from_distributed_shampoo(params=(), **given))
        values.update({name: saved[name] for name in _OF_A_SCHEDULE if name in saved})
        values["preconditioner_dtype"] = dtype_name(values["preconditioner_dtype"])
    return values


def _translated(
    name: str, param: Tensor, values: dict[str, Any], found: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The state of one parameter in our words.

    Args:
        values: of its group.
        found: what every file has of it.
    """
    geometry = Geometry.of(values)
    layout = layout_of(param.shape, geometry)
    if layout.kind != Kind.name or any(layout.diagonal):
        raise BlockGridMismatchError(
            f"{name} has a factor for every dimension in the state of DistributedShampoo, and none"
            f" here, or the diagonal alone (it is {layout.kind!r}). Build the optimizer with what"
            " from_distributed_shampoo() returns."
        )
    extents = {block: tile.extent for tile in layout.tiles for block in tile.block_indices()}
    steps, blocks = _gathered(name, found)
    if stranger := sorted(blocks.keys() - extents.keys()):
        raise BlockGridMismatchError(
            f"{name} has block_{stranger[0]} in the file, and {len(extents)} blocks here, of a"
            f" tensor {layout.dims} with max_preconditioner_dim={geometry.max_preconditioner_dim}"
            f" and merge_dims={geometry.merge_dims!r}. Build the optimizer with the values of the"
            " file."
        )
    if missing := sorted(extents.keys() - blocks.keys()):
        raise IncompleteCheckpointError(
            f"{name} lacks {len(missing)} of {len(extents)} blocks (first: block_{missing[0]})."
            " Each rank of a run with DDP has saved those that it owned: give the state of all."
        )
    require(len(steps) == 1, f"step of {name}", sorted(steps), "one in all files")
    step = steps.pop()
    start = values["start_preconditioning_step"]
    has_roots = step >= (values["precondition_frequency"] if start == -1 else start)
    entries: dict[str, Any] = {"step": torch.tensor(step)}
    if values["capturable"]:
        entries["calls"] = torch.tensor(step)
    for block, extent in sorted(extents.items()):
        where, prefix = f"block_{block} of {name}", f"block{block}."
        kept = dict(blocks[block])
        factors = _factors_of(where, kept.pop("shampoo", {}), extent)
        for mode, (factor, root) in enumerate(factors):
            entries[f"{prefix}factor{mode}"] = factor
            # Before its first root the other optimizer has the identity, and this one zeros.
            entries[f"{prefix}root{mode}"] = root if has_roots else torch.zeros_like(root)
            entries[f"{prefix}failures{mode}"] = torch.zeros((), dtype=torch.int32)
        for key, value in _moments_of(where, kept, values, extent).items():
            entries[f"{prefix}{key}"] = value.to(geometry.dtype)
    return entries


def _gathered(
    name: str, found: Sequence[Mapping[str, Any]]
) -> tuple[set[int], dict[int, Mapping[str, Any]]]:
    """The steps of one parameter, and its blocks by index, from all files that have some."""
    steps: set[int] = set()
    blocks: dict[int, Mapping[str, Any]] = {}
    for entries in found:
        for key, value in entries.items():
            if key == "step":
                steps.add(int(value))
            elif match := _BLOCK.fullmatch(str(key)):
                if value:
                    blocks.setdefault(int(match[1]), value)
            else:
                raise BlockGridMismatchError(
                    f"{name} has {shown(key)} in the file, which has no counterpart: blocks of"
                    " shards (rank_0-block_0) and averaged iterates (train_mode, lr_sum) cannot be"
                    " converted. Load the weights alone and start the optimizer anew."
                )
    return steps, blocks


def _by_mode(values: Any) -> list[Any]:
    """What a tuple has become in a file: a dictionary by index, whose keys may be text."""
    if not isinstance(values, Mapping):
        return list(values or ())
    return [values[key] for key in sorted(values, key=int)]


def _factors_of(where: str, kept: Any, extent: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Factor and root of every mode, ``[d, d]``."""
    strangers = sorted(str(key) for key in kept if key not in _FACTORS)
    matrices = [_by_mode(kept.get(key)) for key in _FACTORS]
    if strangers or any(len(each) != len(extent) for each in matrices):
        counts = ", ".join(
            f"{len(each)} {key}" for key, each in zip(_FACTORS, matrices, strict=True)
        )
        raise BlockGridMismatchError(
            f"{where} has {counts}{' and ' if strangers else ''}{', '.join(strangers)}, and needs"
            f" {len(extent)} of each and nothing else: one for every side of {tuple(extent)}."
            " Eigenvectors, corrected eigenvalues and dimensions without a factor cannot be"
            " converted."
        )
    pairs = zip(*matrices, extent, strict=True)
    return [(_square(where, a, size), _square(where, x, size)) for a, x, size in pairs]


def _square(where: str, value: Any, size: int) -> Tensor:
    """A symmetric matrix, from all of it or from its upper triangle, row after row."""
    matrix = _local(value)
    if matrix.shape == (size, size):
        return matrix
    if matrix.shape != (size * (size + 1) // 2,):
        raise BlockGridMismatchError(
            f"{where} has a factor of shape {tuple(matrix.shape)}, and {size} rows here. Build the"
            " optimizer with the values of the file: factors of other blocks cannot be converted."
        )
    rows, columns = torch.triu_indices(size, size, device=matrix.device)
    whole = matrix.new_empty(size, size)
    whole[rows, columns] = matrix
    whole[columns, rows] = matrix
    return whole


def _moments_of(
    where: str, kept: Mapping[str, Any], values: Mapping[str, Any], extent: Sequence[int]
) -> dict[str, Tensor]:
    """What a block keeps beside its factors, by our names."""
    wanted = {
        "filtered_grad": values["betas"][0] > 0.0,
        "adagrad": GRAFTING[values["grafting"]].second_moment,
        "momentum_buffer": values["momentum"] > 0.0,
    }
    for key in kept:
        argument = _ASKED_FOR_BY.get(key)
        if argument is None:
            raise BlockGridMismatchError(
                f"{where} has {shown(key)}, which has no counterpart. Load the weights alone and"
                " start the optimizer anew."
            )
        bound = f"one that keeps what {where} has as {key}"
        require(wanted[key], argument, values[argument], bound)
    found = {}
    for key, is_wanted in wanted.items():
        if not is_wanted:
            continue
        if key not in kept:
            argument = _ASKED_FOR_BY[key]
            raise IncompleteCheckpointError(
                f"{where} has no {key}, which {argument}={values[argument]!r} needs. Build the"
                " optimizer with the values of the file."
            )
        moment = _local(kept[key])
        if moment.shape != tuple(extent):
            raise BlockGridMismatchError(
                f"{where} has {key} of shape {tuple(moment.shape)}, and here it is {tuple(extent)}."
                " Build the optimizer with the values of the file."
            )
        found[_MOMENTS[key]] = moment
    return found


def _local(value: Any) -> Tensor:
    """A plain tensor: what a rank owns is there whole, as a DTensor of the ranks that own it."""
    tensor: Tensor = value.to_local() if is_dtensor(value) else value
    return tensor.detach()
