"""The thinned products of other tests leave out no value and no two that could meet."""

import itertools

import pytest
from pairwise import pairwise


@pytest.mark.parametrize("sizes", [(2, 3), (12, 4, 3, 2), (3, 3, 3, 3, 3)], ids=str)
def test_every_two_values_meet_in_far_fewer_combinations(sizes):
    axes = [[f"{axis}{i}" for i in range(size)] for axis, size in zip("abcde", sizes, strict=False)]
    chosen = pairwise(*axes)
    assert all(len(row) == len(sizes) for row in chosen)
    met = {frozenset(pair) for row in chosen for pair in itertools.combinations(row, 2)}
    for first, second in itertools.combinations(axes, 2):
        assert {frozenset(pair) for pair in itertools.product(first, second)} <= met
    largest, second = sorted(sizes)[-1], sorted(sizes)[-2]
    assert largest * second <= len(chosen) <= 1.8 * largest * second
    assert len(set(chosen)) == len(chosen)
