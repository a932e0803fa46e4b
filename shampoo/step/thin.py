"""Which parameters ``large_dim_method="auto"`` denies a full factor, in words for their user.

The rule is geometry alone (:mod:`shampoo.blocks.layout`); here is what it saves. Someone whose
matrices are not preconditioned as in the paper must hear of it, once, with what else there is to
choose.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from shampoo.blocks.layout import AUTO
from shampoo.errors import warn_outside
from shampoo.hyperparameters import Hyperparameters
from shampoo.preconditioner.choice import layout_of
from shampoo.preconditioner.footprint import state_bytes
from shampoo.step.parameters import parameter_name


@dataclass(frozen=True)
class Thin:
    """A parameter some of whose factors are diagonal, and its bytes of state either way."""

    name: str
    shape: tuple[int, ...]
    state_bytes: int
    blocking_bytes: int


def thin_among(
    tensors: Iterable[tuple[str, Sequence[int], torch.dtype]], values: Hyperparameters
) -> list[Thin]:
    """The thin ones of a group's parameters: name, shape, without a 0 in it, and dtype of each."""
    if values.geometry.large_dim_method != AUTO:
        return []
    blocking = replace(values.geometry, large_dim_method="blocking")
    found = []
    for name, shape, dtype in tensors:
        layout = layout_of(shape, values.geometry)
        if any(layout.diagonal):
            kept = state_bytes(layout, values, dtype)
            full = state_bytes(layout_of(shape, blocking), values, dtype)
            found.append(Thin(name, tuple(shape), kept, full))
    return found


def describe(found: Sequence[Thin]) -> str:
    """What happens to thin parameters, at least one, what it saves, and what else to choose."""
    first, count = found[0], len(found)
    kept, full = sum(each.state_bytes for each in found), sum(each.blocking_bytes for each in found)
    # A parameter without a name goes by its place and shape.
    label = first.name if str(first.shape) in first.name else f"{first.name}, shape {first.shape}"
    many = f"{count} thin parameters, {kept:,} bytes of state instead of {full:,}; the first is"
    return (
        'large_dim_method="auto" keeps only the diagonal of the factor of a side that is very long'
        " for the others, where full factors would take more than 5 times AdamW's memory:"
        f" {many if count > 1 else 'for'}"
        f" {label}: {first.state_bytes:,} bytes of state instead of {first.blocking_bytes:,}."
        ' Choose: large_dim_method="blocking" for full factors, a smaller max_preconditioner_dim'
        " for shorter blocks with full factors, or a group with precondition=False for no factors."
    )


def warn_of_thin(groups: Sequence[dict[str, Any]], start: int = 0) -> None:
    """Warns once of all parameters that are thin and trained, in groups from ``start`` on."""
    found = []
    for index, group in enumerate(groups[start:], start):
        trained = [
            (parameter_name(group, index, position), param.shape, param.dtype)
            for position, param in enumerate(group["params"])
            if param.requires_grad and param.numel() > 0
        ]
        found += thin_among(trained, Hyperparameters.read(group))
    if found:
        warn_outside(f"shampoo: {describe(found)}")
