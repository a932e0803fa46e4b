"""When roots are taken and used: algorithm.md section 8, group E."""

import math

import pytest
import torch
from reference_shampoo import inverse_root
from torch import Tensor
from torch.nn import Parameter
from trajectory import (
    PURE,
    apply,
    assert_relative,
    compare,
    directions,
    double_shampoo,
    snapshot,
    state_tensors,
)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def roots_of(state: dict[str, Tensor]) -> list[Tensor]:
    return [value.clone() for key, value in state.items() if ".root" in key]


def refreshes(steps: int, shape: tuple[int, ...] = (3, 2), **hyper: object) -> list[int]:
    """The steps after which any root has other bits; all roots must change together."""
    param = Parameter(randn(*shape))
    opt = double_shampoo([param], betas=(0.9, 0.999), **hyper)
    previous: list[Tensor] | None = None
    found = []
    for t in range(1, steps + 1):
        apply(opt, [param], [randn(*shape)])
        roots = roots_of(opt.state[param])
        assert len(roots) > 0
        before = previous or [torch.zeros_like(root) for root in roots]
        changed = {not torch.equal(a, b) for a, b in zip(roots, before, strict=True)}
        assert len(changed) == 1, f"step {t}: some roots were refreshed and others were not"
        if changed == {True}:
            found.append(t)
        previous = roots
    return found


@pytest.mark.parametrize(
    ("frequency", "start", "steps", "expected"),
    [
        (100, 150, 310, [150, 200, 300]),
        (50, 50, 160, [50, 100, 150]),
        (50, -1, 110, [50, 100]),
        (1, 1, 4, [1, 2, 3, 4]),
        (1, -1, 4, [1, 2, 3, 4]),
        (1, 3, 5, [3, 4, 5]),
        (4, 6, 17, [6, 8, 12, 16]),
        (3, 4, 10, [4, 6, 9]),
        (2, math.inf, 7, []),
    ],
)
def test_e1_roots_change_exactly_on_schedule(frequency, start, steps, expected):
    found = refreshes(steps, precondition_frequency=frequency, start_preconditioning_step=start)
    assert found == expected


def test_e1_blocks_and_orders_share_the_schedule():
    for shape in [(5,), (5, 4), (3, 2, 4)]:
        found = refreshes(
            9,
            shape,
            precondition_frequency=3,
            start_preconditioning_step=4,
            max_preconditioner_dim=3,
            precondition_1d=True,
        )
        assert found == [4, 6, 9]


def test_e1_factors_change_every_step():
    param = Parameter(randn(3, 2))
    opt = double_shampoo([param], precondition_frequency=4)
    previous = torch.zeros(3, 3).double()
    for _ in range(7):
        apply(opt, [param], [randn(3, 2)])
        factor = opt.state[param]["block0.factor0"].clone()
        assert not torch.equal(factor, previous)
        previous = factor


def test_e1_a_refresh_sees_the_gradient_of_its_own_step():
    param, beta2 = Parameter(randn(3, 2)), 0.9
    hyper = {"precondition_frequency": 3, "eps": 1e-3}
    opt = double_shampoo([param], betas=(0.9, beta2), **hyper)
    for t in range(1, 8):
        apply(opt, [param], [randn(3, 2)])
        if t % 3 == 0:
            state = opt.state[param]
            for mode in range(2):
                A = state[f"block0.factor{mode}"] / (1 - beta2**t)
                expected = inverse_root(A, -0.5, 1e-3, 1e-6)
                assert_relative(state[f"block0.root{mode}"], expected)


@pytest.mark.parametrize("grafting", ["none", "adam", "sgd"])
@pytest.mark.parametrize(
    ("frequency", "start"), [(4, 6), (3, 5), (5, 5), (5, -1), (1, 4), (10, 1), (9, 3)]
)
def test_e2_no_step_is_zero(grafting, frequency, start):
    hyper = {"precondition_frequency": frequency, "start_preconditioning_step": start}
    for P in directions([randn(4, 3) for _ in range(13)], grafting=grafting, **hyper):
        assert P.all()
    compare([(4, 3), (3,)], 13, lr=0.1, grafting=grafting, **hyper)


def test_e3_before_the_start_the_graft_steps():
    history = [randn(4, 3) for _ in range(7)]
    hyper = {"precondition_frequency": 2, "start_preconditioning_step": 5}
    found = directions(history, **hyper)
    grafted = directions(history, precondition_frequency=2, start_preconditioning_step=math.inf)
    for t in range(1, 8):
        if t < 5:
            assert_relative(found[t - 1], grafted[t - 1], 1e-14)
        else:
            cosine = (found[t - 1] * grafted[t - 1]).sum()
            cosine = cosine / (found[t - 1].norm() * grafted[t - 1].norm())
            assert cosine < 0.9999


def test_e3_before_the_start_without_a_graft_the_filtered_gradient_steps():
    history = [randn(4, 3) for _ in range(5)]
    hyper = {"precondition_frequency": 5, "start_preconditioning_step": -1}
    found = directions(history, grafting="none", betas=(0.5, 0.9), **hyper)
    M1 = torch.zeros(4, 3).double()
    for t, G in enumerate(history[:4], start=1):
        M1 = 0.5 * M1 + 0.5 * G
        assert_relative(found[t - 1], M1 / (1 - 0.5**t), 1e-13)


@pytest.mark.parametrize("start", [0, -2, 0.5, 1.5, -math.inf, math.nan, True])
def test_e4_a_start_that_is_no_step_is_refused(start):
    message = rf"(?s)start_preconditioning_step={start}\. Must be -1 .*math\.inf.*integer >= 1"
    for frequency in (1, 10):
        with pytest.raises(ValueError, match=message):
            double_shampoo(
                [Parameter(randn(3, 2))],
                precondition_frequency=frequency,
                start_preconditioning_step=start,
            )


@pytest.mark.parametrize("start", [-1, 1])
def test_e5_a_root_every_step_is_pure_shampoo(start):
    history = [randn(4, 3) for _ in range(5)]
    eps = 1e-6
    found = directions(history, eps=eps, start_preconditioning_step=start, **PURE)
    for t, P in enumerate(found, start=1):
        XL = inverse_root(sum(G @ G.T for G in history[:t]), -0.25, eps, 0.0)
        XR = inverse_root(sum(G.T @ G for G in history[:t]), -0.25, eps, 0.0)
        assert_relative(P, XL @ history[t - 1] @ XR)


def poison_factor(opt: torch.optim.Optimizer, index: int, key: str) -> None:
    """A factor that no solver can take, put there the way a damaged checkpoint would."""
    saved = opt.state_dict()
    saved["state"][index] = dict(saved["state"][index])
    saved["state"][index][key] = torch.full_like(saved["state"][index][key], math.nan)
    opt.load_state_dict(saved)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grafting", ["none", "adam"])
def test_e6_a_failed_first_refresh_keeps_the_grafted_direction(grafting):
    hyper = {"precondition_frequency": 3, "grafting": grafting, "start_preconditioning_step": -1}
    history = [[randn(4, 3), randn(4, 3)] for _ in range(5)]
    params = [Parameter(torch.zeros(4, 3).double()) for _ in range(2)]
    opt = double_shampoo(params, lr=1.0, **hyper)
    grafted = directions(
        [G for G, _ in history], **{**hyper, "start_preconditioning_step": math.inf}
    )
    passes_root_check = directions([G for _, G in history], **hyper)
    for t, grads in enumerate(history, start=1):
        if t == 3:
            poison_factor(opt, 0, "block0.factor0")
        apply(opt, params, grads)
        # the failed block steps on by its graft, and its stack neighbour knows nothing of it
        assert_relative(params[0], -grafted[t - 1], 1e-12, f"step {t}, failed:")
        assert_relative(params[1], -passes_root_check[t - 1], 1e-12, f"step {t}, neighbour:")
        with torch.no_grad():
            for param in params:
                param.zero_()
    state = opt.state[params[0]]
    assert state["block0.failures0"] == 1
    assert state["block0.failures1"] == 0
    assert not state["block0.root0"].any()
    assert all(root.isfinite().all() for root in roots_of(state))


@pytest.mark.filterwarnings("ignore")
def test_e6_a_failed_later_refresh_keeps_the_previous_root():
    params = [Parameter(randn(4, 3)) for _ in range(2)]
    opt = double_shampoo(params, precondition_frequency=2)
    for t in range(1, 6):
        if t == 4:
            previous = roots_of(opt.state[params[0]])
            poison_factor(opt, 0, "block0.factor0")
        apply(opt, params, [randn(4, 3), randn(4, 3)])
        assert all(param.isfinite().all() for param in params)
    assert previous[0].any()
    assert torch.equal(opt.state[params[0]]["block0.root0"], previous[0])
    assert not torch.equal(opt.state[params[0]]["block0.root1"], previous[1])
    assert opt.state[params[0]]["block0.failures0"] == 1
    assert opt.state[params[1]]["block0.failures0"] == 0


def test_e_a_block_without_a_gradient_is_untouched_and_takes_no_step():
    """Parameter 1 misses steps 3 and 4, parameter 2 the first two: refreshes follow their own."""
    missing = {(3, 1), (4, 1), (2, 2), (1, 2)}
    compare(
        [(4, 3), (3, 2), (3, 2)],
        9,
        lr=0.1,
        precondition_frequency=2,
        weight_decay=0.1,
        mask=lambda t, i: (t, i) not in missing,
    )


def test_e_a_block_that_missed_a_step_has_its_first_refresh_a_step_later():
    history = [[randn(4, 3), randn(4, 3)] for _ in range(6)]
    params = [Parameter(torch.zeros(4, 3).double()) for _ in range(2)]
    hyper = {"precondition_frequency": 3, "start_preconditioning_step": -1}
    opt = double_shampoo(params, lr=1.0, **hyper)
    for t, (G, H) in enumerate(history, start=1):
        with torch.no_grad():
            params[0].zero_()
        before = snapshot(opt)
        apply(opt, params, [None if t == 3 else G, H])
        roots = roots_of(opt.state[params[0]])
        assert any(root.any() for root in roots) == (t >= 4)
        assert any(root.any() for root in roots_of(opt.state[params[1]])) == (t >= 3)
        if t == 3:
            for (i, key), value in state_tensors(opt).items():
                if i == 0:
                    assert torch.equal(value, before[i, key]), key
        else:
            assert params[0].detach().all()
