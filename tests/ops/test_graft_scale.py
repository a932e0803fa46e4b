"""``graft_scale_``, block by block in plain Python, on every backend there is on the CPU."""

import math

import pytest
import torch
from compiled import load_compiled
from host_build import HostOps

from shampoo import ops
from shampoo.certificates.cases.tiles import FLAT
from shampoo.kernels.reference import ops as reference

NORMS = [2.0, 0.5, 3.0, 0.0, 1.0, 7.0, 1e8]
LENGTHS = [4.0, 0.0, math.nan, 1.0, math.inf, 1e-3, 2.0]
OWN = [True, True, True, True, False, False, True]


@pytest.fixture(params=["reference", "compiled", "emulated"])
def impl(request):
    if request.param == "emulated":
        return HostOps()
    if request.param == "compiled":
        load_compiled()
        return ops
    return reference


def expected(norm, length, is_own, correction, grafted, most):
    if not is_own:
        return 1.0 if norm <= most else 0.0
    found = norm / (length / correction + 1e-16) / correction if grafted else 1.0 / correction
    return found if found * length <= most else 0.0


@pytest.mark.parametrize("how", ["number", "tensor", "each"])
@pytest.mark.parametrize("grafted", [True, False])
@pytest.mark.parametrize("follows", ["none", "some", "all"])
@pytest.mark.parametrize("flat", FLAT, ids=str)
def test_every_block_by_itself(impl, flat, follows, grafted, how):
    corrections = [0.25] * len(NORMS) if how != "each" else [0.1 * n for n in range(1, 8)]
    own = {"none": [True] * len(NORMS), "some": OWN, "all": [False] * len(NORMS)}[follows]
    norm, length = (torch.tensor(values, dtype=flat) for values in (NORMS, LENGTHS))
    scale = torch.full_like(norm, torch.nan)
    correction = torch.tensor(corrections, dtype=torch.float64)
    impl.graft_scale_(
        scale,
        norm,
        None if follows == "all" else length,
        torch.tensor(own) if follows == "some" else None,
        {"number": 0.25, "tensor": correction[0], "each": correction}[how],
        grafted,
        1e6,
    )
    rows = zip(NORMS, LENGTHS, own, corrections, strict=True)
    found = [expected(*row, grafted, 1e6) for row in rows]
    torch.testing.assert_close(scale, torch.tensor(found, dtype=flat))
    assert found[2] == (1.0 if follows == "all" else 0.0), "a NaN takes no step"


@pytest.mark.parametrize("is_accepted", [True, False])
@pytest.mark.parametrize("follows", ["none", "all"])
def test_what_is_not_accepted_takes_no_step(impl, is_accepted, follows):
    norm, scale = torch.rand(5) + 1.0, torch.full((5,), torch.nan)
    length = None if follows == "all" else torch.rand(5) + 1.0
    impl.graft_scale_(scale, norm, length, None, 1.0, True, 1e6, torch.tensor(is_accepted))
    assert bool(scale.all()) is is_accepted
    assert bool(scale.any()) is is_accepted


def test_a_direction_is_kept_up_to_its_longest(impl):
    norm = torch.tensor([99.0, 100.0, 100.00001])
    scale = torch.empty(3)
    impl.graft_scale_(scale, norm, None, None, 1.0, True, 100.0)
    assert scale.tolist() == [1.0, 1.0, 0.0]
