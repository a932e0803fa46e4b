"""What a new value weighs in an exponential average, and what corrects its bias."""

import torch
from torch import Tensor

Number = float | Tensor  # a tensor is 0-d float64, and never read on the host


def weight_of(beta: Number) -> Number:
    """``1 - beta``, or 1 in a plain sum, which is what ``beta = 1`` means."""
    if isinstance(beta, Tensor):
        return torch.where(beta < 1.0, 1.0 - beta, 1.0)
    return 1.0 if beta == 1.0 else 1.0 - beta


def correction_of(beta: Number, step: Number) -> Number:
    """``1 - beta^step``, the sum of all weights so far; 1 for a plain sum, which has no bias."""
    if isinstance(beta, Tensor):
        return torch.where(beta < 1.0, 1.0 - beta**step, 1.0)
    return 1.0 if beta == 1.0 else 1.0 - beta**step
