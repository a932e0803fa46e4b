"""Distributed Shampoo for PyTorch: the AdamW line, replaced by one line."""

import importlib
from typing import TYPE_CHECKING, Any

from shampoo.certificates import inverse_root, kernels_in_use
from shampoo.errors import (
    BlockGridMismatchError,
    DamagedCheckpointError,
    FolderInUseError,
    ForeignCheckpointError,
    IncompleteCheckpointError,
    NonFiniteGradientError,
    PlanMismatchError,
    ReplicaMismatchError,
    RootFailureError,
    ShampooDistributedError,
    ShampooError,
    UnsafeCheckpointError,
)
from shampoo.groups import groups
from shampoo.optimizer import Shampoo
from shampoo.planner import plan
from shampoo.replay import Replay

if TYPE_CHECKING:
    from shampoo import checkpoint, migrate

__version__ = "0.2.0.dev0"
__all__ = [
    "BlockGridMismatchError",
    "DamagedCheckpointError",
    "FolderInUseError",
    "ForeignCheckpointError",
    "IncompleteCheckpointError",
    "NonFiniteGradientError",
    "PlanMismatchError",
    "Replay",
    "ReplicaMismatchError",
    "RootFailureError",
    "Shampoo",
    "ShampooDistributedError",
    "ShampooError",
    "UnsafeCheckpointError",
    "checkpoint",
    "groups",
    "inverse_root",
    "kernels_in_use",
    "migrate",
    "plan",
]

# Packages that few runs need, or not before their first save: imported when they are named.
_LATER = ("checkpoint", "migrate")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f"shampoo.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
