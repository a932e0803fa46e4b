"""No finite gradient leaves a parameter, or anything of the state, that is not finite."""

import math
from typing import Any

import pytest
import torch
from finite_runs import CASES, half_run, wild_run
from ranks import Ranks
from torch.nn import Parameter

from shampoo import NonFiniteGradientError, Shampoo
from shampoo.grafting import GRAFTING
from shampoo.ops.limits import clamped, summand_limit
from shampoo.step.gradients import square_limit

STEPS = 1500
# lr is small enough for weights to stay far from the limits: those are its to keep.
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "momentum": {"momentum": 0.9, "nesterov": True},
    "heavy momentum": {"momentum": 0.9999999, "betas": (0.0, 0.999)},
    "coupled decay": {"decoupled_weight_decay": False, "weight_decay": 0.1, "momentum": 0.5},
    "plain sums": {"betas": (0.9, 1.0), "grafting_beta2": 1.0},
    "plain": {"precondition": False, "betas": (0.9, 1.0), "momentum": 0.9},
    "tiny eps": {"eps": 1e-38, "relative_eps": 0.0, "grafting_eps": 1e-38, "exponent": 1},
    "fast factors": {"betas": (0.999, 0.1), "grafting_beta2": 0.1, "weight_decay": 0.1},
    "float64": {"preconditioner_dtype": torch.float64, "momentum": 0.5},
    "diagonal": {"max_preconditioner_dim": 2, "large_dim_method": "diagonal", "eps": 1e-38},
    "adagrad": {"max_preconditioner_dim": 2, "large_dim_method": "adagrad", "eps": 1e-38},
    "kl": {"preconditioner": "kl_shampoo", "betas": (0.9, 1.0), "momentum": 0.9},
    "capturable": {"capturable": True, "momentum": 0.9},
    "capturable, coupled": {
        "capturable": True, "weight_decay": 0.1, "decoupled_weight_decay": False,
    },
}  # fmt: skip
# All that remembers for ever, at once.
LASTING = {
    **VARIANTS["plain sums"], "momentum": 0.99, "nesterov": True,
    "decoupled_weight_decay": False, "weight_decay": 0.1,
}  # fmt: skip


def check(opt: Shampoo, what: str) -> None:
    for i, (param, state) in enumerate(opt.state.items()):
        named = {"parameter": param, **state}
        floats = {key: value for key, value in named.items() if value.is_floating_point()}
        largest = torch._foreach_norm(list(floats.values()), ord=math.inf)
        bad = [key for key, most in zip(floats, largest, strict=True) if not most.isfinite()]
        assert not bad, f"{what}: {bad} of parameter {i}"


def train(opt: Shampoo, powers: list[float], generator: torch.Generator) -> None:
    """One parameter has gradients of these powers of ten, the other dies after 20 steps."""
    wild, dead = opt.param_groups[0]["params"]
    for t, power in enumerate(powers):
        drawn = torch.randn((2, *wild.shape), generator=generator)
        wild.grad = (drawn[0].double() * 10.0**power).float()
        dead.grad = drawn[1] if t < 20 else torch.zeros_like(dead)
        opt.step()
        check(opt, f"step {t}, gradients of 1e{power:.0f}")


def optimizer(grafting: str, hyper: dict[str, Any]) -> Shampoo:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(4, 3, generator=generator)) for _ in range(2)]
    return Shampoo(params, lr=1e-5, grafting=grafting, **{"precondition_frequency": 3, **hyper})


def check_that_training_goes_on(opt: Shampoo, generator: torch.Generator) -> None:
    """The layer that was dead learns again. The other need not: its sums remember 1e15."""
    dead = opt.param_groups[0]["params"][1]
    kept, skipped = dead.detach().clone(), opt.skipped_steps
    train(opt, [0.0] * 15, generator)
    assert (dead != kept).any()
    assert opt.skipped_steps == skipped


@pytest.mark.parametrize("grafting", GRAFTING)
def test_gradients_of_any_size_leave_everything_finite_for_long(grafting):
    opt, generator = optimizer(grafting, LASTING), torch.Generator().manual_seed(1)
    drawn = torch.rand(STEPS // 10, generator=generator) * 72 - 42  # 1e-42 to 1e30
    train(opt, drawn.repeat_interleave(10).tolist(), generator)
    assert 0 < opt.skipped_steps < STEPS / 2
    check_that_training_goes_on(opt, generator)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grafting", GRAFTING)
def test_gradients_of_any_size_leave_everything_finite(grafting, variant):
    opt, generator = optimizer(grafting, VARIANTS[variant]), torch.Generator().manual_seed(1)
    powers = [-42.0, -25.0, 14.5, 0.0, 30.0, -10.0, 14.5, -30.0, 10.0, 17.0]
    train(opt, [power for power in powers for _ in range(4)], generator)
    assert opt.skipped_steps > 0 or variant == "float64"  # which holds the squares of 1e30
    check_that_training_goes_on(opt, generator)


@pytest.mark.parametrize("start", [1e-40, 1e-20, 1.0])
@pytest.mark.parametrize("grafting", ["lars", "lamb"])
@pytest.mark.parametrize("precondition", [True, False])
def test_a_layer_that_dies_keeps_a_finite_length(start, grafting, precondition):
    """Its average fades through the denormal numbers, where |W| / |P| leaves float32."""
    torch.manual_seed(0)
    param, other = (Parameter(torch.randn(6, 6) * 100) for _ in range(2))
    groups = [{"params": [param]}, {"params": [other]}]
    opt = Shampoo(groups, lr=1e-5, grafting=grafting, precondition=precondition)
    for t in range(900 if start == 1.0 else 300):
        param.grad = torch.full((6, 6), start if t < 5 else 0.0)
        other.grad = torch.randn(6, 6)
        before = param.detach().clone()
        opt.step()
        check(opt, f"step {t}")
        # The direction has at most the length of the weights.
        assert (param - before).norm() <= 1.01e-5 * before.norm() + 1e-4


@pytest.mark.parametrize(
    "hyper",
    [
        {"grafting": "adagrad", "betas": (0.9, 1.0)},
        {"grafting": "sgd", "betas": (0.0, 1.0), "momentum": 0.999},
        {"grafting": "adam", "betas": (0.9, 0.9999999), "grafting_beta2": 1.0},
        {"grafting": "adagrad", "betas": (0.9, 1.0), "precondition": False},
        {"betas": (0.9, 1.0), "max_preconditioner_dim": 2, "large_dim_method": "adagrad"},
        {"betas": (0.9, 1.0), "max_preconditioner_dim": 2, "large_dim_method": "diagonal"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_hold_as_many_squares_as_there_are_steps(hyper, dtype):
    """At the documented limit a step is taken, beyond it refused, and sums saturate in between.

    A sum in floating-point numbers ends where a summand is less than half of its last place: it is
    put there, as many more steps than can be taken would, and must stay.
    """
    param = Parameter(torch.zeros(4, 4, dtype=torch.float64))
    opt = Shampoo([param], lr=1e-30, precondition_frequency=4, preconditioner_dtype=dtype, **hyper)
    limit = square_limit(16, dtype)
    param.grad = torch.full_like(param, 0.999 * limit)
    for _ in range(5):
        opt.step()
    assert opt.skipped_steps == 0
    most = 4 / torch.finfo(dtype).eps * summand_limit(dtype)
    for key, value in opt.state[param].items():
        if ("factor" in key and hyper["betas"][1] == 1.0) or (
            "exp_avg_sq" in key and (hyper.get("grafting_beta2") == 1.0 or "factor" not in key)
        ):
            value.fill_(most if "factor" in key else most / 16)
    for _ in range(20):
        opt.step()
        check(opt, "at the end of a sum")
    param.grad = torch.full_like(param, 1.001 * limit)
    opt.step()
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("capturable", [False, True])
def test_weights_whose_decay_cannot_be_squared_skip_the_step(capturable):
    """With coupled decay they are part of the gradient, which is then checked with them."""
    param, other = (Parameter(torch.ones(4, 4)) for _ in range(2))
    opt = Shampoo(
        [{"params": [param]}, {"params": [other]}],
        weight_decay=0.1,
        decoupled_weight_decay=False,
        capturable=capturable,
    )

    def step() -> None:
        param.grad, other.grad = torch.ones(4, 4), torch.ones(4, 4)
        opt.step()

    step()
    for weight in (1e20, 1e25, -3e38):
        kept = [v.clone() for p in (param, other) for v in opt.state[p].values()]
        before = other.detach().clone()
        param.data[1, 2] = weight
        step()
        after = [v for p in (param, other) for v in opt.state[p].values()]
        counts = [v.dtype == torch.int64 for v in kept]  # of a captured step: what was asked for
        for old, new, is_count in zip(kept, after, counts, strict=True):
            assert is_count or torch.equal(old, new)
        assert torch.equal(other, before)
    assert opt.skipped_steps == 3
    param.data[1, 2] = 1.0
    step()
    assert opt.skipped_steps == 3
    assert (other != before).any()
    if not capturable:
        opt.param_groups[0]["nonfinite"] = "raise"
        param.data[1, 2] = 1e20
        with pytest.raises(NonFiniteGradientError, match=r"weight_decay=0.1 that is added"):
            step()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_direction_that_float32_cannot_hold_is_no_step(capturable, momentum):
    """Its statistics move and its roots are kept; a block beside it goes on."""
    params = [Parameter(torch.ones(4, 4)), Parameter(torch.ones(4, 4))]
    opt = Shampoo(
        params,
        lr=1e-3,
        betas=(0.0, 0.9),
        grafting="none",
        momentum=momentum,
        exponent=1,
        eps=1e-38,
        relative_eps=0.0 if not capturable else 1e-6,
        precondition_frequency=4,
        start_preconditioning_step=4,
        capturable=capturable,
        root_method="coupled_newton" if capturable else "auto",
    )
    for t in range(8):
        for param, tiny in zip(params, (True, False), strict=True):
            # At the first refresh the roots are those of tiny gradients, and then they grow.
            param.grad = torch.eye(4) * (1e-19 if tiny and t < 4 else 1.0)
        before = [param.detach().clone() for param in params]
        factor = opt.state[params[0]].get("block0.factor0", torch.zeros(4, 4)).clone()
        opt.step()
        check(opt, f"step {t}")
        assert (params[1] != before[1]).any()
        assert not torch.equal(factor, opt.state[params[0]]["block0.factor0"])
        if 4 <= t < 7:
            assert torch.equal(params[0], before[0]) or momentum > 0
    assert (params[0] != before[0]).any(), "new roots have found a direction again"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("is_sharded", [False, True])
def test_ranks_decide_alike_and_as_one_process_does(ranks: Ranks, case, is_sharded):
    wanted, skipped, bad = wild_run(0, case)
    assert not bad
    assert skipped == (4 if case == "coupled" else 2)
    for found, count, unfit in ranks.returns(wild_run, 2, case, is_sharded):
        assert not unfit
        assert count == skipped
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_directions_beyond_float16_travel_as_its_largest_number(ranks: Ranks):
    for found, _, bad in ranks.returns(half_run, 2):
        assert not bad
        assert all(param.isfinite().all() for param in found)


def test_what_a_narrower_dtype_cannot_hold_travels_as_its_largest_number():
    values = torch.tensor([1e6, -1e6, 1.0, 3e38, 0.0])
    assert clamped(values, torch.bfloat16) is values
    assert clamped(values, torch.float64) is values
    assert clamped(values, torch.float16).half().tolist() == [65504, -65504, 1, 65504, 0]
    wide = torch.tensor([1e300, -1e300, 2.0], dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        largest = torch.finfo(dtype).max
        assert clamped(wide, dtype).to(dtype).tolist() == [largest, -largest, 2.0]


def test_the_limits_are_those_of_the_documentation():
    assert math.isclose(square_limit(1, torch.float32), 2.2e15, rel_tol=0.05)
    assert math.isclose(summand_limit(torch.float32), 5e30, rel_tol=0.05)
    for dtype in (torch.float32, torch.float64):
        total = torch.tensor(summand_limit(dtype) * 2 / torch.finfo(dtype).eps * 2, dtype=dtype)
        assert total.isfinite()
        assert torch.equal(total + summand_limit(dtype), total), "the sum has ended"
