"""The minimax chain of the CPU against the same chain in PyTorch, and against float64 roots."""

from __future__ import annotations

import pytest
import torch
from compiled import load_compiled
from op_arguments import good_arguments
from root_cases import Exact, spd, stack
from torch import Tensor

from shampoo import ops
from shampoo.kernels.reference import minimax
from shampoo.roots.minimax_table import minimax_schedule

NEWTON = [1.25, -0.25, 0.0, 0.0, 0.0]  # a step of degree one, for p = 4
SIZES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 257]


@pytest.fixture
def compiled():
    load_compiled()
    return ops.minimax_root_


def roots(kernel, A: Tensor, p: int, eps=0.0, relative_eps=1e-6, schedule=None):
    schedule = schedule or [c for step in minimax_schedule(p, relative_eps) for c in step]
    root = torch.full_like(A, torch.nan, memory_format=torch.contiguous_format)
    ridge = torch.full((len(A),), torch.nan, dtype=torch.float64)
    kernel(root, ridge, A, p, eps, relative_eps, schedule)
    return root, ridge


def distance(A: Tensor, X: Tensor, Y: Tensor, p: int, ridge: float) -> float:
    """Between two roots of A, where 1 is a root of nothing."""
    exact = Exact(A)
    half = exact.damped(ridge) ** (0.5 / p)
    E = exact.vectors.mT @ (X.double() - Y.double()) @ exact.vectors * half * half[:, None]
    return float(torch.linalg.matrix_norm(E, ord=2))


def assert_as_good(compiled, A: Tensor, p: int, **options) -> None:
    """In float64 the same; in float32 at most twice as far from that as PyTorch's own float32.

    Give or take two roundings of the matrix, as the root sees them.
    """
    truth, ridges = roots(minimax.minimax_root_, A.double(), p, **options)
    same, same_ridges = roots(compiled, A.double(), p, **options)
    actual, own_ridges = roots(compiled, A, p, **options)
    expected, _ = roots(minimax.minimax_root_, A, p, **options)
    torch.testing.assert_close(same_ridges, ridges, rtol=1e-12, atol=0)
    torch.testing.assert_close(own_ridges, ridges, rtol=1e-5, atol=0)
    for X in (same, actual):
        assert torch.equal(X, X.mT)
    for b, ridge in enumerate(ridges.tolist()):
        assert distance(A[b], same[b], truth[b], p, ridge) <= 1e-9
        wrong = distance(A[b], expected[b], truth[b], p, ridge)
        exact = Exact(A[b])
        rounding = torch.finfo(A.dtype).eps * exact.norm / exact.damped(ridge).min().item() / p
        assert distance(A[b], actual[b], truth[b], p, ridge) <= 2 * wrong + 2 * rounding


@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("n", SIZES)
def test_the_chain_is_its_reference(compiled, n, p):
    for count in (1, 3) if n < 100 else (1,):
        assert_as_good(compiled, stack(count, n, 4.0), p)


@pytest.mark.parametrize("p", [10, 12])
def test_high_powers(compiled, p):
    assert_as_good(compiled, stack(2, 40, 4.0), p)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_schedules_of_one_step_and_of_degree_one(compiled, steps):
    A = torch.stack([spd(torch.logspace(0, -0.1, 20))])
    assert_as_good(compiled, A, 4, relative_eps=1e-2, schedule=NEWTON * steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [5, 33, 96, 270])
def test_bits_depend_on_nothing_but_the_matrix(compiled, n, dtype):
    """Neither on the neighbours, nor on the threads, which share a matrix where there are few."""
    A = stack(4, n, 4.0).to(dtype)
    before = torch.get_num_threads()
    wanted, ridges = [], []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for part in (A, A[2:3], A[1:3]):
                root, ridge = roots(compiled, part, 4)
                wanted.append(root[-1] if part is not A else root[2])
                ridges.append(ridge[-1] if part is not A else ridge[2])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(root, wanted[0]) for root in wanted)
    assert all(torch.equal(ridge, ridges[0]) for ridge in ridges)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (39, 39), (3, 38)])
def test_what_is_not_finite_ruins_its_own_root_alone(compiled, bad, place):
    A = stack(3, 40, 4.0)
    clean, _ = roots(compiled, A, 4)
    A[1][place] = A[1].mT[place] = bad
    root, ridge = roots(compiled, A, 4)
    assert root[1].isnan().all()
    assert not ridge[1].isfinite()
    assert torch.equal(root[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("scale", [2.0**-140, 1e-30, 3.0, 2.0**120])
def test_no_scale_leaves_the_range(compiled, scale):
    A = spd(torch.logspace(0, -2, 24))[None]
    root, ridge = roots(compiled, A * scale, 4, relative_eps=1e-4)
    exact = Exact(A[0] * scale)
    assert ridge.item() == pytest.approx(1e-4 * exact.norm, rel=1e-4)
    assert exact.error(root[0], 4, ridge.item()) <= 2e-3


def test_the_absolute_ridge_counts_where_it_is_larger_and_zero_has_a_root(compiled):
    A = torch.stack([torch.zeros(9, 9), spd(torch.logspace(-6, -8, 9))])
    root, ridge = roots(compiled, A, 2, eps=1e-4)
    assert ridge.tolist() == pytest.approx([1e-4, 1e-4], rel=1e-12)
    eye = torch.eye(9) * 1e-4**-0.5
    torch.testing.assert_close(root, eye.expand(2, 9, 9), rtol=2e-2, atol=2.0)
    torch.testing.assert_close(root[0], eye, rtol=2e-3, atol=1e-3)


def test_strided_and_empty_stacks(compiled):
    A = stack(2, 24, 4.0)
    wide = torch.randn(2, 24, 48)
    wide[:, :, ::2] = A
    kept = wide.clone()
    assert torch.equal(roots(compiled, wide[:, :, ::2], 4)[0], roots(compiled, A, 4)[0])
    assert torch.equal(wide, kept)
    for shape in ((0, 5, 5), (3, 0, 0)):
        assert roots(compiled, torch.empty(shape), 4)[0].shape == shape


WRONG = [
    ("factor", torch.ones(2, 4, 3), r"factor has shape \[2, 4, 3\]. Must be \[B, n, n\]"),
    ("factor", torch.ones(2, 4, 4).half(), r"factor has dtype Half. Must be float32 or float64"),
    ("root", torch.ones(2, 4, 3), r"root is Float of shape \[2, 4, 3\].*Must be contiguous Float"),
    ("root", torch.ones(2, 4, 4).double(), r"root is Double of shape"),
    ("root", torch.ones(2, 4, 8)[:, :, ::2], r"with strides \[32, 8, 2\]. Must be contiguous"),
    ("ridge", torch.ones(2), r"ridge is Float of shape \[2\]. Must be contiguous float64"),
    ("ridge", torch.ones(3).double(), r"ridge is Double of shape \[3\].*of shape \[2\]"),
    ("p", 0, r"Invalid p=0. Must be >= 1"),
    ("schedule", [], r"schedule has 0 coefficients. Must have five for each step, and a step"),
    ("schedule", [1.0] * 4, r"schedule has 4 coefficients"),
]


@pytest.mark.parametrize(("argument", "value", "message"), WRONG)
def test_a_wrong_argument_is_named_with_its_value_and_bound(compiled, argument, value, message):
    arguments = good_arguments().minimax_root_
    compiled(**arguments)
    with pytest.raises(RuntimeError, match=message):
        compiled(**{**arguments, argument: value})
