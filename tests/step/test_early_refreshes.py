"""From the start to the frequency, roots are refreshed when the steps have doubled (1.5)."""

import copy
import hashlib
import io
import itertools
import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from ranks import Ranks
from tape import Tape, record_tape
from torch import Tensor
from torch.nn import Parameter
from trajectory import apply, assert_same_bits, compare, random_grads, random_params, snapshot

from shampoo import Replay, Shampoo
from shampoo.hyperparameters import Hyperparameters
from shampoo.step import capture

SHAPES = [(6, 4), (9, 5), (3, 2, 4), (7,)]


def roots_of(opt: Shampoo, param: Parameter) -> dict[str, Tensor]:
    """Copies of its roots by their keys."""
    return {key: root.clone() for key, root in opt.state.get(param, {}).items() if ".root" in key}


def refreshed(opt: Shampoo, param: Parameter, before: dict[str, Tensor]) -> set[str]:
    """Which of its roots are others than before; zeros, where there was none."""
    return {
        key
        for key, root in roots_of(opt, param).items()
        if not torch.equal(root, before.get(key, torch.zeros_like(root)))
    }


def refreshes(steps: int, **hyper: Any) -> list[int]:
    """The steps of one matrix that refresh its roots, which must all change together."""
    [param] = random_params((3, 2))
    opt = Shampoo([param], **hyper)
    found = []
    for t, grads in enumerate(random_grads([param], steps), start=1):
        before = roots_of(opt, param)
        apply(opt, [param], grads)
        changed = refreshed(opt, param, before)
        assert changed in (set(), {"block0.root0", "block0.root1"})
        found += [t] * bool(changed)
    return found


@pytest.mark.parametrize(
    ("hyper", "steps", "expected"),
    [
        ({}, 41, [1, 2, 4, 8, 10, 20, 30, 40]),
        ({"precondition_frequency": 1}, 5, [1, 2, 3, 4, 5]),
        ({"precondition_frequency": 2}, 9, [1, 2, 4, 6, 8]),
        ({"precondition_frequency": 7}, 21, [1, 2, 4, 7, 14, 21]),
        ({"precondition_frequency": 8}, 17, [1, 2, 4, 8, 16]),
        ({"precondition_frequency": 100}, 205, [1, 2, 4, 8, 16, 32, 64, 100, 200]),
        ({"start_preconditioning_step": 2}, 21, [2, 4, 8, 10, 20]),
        ({"start_preconditioning_step": 3}, 21, [3, 6, 10, 20]),
        ({"start_preconditioning_step": 5}, 31, [5, 10, 20, 30]),
        ({"start_preconditioning_step": 6}, 31, [6, 10, 20, 30]),
        ({"start_preconditioning_step": 10}, 31, [10, 20, 30]),
        ({"start_preconditioning_step": -1}, 31, [10, 20, 30]),
        ({"start_preconditioning_step": 60}, 75, [60, 70]),
        ({"start_preconditioning_step": 65}, 85, [65, 70, 80]),
        ({"start_preconditioning_step": math.inf}, 31, []),
        ({"start_preconditioning_step": 3.0, "precondition_frequency": 100}, 101,
         [3, 6, 12, 24, 48, 96, 100]),
    ],
    ids=str,
)  # fmt: skip
def test_roots_change_when_the_steps_have_doubled(hyper, steps, expected):
    hyper = {"betas": (0.9, 0.999), **hyper} if hyper else hyper
    assert refreshes(steps, **hyper) == expected


@pytest.mark.parametrize("frequency", [1, 2, 7, 10, 100])
@pytest.mark.parametrize("start", [1, 2, 3, 5, "f", "f + 50", -1, math.inf])
def test_the_phase_is_that_of_the_document(frequency, start):
    """``t = s`` or ``t mod f = 0``; and before ``f``, ``t = s 2^i`` (1.5)."""
    start = {"f": frequency, "f + 50": frequency + 50}.get(start, start)
    hyper = {"precondition_frequency": frequency, "start_preconditioning_step": start}
    opt = Shampoo(random_params((3, 2)), betas=(0.9, 0.999), **hyper)
    values = Hyperparameters.read(opt.param_groups[0])
    s = frequency if start == -1 else start
    steps = range(1, 4 * frequency + 60)
    due = [t for t in steps if values.due_phase(t) is not None]
    doubled = [t for t in steps if s <= t < frequency and math.log2(t / s) % 1 == 0]
    regular = [t for t in steps if t >= s and t % frequency == 0]
    assert due == sorted({*doubled, *regular, *[t for t in steps if t == s]})
    # What the rule is for: no root is older than half of the steps, or than a period.
    for one, following in itertools.pairwise(due):
        assert following - one <= min(one, frequency)


def test_nobody_is_started_by_a_frequency_that_is_raised():
    """Roots go on from where they are: the count is the parameter's, and not of its refreshes."""
    [param] = random_params((3, 2))
    opt, found = Shampoo([param], precondition_frequency=3, betas=(0.9, 0.99)), []
    for t, grads in enumerate(random_grads([param], 40), start=1):
        opt.param_groups[0]["precondition_frequency"] = 3 if t <= 6 else 20
        before = roots_of(opt, param)
        apply(opt, [param], grads)
        found += [t] * bool(refreshed(opt, param, before))
    assert found == [1, 2, 3, 6, 8, 16, 20, 40]


def test_parameters_that_come_and_go_double_their_own_steps():
    params = random_params(*[(6, 4)] * 4)
    opt = Shampoo(params)
    due: dict[int, list[int]] = defaultdict(list)
    taken = [0] * len(params)
    for t, full in enumerate(random_grads(params, 44), start=1):
        # All steps, every second, from the seventh on, and in runs of five.
        here = [True, t % 2 == 0, t >= 7, t // 5 % 2 == 1]
        before = [roots_of(opt, param) for param in params]
        apply(opt, params, [g if is_here else None for g, is_here in zip(full, here, strict=True)])
        for i, param in enumerate(params):
            taken[i] += here[i]
            changed = refreshed(opt, param, before[i])
            assert here[i] or not changed
            due[i] += [taken[i]] * bool(changed)
    assert taken == [44, 22, 38, 20]
    assert due[0] == [1, 2, 4, 8, 10, 20, 30, 40]
    assert due[1] == [1, 2, 4, 8, 10, 20]
    assert due[2] == [1, 2, 4, 8, 10, 20, 30]
    assert due[3] == [1, 2, 4, 8, 10, 20]


@pytest.mark.parametrize(("frequency", "start"), [(5, 1), (7, 3), (10, 1)])
def test_staggered_roots_come_once_a_period_and_do_not_double(frequency, start):
    params = random_params(*SHAPES, dtype=torch.float32)
    opt = Shampoo(
        params,
        max_preconditioner_dim=4,
        large_dim_method="blocking",
        refresh_schedule="staggered",
        precondition_frequency=frequency,
        start_preconditioning_step=start,
    )
    steps: dict[tuple[int, str], list[int]] = defaultdict(list)
    count = 3 * frequency
    for t, grads in enumerate(random_grads(params, count), start=1):
        before = [roots_of(opt, param) for param in params]
        apply(opt, params, grads)
        for i, param in enumerate(params):
            for key in refreshed(opt, param, before[i]):
                steps[i, key].append(t)
    slots = {
        (i, key): int(opt.state[param][key.replace("root", "slot")])
        for i, param in enumerate(params)
        for key in roots_of(opt, param)
    }
    assert len(set(slots.values())) > 2
    expected = {key: list(range(start + r, count + 1, frequency)) for key, r in slots.items()}
    assert steps == expected


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("saved_after", [1, 3, 5, 9])
def test_a_run_resumed_between_two_doublings_goes_on_to_the_bit(saved_after, precision):
    params = random_params(*SHAPES, dtype=torch.float32)
    opt = Shampoo(params, lr=0.05, preconditioner_dtype=precision)
    history = random_grads(params, 22)
    for grads in history[:saved_after]:
        apply(opt, params, grads)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    others = [Parameter(param.detach().clone()) for param in params]
    # Whatever it is made with: the checkpoint holds its schedule.
    other = Shampoo(others, start_preconditioning_step=-1, precondition_frequency=3)
    other.load_state_dict(torch.load(file, weights_only=True))
    due = []
    for t, grads in enumerate(history[saved_after:], start=saved_after + 1):
        before = roots_of(other, others[0])
        apply(opt, params, grads)
        apply(other, others, grads)
        assert_same_bits(snapshot(other), snapshot(opt))
        due += [t] * bool(refreshed(other, others[0], before))
    assert due == [t for t in (1, 2, 4, 8, 10, 20) if t > saved_after]


def trained_on(rank: int, world: int, hyper: dict[str, Any]) -> tuple[list[str], set[int]]:
    """A job: digests of all parameters after each step, and the steps that refreshed roots here."""
    torch.manual_seed(0)
    params = random_params(*SHAPES, dtype=torch.float32)
    opt = Shampoo(
        params,
        lr=0.05,
        max_preconditioner_dim=4,
        num_trainers_per_group=world,
        **hyper,
    )
    digests, due = [], set()
    for t, full in enumerate(random_grads(params, 13), start=1):
        grads = [None if (t, i) in ((2, 0), (5, 1)) else grad for i, grad in enumerate(full)]
        before = [roots_of(opt, param) for param in params]
        apply(opt, params, grads)
        sha = hashlib.sha256()
        for param, earlier in zip(params, before, strict=True):
            sha.update(param.detach().numpy().tobytes())
            if refreshed(opt, param, earlier):
                due.add(t)
        digests.append(sha.hexdigest())
    return digests, due


@pytest.mark.parametrize("hyper", [{}, {"start_preconditioning_step": 3}], ids=str)
def test_two_ranks_double_alike_to_the_bit(ranks: Ranks, hyper: dict[str, Any]):
    [(digests, due)] = ranks.returns(trained_on, 1, 1, hyper)
    answers = ranks.returns(trained_on, 2, 2, hyper)
    for found, steps in answers:
        assert found == digests
        assert steps <= due
    assert set().union(*(steps for _, steps in answers)) == due
    # Parameters 0 and 1 have missed a step each: their doublings come one later.
    assert due == ({3, 4, 6, 7, 10, 11} if hyper else {1, 2, 3, 4, 5, 8, 9, 10, 11})


@pytest.fixture
def _tape_is_a_capture(monkeypatch):
    monkeypatch.setattr(capture, "is_capturing", lambda: Tape.recording)


@pytest.mark.usefixtures("_tape_is_a_capture")
@pytest.mark.parametrize(
    ("hyper", "due"),
    [
        ({}, [1, 2, 4, 8, 10, 20]),
        ({"start_preconditioning_step": 3}, [3, 6, 10, 20]),
        ({"start_preconditioning_step": -1}, [10, 20]),
        ({"precondition_frequency": 16}, [1, 2, 4, 8, 16]),
    ],
    ids=str,
)
def test_replayed_steps_refresh_when_the_steps_have_doubled(hyper, due):
    params = random_params(*SHAPES, dtype=torch.float32)
    twins = copy.deepcopy(params)
    for param in (*params, *twins):
        param.grad = torch.zeros_like(param)
    hyper = {"lr": 0.05, "betas": (0.9, 0.99), "root_method": "minimax", **hyper}
    opt, ordinary = Shampoo(params, capturable=True, **hyper), Shampoo(twins, **hyper)
    replay, found = Replay(opt, opt.step, record_tape), []
    for t, grads in enumerate(random_grads(params, 24), start=1):
        for each in (params, twins):
            for param, grad in zip(each, grads, strict=True):
                param.grad.copy_(grad)
        coming, before = opt.coming_refresh(), roots_of(opt, params[0])
        replay()
        ordinary.step()
        changed = refreshed(opt, params[0], before)
        assert any(phase is not None for phase in coming) == bool(changed)
        found += [t] * bool(changed)
        for param, twin in zip(params, twins, strict=True):
            assert torch.equal(param, twin)
    assert found == due
    assert len(replay._recorded) == 2
    assert None not in replay._recorded.values()  # both were replayed


@pytest.mark.parametrize("hyper", [{}, {"precondition_1d": True, "grafting": "none"}], ids=str)
def test_the_defaults_are_those_of_the_reference(hyper):
    """25 steps: past both kinds of refreshes, with another scale of gradients in each."""
    compare([(9, 6), (5,), (3, 2, 4), (40, 3)], 25, **hyper)
    compare([(9, 6), (5,), (3, 2, 4)], 25, mask=lambda t, i: (t + i) % 4 != 3, lr=0.1, **hyper)
