"""What has a side as long as a vocabulary, and is preconditioned though nobody has asked for it.

Embeddings and output heads are the tensors that Shampoo costs most for, and they are commonly left
to the grafted method. A plain list of parameters does not tell which they are: their sides do, and
whoever has passed one must hear of it, once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shampoo.errors import warn_outside
from shampoo.groups import LONG_SIDE
from shampoo.hyperparameters import Hyperparameters
from shampoo.preconditioner.choice import cost_of, kind_of, layout_of
from shampoo.preconditioner.footprint import state_bytes
from shampoo.step.parameters import parameter_name

_FEW = 4  # tensors that the warning names


@dataclass(frozen=True)
class LongSided:
    """A preconditioned tensor with a long side, and what it costs.

    Attributes:
        state_bytes: of its state, its step counter aside.
        grafted_bytes: the same with ``precondition=False``.
        roots: that a refresh computes.
        frequency: steps between two refreshes.
    """

    name: str
    shape: tuple[int, ...]
    state_bytes: int
    grafted_bytes: int
    roots: int
    frequency: int


def long_sided(group: dict[str, Any], index: int) -> list[LongSided]:
    """Those of a group."""
    values = Hyperparameters.read(group)
    plain = replace(values.geometry, precondition=False)
    found = []
    for position, param in enumerate(group["params"]):
        shape = param.shape
        is_matrix = sum(size > 1 for size in shape) > 1
        if not (param.requires_grad and param.numel() > 0 and is_matrix):
            continue
        layout = layout_of(shape, values.geometry)
        if max(shape) <= LONG_SIDE or not kind_of(layout).preconditions:
            continue
        roots = sum(
            tile.blocks * sum(count for _, count in cost_of(layout, tile.extent).refreshed)
            for tile in layout.tiles
        )
        found.append(
            LongSided(
                parameter_name(group, index, position),
                tuple(shape),
                state_bytes(layout, values, param.dtype),
                state_bytes(layout_of(shape, plain), values, param.dtype),
                roots,
                values.precondition_frequency,
            )
        )
    return found


def describe(found: Sequence[LongSided]) -> str:
    """What is preconditioned, at least one, what that costs, and what else to do."""
    named = ", ".join(
        # A parameter without a name goes by its place and shape.
        each.name if str(each.shape) in each.name else f"{each.name}, shape {each.shape}"
        for each in found[:_FEW]
    )
    more = f", and {len(found) - _FEW} more" if len(found) > _FEW else ""
    held, plain = sum(each.state_bytes for each in found), sum(each.grafted_bytes for each in found)
    roots, frequency = sum(each.roots for each in found), min(each.frequency for each in found)
    return (
        f"a side of more than {LONG_SIDE:,} is preconditioned, and no group says that it should be:"
        f" {named}{more}. It takes {held:,} bytes of state instead of {plain:,}, and"
        f" {roots:,} root{'s' * (roots > 1)} every {frequency:,} steps. Embeddings and output"
        " heads are commonly left to the grafted method: pass the model, Shampoo(model, ...), or"
        " shampoo.groups(model), which do so; or give these tensors a group of their own with"
        ' "precondition": False, or True to keep it as it is.'
    )


def warn_of_long_sides(groups: Sequence[dict[str, Any]], unasked: Iterable[int]) -> None:
    """Warns once of all such tensors.

    Args:
        groups: ``optimizer.param_groups``.
        unasked: indices of those that have not said whether they are preconditioned.
    """
    found = [each for index in unasked for each in long_sided(groups[index], index)]
    if found:
        warn_outside(f"shampoo: {describe(found)}")
