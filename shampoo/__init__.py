"""Distributed Shampoo for PyTorch: the AdamW line, replaced by one line."""

from shampoo.certificates import kernels_in_use
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
from shampoo.roots import inverse_root

__version__ = "0.1.0"
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
    "groups",
    "inverse_root",
    "kernels_in_use",
    "plan",
]
