"""Moments, grafted directions and their norms, gathered or not, as every kernel computes them."""

import itertools
import math

import pytest
import torch
from pairwise import pairwise
from test_ops import assert_as_good

from shampoo.certificates.cases.tiles import FLAT, LAYOUTS, make, packed, table
from shampoo.kernels.reference import ops as reference

RUNS = [(3, 2500), (2, 1), (5, 63), (1, 1024), (4, 257)]
NUMEL = sum(count * size for count, size in RUNS)


def moments_truth(exp_avg, exp_avg_sq, grad, beta1, c1, beta2, weight2, c2, eps, normalized):
    """One block in float64."""
    filtered = grad
    if exp_avg is not None:
        exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        filtered = exp_avg / c1
    if exp_avg_sq is not None:
        length = grad.square().sum().sqrt()
        raw = grad / (length if length > 0 else 1.0) if normalized else grad
        exp_avg_sq = beta2 * exp_avg_sq + weight2 * raw.square()
        filtered = filtered / ((exp_avg_sq / c2).sqrt() + eps)
    return exp_avg, exp_avg_sq, filtered


PRESENT = [*itertools.product([False, True], repeat=3)]  # the moments, and a place to write to


@pytest.mark.parametrize(
    ("present", "beta1", "normalized", "flat"),
    pairwise(PRESENT, [0.9, 0.3, 0.0], [False, True], FLAT),
    ids=str,
)
def test_graft_moments(impl, flat, present, beta1, normalized):
    grad = torch.randn(NUMEL, dtype=flat)
    grad[2500:5000] = 0.0  # a block without gradient
    state = (torch.randn(NUMEL, dtype=flat), torch.rand(NUMEL, dtype=flat) + 0.1)
    scalars = (beta1, 1 - beta1**3, 0.99, 0.01, 1 - 0.99**3, 1e-8)
    results = []
    for function in (impl.graft_moments_, reference.graft_moments_):
        tensors = [*(t.clone() for t in state), torch.full((NUMEL,), torch.nan, dtype=flat)]
        given = [t if p else None for t, p in zip(tensors, present, strict=True)]
        norm = torch.full((15,), torch.nan, dtype=flat)
        function(None, *given, norm, [grad], packed(RUNS), 1.0, False, *scalars, normalized)
        results.append([*given, norm])
    truth, start = ([[] for _ in range(4)]), 0
    for size in (size for count, size in RUNS for _ in range(count)):
        block = [
            t[start : start + size].double() if p else None
            for t, p in zip((*state, grad), (*present[:2], True), strict=True)
        ]
        moved = moments_truth(*block, *scalars, normalized)
        for column, value in zip(truth, (*moved, moved[2].norm().reshape(1)), strict=True):
            column.append(value)
        start += size
    for actual, expected, column in zip(*results, truth, strict=True):
        if actual is not None:
            assert_as_good(actual, expected, torch.cat(column))


# alpha, accumulate, normalized
GATHERS = [(1.0, False, False), (-0.3, False, True), (0.3, True, False), (1.0, True, True)]


@pytest.mark.parametrize(
    ("layout", "how", "param", "flat"),
    pairwise(LAYOUTS, GATHERS, [torch.bfloat16, torch.float32], FLAT),
    ids=str,
)
def test_graft_moments_gathers(impl, flat, param, layout, how):
    """The same bits as to gather first: in ``grad``, the moments, the directions and norms."""
    alpha, accumulate, normalized = how
    sources = [make(layout, param), make(layout, torch.float32)]
    dims = LAYOUTS[layout][1]
    tiles, boxes, numel = table([dims, dims], 16, skip=3)
    start = torch.randn(5, numel, dtype=flat)
    scalars = (0.9, 0.1, 0.99, 0.01, 0.01, 1e-8, normalized)
    order = (tiles.shape[1] - 2) // 4
    runs = []
    for row in tiles.tolist():
        grid, extent = row[2 + 2 * order : 2 + 3 * order], row[2 + 3 * order :]
        runs.append([0, row[1], numel, row[1], math.prod(grid), math.prod(extent)])
    results = []
    for gathers in (True, False):
        grad, average, square, direction, _ = start.clone().unbind()
        square.abs_()
        norm = torch.full((len(boxes),), torch.nan, dtype=flat)
        blocks = sources, tiles, alpha, accumulate
        if not gathers:
            impl.gather_blocks_(grad, *blocks)
            blocks = [grad], torch.tensor(runs), 1.0, False
        impl.graft_moments_(grad, average, square, direction, norm, *blocks, *scalars)
        results.append((grad, average, square, direction, norm))
        if gathers and not accumulate:  # and the same without a place for it
            _, *moments, _ = start.clone().unbind()
            moments[1].abs_()
            again = torch.full_like(norm, torch.nan)
            impl.graft_moments_(None, *moments, again, *blocks, *scalars)
            torch.testing.assert_close((*moments, again), results[0][1:], rtol=0, atol=0)
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("beta1", "how", "has_square", "as_tensors", "flat"),
    pairwise([0.9, 0.3, 0.0], GATHERS, [False, True], [False, True], FLAT),
    ids=str,
)
def test_graft_moments_looks_ahead(impl, flat, as_tensors, has_square, how, beta1):
    """The bits of torch's operations one by one on what else is written, which does not change."""
    alpha, accumulate, normalized = how
    tiles = packed(RUNS)[[0, 2, 3, 4]]  # nothing is written where no tile lies
    start, source = torch.randn(6, NUMEL, dtype=flat), torch.randn(NUMEL).bfloat16()
    start[2].abs_()
    numbers = [alpha, beta1, 0.3, 0.99, 0.01, 0.2]
    if as_tensors:
        numbers = [torch.tensor(number, dtype=torch.float64) for number in numbers]
    alpha, *scalars = numbers
    results = []
    for looks in (False, True):
        grad, average, square, direction, ahead, _ = start.clone().unbind()
        norm = torch.full((13,), torch.nan, dtype=flat)
        state = grad, average, square if has_square else None, direction, norm
        rest = alpha, accumulate, *scalars, 1e-8, normalized, *([ahead] if looks else [])
        impl.graft_moments_(*state, [source], tiles, *rest)
        results.append((grad, average, square, direction, norm))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    expected = (grad - average).mul_(1.0 - beta1).add_(average)
    expected[7500:7502] = start[4][7500:7502]
    assert torch.equal(ahead, expected)


def test_graft_moments_may_write_the_direction_over_the_gradient(impl):
    grad, tiles = torch.randn(NUMEL), packed(RUNS)
    norms = [torch.empty(15), torch.empty(15)]
    moments = [[torch.zeros(NUMEL), torch.ones(NUMEL)] for _ in range(2)]
    apart, over = torch.empty(NUMEL), grad.clone()
    scalars = (-1.0, False, 0.9, 0.1, 0.99, 0.01, 0.01, 1e-8, True)
    impl.graft_moments_(None, *moments[0], apart, norms[0], [grad], tiles, *scalars)
    impl.graft_moments_(None, *moments[1], over, norms[1], [over], tiles, *scalars)
    torch.testing.assert_close((over, norms[1]), (apart, norms[0]), rtol=0, atol=0)
    assert torch.equal(moments[0][0], moments[1][0])


@pytest.mark.parametrize("normalized", [False, True])
def test_graft_moments_may_gather_a_segment_from_itself(impl, normalized):
    grad, tiles = torch.randn(NUMEL), packed(RUNS)
    results = []
    for is_own in (False, True):
        own, moments = grad.clone(), [torch.zeros(NUMEL), torch.ones(NUMEL)]
        source, norm = own if is_own else grad, torch.empty(15)
        scalars = (-1.0, False, 0.9, 0.1, 0.99, 0.01, 0.01, 1e-8, normalized)
        impl.graft_moments_(own, *moments, None, norm, [source], tiles, *scalars)
        results.append((own, *moments, norm))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert torch.equal(results[0][0], -grad)


def test_graft_moments_without_a_memory_is_exact(impl):
    """As lerp with a weight of 1: no rounding of what was there before."""
    grad, average, direction = torch.randn(NUMEL), torch.randn(NUMEL) * 1e4, torch.empty(NUMEL)
    scalars = (1.0, False, 0.0, 1.0, 0.99, 0.01, 1.0, 1e-8, False)
    state = None, average, None, direction
    impl.graft_moments_(*state, torch.empty(15), [grad], packed(RUNS), *scalars)
    assert torch.equal(average, grad)
    assert torch.equal(direction, grad)


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_graft_moments_takes_nothing_of_a_nan(impl, accumulate, as_tensors):
    """What a captured step does with gradients that are not finite: alpha = 0."""
    source = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 1.0]).repeat(NUMEL // 5 + 1)
    numbers = [0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    if as_tensors:
        numbers = [torch.tensor(number, dtype=torch.float64) for number in numbers]
    alpha, *scalars = numbers
    start = [torch.randn(NUMEL), torch.randn(NUMEL), torch.rand(NUMEL) + 0.1]
    grad, average, square = (tensor.clone() for tensor in start)
    direction, norm = torch.full((NUMEL,), torch.nan), torch.full((15,), torch.nan)
    state, tiles = (grad, average, square, direction, norm), packed(RUNS)
    impl.graft_moments_(*state, [source[:NUMEL]], tiles, alpha, accumulate, *scalars, 1e-8, False)
    assert torch.equal(grad, start[0] if accumulate else torch.zeros(NUMEL))
    assert torch.equal(average, start[1])
    assert torch.equal(square, start[2])
    assert direction.isfinite().all()
    assert norm.isfinite().all()


def test_graft_moments_keeps_a_nan_in_its_block(impl):
    grad, norm = torch.randn(NUMEL), torch.empty(15)
    grad[0] = torch.nan
    state = None, torch.zeros(NUMEL), torch.zeros(NUMEL), None
    scalars = (1.0, False, 0.9, 0.1, 0.99, 0.01, 0.01, 1e-8, False)
    impl.graft_moments_(*state, norm, [grad], packed(RUNS), *scalars)
    assert norm.isnan().tolist() == [True] + [False] * 14
