"""diagonal_root_ and keep_roots_: their cases, views, and what pads a factor."""

import pytest
import torch
from comparison import symmetric

from shampoo.certificates.cases import CASES
from shampoo.certificates.checks import Trial
from shampoo.kernels.reference import diagonal as reference
from shampoo.kernels.triton import diagonal, keep_roots
from shampoo.ops import OPS

CPU = torch.device("cpu")
LARGE = 130  # which the interpreter takes long for


def cases(op):
    return [case for case in CASES[op] if max(case.arguments()["root"].shape) <= LARGE]


@pytest.mark.parametrize("module", [diagonal, keep_roots])
def test_the_cases(module):
    op = "diagonal_root_" if module is diagonal else "keep_roots_"
    for case in cases(op):
        trial = Trial(case, OPS[op], CPU, "triton")
        assert trial.accepts(module.supports)
        found = trial.examine(lambda _: getattr(module, op))
        assert not found.failure, case.name


def diagonal_factor(n, dtype=torch.float32):
    return (torch.rand(3, n, dtype=dtype) + 0.1).diag_embed()


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0, 4.5])
def test_powers_are_those_of_the_reference(p):
    factor = diagonal_factor(65)
    factor[1] *= torch.logspace(0, -12, 65)
    found, wanted = ([torch.zeros(3, 65, 65), torch.zeros(3).double()] for _ in range(2))
    diagonal.diagonal_root_(*found, factor, p, 1e-12, 1e-6)
    reference.diagonal_root_(*wanted, factor, p, 1e-12, 1e-6)
    torch.testing.assert_close(found[0], wanted[0], rtol=2**-23, atol=0.0)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-14, atol=0.0)


def test_zero_padding_changes_no_bit():
    alone, padded = diagonal_factor(33), torch.zeros(3, 70, 70)
    padded[:, :33, :33] = alone
    roots = torch.zeros(3, 33, 33), torch.zeros(3, 70, 70)
    ridges = torch.zeros(2, 3).double()
    for root, ridge, factor in zip(roots, ridges, (alone, padded), strict=True):
        diagonal.diagonal_root_(root, ridge, factor, 4.0, 0.0, 1e-6)
    assert torch.equal(roots[0], roots[1][:, :33, :33])
    assert torch.equal(*ridges)


def test_parts_of_wider_matrices():
    wide, into = torch.full((2, 3, 40, 48), 7.0)
    factor, root, ridge = wide[:, :33, :33], into[:, :33, :33], torch.zeros(3).double()
    factor.copy_(diagonal_factor(33))
    diagonal.diagonal_root_(root, ridge, factor, 4.0, 0.0, 1e-6)
    wanted = torch.zeros(3, 33, 33)
    reference.diagonal_root_(wanted, ridge.clone(), factor.contiguous(), 4.0, 0.0, 1e-6)
    torch.testing.assert_close(root, wanted, rtol=2**-23, atol=0.0)
    candidate = symmetric(3, 33)
    wide[:, :33, :33] = candidate
    counts = (torch.zeros(3, dtype=each) for each in (torch.uint8, torch.int32, torch.bool))
    keep_roots.keep_roots_(root, *counts, factor, torch.tensor([True, True, False]))
    assert torch.equal(root[:2], candidate[:2])
    torch.testing.assert_close(root[2], wanted[2], rtol=2**-23, atol=0.0)
    assert (into[:, 33:] == 7).all()
    assert (into[:, :, 33:] == 7).all()


def test_what_is_left_to_the_reference():
    factor, ridge = diagonal_factor(4), torch.zeros(3).double()
    assert diagonal.supports(factor, ridge, factor, 4.5, 0.0, 1e-6)
    assert not diagonal.supports(factor.double(), ridge, factor.double(), 4.0, 0.0, 1e-6)
    assert not diagonal.supports(factor.mT, ridge, factor, 4.0, 0.0, 1e-6)
    ok = torch.ones(3, dtype=torch.bool)
    given = factor, ok.byte(), ok.int(), ok
    assert keep_roots.supports(*given, factor, ok)
    assert not keep_roots.supports(*given, factor.double(), ok)
    assert not keep_roots.supports(*given, factor, torch.ones(6, dtype=torch.bool)[::2])
