"""What a parameter is called in messages: they are read by people who know their model."""

from collections.abc import Mapping
from typing import Any


def parameter_name(group: Mapping[str, Any], group_index: int, position: int) -> str:
    """The name a user knows the parameter by, or where it stands."""
    names = group.get("param_names")
    if names is not None:
        return str(names[position])
    shape = tuple(group["params"][position].shape)
    return f"parameter {position} of group {group_index}, shape {shape}"
