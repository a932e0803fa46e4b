"""The average that roots are applied to: looked ahead by one gradient, or not (step 5)."""

from typing import Any

import pytest
import torch
from torch.nn import Parameter
from trajectory import (
    apply,
    assert_relative,
    compare,
    double_shampoo,
    random_grads,
    random_params,
    twins_of,
)

from shampoo import Shampoo

SHAPES = [(9, 5), (4, 3, 2), (7,)]
CASES: dict[str, dict[str, Any]] = {
    "adam": {},
    "no graft": {"grafting": "none", "eps": 1e-3},
    "no correction": {"grafting": "none", "bias_correction": False, "eps": 1e-3},
    "a late start": {"start_preconditioning_step": 4, "precondition_frequency": 3},
    "momentum": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "kept by the layer": {"grafting": "lamb", "weight_decay": 0.1},
    "coupled": {"decoupled_weight_decay": False, "weight_decay": 0.1},
    "little average": {"betas": (1e-9, 0.95)},
}


@pytest.mark.parametrize("looks_ahead", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_reference(case, looks_ahead):
    compare(SHAPES, 9, **{"lr": 0.1, "nesterov_average": looks_ahead, **CASES[case]})


def test_it_is_what_trains_unless_it_is_switched_off():
    ends, start = [], random_params((9, 5))
    for hyper in ({}, {"nesterov_average": True}, {"nesterov_average": False}):
        params = twins_of(start)
        opt = double_shampoo(params, lr=0.1, **hyper)
        for grads in random_grads(params, 5):
            apply(opt, params, grads)
        ends.append(params[0])
    assert torch.equal(ends[0], ends[1])
    assert not torch.allclose(ends[0], ends[2], rtol=1e-3)


@pytest.mark.parametrize("hyper", [{"betas": (0.0, 0.95)}, {"precondition": False}])
def test_it_changes_nothing_without_an_average_or_without_roots(hyper):
    params = random_params(*SHAPES)
    twins = twins_of(params)
    ours = double_shampoo(params, lr=0.1, nesterov_average=True, **hyper)
    theirs = double_shampoo(twins, lr=0.1, nesterov_average=False, **hyper)
    for grads in random_grads(params, 5):
        apply(ours, params, grads)
        apply(theirs, twins, grads)
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(param, twin)


def test_a_gradient_that_stays_is_its_own_average_whichever_way():
    params = random_params((6, 5))
    twins = twins_of(params)
    hyper = {"lr": 0.1, "grafting": "none", "eps": 1e-3}
    ours = double_shampoo(params, nesterov_average=True, **hyper)
    theirs = double_shampoo(twins, nesterov_average=False, **hyper)
    [grads] = random_grads(params, 1)
    for _ in range(8):
        apply(ours, params, grads)
        apply(theirs, twins, grads)
    assert_relative(params[0], twins[0], 1e-12)


def test_gradients_are_left_as_they_are():
    param = Parameter(torch.randn(8, 6))
    param.grad = torch.randn(8, 6)
    before = param.grad.clone()
    opt = Shampoo([param], lr=0.1)
    for _ in range(3):
        opt.step()
        assert torch.equal(param.grad, before)


def test_betas_that_are_tensors_look_ahead_alike():
    params = random_params((6, 5), (4, 4))
    twins = twins_of(params)
    live = {"capturable": True, "root_method": "minimax"}
    betas = (torch.tensor(0.9), torch.tensor(0.95))
    ours = double_shampoo(params, lr=0.1, betas=betas, **live)
    theirs = double_shampoo(twins, lr=0.1, betas=(float(betas[0]), float(betas[1])), **live)
    for grads in random_grads(params, 6):
        apply(ours, params, grads)
        apply(theirs, twins, grads)
    for param, twin in zip(params, twins, strict=True):
        assert_relative(param, twin, 1e-12)


def test_a_value_that_is_no_flag_is_refused():
    with pytest.raises(ValueError, match=r"Invalid nesterov_average=1\. Must be True or False"):
        Shampoo([Parameter(torch.ones(2, 2))], nesterov_average=1)
