"""check_roots_ against the reference: the two numbers, and the verdict on injected failures."""

import pytest
import torch
from comparison import SIZES
from root_cases import Exact, stack

from shampoo.kernels.reference import root_check
from shampoo.kernels.triton.root_check import check_roots_, supports

EPS = 1e-6


def roots_of(A, p):
    exact = [Exact(matrix) for matrix in A]
    X = torch.stack([e.root(p, EPS * e.norm) for e in exact]).float()
    return (X + X.mT) / 2, torch.tensor([EPS * e.norm for e in exact], dtype=torch.float64)


def check(X, A, ridge, p):
    ok, values = torch.zeros(len(A), dtype=torch.bool), torch.full((len(A), 2), torch.nan).double()
    assert supports(ok, X, A, ridge, p)
    check_roots_(ok, X, A, ridge, p, values=values)
    wanted = torch.zeros_like(ok)
    root_check.check_roots_(wanted, X, A, ridge, p)
    return ok, wanted, values


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6])
def test_the_two_numbers(n, p):
    A = stack(2, n, decades=3.0)
    X, ridge = roots_of(A, p)
    noise = torch.randn(n, n) * 1e-3 * X.abs().amax()  # so that the commutator is not rounding
    X += noise + noise.mT
    ok, wanted, values = check(X, A, ridge, p)
    exact_commutator, exact_form = root_check.check_values(X.double(), A.double(), ridge, p)
    scale = exact_commutator.clamp(min=1e-4)
    assert ((values[:, 0] - exact_commutator).abs() <= 1e-3 * scale + 1e-6).all()
    assert ((values[:, 1] - exact_form).abs() <= 1e-3 * exact_form.abs()).all()
    assert torch.equal(ok, wanted)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_the_verdict(p):
    A = stack(8, 65) * 10.0 ** torch.arange(-4, 4)[:, None, None]
    X, ridge = roots_of(A, p)
    ok, wanted, _ = check(X, A, ridge, p)
    assert ok.all()
    assert wanted.all()
    X[0, 64, 64] = torch.nan
    X[1, 3, 64] = torch.inf
    X[2] *= 1.3  # a wrong quadratic form
    X[3, 64, 64] = -X[3, 64, 64]
    X[4] += 1e-1 * X[4].abs().amax() * torch.eye(65)[torch.randperm(65)]
    A[5] = torch.nan
    X[6, 64, 64] += 2 * ridge[6].item() ** (-1 / p)
    ok, wanted, _ = check(X, A, ridge, p)
    assert torch.equal(ok, wanted)
    assert ok.tolist() == [False] * 7 + [True]


def test_pseudo_inverses_have_no_ridge():
    A = stack(3, 33, decades=1.0)
    A[1] = 0
    X, _ = roots_of(A, 4)
    X[1] = 0
    X[2, 5, 5] = -1
    ok, wanted, _ = check(X, A, torch.zeros(3, dtype=torch.float64), 4)
    assert torch.equal(ok, wanted)
    assert ok.tolist() == [True, True, False]


@pytest.mark.parametrize("place", [0, 32])
def test_a_negative_diagonal_that_commutes(place):
    A = torch.eye(33).repeat(2, 1, 1)
    X = A.clone()
    X[1, place, place] = -1
    ok, wanted, _ = check(X, A, torch.zeros(2, dtype=torch.float64), 4)
    assert torch.equal(ok, wanted)
    assert ok.tolist() == [True, False]


def test_what_is_left_to_the_reference():
    A = stack(1, 4)
    ok, ridge = torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.float64)
    assert supports(ok, A, A, ridge, 4.0)
    assert not supports(ok, A, A, ridge, 2.5)
    assert not supports(ok, A.double(), A.double(), ridge, 4.0)
