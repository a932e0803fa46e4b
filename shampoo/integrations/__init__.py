"""What frameworks need besides an optimizer of torch: one module for each that needs something.

``import shampoo`` imports none of them, and each imports its framework when it is imported itself.
What works without any of this, and the tests that say so, is in docs/frameworks.md.
"""

import importlib
from typing import Any

from torch import nn

from shampoo.groups import groups
from shampoo.optimizer import Shampoo

_INSIDE = ("optimizer", "_optimizer", "_base_optimizer")  # where wrappers keep what they wrap


def framework(name: str) -> Any:
    """Imports the framework that a module here is for.

    Raises:
        ImportError: naming the package, if it is not there.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name != package:
            raise  # the framework is there, and lacks something itself
        raise ImportError(
            f"shampoo.integrations.{package} needs {package}: pip install {package}"
        ) from error


def innermost(optimizer: Any) -> Shampoo | None:
    """The Shampoo in an optimizer that frameworks have wrapped; None if it is another."""
    # Fabric's wrapper derives from what it wraps: what is inside comes first.
    while inside := [vars(optimizer)[name] for name in _INSIDE if name in vars(optimizer)]:
        optimizer = inside[0]
    return optimizer if isinstance(optimizer, Shampoo) else None


def undecayed_vectors(model: nn.Module, others: frozenset[str] = frozenset()) -> list[Any]:
    """The groups of what is trained in a model, without decay of vectors.

    As frameworks divide it for AdamW, and with embeddings and heads apart, as Shampoo wants them.

    Args:
        model: see :func:`shampoo.groups`.
        others: names of further parameters without decay; they get a group of their own.
    """
    found = []
    for group in groups(model):
        members = [(name, param) for name, param in group["params"] if param.requires_grad]
        for is_spared in (False, True):
            part = [member for member in members if (member[0] in others) == is_spared]
            if part:
                found.append({**group, "params": part})
                if is_spared or group["name"] == "vectors":
                    found[-1]["weight_decay"] = 0.0
    return found
