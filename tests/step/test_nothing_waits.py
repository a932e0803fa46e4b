"""On a device the default step reads nothing back, and moves what a step on the host moves.

The device (``far.py``) raises for whatever would make the host wait. Its verdict on a step comes
with the next one, as on a GPU that is not more than an iteration behind.
"""

import copy
import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from far import Far, FarTensor, Post, far, near, parameter
from tape import HostReadError
from torch import Tensor
from torch.nn import Parameter

from shampoo import NonFiniteGradientError, Shampoo, optimizer
from shampoo.blocks.segments import Segment
from shampoo.grafting import GRAFTING
from shampoo.step import agreed_step

SHAPES = [(12, 9), (7,), (6, 4, 3), ()]
ARGUMENTS: dict[str, Any] = {
    "lr": 0.02,
    "max_preconditioner_dim": 8,
    "precondition_frequency": 3,
    "large_dim_method": "blocking",
    "weight_decay": 0.1,
}
METHODS = {
    f"{name}{', staggered' if schedule == 'staggered' else ''}": {
        "grafting": name,
        "refresh_schedule": schedule,
    }
    for name in GRAFTING
    for schedule in ("together", "staggered")
}
VARIANTS: dict[str, dict[str, Any]] = {
    **METHODS,
    "coupled": {"decoupled_weight_decay": False, "maximize": True},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "nesterov_average": False},
    "lars with momentum": {"grafting": "lars", "momentum": 0.9},
    "lamb, coupled": {"grafting": "lamb", "decoupled_weight_decay": False},
    "no filter": {"betas": (0.0, 0.9)},
    "sums": {"betas": (0.9, 1.0), "grafting": "adagrad"},
    "uncorrected": {"bias_correction": False},
    "diagonal": {"large_dim_method": "diagonal"},
    "adagrad": {"large_dim_method": "adagrad"},
    "vectors": {"precondition_1d": True, "merge_dims": "full"},
    "late": {"start_preconditioning_step": 4},
    "never": {"start_preconditioning_step": math.inf},
    "every step": {"precondition_frequency": 1},
    "kl": {"preconditioner": "kl_shampoo"},
    "kl, diagonal": {"preconditioner": "kl_shampoo", "large_dim_method": "diagonal"},
    "kl, staggered": {"preconditioner": "kl_shampoo", "refresh_schedule": "staggered"},
}
BAD = {0: math.nan, 2: math.inf, 3: 1e30, 7: math.nan}  # steps that are skipped
STEPS = 11


@pytest.fixture(autouse=True)
def device():
    with Far():
        yield


@pytest.fixture
def post(monkeypatch) -> Post:
    post = Post(delay=1)
    post.install(monkeypatch)
    return post


def weights(shapes=SHAPES, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def pair(dtype=torch.float32, **arguments: Any) -> tuple[Shampoo, Shampoo]:
    """Twins: on the host, and on the device."""
    kwargs = {**ARGUMENTS, **arguments}
    here = Shampoo([Parameter(each.clone()) for each in weights(dtype=dtype)], **kwargs)
    return here, Shampoo([parameter(each) for each in weights(dtype=dtype)], **kwargs)


def params_of(opt: Shampoo) -> list[Tensor]:
    return [param for group in opt.param_groups for param in group["params"]]


def gradients(opt: Shampoo, step: int, bad: dict[int, float]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(step)
    grads = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params_of(opt)]
    if step in bad:
        grads[step % 2].view(-1)[step % 5] = bad[step]
    return grads


def put(opt: Shampoo, grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(params_of(opt), grads, strict=True):
        is_far = isinstance(param, FarTensor)
        param.grad = None if grad is None else far(grad) if is_far else grad.clone()


def both_step(post: Post, twins: Sequence[Shampoo], grads: Sequence[Tensor | None]) -> None:
    post.now += 1
    for opt in twins:
        put(opt, grads)
        opt.step()


def values(opt: Shampoo, has_counts: bool) -> dict[Any, Tensor]:
    """All that is kept, but for the counts of steps, of which the host hears later."""
    found: dict[Any, Tensor] = {}
    for index, param in enumerate(params_of(opt)):
        found[index, "weight"] = near(param.data)
        for key, value in opt.state[param].items():
            if has_counts or key != "step":
                found[index, key] = near(value)
    return found


def assert_alike(twins: Sequence[Shampoo], has_counts: bool = False) -> None:
    expected, actual = (values(opt, has_counts) for opt in twins)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_step_is_that_of_the_host(post, variant):
    """First, ordinary and with a refresh; each of them skipped as well."""
    twins = pair(**VARIANTS[variant])
    for step in range(STEPS):
        both_step(post, twins, gradients(twins[0], step, BAD))
        if step > 0:  # slots are spread in a first step on the device, though it be skipped
            assert_alike(twins)
    post.now += 1
    assert twins[1].skipped_steps == twins[0].skipped_steps == len(BAD)
    assert_alike(twins, has_counts=True)
    assert post.waited == 0


@pytest.mark.parametrize("schedule", ["together", "staggered"])
def test_where_nothing_is_skipped_too(post, schedule):
    twins = pair(refresh_schedule=schedule)
    for step in range(STEPS):
        both_step(post, twins, gradients(twins[0], step, {}))
        assert_alike(twins, has_counts=True)


@pytest.mark.parametrize("delay", [2, 1000])
def test_a_host_that_is_far_ahead_takes_the_same_steps(post, delay):
    """It waits for the verdict on the step before; when other letters come changes nothing."""
    post.delay = delay
    twins = pair(preconditioner="kl_shampoo", momentum=0.9)
    for step in range(STEPS):
        both_step(post, twins, gradients(twins[0], step, BAD))
        if step > 0:
            assert_alike(twins)
    assert post.waited == STEPS - 1


def test_a_closure_is_asked_as_ever(post):
    twins = pair()
    for step in range(5):
        grads = gradients(twins[0], step, {2: math.nan})
        post.now += 1
        for opt in twins:

            def closure(opt=opt, grads=grads):
                opt.zero_grad()
                put(opt, grads)
                return "loss"

            assert opt.step(closure) == "loss"
        assert_alike(twins)


def test_parameters_count_their_own_steps(post):
    """Patterns of gradients change, and steps of any of them are skipped."""
    twins = pair(refresh_schedule="staggered", momentum=0.9)
    for step in range(16):
        grads = gradients(twins[0], step, {4: math.nan, 5: math.inf, 11: math.nan})
        grads = [None if (step + i) % 5 == 4 else grad for i, grad in enumerate(grads)]
        both_step(post, twins, grads)
        assert_alike(twins)
    post.now += 1
    assert twins[1].skipped_steps == twins[0].skipped_steps > 0
    assert_alike(twins, has_counts=True)
    counts = [int(twins[1].state[param]["step"]) for param in params_of(twins[1])]
    assert len(set(counts)) > 1


def test_groups_of_their_own(post):
    twins = []
    for make in (lambda each: Parameter(each.clone()), parameter):
        first, second, *others = map(make, weights())
        groups = [
            {"params": [first], "grafting": "lamb"},
            {"params": [second, *others], "precondition_frequency": 2, "momentum": 0.5, "lr": 0.1},
        ]
        twins.append(Shampoo(groups, **ARGUMENTS))
    for step in range(STEPS):
        both_step(post, twins, gradients(twins[0], step, BAD))
        if step > 0:
            assert_alike(twins)


def test_rounding_at_random_draws_the_same(post):
    twins = pair(dtype=torch.bfloat16, stochastic_rounding=True)
    for step in range(8):
        both_step(post, twins, gradients(twins[0], step, {3: math.nan}))
        assert_alike(twins)


def test_a_first_step_of_zeros_only_makes_the_state(post):
    twins = pair()
    zeros = [torch.zeros_like(each) for each in gradients(twins[0], 0, {})]
    for _ in range(2):
        both_step(post, twins, zeros)
    post.now += 1
    assert twins[1].skipped_steps == 0
    assert_alike(twins, has_counts=True)
    for step, grads in enumerate([gradients(twins[0], 0, {}), zeros, zeros]):
        both_step(post, twins, grads)
        assert_alike(twins, has_counts=True)
        assert int(twins[1].state[params_of(twins[1])[0]]["step"]) == step + 1


def test_learning_rates_and_betas_may_move(post):
    twins = pair(refresh_schedule="staggered")
    for step in range(STEPS):
        for opt in twins:
            group = opt.param_groups[0]
            group["lr"], group["betas"] = 0.01 * (1 + step % 4), (0.5 + 0.02 * step, 0.9)
            group["momentum"] = 0.9 * (step > 5)
        both_step(post, twins, gradients(twins[0], step, BAD))
        if step > 0:
            assert_alike(twins)


def test_the_warning_comes_a_step_later_in_the_same_words(post, caplog):
    """It names the gradient; counts of steps are right from then on."""
    caplog.set_level(logging.WARNING)
    here, there = pair(decoupled_weight_decay=False)
    said = []
    for opt in (here, there):
        caplog.clear()
        for step in range(3):
            post.now += 1
            put(opt, gradients(opt, step, {1: math.nan}))
            opt.step()
            skipped = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
            assert len(skipped) == (step >= (1 if opt is here else 2))
        said.append(skipped)
        assert opt.param_groups[0]["extra"]["skipped_steps"] == 1
        assert int(opt.state[params_of(opt)[0]]["step"]) == 2
    assert said[0] == said[1]
    assert "with the weight_decay=0.1 that is added to it" in said[0][0]


@pytest.mark.parametrize("move", ["state_dict", "deepcopy"])
def test_what_is_saved_knows_of_the_last_step(post, monkeypatch, move):
    """A verdict that is on its way is waited for; host and device save the same, and load it."""
    twins = pair(refresh_schedule="staggered", momentum=0.9)
    for step in range(6):
        both_step(post, twins, gradients(twins[0], step, {2: math.nan, 5: math.inf}))
    post.now += 1
    saved = []
    for opt in twins:
        if move == "state_dict":
            saved.append(opt.state_dict())
        else:
            saved.append(copy.deepcopy(opt.param_groups[0]["extra"]) if opt is twins[0] else None)
    if move == "deepcopy":
        state = twins[1].__getstate__()
        assert state["param_groups"][0]["extra"] == saved[0]
        assert {int(each["step"]) for each in state["state"].values()} == {4}
        return
    here, there = saved
    assert there["param_groups"] == here["param_groups"]
    for index, entries in here["state"].items():
        assert there["state"][index].keys() == entries.keys()
        for key, value in entries.items():
            assert torch.equal(near(there["state"][index][key]), value)
            assert there["state"][index][key].dtype == value.dtype
    assert here["state"][0]["step"].device.type == there["state"][0]["step"].device.type == "cpu"
    # What a host has saved goes on on a device, as it does on the host.
    resumed = pair(refresh_schedule="staggered", momentum=0.9)
    for opt, source in zip(resumed, twins, strict=True):
        for param, other in zip(params_of(opt), params_of(source), strict=True):
            near(param.data).copy_(near(other.data))
        with monkeypatch.context() as patch:
            patch.setattr(Far, "refuses_copies", False)  # a load may wait
            opt.load_state_dict(copy.deepcopy(here))
    for step in range(6, 12):
        both_step(post, resumed, gradients(resumed[0], step, {8: math.nan}))
        assert_alike(resumed)
    post.now += 1
    assert resumed[1].skipped_steps == resumed[0].skipped_steps == 3


def test_a_count_that_somebody_writes_is_kept(post):
    _, opt = pair()
    for step in range(2):
        post.now += 1
        put(opt, gradients(opt, step, {1: math.nan}))
        opt.step()
    first, *others = params_of(opt)
    opt.state[first]["step"].fill_(40)
    post.now += 1
    assert opt.skipped_steps == 1
    assert [int(opt.state[param]["step"]) for param in (first, *others)] == [40, 1, 1, 1]


def test_parameters_may_come_after_a_step_that_was_skipped(post):
    twins = pair()
    for step in range(8):
        if step == 3:
            twins[0].add_param_group({"params": [Parameter(torch.ones(5, 5))]})
            twins[1].add_param_group({"params": [parameter(torch.ones(5, 5))]})
        both_step(post, twins, gradients(twins[0], step, {2: math.nan}))
        assert_alike(twins)
    post.now += 1
    assert twins[1].skipped_steps == twins[0].skipped_steps == 1
    assert_alike(twins, has_counts=True)


def test_schedules_ask_for_counts_that_are_right(post):
    here, there = pair(precondition_frequency=4)
    for step in range(4):  # the last is skipped, so that the fourth is still to come
        both_step(post, (here, there), gradients(here, step, {3: math.nan}))
    post.now += 1
    assert there.coming_refresh() == here.coming_refresh()
    assert any(phase is not None for phase in here.coming_refresh())


METERED = ("defaults", "lamb", "coupled", "nesterov", "diagonal", "late", "never", "kl, staggered")


@pytest.mark.parametrize(
    ("variant", "delay"), [*((name, 1) for name in METERED), ("defaults", 1000)]
)
def test_metrics_are_computed_there_and_read_when_asked_for(post, variant, delay):
    """Skipped steps leave the record of the step before, which the host does not know yet."""
    post.delay = delay
    twins = pair(**VARIANTS.get(variant, {}))
    for opt in twins:
        opt.record_metrics(every=2)
    for step in range(STEPS):
        both_step(post, twins, gradients(twins[0], step, BAD))
        if step in (1, 6, STEPS - 1):
            post.now += 1
            here, there = (opt.metrics() for opt in twins)
            assert there.keys() == here.keys()
            assert there == pytest.approx(here, rel=1e-6)
            assert there.get("shampoo/step", 0) % 2 == 0
    assert there["shampoo/skipped_steps"] == sum(bad in BAD for bad in range(STEPS))
    assert there["shampoo/step"] == 6


def test_what_was_skipped_last_is_heard_of_when_asked(post):
    twins = pair()
    for step in range(STEPS):
        both_step(post, twins, gradients(twins[0], step, BAD))
        post.now += 1
        assert twins[1].last_step_skipped is twins[0].last_step_skipped is (step in BAD)
    post.now += 1
    assert twins[1].skipped_steps == len(BAD)


WAITING = {
    "raise": {"nonfinite": "raise"},
    "too many failures": {"max_root_failures": 3},
    "eigh": {"root_method": "eigh"},
}


@pytest.mark.parametrize("arguments", WAITING)
def test_what_is_documented_to_wait_does(post, arguments):
    """Or the documentation would be wrong: what these ask for takes an answer."""
    _, opt = pair(**WAITING[arguments])
    put(opt, gradients(opt, 0, {}))
    with pytest.raises(HostReadError):
        opt.step()


def test_one_group_that_raises_makes_all_wait(post):
    opt = Shampoo(
        [{"params": [parameter(torch.ones(3, 3))]},
         {"params": [parameter(torch.ones(3, 3))], "nonfinite": "raise"}],
        **ARGUMENTS,
    )  # fmt: skip
    put(opt, gradients(opt, 0, {}))
    with pytest.raises(HostReadError):
        opt.step()
    here = Shampoo([Parameter(torch.ones(3, 3))], nonfinite="raise")
    put(here, [torch.full((3, 3), math.nan)])
    with pytest.raises(NonFiniteGradientError):
        here.step()


def test_coupled_newton_reads_nothing_either(post):
    """Its bits are others on a device, where it iterates in float32."""
    _, opt = pair(root_method="coupled_newton", relative_eps=1e-2)
    for step in range(STEPS):
        post.now += 1
        put(opt, gradients(opt, step, BAD))
        opt.step()
    post.now += 1
    assert opt.skipped_steps == len(BAD)
    assert all(value.isfinite().all() for value in values(opt, has_counts=True).values())


def test_a_root_that_fails_is_kept_and_counted_there(post, caplog):
    """The next refresh hears of it and tries again; the last rung is one that waits."""
    caplog.set_level(logging.WARNING)
    _, opt = pair(precondition_frequency=2)
    first = params_of(opt)[0]

    def step(number: int) -> None:
        post.now += 1
        put(opt, gradients(opt, number, {5: math.nan}))
        opt.step()

    for number in range(2):
        step(number)
    state = {key: near(value) for key, value in opt.state[first].items()}
    kept = state["block0.root0"].clone()
    state["block0.factor0"].fill_diagonal_(-100.0)
    for number, failures in ((2, 0), (3, 1), (4, 1), (5, 1), (6, 2)):  # the refresh of 5 is skipped
        step(number)
        assert int(state["block0.failures0"]) == failures
        assert torch.equal(state["block0.root0"], kept)
        assert int(state["block0.failures1"]) == 0
    assert sum("inverse roots failed" in each.getMessage() for each in caplog.records) == 1
    step(7)
    with pytest.raises(HostReadError, match="eigh"):
        step(8)


@pytest.mark.parametrize("stage", ["gradients", "graft", "accumulate", "refresh", "precondition"])
def test_a_read_anywhere_in_a_step_is_found(post, monkeypatch, stage):
    """Or the tests above would not tell."""
    plain = getattr(optimizer, stage)

    def reads(*given: Any) -> Any:
        [segment] = [each for each in given if isinstance(each, Segment)] or [None]
        looked = given[1][0].stack.ready if segment is None and given[1] else None
        bool((segment.norm if looked is None else looked).max()) if segment or given[1] else None
        return plain(*given)

    monkeypatch.setattr(optimizer, stage, reads)
    _, opt = pair()
    put(opt, gradients(opt, 0, {}))
    with pytest.raises(HostReadError):
        opt.step()


def test_a_gate_that_is_left_open_is_found(post, monkeypatch):
    monkeypatch.setattr(agreed_step.AgreedStep, "_gated", lambda self, steps: steps)
    _, opt = pair()
    put(opt, gradients(opt, 0, BAD))
    opt.step()
    assert not all(value.isfinite().all() for value in values(opt, has_counts=False).values())
