"""Grafting: algorithm.md section 8, group C."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch_twins import TWINS
from trajectory import (
    PURE,
    apply,
    assert_relative,
    compare,
    directions,
    double_shampoo,
    random_grads,
    random_params,
    state_tensors,
)

from shampoo import Shampoo

GRAFTS = [
    *("sgd", "adagrad", "rmsprop", "adam", "lars", "lamb"),
    *("adagrad_normalized", "rmsprop_normalized", "adam_normalized"),
]
BETA1, BETA_G, EPS_G = 0.8, 0.95, 1e-3


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def grafted_direction(grafting: str, history: list[Tensor]) -> Tensor:
    """D_g(Gt) of one block after the whole history, from the table of section 2.1."""
    t = len(history)
    filtered = sum((1 - BETA1) * BETA1 ** (t - s) * G for s, G in enumerate(history, start=1))
    filtered = filtered / (1 - BETA1**t)
    if grafting in ("sgd", "lars"):
        return filtered
    if grafting.endswith("_normalized"):
        history = [G / G.norm() for G in history]
    if grafting.startswith("adagrad"):
        v = sum(G**2 for G in history)
    else:
        v = sum((1 - BETA_G) * BETA_G ** (t - s) * G**2 for s, G in enumerate(history, start=1))
    if grafting.startswith("adam") or grafting == "lamb":
        v = v / (1 - BETA_G**t)
    return filtered / (v.sqrt() + EPS_G)


@pytest.mark.parametrize("grafting", GRAFTS)
@pytest.mark.parametrize("start", [2, math.inf])
def test_c1_length_of_the_graft_direction_of_shampoo(grafting, start):
    history = [randn(7, 5) for _ in range(6)]
    hyper: dict[str, Any] = {
        "betas": (BETA1, 0.9),
        "grafting_beta2": BETA_G,
        "grafting_eps": EPS_G,
        "max_preconditioner_dim": 3,
        "precondition_frequency": 2,
        "start_preconditioning_step": start,
    }
    # weights at zero make the factor of lars and lamb one
    found = directions(history, grafting=grafting, **hyper)[-1]
    plain = directions(history, grafting="none", **hyper)[-1]
    for rows in (slice(0, 3), slice(3, 6), slice(6, 7)):
        for cols in (slice(0, 3), slice(3, 5)):
            graft = grafted_direction(grafting, [G[rows, cols] for G in history])
            P, Psh = found[rows, cols], plain[rows, cols]
            assert_relative(P.norm(), graft.norm(), 1e-12)
            if start == math.inf:
                assert_relative(P, graft, 1e-12)
            else:
                assert abs(1 - (P * Psh).sum() / (P.norm() * Psh.norm())) <= 1e-12


def test_c1_the_norm_is_per_block_not_per_tensor():
    """One block a thousand times larger leaves the length of its neighbour alone."""
    small, large = [randn(3, 3) for _ in range(3)], [1e3 * randn(3, 3) for _ in range(3)]
    hyper = {"grafting": "sgd", "precondition_frequency": 1, "max_preconditioner_dim": 3}
    alone = directions(small, **hyper)[-1]
    pairs = [torch.cat(pair, dim=1) for pair in zip(small, large, strict=True)]
    assert_relative(directions(pairs, **hyper)[-1][:, :3], alone)


SHAPES = [(7, 5), (6,), (3, 2, 4), (), (1, 5)]


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_c2_a_start_that_never_comes_is_the_grafted_optimizer(twin, weight_decay, dtype):
    torch_class, torch_hyper, hyper = TWINS[twin]
    params = random_params(*SHAPES, dtype=dtype)
    twins = [Parameter(p.detach().clone()) for p in params]
    theirs = torch_class(twins, lr=0.01, weight_decay=weight_decay, **torch_hyper)
    ours = Shampoo(
        params,
        lr=0.01,
        weight_decay=weight_decay,
        start_preconditioning_step=math.inf,
        max_preconditioner_dim=4,
        preconditioner_dtype=dtype,
        **hyper,
    )
    tol = 1.2e-7 if dtype == torch.float32 else 1e-12
    for grads in random_grads(params, 5):
        apply(ours, params, grads)
        apply(theirs, twins, grads)
        for param, expected in zip(params, twins, strict=True):
            torch.testing.assert_close(param, expected, rtol=tol, atol=tol)


def test_c2_the_defaults_with_a_later_start_are_adamw_until_then():
    params = random_params(*SHAPES, dtype=torch.float32)
    twins = [Parameter(p.detach().clone()) for p in params]
    ours = Shampoo(params, start_preconditioning_step=-1)
    theirs = torch.optim.AdamW(twins, betas=(0.9, 0.95), weight_decay=0.0)
    history = random_grads(params, 10)
    for grads in history[:9]:
        apply(ours, params, grads)
        apply(theirs, twins, grads)
        for param, expected in zip(params, twins, strict=True):
            torch.testing.assert_close(param, expected, rtol=5e-7, atol=5e-7)
    apply(ours, params, history[9])  # the tenth step is Shampoo's, for what it preconditions
    apply(theirs, twins, history[9])
    assert not torch.allclose(params[0], twins[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(params[1], twins[1], rtol=5e-7, atol=5e-7)


def test_c3_normalized_accumulators_sum_unit_gradients():
    param = Parameter(randn(5, 4))
    opt = double_shampoo([param], grafting="adagrad_normalized", max_preconditioner_dim=3)
    for t in range(1, 5):
        apply(opt, [param], [10.0**t * randn(5, 4)])
        sums = {k: v.sum() for (_, k), v in state_tensors(opt).items() if k.endswith("exp_avg_sq")}
        assert len(sums) == 4
        for key, total in sums.items():
            assert_relative(total, torch.tensor(float(t)), 1e-12, key)


@pytest.mark.parametrize("grafting", [name for name in GRAFTS if "normalized" in name])
def test_c3_a_zero_gradient_is_no_nan(grafting):
    """A zero block contributes nothing, beside a block that is not zero."""
    history = [randn(4, 6) for _ in range(4)]
    for G in history:
        G[:, 3:] = 0
    found = directions(history, grafting=grafting, max_preconditioner_dim=3)
    for P in found:
        assert P[:, :3].all()
        assert not P[:, 3:].any()


@pytest.mark.parametrize("grafting", ["lars", "lamb"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_c4_layerwise_rescaling_follows_the_reference(grafting, weight_decay, decoupled, momentum):
    compare(
        [(5, 4), (4,), (3, 2, 3)],
        6,
        lr=0.05,
        grafting=grafting,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled,
        momentum=momentum,
        max_preconditioner_dim=3,
        precondition_frequency=2,
    )


@pytest.mark.parametrize("grafting", ["lars", "lamb"])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_c4_every_step_moves_by_the_norm_of_the_whole_weight(grafting, decoupled, weight_decay):
    param = Parameter(randn(5, 4))
    opt = double_shampoo(
        [param],
        lr=0.05,
        grafting=grafting,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled,
        max_preconditioner_dim=3,
        precondition_frequency=2,
    )
    for _ in range(4):
        before = param.detach().clone()
        apply(opt, [param], [100 * randn(5, 4)])
        assert_relative((param - before).norm(), 0.05 * before.norm(), 1e-12)


@pytest.mark.parametrize("grafting", ["lars", "lamb"])
def test_c4_a_zero_weight_or_direction_is_not_rescaled(grafting):
    G = randn(4, 3)
    plain = {"lars": "sgd", "lamb": "adam"}[grafting]
    hyper = {"start_preconditioning_step": math.inf}
    zero_weight = directions([G], grafting=grafting, **hyper)[0]
    assert_relative(zero_weight, directions([G], grafting=plain, **hyper)[0], 1e-14)

    still, moving = Parameter(randn(4, 3)), Parameter(randn(4, 3))
    before = still.detach().clone()
    opt = double_shampoo([still, moving], grafting=grafting, **hyper)
    apply(opt, [still, moving], [torch.zeros(4, 3).double(), G])
    assert torch.equal(still, before)


def factors_of(opt: Shampoo) -> list[Tensor]:
    return [value for (_, key), value in state_tensors(opt).items() if ".factor" in key]


def test_c5_the_graft_ignores_beta2_and_eps():
    history = [randn(4, 3) for _ in range(5)]
    hyper = {
        **{"grafting": "adam", "grafting_beta2": 0.9, "grafting_eps": 1e-3},
        "start_preconditioning_step": math.inf,
    }
    found = directions(history, betas=(0.5, 0.99), eps=1e-12, **hyper)
    for betas, eps in [((0.5, 0.7), 1e-12), ((0.5, 0.99), 1e-1)]:
        for P, expected in zip(
            directions(history, betas=betas, eps=eps, **hyper), found, strict=True
        ):
            assert torch.equal(P, expected)


def test_c5_factors_and_roots_ignore_the_grafts_beta2_and_eps():
    history = [randn(4, 3) for _ in range(4)]
    runs = []
    for beta, eps in [(0.9, 1e-8), (0.5, 1e-1)]:
        param = Parameter(torch.zeros(4, 3).double())
        opt = double_shampoo(
            [param], grafting_beta2=beta, grafting_eps=eps, precondition_frequency=2
        )
        for G in history:
            apply(opt, [param], [G])
        runs.append(state_tensors(opt))
    for (i, key), value in runs[0].items():
        if ".factor" in key or ".root" in key:
            assert torch.equal(runs[1][i, key], value), key
    assert not torch.equal(runs[0][0, "block0.exp_avg_sq"], runs[1][0, "block0.exp_avg_sq"])


@pytest.mark.parametrize("grafting", ["adam", "rmsprop", "lamb", "adam_normalized"])
@pytest.mark.parametrize("grafting_beta2", [None, 0.9, 1.0])
def test_c5_the_grafts_beta2_follows_the_reference(grafting, grafting_beta2):
    """None takes betas[1]; 1.0 is a plain sum without correction."""
    for beta2 in (0.95, 1.0):
        compare(
            [(5, 3), (4,)],
            5,
            lr=0.1,
            betas=(0.9, beta2),
            grafting=grafting,
            grafting_beta2=grafting_beta2,
            grafting_eps=1e-3,
            precondition_frequency=2,
        )


@pytest.mark.parametrize("grafting", GRAFTS)
def test_c_every_graft_follows_the_reference(grafting):
    compare(
        [(7, 5), (6,), (2, 3, 4)],
        8,
        lr=0.1,
        betas=(0.9, 0.97),
        grafting=grafting,
        grafting_beta2=0.9,
        grafting_eps=1e-4,
        weight_decay=0.1,
        max_preconditioner_dim=4,
        precondition_frequency=3,
        precondition_1d=grafting in ("sgd", "adam"),
    )


def test_c_without_a_graft_the_direction_is_shampoos_own():
    history = [randn(4, 3) for _ in range(3)]
    found = directions(history, eps=1e-8, **PURE)
    longer = directions(history, eps=1e-8, **{**PURE, "grafting": "sgd"})
    for P, Psgd, G in zip(found, longer, history, strict=True):
        assert_relative(P / P.norm(), Psgd / Psgd.norm(), 1e-12)
        assert_relative(Psgd.norm(), G.norm(), 1e-12)
        assert abs(P.norm() / G.norm() - 1) > 1e-2
