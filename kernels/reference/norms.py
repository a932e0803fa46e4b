"""Norms of every matrix of a stack, in float64, and powers."""

from __future__ import annotations

import torch
from torch import Tensor


def absmax(stack: Tensor) -> Tensor:
    """``max |A_ij|``, [B]: two reductions, many times as fast on a CPU as the infinity norm."""
    return torch.maximum(stack.amax(dim=(1, 2)), -stack.amin(dim=(1, 2))).double()


def frobenius(stack: Tensor) -> Tensor:
    """``||A||_F``, [B].

    By rows first: one float32 sum over a large matrix is wrong by up to a per cent.
    """
    rows = torch.linalg.vector_norm(stack, dim=2).double()
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norm


def schatten4(values: Tensor) -> Tensor:
    """``(sum lambda^4)^(1/4)``, [B], of eigenvalues [B, n] in float64."""
    largest = values.abs().amax(dim=1)
    unit = torch.where(largest > 0, largest, 1.0)
    norm: Tensor = unit * torch.linalg.vector_norm(values / unit[:, None], ord=4, dim=1)
    return norm


def elementwise_power(values: Tensor, exponent: float) -> Tensor:
    """``values ** exponent``, whose bits on a CPU do not depend on where an element lies.

    torch raises whole vectors with one function and what is left over at the end with another. Of
    a tensor with gaps it raises every element with the second.
    """
    if values.device.type == "cpu":
        values = torch.stack((values, values), dim=-1)[..., 0]
    return values**exponent


def power_of_two(largest: Tensor) -> Tensor:
    """The power of two at or below each value, 1 for zero: dividing by it is exact."""
    return torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest))), 1.0)
