"""What torch.optim promises to those who use it, one promise a test."""

from typing import Any

import pytest
import torch
from reference_shampoo import ReferenceShampoo
from torch import Tensor
from torch.nn import Parameter
from trajectory import (
    apply,
    assert_relative,
    assert_same_bits,
    compare,
    double_shampoo,
    random_grads,
    random_params,
    snapshot,
)

from shampoo import Shampoo

SHAPES = [(5, 4), (4,), (2, 3, 2)]
RICH: dict[str, Any] = {
    # every buffer in use
    **{"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1, "momentum": 0.5},
    **{"precondition_frequency": 2, "max_preconditioner_dim": 3},
}


def twins_of(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in params]


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.01},
        {"lr": torch.tensor(0.01, dtype=torch.float64)},
        {"betas": (0.5, 0.95)},
        {"betas": (0.9, 0.5)},
        {"eps": 0.5},
        {"relative_eps": 0.3},
        {"weight_decay": 0.7},
        {"decoupled_weight_decay": False},
        {"momentum": 0.9},
        {"nesterov": True},
        {"precondition_frequency": 3},
        {"start_preconditioning_step": 8},
        {"exponent": 3},
        {"exponent_multiplier": 1.5},
        {"bias_correction": False},
        {"grafting": "rmsprop"},
        {"grafting_beta2": 0.5},
        {"grafting_eps": 0.1},
        {"maximize": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_hyper_parameter_changed_mid_run_equals_a_twin(change):
    compare(SHAPES, 9, change={6: change}, **{**RICH, "start_preconditioning_step": 4})


def test_momentum_and_the_first_moment_may_be_switched_on_mid_run():
    """Their buffers start at zero then."""
    off = {**RICH, "momentum": 0.0, "betas": (0.0, 0.95)}
    compare(SHAPES, 8, change={5: {"momentum": 0.9}}, **off)
    compare(SHAPES, 8, change={5: {"betas": (0.9, 0.95)}}, **off)


def test_betas_may_be_tensors():
    params = random_params(*SHAPES)
    twins = twins_of(params)
    betas = (torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.95, dtype=torch.float64))
    ours = double_shampoo(params, **{**RICH, "betas": betas})
    theirs = double_shampoo(twins, **RICH)
    for grads in random_grads(params, 5):
        apply(ours, params, grads)
        apply(theirs, twins, grads)
    for param, twin in zip(params, twins, strict=True):
        assert_relative(param, twin, 1e-12)


def test_k2_groups_have_their_own_hyper_parameters():
    params = random_params(*SHAPES)
    own: list[dict[str, Any]] = [
        {"lr": 0.2, "betas": (0.5, 0.8), "grafting": "sgd", "weight_decay": 0.3},
        {"precondition_frequency": 3, "eps": 0.1, "momentum": 0.9, "precondition_1d": True},
        {"merge_dims": "none", "max_preconditioner_dim": 2, "grafting": "lamb", "maximize": True},
    ]
    groups = [{"params": [p], **hyper} for p, hyper in zip(params, own, strict=True)]
    opt = double_shampoo(groups, **RICH)
    references = [
        ReferenceShampoo([p], **{**RICH, **hyper}) for p, hyper in zip(params, own, strict=True)
    ]
    for grads in random_grads(params, 7):
        apply(opt, params, grads)
        for param, reference, grad in zip(params, references, grads, strict=True):
            reference.step([grad])
            assert_relative(param, reference.params[0])


def test_k2_equal_shapes_in_different_groups_do_not_mix():
    """Their blocks could share one stack."""
    params = random_params(*[(5, 4)] * 5)
    own: list[dict[str, Any]] = [
        {},
        {"lr": 0.3, "betas": (0.5, 0.8), "weight_decay": 0.0, "momentum": 0.9},
        {"eps": 0.1, "relative_eps": 1e-2, "grafting_eps": 1e-2, "nesterov": True},
        {"exponent": "paper", "precondition_frequency": 3, "bias_correction": False},
        {"betas": (0.9, 1.0), "decoupled_weight_decay": False, "start_preconditioning_step": 5},
    ]
    groups = [{"params": [p], **hyper} for p, hyper in zip(params, own, strict=True)]
    opt = double_shampoo(groups, **RICH)
    references = [
        ReferenceShampoo([p], **{**RICH, **hyper}) for p, hyper in zip(params, own, strict=True)
    ]
    for grads in random_grads(params, 8):
        apply(opt, params, grads)
        for i, (param, reference) in enumerate(zip(params, references, strict=True)):
            reference.step([grads[i]])
            assert_relative(param, reference.params[0], what=f"group {i}:")


def test_k2_precondition_false_on_a_group_is_the_graft_alone():
    params = random_params((5, 4), (5, 4))
    twins = twins_of(params[:1])
    opt = double_shampoo(
        [{"params": params[:1], "precondition": False}, {"params": params[1:]}],
        **{"lr": 0.1, "precondition_frequency": 1, "grafting_eps": 1e-8, "weight_decay": 0.1},
    )
    adamw = torch.optim.AdamW(twins, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for grads in random_grads(params, 5):
        apply(opt, params, grads)
        apply(adamw, twins, grads[:1])
    assert_relative(params[0], twins[0], 1e-12)
    assert not [key for key in opt.state[params[0]] if "factor" in key]
    compare([(5, 4), (3,)], 4, **{**RICH, "precondition": False, "grafting": "none", "eps": 1e-3})


def test_lr_as_a_tensor_is_the_schedulers_to_mutate():
    params = random_params(*SHAPES)
    twins = twins_of(params)
    lr = torch.tensor(0.1, dtype=torch.float64)
    ours, theirs = double_shampoo(params, **{**RICH, "lr": lr}), double_shampoo(twins, **RICH)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) for opt in (ours, theirs)]
    for grads in random_grads(params, 6):
        apply(ours, params, grads)
        apply(theirs, twins, grads)
        for scheduler in schedulers:
            scheduler.step()
    assert ours.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.1 * 0.5**6)
    for param, twin in zip(params, twins, strict=True):
        assert_relative(param, twin, 1e-13)


def test_one_cycle_rewrites_lr_and_betas():
    params = random_params(*SHAPES)
    opt = double_shampoo(params, **RICH)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        opt, max_lr=0.2, total_steps=9, cycle_momentum=True
    )
    reference = ReferenceShampoo(params, **RICH)
    seen = set()
    for grads in random_grads(params, 8):
        group = opt.param_groups[0]
        reference.hyper.update(lr=group["lr"], betas=group["betas"], momentum=group["momentum"])
        seen.add((group["betas"][0], group["momentum"]))
        apply(opt, params, grads)
        reference.step(list(grads))
        scheduler.step()
        for param, expected in zip(params, reference.params, strict=True):
            assert_relative(param, expected)
    assert len(seen) > 3, "the scheduler cycled nothing"


def test_keys_that_schedulers_add_are_tolerated():
    params = random_params(*SHAPES, dtype=torch.float32)
    opt = Shampoo(params, **RICH)
    torch.optim.lr_scheduler.CyclicLR(opt, base_lr=0.01, max_lr=0.1, cycle_momentum=True)
    opt.param_groups[0]["someones_note"] = "kept"
    for grads in random_grads(params, 3):
        apply(opt, params, grads)
    fresh_params = twins_of(params)
    fresh = Shampoo(fresh_params, **RICH)
    fresh.load_state_dict(opt.state_dict())
    assert fresh.param_groups[0]["someones_note"] == "kept"
    (grads,) = random_grads(params, 1, seed=9)
    apply(opt, params, grads)
    apply(fresh, fresh_params, grads)
    assert_same_bits(snapshot(fresh), snapshot(opt))


def test_foreach_and_fused_are_accepted_as_group_keys():
    opt = Shampoo([{"params": random_params((3, 2)), "foreach": False, "fused": True}])
    opt.add_param_group({"params": random_params((3, 2)), "foreach": None, "fused": None})
    params = [p for group in opt.param_groups for p in group["params"]]
    before = [param.clone() for param in params]
    apply(opt, params, random_grads(params, 1)[0])
    assert not any(torch.equal(param, old) for param, old in zip(params, before, strict=True))


@pytest.mark.parametrize("decoupled", [True, False])
def test_maximize_equals_negated_gradients(decoupled):
    params = random_params(*SHAPES)
    twins = twins_of(params)
    hyper = {**RICH, "decoupled_weight_decay": decoupled}
    ours, theirs = double_shampoo(params, maximize=True, **hyper), double_shampoo(twins, **hyper)
    for grads in random_grads(params, 5):
        apply(ours, params, grads)
        apply(theirs, twins, [-g for g in grads])
    assert_same_bits(snapshot(ours), snapshot(theirs))


def test_add_param_group_mid_training_keeps_state_and_starts_at_zero():
    params = random_params((5, 4), (4,), (3, 3))
    opt = double_shampoo(params[:2], **RICH)
    old = ReferenceShampoo(params[:2], **RICH)
    new = ReferenceShampoo(params[2:], **{**RICH, "lr": 0.3})
    for t, grads in enumerate(random_grads(params, 9), start=1):
        if t == 5:
            before = snapshot(opt)
            opt.add_param_group({"params": params[2:], "lr": 0.3})
            after = snapshot(opt)
            assert_same_bits({key: after[key] for key in before}, before)
        apply(opt, params, grads if t >= 5 else [*grads[:2], None])
        old.step(grads[:2])
        new.step(grads[2:] if t >= 5 else [None])
        for param, expected in zip(params, old.params + new.params, strict=True):
            assert_relative(param, expected)
    assert opt.state[params[0]]["step"] == 9
    assert opt.state[params[2]]["step"] == 5


def test_parameters_swapped_before_the_first_step_are_the_ones_that_train():
    params = random_params(*SHAPES)
    placeholders = [Parameter(torch.empty(1, dtype=torch.float64)) for _ in params]
    opt = double_shampoo(placeholders, **RICH)
    opt.param_groups[0]["params"] = list(params)
    reference = ReferenceShampoo(params, **RICH)
    for grads in random_grads(params, 4):
        apply(opt, params, grads)
        reference.step(list(grads))
    for param, expected in zip(params, reference.params, strict=True):
        assert_relative(param, expected)


@pytest.mark.parametrize("shape", [(5, 4), (4, 6)])
def test_parameters_swapped_after_steps_start_fresh_and_spare_their_neighbours(shape, said):
    params = random_params((5, 4), (4, 3))
    opt = double_shampoo(params, **RICH)
    kept = ReferenceShampoo(params[1:], **RICH)
    for grads in random_grads(params, 3):
        apply(opt, params, grads)
        kept.step(grads[1:])
    gone, old = params[0], params[0].detach().clone()
    params[0] = random_params(shape)[0]
    opt.param_groups[0]["params"][0] = params[0]
    fresh = ReferenceShampoo(params[:1], **RICH)
    for grads in random_grads(params, 5, seed=2):
        apply(opt, params, grads)
        fresh.step(grads[:1])
        kept.step(grads[1:])
        assert_relative(params[0], fresh.params[0], what="the new parameter:")
        assert_relative(params[1], kept.params[0], what="its neighbour:")
    assert torch.equal(gone, old)
    assert gone not in opt.state, "state of a parameter that left is dropped"
    assert "replaced" in said()


def test_a_frozen_parameter_is_left_alone_and_may_be_unfrozen():
    params = random_params((5, 4), (4, 3))
    params[0].requires_grad_(False)
    opt = double_shampoo(params, **RICH)
    before = params[0].detach().clone()
    for grads in random_grads(params, 2):
        apply(opt, params, [None, grads[1]])
    assert torch.equal(params[0], before)
    params[0].requires_grad_(True)
    apply(opt, params, random_grads(params, 1)[0])
    assert not torch.equal(params[0], before)


def test_k4_the_closure_runs_once_with_grad_and_its_value_is_returned():
    model = torch.nn.Linear(4, 3)
    opt = Shampoo(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        assert torch.equal(model.weight, before), "the closure comes before any change"
        opt.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
        assert not torch.is_grad_enabled()
    assert calls == [True]
    assert isinstance(loss, Tensor)
    assert loss.item() > 0
    assert not torch.equal(model.weight, before)
    assert opt.step() is None


def test_named_parameters_are_kept_and_survive_save_and_load():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    opt = Shampoo(model.named_parameters())
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert opt.param_groups[0]["param_names"] == names
    model(torch.randn(5, 4)).sum().backward()
    opt.step()
    fresh = Shampoo(model.named_parameters())
    fresh.load_state_dict(opt.state_dict())
    assert fresh.param_groups[0]["param_names"] == names


def test_step_hooks_run():
    params = random_params((3, 2))
    opt = Shampoo(params)
    calls: list[str] = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    for grads in random_grads(params, 3):
        apply(opt, params, grads)
    assert calls == ["pre", "post"] * 3


def test_a_step_leaves_the_random_state_alone():
    params = random_params(*SHAPES, dtype=torch.float32)
    opt = Shampoo(params, **RICH)
    history = random_grads(params, 5)
    before = torch.get_rng_state()
    for grads in history:
        apply(opt, params, grads)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_leaves_global_flags_alone():
    def flags() -> tuple[object, ...]:
        return (
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
        )

    before = flags()
    params = random_params(*SHAPES, dtype=torch.float32)
    opt = Shampoo(params, **RICH)
    for grads in random_grads(params, 4):
        apply(opt, params, grads)
    assert flags() == before


def test_shampoo_learns():
    """A least-squares problem whose gradient depends on the weights, by the defaults but lr."""
    X, Y = torch.randn(64, 8), torch.randn(64, 3)
    best = (Y - X @ torch.linalg.lstsq(X, Y).solution).square().mean()
    model = torch.nn.Linear(8, 3, bias=False)
    opt = Shampoo(model.parameters(), lr=0.03)
    for _ in range(300):
        opt.zero_grad()
        (model(X) - Y).square().mean().backward()
        opt.step()
    assert (model(X) - Y).square().mean() < 1.01 * best
