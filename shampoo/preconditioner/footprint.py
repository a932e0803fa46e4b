"""The bytes of state that blocks and parameters take, by what their kind declares."""

import math
from collections.abc import Sequence

import torch

from shampoo.blocks.layout import Layout
from shampoo.grafting import grafting_of
from shampoo.hyperparameters import Hyperparameters
from shampoo.preconditioner.choice import kind_of

_PHASE_BYTES = 4  # of a mode that is refreshed, if staggered


def block_state_bytes(
    layout: Layout, extent: Sequence[int], values: Hyperparameters, dtype: torch.dtype
) -> int:
    """Bytes of the state of a block of a parameter of ``dtype`` (algorithm.md 7.1)."""
    kind, size = kind_of(layout), values.geometry.dtype.itemsize
    wide = torch.promote_types(dtype, values.geometry.dtype).itemsize
    second_moment = grafting_of(values.geometry.grafting, kind.borrows).second_moment
    per_element = size * (values.has_exp_avg + second_moment + len(kind.block_state))
    per_element += wide * (values.momentum > 0)
    total = per_element * math.prod(extent)
    for side, mode in zip(extent, kind.modes(extent, layout.diagonal), strict=True):
        states = kind.mode_state.get(mode, ())
        for state in states:
            itemsize = size if state.dtype is None else state.dtype.itemsize
            total += itemsize * math.prod(state.shape(side))
        if values.is_staggered and any(state.decides_ready for state in states):
            total += _PHASE_BYTES
    return total


def state_bytes(layout: Layout, values: Hyperparameters, dtype: torch.dtype) -> int:
    """Bytes of the state of all blocks of a parameter of ``dtype``, its step counter aside."""
    return sum(
        tile.blocks * block_state_bytes(layout, tile.extent, values, dtype) for tile in layout.tiles
    )
