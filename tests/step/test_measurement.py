"""Metrics of one process, against float64 computations from what `optimizer.state` shows."""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from trajectory import random_grads

from shampoo import Shampoo
from shampoo.kernels.reference.root_check import white_vectors

ARGUMENTS: dict[str, Any] = {
    "lr": 0.02,
    "betas": (0.9, 0.95),
    "max_preconditioner_dim": 8,
    "precondition_frequency": 3,
    "large_dim_method": "blocking",
}
SHAPES = [(12, 9), (7,), (8, 5), (3, 3)]


def make(dtype: torch.dtype = torch.float32, **arguments: Any) -> tuple[Shampoo, list[Parameter]]:
    """Two groups with names: matrices, and others that follow the grafted method."""
    generator = torch.Generator().manual_seed(3)
    params = [Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    groups = [
        {"params": params[:2], "name": "first"},
        {"params": params[2:], "name": "second", "weight_decay": 0.1},
    ]
    return Shampoo(groups, **{**ARGUMENTS, **arguments}), params


def walk(
    opt: Shampoo, params: Sequence[Parameter], steps: int, edit: Callable[[int], None] | None = None
) -> list[Tensor]:
    """Some steps; the weights before the last one."""
    for step, grads in enumerate(random_grads(params, steps, seed=5)):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone() if param.requires_grad else None
        if edit is not None:
            edit(step)
        before = [param.detach().clone() for param in params]
        opt.step()
    return before


def rms(tensors: Sequence[Tensor]) -> float:
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    return math.sqrt(float(flat.square().sum()) / len(flat))


def updates(params: Sequence[Parameter], before: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().double() - b.double() for p, b in zip(params, before, strict=True)]


VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "momentum": {"momentum": 0.9},
    "coupled": {"decoupled_weight_decay": False, "weight_decay": 0.2},
    "lamb": {"grafting": "lamb"},
    "kl": {"preconditioner": "kl_shampoo"},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16, "lr": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_weights_and_updates(variant):
    opt, params = make(**VARIANTS[variant])
    opt.record_metrics(every=5)
    before = walk(opt, params, 10)
    found, moved = opt.metrics(), updates(params, before)
    tol = 5e-3 if variant == "bfloat16" else 1e-5
    for prefix, chosen in (
        ("shampoo", slice(None)),
        ("shampoo/first", slice(2)),
        ("shampoo/second", slice(2, None)),
    ):
        grads = [param.grad for param in params[chosen]]
        expected = {
            "grad_rms": rms(grads),
            "weight_rms": rms(before[chosen]),
            "update_rms": rms(moved[chosen]),
            "update_ratio": rms(moved[chosen]) / rms(before[chosen]),
        }
        for name, value in expected.items():
            assert found[f"{prefix}/{name}"] == pytest.approx(value, rel=tol), name
    assert found["shampoo/step"] == 10
    assert found["shampoo/skipped_steps"] == 0


def test_long_tensors_are_added_up_in_runs():
    """A float32 sum over all of it would be wrong in the fourth digit."""
    param = Parameter(torch.rand(3_000, 1_100))
    opt = Shampoo([param], precondition=False)
    opt.record_metrics()
    param.grad = torch.rand_like(param)
    before = param.detach().clone()
    opt.step()
    assert opt.metrics()["shampoo/weight_rms"] == pytest.approx(rms([before]), rel=5e-5)
    assert opt.metrics()["shampoo/grad_rms"] == pytest.approx(rms([param.grad]), rel=5e-5)


def factors_of(opt: Shampoo, params: Sequence[Parameter]) -> list[tuple[Tensor, Tensor, int]]:
    """Every factor with its root and the steps of its parameter, from published state."""
    found = []
    for param in params:
        state = opt.state[param]
        for key, value in state.items():
            if ".factor" in key and value.dim() == 2:
                found.append((value, state[key.replace("factor", "root")], int(state["step"])))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_spectra_and_errors_of_roots(dtype):
    """In a step that refreshes: by eigenvalues of the factors that are there."""
    own = {"preconditioner_dtype": dtype, "dtype": dtype, "precondition_frequency": 1}
    opt, params = make(**own, relative_eps=1e-4)
    opt.record_metrics()
    walk(opt, params, 7)
    spreads, errors = [], []
    for factor, root, step in factors_of(opt, params):
        matrix = factor.double() / (1 - 0.95**step)
        values = torch.linalg.eigvalsh(matrix)
        ridge = max(1e-12, 1e-4 * float(values.pow(4).sum() ** 0.25))
        spreads.append(float(values[-1]) / ridge)
        damped = matrix + ridge * torch.eye(len(matrix), dtype=torch.float64)
        probe = white_vectors(len(matrix), torch.float64, matrix.device)
        image = root.double() @ damped @ probe
        errors.append(float((image - damped @ root.double() @ probe).norm() / image.norm()))
    found = opt.metrics()
    mean = math.exp(sum(map(math.log, spreads)) / len(spreads))
    assert found["shampoo/eig_over_ridge"] == pytest.approx(mean, rel=0.02)
    assert found["shampoo/eig_over_ridge_max"] == pytest.approx(max(spreads), rel=0.03)
    assert found["shampoo/eig_over_ridge_min"] == pytest.approx(min(spreads), rel=0.05)
    if dtype == torch.float32:  # of others nothing but rounding is left, of which it has some too
        assert found["shampoo/root_error"] == pytest.approx(max(errors), rel=0.2)
    assert found["shampoo/root_error"] < 1e-2


@pytest.mark.parametrize(
    ("arguments", "is_ahead"),
    [({}, True), ({"nesterov_average": False}, False), ({"betas": (0.0, 0.95)}, False)],
)
def test_the_graft_scale(arguments, is_ahead):
    """|D| over |P| of every block, from moments and eigenvalues of factors, by hand."""
    opt, params = make(precondition_frequency=1, **arguments)
    opt.record_metrics()
    steps = 5
    walk(opt, params, steps)
    beta1, beta2 = opt.param_groups[0]["betas"]
    logs = []
    for param in params:
        state = opt.state[param]
        grid = {tuple(map(int, (key[5 : key.index(".")],))) for key in state if ".factor" in key}
        for (block,) in sorted(grid):
            average = state.get(f"block{block}.exp_avg")
            square = state[f"block{block}.exp_avg_sq"].double()
            rows, columns = square.shape
            # Blocks are cut row-major from the matrix, at multiples of 8.
            across = -(-param.shape[1] // 8)
            top, left = 8 * (block // across), 8 * (block % across)
            grad = param.grad[top : top + rows, left : left + columns].double()
            plain = grad if average is None else average.double() / (1 - beta1**steps)
            graft = plain / ((square / (1 - beta2**steps)).sqrt() + 1e-8)
            filtered = plain
            if is_ahead:
                ahead = beta1 * average.double() + (1 - beta1) * grad
                filtered = ahead / (1 - beta1 ** (steps + 1))
            roots = []
            for mode in range(2):
                matrix = state[f"block{block}.factor{mode}"].double() / (1 - beta2**steps)
                values, vectors = torch.linalg.eigh(matrix)
                ridge = max(1e-12, 1e-6 * float(values.pow(4).sum() ** 0.25))
                roots.append((vectors * (values.clamp(min=0) + ridge) ** -0.5) @ vectors.mT)
            logs.append(math.log(graft.norm() / (roots[0] @ filtered @ roots[1]).norm()))
    assert len(logs) == 6
    scale = opt.metrics()["shampoo/graft_scale"]
    assert scale == pytest.approx(math.exp(sum(logs) / len(logs)), rel=2e-3)


def test_blocks_and_bytes():
    opt, params = make(start_preconditioning_step=4)
    opt.record_metrics()
    walk(opt, params, 3)
    early = opt.metrics()
    assert early["shampoo/preconditioned"] == 0.0
    assert "shampoo/graft_scale" not in early
    assert "shampoo/root_age" not in early
    assert early["shampoo/root_failures"] == 0.0
    walk(opt, params, 2)
    found = opt.metrics()
    # 12 x 9 has four blocks, 8 x 5 and 3 x 3 one each; the vector follows the grafted method.
    assert found["shampoo/preconditioned"] == pytest.approx(6 / 7)
    assert found["shampoo/first/preconditioned"] == pytest.approx(4 / 5)
    assert found["shampoo/second/preconditioned"] == 1.0
    rows = opt.explain()
    assert found["shampoo/state_bytes"] == rows.state_bytes
    for index, name in enumerate(("first", "second")):
        held = sum(row.state_bytes for row in rows.tensors if row.group == index)
        assert found[f"shampoo/{name}/state_bytes"] == held


@pytest.mark.parametrize("arguments", [{"momentum": 0.9}, {"refresh_schedule": "staggered"}])
def test_bytes_are_those_of_explain(arguments):
    opt, params = make(**arguments)
    opt.record_metrics()
    walk(opt, params, 4)
    assert opt.metrics()["shampoo/state_bytes"] == opt.explain().state_bytes


def test_groups_that_are_not_preconditioned_or_not_trained():
    params = [Parameter(torch.randn(9, 9)) for _ in range(3)]
    params[2].requires_grad_(False)
    opt = Shampoo(
        [
            {"params": [params[0]], "name": "twice"},
            {"params": [params[1]], "name": "twice", "precondition": False},
            {"params": [params[2]]},
        ],
        **ARGUMENTS,
    )
    opt.record_metrics()
    walk(opt, params, 4)
    found = opt.metrics()
    assert found["shampoo/twice.0/preconditioned"] == 1.0
    assert found["shampoo/twice.1/preconditioned"] == 0.0
    assert "shampoo/twice.1/root_error" not in found
    assert "shampoo/twice.1/root_failures" not in found
    assert found["shampoo/twice.1/grad_rms"] == pytest.approx(rms([params[1].grad]), rel=1e-5)
    assert not any(key.startswith("shampoo/2/") for key in found)  # nothing is trained there
    assert found["shampoo/preconditioned"] == 0.5  # of four blocks each
    assert all(type(value) is float and math.isfinite(value) for value in found.values())


def ages(hyper: dict[str, Any], steps: int) -> list[int]:
    """The age of a root of phase 0 after every step, by the documented schedule."""
    found, last = [], 0
    for step in range(1, steps + 1):
        early = [2**k for k in range(20) if 2**k < hyper["precondition_frequency"]]
        if step in early or step % hyper["precondition_frequency"] == 0:
            last = step
        found.append(step - last)
    return found


@pytest.mark.parametrize("frequency", [1, 3, 7])
def test_the_age_of_roots(frequency):
    opt, params = make(precondition_frequency=frequency)
    opt.record_metrics()
    seen = []
    for step in range(16):
        walk(opt, params, 1)
        found = opt.metrics()
        assert found["shampoo/root_age"] == found["shampoo/root_age_max"]
        assert found["shampoo/step"] == step + 1
        seen.append(found["shampoo/root_age"])
    assert seen == ages({"precondition_frequency": frequency}, 16)


def test_the_age_of_roots_that_are_spread_over_a_period():
    opt, params = make(refresh_schedule="staggered", precondition_frequency=5)
    opt.record_metrics()
    last: dict[tuple[int, str], int] = {}
    for step in range(1, 19):
        before = [
            {key: value.clone() for key, value in opt.state.get(param, {}).items()}
            for param in params
        ]
        walk(opt, params, 1, lambda _, step=step: [p.grad.mul_(1 + step) for p in params])
        for index, param in enumerate(params):
            for key, value in opt.state[param].items():
                is_new = not value.equal(before[index].get(key, torch.zeros(1)))
                if ".root" in key and is_new and value.any():
                    last[index, key] = step
        expected = [step - each for each in last.values()]
        found = opt.metrics()
        if expected:
            assert found["shampoo/root_age"] == pytest.approx(sum(expected) / len(expected))
            assert found["shampoo/root_age_max"] == max(expected)


def test_a_root_that_fails(caplog):
    """It is counted, ages on, and what was found of the one before it stays."""
    caplog.set_level(logging.ERROR)
    opt, params = make(precondition_frequency=2)
    opt.record_metrics()
    walk(opt, params, 4)
    before = opt.metrics()
    assert before["shampoo/root_failures"] == 0

    def spoil(_: int) -> None:
        opt.state[params[0]]["block1.factor0"].fill_diagonal_(-100.0)

    walk(opt, params, 4, spoil)
    found = opt.metrics()
    assert found["shampoo/root_failures"] == found["shampoo/first/root_failures"] == 1
    assert found["shampoo/root_failures_in_a_row"] == 2
    assert found["shampoo/root_age_max"] == 4
    assert found["shampoo/root_age"] == pytest.approx(4 / 12)
    assert found["shampoo/second/root_failures"] == 0
    assert math.isfinite(found["shampoo/root_error"])
    assert found["shampoo/preconditioned"] == before["shampoo/preconditioned"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_step_that_is_skipped_leaves_the_record(bad, caplog):
    caplog.set_level(logging.ERROR)
    opt, params = make()
    opt.record_metrics()
    walk(opt, params, 3)
    assert not opt.last_step_skipped
    before = opt.metrics()

    def spoil(_: int) -> None:
        params[1].grad[2] = bad

    walk(opt, params, 1, spoil)
    assert opt.last_step_skipped
    assert opt.metrics() == {**before, "shampoo/skipped_steps": 1.0}
    walk(opt, params, 1)
    assert not opt.last_step_skipped
    assert opt.metrics()["shampoo/step"] == 4
    assert opt.metrics()["shampoo/skipped_steps"] == 1


@pytest.mark.parametrize("arguments", [{}, {"capturable": True, "root_method": "minimax"}])
def test_what_was_skipped_last(arguments, caplog):
    caplog.set_level(logging.ERROR)
    opt, params = make(**arguments)
    assert not opt.last_step_skipped
    for bad in (math.nan, 0.5, math.inf, math.nan, 0.5):
        walk(opt, params, 1, lambda _, bad=bad: params[0].grad[0, 0].fill_(bad))
        assert opt.last_step_skipped is not math.isfinite(bad)
    opt.zero_grad()
    opt.step()  # nothing to take is nothing skipped
    if not arguments:
        assert not opt.last_step_skipped


def test_parameters_without_a_gradient_do_not_count():
    opt, params = make()
    opt.record_metrics()
    walk(opt, params, 2)
    grads = [torch.ones_like(param) for param in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    params[0].grad = None
    opt.step()
    found = opt.metrics()
    assert found["shampoo/grad_rms"] == pytest.approx(1.0)
    assert found["shampoo/preconditioned"] == pytest.approx(2 / 3)
    assert found["shampoo/first/preconditioned"] == 0.0  # the vector alone


def test_parameters_that_count_their_own_steps():
    """The second starts where the first has long begun."""
    opt, params = make(start_preconditioning_step=3)
    opt.record_metrics()
    params[2].requires_grad_(False)  # it is planned nevertheless once it has state
    walk(opt, params, 4)
    params[2].requires_grad_(True)
    shares = []
    for _ in range(4):
        walk(opt, params, 1)
        shares.append(opt.metrics()["shampoo/second/preconditioned"])
    assert shares == [0.5, 0.5, 1.0, 1.0]


def test_every_nth_step_is_measured():
    opt, params = make()
    with pytest.raises(RuntimeError, match=r"record_metrics\(every=10\)"):
        opt.metrics()
    opt.record_metrics(every=3)
    steps = []
    for _ in range(8):
        walk(opt, params, 1)
        steps.append(opt.metrics().get("shampoo/step"))
    assert steps == [None, None, 3, 3, 3, 6, 6, 6]
    opt.record_metrics(every=0)
    assert all(
        stack.found is None for arena in opt._plan.arenas for stack in arena.refreshed_stacks()
    )
    with pytest.raises(RuntimeError, match="No step has been measured"):
        opt.metrics()
    for bad in (-1, 1.5, True, "10"):
        with pytest.raises(ValueError, match="Must be an integer >= 0"):
            opt.record_metrics(every=bad)


@pytest.mark.parametrize("variant", ["defaults", "momentum", "lamb", "kl", "bfloat16"])
def test_no_bit_of_a_step_depends_on_it(variant):
    plain, params = make(**VARIANTS[variant])
    measured, others = make(**VARIANTS[variant])
    measured.record_metrics(every=2)
    walk(plain, params, 9)
    walk(measured, others, 9)
    for param, other in zip(params, others, strict=True):
        assert param.equal(other)
        for key, value in plain.state[param].items():
            assert value.equal(measured.state[other][key]), key


def test_no_checkpoint_or_copy_holds_it():
    opt, params = make()
    opt.record_metrics()
    walk(opt, params, 4)
    assert copy.deepcopy(opt)._recorder is None
    twin, _ = make()
    twin.load_state_dict(opt.state_dict())
    assert twin._recorder is None


def test_a_new_plan_is_followed():
    """Parameters may come, and a load makes the state anew."""
    opt, params = make()
    opt.record_metrics()
    walk(opt, params, 3)
    params.append(Parameter(torch.randn(6, 6)))
    opt.add_param_group({"params": [params[-1]], "name": "third"})
    walk(opt, params, 3)
    assert opt.metrics()["shampoo/third/preconditioned"] == 1.0
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    walk(opt, params, 3)
    found = opt.metrics()
    assert found["shampoo/step"] == 9
    assert found["shampoo/root_error"] > 0


def test_a_closure_and_a_module():
    model = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 3))
    opt = Shampoo(model, lr=1e-2)
    opt.record_metrics()
    x = torch.randn(5, 9)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    assert {"shampoo/matrices/update_rms", "shampoo/vectors/update_rms"} <= opt.metrics().keys()


def test_hyper_parameters_in_plain_values():
    opt, _ = make(betas=(torch.tensor(0.5), 0.75), lr=torch.tensor(0.25))
    found = opt.hparams()
    assert all(type(value) in (bool, int, float, str) for value in found.values())
    assert found["shampoo/first/lr"] == found["shampoo/second/lr"] == 0.25
    assert found["shampoo/first/betas.0"] == 0.5
    assert found["shampoo/second/betas.1"] == 0.75
    assert found["shampoo/second/weight_decay"] == 0.1
    assert not any("params" in key or "extra" in key for key in found)
