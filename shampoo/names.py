"""What a parameter is called in messages, and that each is there once.

Messages are read by people who know their model: by its names, or else by where they put what.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_FEW = 3  # duplicates that a message names


def parameter_name(group: Mapping[str, Any], group_index: int, position: int) -> str:
    """The name a user knows the parameter by, or where it stands."""
    names = group.get("param_names")
    if names is not None:
        return str(names[position])
    shape = tuple(group["params"][position].shape)
    return f"parameter {position} of group {group_index}, shape {shape}"


def check_distinct(groups: Sequence[Mapping[str, Any]], first: int = 0) -> None:
    """Refuses a parameter that stands in two places: it would move twice in a step.

    Args:
        groups: their ``"params"`` are tensors, or names with tensors.
        first: index of the first of them among all groups.

    Raises:
        ValueError: naming such parameters and their places.
    """
    seen: dict[Tensor, str] = {}
    found = []
    for index, group in enumerate(groups, first):
        names = group.get("param_names")
        for position, entry in enumerate(group["params"]):
            name, param = entry if isinstance(entry, tuple) else (None, entry)
            if not isinstance(param, Tensor):
                continue  # torch says what is wrong with it
            name = names[position] if names is not None else name
            place = f"position {position} of group {index}" + (f" ({name})" if name else "")
            if param in seen:
                found.append(
                    f"the parameter of shape {tuple(param.shape)} at {place} is the one at"
                    f" {seen[param]}"
                )
            seen.setdefault(param, place)
    if found:
        more = f", and {len(found) - _FEW} more" if len(found) > _FEW else ""
        raise ValueError(
            f"Invalid duplicate parameters: {'; '.join(found[:_FEW])}{more}. Each must be there"
            " once, or a step would move it twice: pass list(dict.fromkeys(parameters)), or leave"
            " shared ones out where they come again."
        )
