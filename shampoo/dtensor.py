"""DTensors, told from other tensors without an import that takes longer than all of this package.

Where nobody has imported ``torch.distributed.tensor``, nothing is one.
"""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(value: Any) -> "TypeGuard[DTensor]":
    """Whether a value is a ``torch.distributed.tensor.DTensor``."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(value, kind)
