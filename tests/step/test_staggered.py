"""Staggered refreshes: every root once a period, spread by cost, kept by checkpoints."""

import copy
import io
from collections import Counter
from itertools import zip_longest
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor

from shampoo import Shampoo, inverse_root

SHAPES = [(24, 16), (9, 5), (16, 8, 6), (7,), (33, 2)]
HYPER: dict[str, Any] = {
    "lr": 0.1,
    "max_preconditioner_dim": 8,
    "precondition_frequency": 5,
    "refresh_schedule": "staggered",
    "start_preconditioning_step": -1,
    "betas": (0.9, 0.99),  # a period of 50 still is within what factors remember
    "root_method": "eigh",
    "large_dim_method": "blocking",
}


def make(**hyper: Any) -> tuple[list[torch.nn.Parameter], Shampoo]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    return params, Shampoo(params, **{**HYPER, **hyper})


def step(params: list[torch.nn.Parameter], opt: Shampoo, t: int) -> None:
    generator = torch.Generator().manual_seed(100 + t)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    opt.step()


def roots(opt: Shampoo) -> dict[tuple[int, str], Tensor]:
    return {
        (i, key): value.clone()
        for i, state in enumerate(opt.state.values())
        for key, value in state.items()
        if ".root" in key
    }


def refreshed(opt: Shampoo, before: dict[tuple[int, str], Tensor]) -> set[tuple[int, str]]:
    return {key for key, root in roots(opt).items() if bool((root != before[key]).any())}


@pytest.mark.parametrize("start", [-1, 1, 3, 7])
def test_every_root_is_refreshed_once_a_period_from_the_first_on(start):
    params, opt = make(start_preconditioning_step=start)
    first = 5 if start == -1 else start
    seen: Counter[tuple[int, str]] = Counter()
    for t in range(1, first + 15):
        before = roots(opt) if t > 1 else {}
        step(params, opt, t)
        if t == 1:
            before = dict.fromkeys(roots(opt), torch.zeros(()))
        changed = refreshed(opt, before)
        assert t >= first or not changed
        seen.update(changed)
        if t >= first and (t - first) % 5 == 4:
            assert set(seen.values()) == {(t - first) // 5 + 1}
            assert seen.keys() == before.keys()


def test_a_refreshed_root_is_the_root_of_the_factor_of_that_step():
    params, opt = make()
    for t in range(1, 13):
        before = roots(opt) if t > 1 else {}
        step(params, opt, t)
        for i, key in refreshed(opt, before) if before else ():
            state = list(opt.state.values())[i]
            factor = state[key.replace("root", "factor")] / (1 - 0.99**t)
            exact = inverse_root(factor[None], 2, method="eigh")[0]
            torch.testing.assert_close(state[key], exact, rtol=1e-3, atol=1e-3 * exact.max().item())
            stale = before[i, key]
            assert t <= 9 or (state[key] - stale).abs().max() > 1e-2 * exact.max()


@pytest.mark.parametrize("period", [2, 5, 50])
def test_no_step_costs_more_than_the_mean_and_the_dearest_factor(period):
    params, opt = make(precondition_frequency=period)
    step(params, opt, 1)
    costs: Counter[int] = Counter()
    every = []
    for state in opt.state.values():
        for key in (k for k in state if ".slot" in k):
            every.append(float(len(state[key.replace("slot", "factor")])) ** 3)
            costs[int(state[key])] += every[-1]
    assert set(costs) <= set(range(period))
    assert max(costs.values()) <= sum(every) / period + max(every)
    assert len(costs) >= min(period, len(every) // 2)


def test_with_frequency_one_it_is_the_paper_s_schedule():
    both = [make(precondition_frequency=1, refresh_schedule=s) for s in ("together", "staggered")]
    for t in range(1, 6):
        for params, opt in both:
            step(params, opt, t)
    for one, other in zip(both[0][0], both[1][0], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("steps", [4, 8])
def test_a_checkpoint_keeps_the_slots_and_resumes_bit_for_bit(steps):
    params, opt = make()
    for t in range(1, steps + 1):
        step(params, opt, t)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    others = copy.deepcopy(params)
    other = Shampoo(others, **HYPER)
    other.load_state_dict(torch.load(file, weights_only=True))
    for t in range(steps + 1, steps + 9):
        step(params, opt, t)
        step(others, other, t)
    for one, another in zip(params, others, strict=True):
        assert torch.equal(one, another)


def test_slots_are_spread_anew_when_the_period_changes():
    params, opt = make()
    for t in range(1, 8):
        step(params, opt, t)
    opt.param_groups[0]["precondition_frequency"] = 3
    opt.param_groups[0]["start_preconditioning_step"] = 5
    seen: set[tuple[int, str]] = set()
    for t in range(8, 11):
        before = roots(opt)
        step(params, opt, t)
        seen |= refreshed(opt, before)
    assert seen == roots(opt).keys()
    slots = {int(v) for s in opt.state.values() for k, v in s.items() if ".slot" in k}
    assert slots == {0, 1, 2}


def test_a_late_group_gets_slots_of_its_own_and_the_old_ones_stay():
    params, opt = make()
    for t in range(1, 4):
        step(params, opt, t)
    before = {k: int(v) for k, v in opt.state[params[0]].items() if ".slot" in k}
    late = torch.nn.Parameter(torch.randn(24, 16))
    opt.add_param_group({"params": [late]})
    step([*params, late], opt, 4)
    assert {k: int(v) for k, v in opt.state[params[0]].items() if ".slot" in k} == before
    assert len({int(v) for k, v in opt.state[late].items() if ".slot" in k}) == 5


def slots_of_rank(rank: int, world: int) -> list[tuple[int, int]]:
    """Side and slot of every root of this rank, dearest first."""
    params, opt = make(num_trainers_per_group=world)
    step(params, opt, 1)
    found = [
        (len(state[key.replace("slot", "factor")]), int(slot))
        for state in opt.state.values()
        for key, slot in state.items()
        if ".slot" in key
    ]
    return sorted(found, key=lambda root: (-root[0], root[1]))


def test_ranks_refresh_their_dearest_roots_in_the_same_steps(ranks: Ranks) -> None:
    found = ranks.returns(slots_of_rank, 3, 3)
    assert sum(map(len, found)) == len(slots_of_rank(0, 1))
    for alike in zip(*found, strict=False):
        assert len({slot for _, slot in alike}) == 1
    slowest = Counter[int]()
    for alike in zip_longest(*found, fillvalue=(0, 0)):
        side, slot = max(alike)
        slowest[slot] += side**3
    assert set(slowest) == set(range(5))
    assert max(slowest.values()) <= sum(slowest.values()) / 5 + 8**3


def test_together_keeps_no_slots():
    params, opt = make(refresh_schedule="together")
    step(params, opt, 1)
    assert not any(".slot" in key for state in opt.state.values() for key in state)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"refresh_schedule='sometimes'.*together, staggered"):
        make(refresh_schedule="sometimes")


def slots_of_a_rank(rank: int) -> list[int]:
    """Six equal blocks with one factor each on four ranks: two ranks own two, two own one."""
    param = torch.nn.Parameter(torch.ones(48))
    opt = Shampoo(
        [param],
        **{**HYPER, "precondition_frequency": 10},
        precondition_1d=True,
        merge_dims="full",
        num_trainers_per_group=4,
    )
    param.grad = torch.ones(48)
    opt.step()
    return sorted(int(value) for key, value in opt.state[param].items() if ".slot" in key)


def test_ranks_refresh_in_the_same_steps(ranks: Ranks):
    """Every rank waits for the slowest: one root on each of four ranks should cost one root."""
    slots = ranks.returns(slots_of_a_rank, 4)
    assert sorted(map(len, slots)) == [1, 1, 2, 2]
    assert {slot for own in slots for slot in own} == {0, 5}
