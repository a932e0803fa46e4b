"""The bytes of state that blocks and parameters take."""

import math
from collections.abc import Sequence

import torch

from shampoo.blocks.layout import ADAGRAD, FACTORED, Layout, factor_numbers
from shampoo.grafting import GRAFTING
from shampoo.hyperparameters import Hyperparameters

_COUNTER_BYTES = 4  # of a factor: failures, and its slot if staggered


def block_state_bytes(
    extent: Sequence[int],
    diagonal: Sequence[bool],
    rule: str,
    values: Hyperparameters,
    dtype: torch.dtype,
) -> int:
    """Bytes of a block's state (algorithm.md 7.1), for a parameter of ``dtype``."""
    size = values.geometry.dtype.itemsize
    wide = torch.promote_types(dtype, values.geometry.dtype).itemsize
    second_moment = rule == ADAGRAD or GRAFTING[values.geometry.grafting].second_moment
    per_element = size * (values.has_exp_avg + second_moment) + wide * (values.momentum > 0)
    total = per_element * math.prod(extent)
    if rule == FACTORED:
        counters = _COUNTER_BYTES * (1 + values.is_staggered)
        total += size * factor_numbers(extent, diagonal)
        total += counters * (len(diagonal) - sum(diagonal))
    return total


def state_bytes(layout: Layout, values: Hyperparameters, dtype: torch.dtype) -> int:
    """Bytes of the state of all blocks of a parameter of ``dtype``, its step counter aside."""
    return sum(
        tile.blocks * block_state_bytes(tile.extent, layout.diagonal, layout.rule, values, dtype)
        for tile in layout.tiles
    )
