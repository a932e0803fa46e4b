"""What older versions have saved, in the words of today.

A checkpoint trains on with what it was trained with: where it does not name an argument, because
there was no choice when it was written, the value is that of then and not the default of today.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from shampoo.blocks.layout import AUTOMATIC, automatic_dim, is_auto, take_dim
from shampoo.hyperparameters import settle
from shampoo.preconditioner import KINDS
from shampoo.preconditioner.shampoo import Shampoo

# What a group without the value was trained with.
FORMER_DEFAULTS = {
    "large_dim_method": "blocking",
    "preconditioner": Shampoo.name,
    "exponent": Shampoo.former_exponent,
    "nesterov_average": False,
}

# Arguments that are no more, which translate() knows.
FORMER_NAMES = ("exponent_override",)

# What a file need not have. Where torch lays one over a group, None stands for what it lacks.
_UNSURE = (*FORMER_DEFAULTS, *FORMER_NAMES)


def translate(group: dict[str, Any]) -> dict[str, Any]:
    """Gives the values of a group the names of today, in place, and returns it.

    ``exponent_override=0`` stood for what the kind of preconditioner does by itself. An argument of
    before counts more than its successor: torch lays the groups of a file over those of today.
    """
    for name in _UNSURE:
        if name in group and group[name] is None:
            del group[name]
    if "exponent_override" in group:
        exponent = group.pop("exponent_override")
        if isinstance(exponent, int) and exponent == 0:
            kind = KINDS.get(group.get("preconditioner", Shampoo.name))
            exponent = FORMER_DEFAULTS["exponent"] if kind is None else kind.former_exponent
        group["exponent"] = exponent
    return group


def complete(group: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Gives a group that was saved by any version all values of today, in place; returns it.

    Args:
        defaults: for what every version before had as it is now.
    """
    translate(group)
    for name, value in {**defaults, **FORMER_DEFAULTS}.items():
        group.setdefault(name, value)
    settle(group)
    if AUTOMATIC not in group.get("extra", {}) and is_auto(defaults["max_preconditioner_dim"]):
        number = automatic_dim(group)
        if group["max_preconditioner_dim"] == number:  # in all likelihood nobody had named it
            take_dim(group, number)
    return group


def to_be_laid_under(file: Mapping[str, Any], groups: Sequence[dict[str, Any]]) -> None:
    """Makes groups, in place, what torch can lay a file over, so that what the file lacks shows.

    torch sets what it finds in a group, entry by entry in a list.

    Args:
        file: what it loads; empty on a rank that has it from another one.
        groups: as they are saved.
    """
    theirs = file.get("param_groups", ())
    for index, group in enumerate(groups):
        for name in _UNSURE:
            if index < len(theirs):
                group[name] = theirs[index].get(name)
            elif not isinstance(group.get(name), (list, tuple)):
                group[name] = None


def named_in(file: Mapping[str, Any], groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups with the names that a flattened file has, for torch to look for just these.

    Args:
        file: what torch makes of a state with ``flatten_optimizer_state_dict=True``.
        groups: the optimizer's.
    """
    names = {key.rpartition(".")[2] for key in file if key.startswith("param_groups.")}
    former = dict.fromkeys(name for name in FORMER_NAMES if name in names)
    return [
        {name: value for name, value in group.items() if name == "params" or name in names} | former
        for group in groups
    ]
