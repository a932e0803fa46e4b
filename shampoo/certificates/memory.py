"""Tensors with guards around them, so that a kernel that writes beside its outputs is found."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_GUARD = 64  # elements on either side: whole cache lines, so that a tensor starts as aligned


class Guarded(NamedTuple):
    """A tensor, and the memory it is a part of."""

    tensor: Tensor
    memory: Tensor


def guarded(values: Tensor, device: torch.device, shift: int = 0) -> Guarded:
    """A copy with the same strides, in the middle of memory that belongs to nobody.

    Args:
        values: what to copy.
        device: where to.
        shift: elements by which it starts later.
    """
    if values.numel() == 0 or 0 in values.stride():
        return Guarded(values.to(device, copy=True), torch.empty(0, device=device))
    extents = zip(values.shape, values.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in extents)
    memory = torch.full((span + 2 * _GUARD + shift,), _canary(values.dtype), dtype=values.dtype)
    memory = memory.to(device)
    tensor = memory.as_strided(values.shape, values.stride(), _GUARD + shift)
    tensor.copy_(values)
    return Guarded(tensor, memory)


def is_intact(guard: Guarded) -> bool:
    """Whether the memory beside a tensor, and in the gaps of its strides, is as it was."""
    tensor, memory = guard
    if memory.numel() == 0:
        return True
    canary, begin = _canary(memory.dtype), tensor.storage_offset()
    if tensor.is_contiguous():  # without gaps
        beside = memory[:begin], memory[begin + tensor.numel() :]
        return all(bool((each == canary).all()) for each in beside)
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside.as_strided(tensor.shape, tensor.stride(), begin).fill_(False)
    return bool((memory[outside] == canary).all())


def _canary(dtype: torch.dtype) -> Any:
    """A value that no kernel writes by chance."""
    return True if dtype == torch.bool else -123 if not dtype.is_floating_point else -123.0
