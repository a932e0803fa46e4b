"""``python -m shampoo explain``: the table of ``explain()`` of a model that is only described."""

import contextlib
import fnmatch
import importlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from shampoo.errors import shown
from shampoo.groups import groups
from shampoo.ops.licence import REFERENCE
from shampoo.optimizer import Shampoo
from shampoo.step.explanation import Explanation

MODEL = (
    "{names}; module:callable, which makes the model; shapes such as 768x768,768; or a JSON file of"
    " shapes, by name or in a list"
)
_BACKEND = "SHAMPOO_BACKEND"
_SHAPES = re.compile(r"\d+(x\d+)*(,\d+(x\d+)*)*")

Shapes = Mapping[str, Sequence[int]] | Sequence[Sequence[int]]


def read_model(model: str) -> nn.Module | Shapes | None:
    """The module that an import path makes, on ``meta``, or the shapes of a list.

    Returns:
        None for anything else.

    Raises:
        ValueError: if a path cannot be imported, or makes no module.
    """
    if _SHAPES.fullmatch(model):
        return [[int(side) for side in shape.split("x")] for shape in model.split(",")]
    module, colon, name = model.partition(":")
    if not colon:
        return None
    try:
        make = getattr(importlib.import_module(module), name)
        with torch.device("meta"):  # nothing is allocated
            made = make()
    except Exception as error:
        raise ValueError(
            f"Invalid model={shown(model)}: {type(error).__name__}: {error}. Must be the import"
            " path of a callable without arguments, such as my.models:build."
        ) from error
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"Invalid model={shown(model)}: it makes a {type(made).__name__}. Must make a"
            " torch.nn.Module."
        )
    return made


def explanation_of(
    model: nn.Module | Shapes,
    dtype: torch.dtype,
    grafted_only: Sequence[str],
    arguments: Mapping[str, Any],
) -> Explanation:
    """What the optimizer would do with a model.

    Args:
        model: a module, which is divided into groups as ``Shampoo(model)`` divides it, or shapes,
            by name or in a row, all of which are preconditioned.
        dtype: of parameters, where shapes are given.
        grafted_only: patterns of names whose tensors are not preconditioned.
        arguments: of the optimizer.

    Raises:
        ValueError: for a value out of range, or a pattern that matches no name.
    """
    found = groups(model) if isinstance(model, nn.Module) else [_group_of(model, dtype)]
    names = [name for group in found for name, _ in group["params"]]
    for pattern in grafted_only:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"Invalid grafted_only={shown(pattern)}. Must match a name, such as {names[0]}."
            )
    split = [part for group in found for part in _split(group, grafted_only)]
    with _without_kernels():
        optimizer = Shampoo(split, **arguments)
    return optimizer.explain()


@contextlib.contextmanager
def _without_kernels() -> Iterator[None]:
    """What is not computed needs no kernel: none is built for it."""
    before = os.environ.get(_BACKEND)
    os.environ[_BACKEND] = REFERENCE
    try:
        yield
    finally:
        if before is None:
            del os.environ[_BACKEND]
        else:
            os.environ[_BACKEND] = before


def _group_of(shapes: Shapes, dtype: torch.dtype) -> dict[str, Any]:
    if isinstance(shapes, Mapping):
        named: dict[str, Any] = {**shapes}
    else:
        named = {f"tensor{index}": shape for index, shape in enumerate(shapes)}
    for name, shape in named.items():
        is_row = isinstance(shape, (list, tuple))
        if not is_row or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(
                f"Invalid shape {shown(shape)} of {name}. Must be a list of integers >= 0."
            )
    if not named:
        raise ValueError(f"Invalid model={shown(shapes)}. Must have at least one shape.")
    return {
        "params": [
            (name, nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device="meta")))
            for name, shape in named.items()
        ],
        "precondition": True,
    }


def _split(group: dict[str, Any], patterns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A group without what patterns name, and that as one that is not preconditioned."""
    plain: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, param in group["params"]:
        is_plain = any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        (plain if is_plain else others).append((name, param))
    if others:
        yield {**group, "params": others}
    if plain:
        own = {"name": f"{group['name']}, grafted only"} if "name" in group else {}
        yield {**group, **own, "params": plain, "precondition": False}


def to_json(explanation: Explanation) -> dict[str, Any]:
    """The rows of an explanation, in values of JSON; None for a step that never comes."""
    rows = asdict(explanation)
    for row in rows["tensors"]:
        row["start"] = None if row["start"] == math.inf else row["start"]
    return {**rows, "numel": explanation.numel, "state_bytes": explanation.state_bytes}
