"""Combinations of values in which every two of different axes meet, without the whole product."""

import itertools
from collections.abc import Collection
from typing import Any


def pairwise(*axes: Collection[Any]) -> list[tuple[Any, ...]]:
    """Combinations with one value of each axis, such that every pair of values is in one of them.

    What a kernel gets wrong, it gets wrong for one value or for two together: for a dtype, or for
    a narrow dtype in transposed memory. The choice is always the same: each time the first of the
    combinations that bring the most pairs not met before.

    Args:
        axes: at least two, the values of each.
    """
    choices = list(itertools.product(*(range(len(axis)) for axis in axes)))

    def pairs(choice: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(choice), 2))

    missing = set().union(*map(pairs, choices))
    chosen = []
    while missing:
        best = max(choices, key=lambda choice: len(pairs(choice) & missing))
        chosen.append(best)
        missing -= pairs(best)
    values = [list(axis) for axis in axes]
    return [tuple(axis[i] for axis, i in zip(values, best, strict=True)) for best in chosen]
