"""Gradients that are missing, zero, huge, shared or wrong."""

import math
from typing import Any

import pytest
import torch
from reference_shampoo import ReferenceShampoo
from trajectory import (
    apply,
    assert_relative,
    assert_same_bits,
    compare,
    double_shampoo,
    random_grads,
    random_params,
    snapshot,
    state_tensors,
    twins_of,
)

import shampoo
from shampoo import Shampoo

SHAPES = [(5, 4), (4,), (2, 3, 2)]
RICH: dict[str, Any] = {
    # every buffer in use
    **{"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1, "momentum": 0.5},
    **{"precondition_frequency": 2, "max_preconditioner_dim": 3},
}


def test_a_missing_gradient_leaves_its_parameter_bit_identical():
    params = random_params(*SHAPES)
    opt = double_shampoo(params, **RICH)
    history = random_grads(params, 4)
    apply(opt, params, history[0])
    apply(opt, params, history[1])
    before = snapshot(opt)
    apply(opt, params, [None, history[2][1], None])
    after = snapshot(opt)
    for i in (0, 2):
        for key in (k for j, k in before if j == i):  # "step" among them: it has taken none
            assert torch.equal(after[i, key], before[i, key]), (i, key)
    assert after[1, "step"] == 3
    assert not torch.equal(after[1, "weight"], before[1, "weight"])


@pytest.mark.parametrize("grafting", ["adam", "lamb", "adagrad_normalized", "none"])
@pytest.mark.parametrize("method", ["blocking", "diagonal", "adagrad"])
def test_gradients_that_come_and_go_follow_the_reference(grafting, method):
    """Equal shapes, so that stacks are partly idle, also at refreshes (steps 2, 4, 6)."""
    idle = {(1, 0), (2, 0), (2, 3), (4, 1), (4, 3), (5, 0), (5, 1), (5, 2), (6, 2), (7, 0)}
    compare(
        [(5, 4), (5, 4), (4,), (5, 4), (3, 2)],
        9,
        mask=lambda t, i: (t, i) not in idle,
        **{**RICH, "grafting": grafting, "large_dim_method": method, "eps": 1e-6},
    )


def test_a_step_without_any_gradient_changes_and_counts_nothing():
    params = random_params(*SHAPES)
    opt = double_shampoo(params, **RICH)
    apply(opt, params, [None] * 3)
    history = random_grads(params, 2)
    apply(opt, params, history[0])
    before = snapshot(opt)
    apply(opt, params, [None] * 3)
    assert_same_bits(snapshot(opt), before)


def test_gradients_none_then_zero_then_real_follow_the_reference():
    params = random_params(*SHAPES)
    opt, reference = double_shampoo(params, **RICH), ReferenceShampoo(params, **RICH)
    zeros = [torch.zeros_like(p) for p in params]
    history = random_grads(params, 4)
    sequence = [[None] * 3, zeros, history[0], zeros, history[1], [None] * 3, *history[2:]]
    for grads in sequence:
        apply(opt, params, grads)
        reference.step(list(grads))
        for param, expected in zip(params, reference.params, strict=True):
            assert_relative(param, expected)
    assert opt.state[params[0]]["step"] == reference.states[0].t == 5


@pytest.mark.parametrize("decoupled", [True, False])
def test_all_zero_gradients_before_the_first_real_step_are_inert(decoupled):
    params = random_params(*SHAPES)
    twins = twins_of(params)
    hyper = {**RICH, "decoupled_weight_decay": decoupled, "precondition_frequency": 1}
    ours, theirs = double_shampoo(params, **hyper), double_shampoo(twins, **hyper)
    before = [p.detach().clone() for p in params]
    apply(ours, params, [torch.zeros_like(p) for p in params])
    assert ours.state[params[0]], "the inert step allocates state"
    assert all(not value.any() for value in state_tensors(ours).values()), "and computes none"
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    for grads in random_grads(params, 4):
        apply(ours, params, grads)
        apply(theirs, twins, grads)
    assert_same_bits(snapshot(ours), snapshot(theirs))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_both_ways(set_to_none):
    layer = torch.nn.Linear(4, 3).double()
    twin = torch.nn.Linear(4, 3).double()
    twin.load_state_dict(layer.state_dict())
    ours, theirs = (double_shampoo(m.parameters(), **RICH) for m in (layer, twin))
    for _ in range(4):
        x = torch.randn(5, 4, dtype=torch.float64)
        ours.zero_grad(set_to_none=set_to_none)
        layer(x).square().mean().backward()
        ours.step()
        theirs.zero_grad()
        twin(x).square().mean().backward()
        theirs.step()
    ours.zero_grad(set_to_none=set_to_none)
    assert (layer.weight.grad is None) == set_to_none
    for param, expected in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.equal(param, expected)


@pytest.mark.parametrize(
    "hyper",
    [
        {"decoupled_weight_decay": False},
        {"maximize": True},
        {"momentum": 0.9, "nesterov": True},
        {"grafting": "none", "betas": (0.0, 1.0)},
        {"grafting": "sgd", "betas": (0.0, 0.9), "start_preconditioning_step": math.inf},
        {"grafting": "adam_normalized"},
        {"grafting": "lamb"},
        {"large_dim_method": "adagrad"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k5_gradients_keep_their_bits_and_are_not_held(hyper, dtype):
    params = random_params(*SHAPES, dtype=dtype)
    opt = Shampoo(params, preconditioner_dtype=dtype, **{**RICH, **hyper})
    for grads in random_grads(params, 4):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        held = [p.grad for p in params]
        opt.step()
        for param, grad, same in zip(params, grads, held, strict=True):
            assert param.grad is same
            assert torch.equal(param.grad, grad)
        before = snapshot(opt)
        for param in params:
            param.grad.fill_(math.nan)  # whoever kept a view of it would show
        assert_same_bits(snapshot(opt), before)


NONFINITE = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", NONFINITE)
@pytest.mark.parametrize("when", [0, 2])
def test_a_non_finite_gradient_skips_the_step_for_all_and_is_counted(bad, when):
    params = random_params((5, 4), (4,), (2, 3, 2), (3, 3))
    twins = twins_of(params)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3}]
    twin_groups = [{"params": twins[:2]}, {"params": twins[2:], "lr": 0.3}]
    ours, theirs = double_shampoo(groups, **RICH), double_shampoo(twin_groups, **RICH)
    for t, grads in enumerate(random_grads(params, 6)):
        if t == when:
            poisoned = [g.clone() for g in grads]
            poisoned[2][1, 2, 0] = bad
            before = snapshot(ours)
            for _ in range(2):
                apply(ours, params, poisoned)
            after = snapshot(ours)
            assert_same_bits({key: after[key] for key in before}, before)
            assert max(g["extra"]["skipped_steps"] for g in ours.param_groups) == 2
            assert ours.skipped_steps == 2
        apply(ours, params, grads)
        apply(theirs, twins, grads)
        assert_same_bits(snapshot(ours), snapshot(theirs))
    assert ours.skipped_steps == 2
    assert theirs.skipped_steps == 0


@pytest.mark.parametrize("bad", NONFINITE)
@pytest.mark.parametrize("named", [True, False])
def test_a_non_finite_gradient_raises_on_request(bad, named):
    params = random_params((5, 4), (4,))
    given: Any = list(zip(["net.0.weight", "net.0.bias"], params, strict=True))
    opt = double_shampoo(given if named else params, nonfinite="raise", **RICH)
    good = random_grads(params, 1)[0]
    apply(opt, params, good)
    before = snapshot(opt)
    poisoned = [good[0].clone(), good[1].clone()]
    poisoned[1][2] = bad
    with pytest.raises(shampoo.NonFiniteGradientError, match="net.0.bias" if named else "1"):
        apply(opt, params, poisoned)
    assert_same_bits(snapshot(opt), before)
    assert issubclass(shampoo.NonFiniteGradientError, RuntimeError)


def test_grad_scaler_skips_a_loss_that_overflowed():
    model = torch.nn.Linear(4, 3)
    opt = Shampoo(model.parameters(), lr=0.1, precondition_frequency=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(5, 4)
    for factor in (1.0, math.inf, 1.0):
        before = snapshot(opt)
        opt.zero_grad()
        scaler.scale(model(x).square().mean() * factor).backward()
        scaler.step(opt)
        scaler.update()
        after = snapshot(opt)
        if factor == math.inf:
            assert_same_bits(after, before)
        else:
            assert not torch.equal(after[0, "weight"], before[0, "weight"])
    assert scaler.get_scale() == 512.0
    assert opt.state[model.weight]["step"] == 2
