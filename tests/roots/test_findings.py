"""What is found of roots as they are taken, against eigenvalues in float64."""

import math

import pytest
import torch

from shampoo.kernels.reference.root_check import check_values, probe
from shampoo.roots.findings import largest_eigenvalue
from shampoo.roots.refresh import refresh_roots_
from shampoo.roots.root_check import passes_root_check, passes_with_findings


def test_of_a_large_stack_some_eigenvalues_are_found():
    """The same ones each time, evenly spread; errors are of all."""
    draws = torch.randn(40, 256, 300)
    stack = draws @ draws.mT
    found = [torch.full((3, 40), math.nan, dtype=torch.float64) for _ in range(2)]
    for each in found:
        root, failures = torch.zeros_like(stack), torch.zeros(40, dtype=torch.int32)
        ready = torch.zeros(40, dtype=torch.bool)
        how = {"p": 2, "correction": 1.0, "eps": 0.0, "relative_eps": 1e-6, "method": "minimax"}
        refresh_roots_(root, stack, failures, ready, **how, found=each)
    errors, ridges, largest = found[0]
    assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())
    assert errors.isfinite().all()
    assert (ridges > 0).all()
    assert largest.isfinite().nonzero()[:, 0].tolist() == list(range(0, 40, 3))
    expected = torch.linalg.eigvalsh(stack[::3].double())[:, -1]
    assert ((largest[::3] / expected) > 0.8).all()


SPECTRA = {
    "one": (torch.eye(64)[0], 0.999),
    "flat": (torch.ones(64), 0.999),
    "falling": (1.0 / torch.arange(1.0, 257.0), 0.98),
    "slowly falling": (torch.arange(1.0, 257.0) ** -0.5, 0.85),
    "spikes over a floor": (torch.tensor([9.0, 8.5, 8.0] + [1.0] * 200), 0.98),
    "of a gradient": (torch.logspace(0, -6, 128), 0.85),  # the second is 0.9 of the first
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
@pytest.mark.parametrize("ridge", [1e-6, 1e3])
def test_the_largest_eigenvalue(name, scale, ridge):
    values, share = SPECTRA[name]
    count = len(values)
    turned, _ = torch.linalg.qr(torch.randn(3, count, count, dtype=torch.float64))
    stack = ((turned * values) @ turned.mT).float() * scale
    ridges = torch.full((3,), ridge * scale, dtype=torch.float64)
    image = probe(torch.eye(count).expand_as(stack), stack, ridges, 2).image
    found = largest_eigenvalue(stack, image) / scale
    expected = float(values.max())
    assert (found <= expected * (1 + 1e-5)).all()
    assert (found >= expected * (share if ridge < 1 else 0.65 * share)).all(), found
    assert largest_eigenvalue(torch.zeros_like(stack), image).tolist() == [0.0] * 3


def test_the_verdict_is_that_of_the_check():
    """Of good roots, and of those that are wrong by a little, by a lot, or not finite."""
    draws = torch.randn(6, 20, 30)
    stack = draws @ draws.mT
    values, vectors = torch.linalg.eigh(stack.double())
    ridge = 1e-6 * values.pow(4).sum(1) ** 0.25
    root = ((vectors * (values + ridge[:, None])[:, None] ** -0.25) @ vectors.mT).float()
    root[1] *= 1.01
    root[2] *= 1.5
    root[3, 0, 1] = math.nan
    root[4] += 0.2 * root[4].norm() * torch.randn(20, 20)
    ok, found = passes_with_findings(root, stack, ridge, 4)
    assert ok.equal(passes_root_check(root, stack, ridge, 4))
    assert ok.tolist() == [True, True, False, False, False, True]
    assert torch.equal(found[0].nan_to_num(), check_values(root, stack, ridge, 4)[0].nan_to_num())
    assert found[1].equal(ridge)
    assert found[2] == pytest.approx(values[:, -1].numpy(), rel=0.1)
