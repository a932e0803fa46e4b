"""The whole state of one optimizer in a safetensors file, which other programs and languages read.

A tensor is named by its parameter and its entry, ``0.weight/block0.factor1``. The metadata of the
file has the parameter groups of ``state_dict()`` as JSON, with parameters by name; a tensor among
their values, a learning rate on a device, is ``param_groups.0/lr``. Such a file holds no code, and
no checksums either: what a run resumes from is a folder of checkpoints.
"""

import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from shampoo.checkpoint.durable import sync_folder
from shampoo.checkpoint.ranks import on_every_rank, on_first_rank
from shampoo.errors import DamagedCheckpointError, shown
from shampoo.inputs import check_list, check_object, parse_json
from shampoo.optimizer import Shampoo

_GROUPS = "param_groups"
_OF_A_GROUP = re.compile(rf"{_GROUPS}\.\d+")
_LACKING = "This needs safetensors: pip install 'shampoo[safetensors]'."


def export_safetensors(path: str | os.PathLike[str], optimizer: Shampoo) -> None:
    """Writes the state of all blocks into one file; all ranks must call it.

    The first rank writes, after :meth:`~shampoo.Shampoo.consolidate_state_dict`, and needs host
    memory for all of the state. Parameters are named as they were given to the optimizer, or else
    by their numbers in ``state_dict()``. Weights are not in it: ``safetensors.torch.save_model``.

    Args:
        path: of the file, in a folder that is there; one of this name is replaced, once the new one
            is on the disk.

    Raises:
        ImportError: on all ranks, if the first has no safetensors.
        ValueError: on all ranks, for names that two parameters have, a value of a group that JSON
            cannot hold, an entry of somebody else that is no tensor, and if ranks hold other
            parameters than the first.
        OSError: on all ranks, if the first cannot write; nothing is left of it.
        ShampooDistributedError: on all ranks, if one has failed to send.
    """

    def gather() -> list[tuple[str, tuple[int, ...]]]:
        optimizer.consolidate_state_dict()
        names = [name for each in _names(optimizer.param_groups) for name in each]
        params = [param for group in optimizer.param_groups for param in group["params"]]
        return [(name, tuple(param.shape)) for name, param in zip(names, params, strict=True)]

    # What is on other ranks alone, a stage of a pipeline, would not be in the file.
    first, *others = on_every_rank(gather)
    for rank, held in enumerate(others, start=1):
        if held != first:
            raise ValueError(
                f"Invalid optimizer: rank {rank} has {shown(held)}, rank 0 has {shown(first)}. Must"
                " be of the same parameters on all ranks. shampoo.checkpoint.save takes any."
            )
    on_first_rank(lambda: _write(Path(path), optimizer.state_dict()))


def import_safetensors(
    path: str | os.PathLike[str], optimizer: Shampoo, *, strict: bool = True
) -> None:
    """Loads what :func:`export_safetensors` wrote, on any number of ranks, each of which reads it.

    Parameters are found by name in their group, in whatever order. Does not communicate.

    Args:
        strict: as of :meth:`~shampoo.Shampoo.load_state_dict`.

    Raises:
        ImportError: if there is no safetensors.
        OSError: if it cannot be opened.
        DamagedCheckpointError: if it is no such file.
        ValueError: if the optimizer has other groups or other parameters in them.
        ShampooError: as :meth:`~shampoo.Shampoo.load_state_dict` raises it. In every case the
            optimizer is as it was.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(_LACKING) from error
    state: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            said = parse_json((file.metadata() or {}).get(_GROUPS, ""))
            groups = [_checked(group) for group in check_list(said, _GROUPS)]
            for name in file.keys():  # noqa: SIM118
                owner, _, entry = name.rpartition("/")
                state.setdefault(owner, {})[entry] = file.get_tensor(name)
    except (SafetensorError, ValueError) as error:
        raise DamagedCheckpointError(
            f"{path} is not the state of an optimizer: {str(error).rstrip('.')}. Must be written by"
            " shampoo.checkpoint.export_safetensors."
        ) from error
    numbers = _match(groups, optimizer.param_groups)
    for index, group in enumerate(groups):
        group.update(state.pop(f"{_GROUPS}.{index}", {}))
    if unknown := sorted(state.keys() - numbers.keys()):
        raise ValueError(f"Invalid {path}: state of {shown(unknown)}. Must be of its parameters.")
    numbered = {numbers[name]: entries for name, entries in state.items()}
    optimizer.load_state_dict({"state": numbered, _GROUPS: groups}, strict=strict)


def _write(path: Path, saved: Mapping[str, Any]) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(_LACKING) from error
    tensors: dict[str, Tensor] = {}
    groups, names = [], _names(saved[_GROUPS])
    for index, group in enumerate(saved[_GROUPS]):
        for param, name in zip(group["params"], names[index], strict=True):
            for key, value in saved["state"].get(param, {}).items():
                if not isinstance(value, Tensor):
                    raise ValueError(f"Invalid {key}={shown(value)} of {name}. Must be a tensor.")
                tensors[f"{name}/{key}"] = value.detach().cpu().contiguous()
        plain = {**group, "params": names[index]}
        for key, value in group.items():
            if isinstance(value, Tensor):
                tensors[f"{_GROUPS}.{index}/{key}"] = plain.pop(key).detach().cpu().contiguous()
            else:
                _check_json(key, value)
        groups.append(plain)
    metadata = {"format": "pt", _GROUPS: json.dumps(groups)}
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        save_file(tensors, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def _names(groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Of the parameters of each group: as they were given, or their numbers in a state_dict."""
    names: list[list[str]] = []
    for group in groups:
        start = sum(map(len, names))
        numbers = [str(start + index) for index in range(len(group["params"]))]
        names.append(list(group.get("param_names") or numbers))
    counts = Counter(name for each in names for name in each)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(f"Invalid names={shown(twice)}. Must be of one parameter each.")
    if taken := [name for name in counts if _OF_A_GROUP.fullmatch(name)]:
        raise ValueError(f"Invalid names={shown(taken)}. Must not be those of groups in the file.")
    return names


def _check_json(key: str, value: Any) -> None:
    """Refuses what would not come back as it was; tuples do where the optimizer has them."""
    plain = list(value) if isinstance(value, tuple) else value
    try:
        comes_back = json.loads(json.dumps(plain, allow_nan=False)) == plain
    except (TypeError, ValueError):
        comes_back = False
    if not comes_back:
        raise ValueError(
            f"Invalid {key}={shown(value)} of a parameter group. Must be what JSON can hold: finite"
            " numbers, strings, lists, dictionaries with strings as keys."
        )


def _checked(group: Any) -> dict[str, Any]:
    found = check_object(group, "a parameter group", {"params"})
    params = check_list(found["params"], "params")
    if not all(isinstance(name, str) for name in params):
        raise ValueError(f"params is {shown(params)}. Must be a list of names.")
    return found


def _match(groups: list[dict[str, Any]], own: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Numbers by name; the groups get the optimizer's order, and tuples where it has them."""
    names = _names(own)
    mine, theirs = [sorted(each) for each in names], [sorted(each["params"]) for each in groups]
    if mine != theirs:
        raise ValueError(
            f"Invalid groups of parameters: {shown(theirs)} in the file. Must be {shown(mine)}, as"
            " in the optimizer."
        )
    numbers = {name: index for index, name in enumerate(name for each in names for name in each)}
    for group, ours, in_order in zip(groups, own, names, strict=True):
        group["params"] = [numbers[name] for name in in_order]
        if "param_names" in group:
            group["param_names"] = in_order
        for key, value in group.items():
            if isinstance(value, list) and isinstance(ours.get(key), tuple):
                group[key] = tuple(value)
    return numbers
