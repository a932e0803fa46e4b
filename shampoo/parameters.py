"""One parameter as an optimizer finds it: can it be trained, is it, and is it what it was?"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo.regions import check_placements


@dataclass(frozen=True)
class Seen:
    """What a parameter was when the plan was built."""

    param: Tensor
    planned: bool
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size

    def still(self, param: Tensor) -> bool:
        """Whether a parameter is what it was."""
        if self.param is not param:
            return False
        if not self.planned:
            return not is_trained(param)
        is_same = param.device == self.device and param.dtype == self.dtype
        return is_same and param.shape == self.shape


def is_trained(param: Tensor) -> bool:
    """Whether an optimizer moves a parameter."""
    return param.numel() > 0 and (param.requires_grad or param.grad is not None)


def check_parameter(param: Tensor, name: str) -> None:
    """Refuses what cannot be cut into blocks, naming the parameter and the remedy.

    Raises:
        RuntimeError: for a complex or flat parameter, or a DTensor with Partial placements.
    """
    if param.is_complex():
        raise RuntimeError(
            f"Shampoo does not support complex parameters ({name}). Optimize"
            " torch.view_as_real(parameter) instead."
        )
    check_placements(param, name)
    if getattr(param, "_fsdp_flattened", False) or hasattr(param, "_is_flat_param"):
        raise RuntimeError(
            f"Shampoo got a flat parameter of {param.numel()} elements ({name}). FSDP1 and"
            " DeepSpeed ZeRO >= 1 hide the shapes of matrices: use fully_shard (FSDP2) or"
            " DistributedDataParallel."
        )
