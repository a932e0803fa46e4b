"""What real programs do to an optimizer, each found by somebody trying it."""

import copy
import gc
import math
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.nn import Parameter

from shampoo import NonFiniteGradientError, Shampoo

HYPER: dict[str, Any] = {
    "lr": 0.1,
    "betas": (0.9, 0.95),
    "momentum": 0.5,
    "precondition_frequency": 2,
    "max_preconditioner_dim": 4,
}


def params_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def step(params: list[Parameter], opt: Shampoo, t: int) -> None:
    generator = torch.Generator().manual_seed(10 + t)
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = grad if param.requires_grad else None
    opt.step()


def assert_equal(ours: list[Parameter], theirs: list[Parameter]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).tanh())


def test_loading_in_place_keeps_the_steps_of_parameters_apart():
    """torch.distributed.checkpoint writes into the tensors that a fresh optimizer publishes."""
    torch.manual_seed(0)
    nets = [Net(), Net()]
    nets[1].load_state_dict(nets[0].state_dict())
    opts = [Shampoo(net.parameters(), **HYPER) for net in nets]

    def train(i: int, t: int) -> None:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t))
        opts[i].zero_grad()
        nets[i](x).square().sum().backward()
        opts[i].step()

    nets[0].a.weight.requires_grad_(False)
    for t in range(3):
        train(0, t)
    nets[0].a.weight.requires_grad_(True)
    for t in range(3, 7):
        train(0, t)
    options = dcp_state.StateDictOptions(flatten_optimizer_state_dict=True)
    saved = dcp_state.get_optimizer_state_dict(nets[0], opts[0], options=options)
    saved = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in saved.items()}
    template = dcp_state.get_optimizer_state_dict(nets[1], opts[1], options=options)
    for key, value in saved.items():
        if isinstance(value, torch.Tensor) and key in template:
            template[key].copy_(value)
        else:
            template[key] = value
    dcp_state.set_optimizer_state_dict(nets[1], opts[1], template, options=options)
    nets[1].load_state_dict(nets[0].state_dict())
    steps = [int(opts[1].state[param]["step"]) for param in nets[1].parameters()]
    assert steps == [4, 7, 7, 7]
    for t in range(7, 12):
        train(0, t)
        train(1, t)
    assert_equal(list(nets[0].parameters()), list(nets[1].parameters()))


def test_a_refused_change_of_geometry_leaves_no_trace():
    params, twins = params_of((6, 5), (7, 3)), params_of((6, 5), (7, 3))
    opt, twin = Shampoo(params, **HYPER), Shampoo(twins, **HYPER)
    for t in range(3):
        step(params, opt, t)
        step(twins, twin, t)
    opt.param_groups[0]["max_preconditioner_dim"] = 3
    with pytest.raises(RuntimeError, match="max_preconditioner_dim"):
        step(params, opt, 3)
    opt.param_groups[0]["max_preconditioner_dim"] = 4
    for t in range(3, 8):
        step(params, opt, t)
        step(twins, twin, t)
    assert_equal(params, twins)
    for param, other in zip(params, twins, strict=True):
        assert opt.state[param].keys() == twin.state[other].keys()
        for key, value in opt.state[param].items():
            assert torch.equal(value, twin.state[other][key]), key


def test_a_pickle_is_about_as_large_as_its_state():
    params = params_of(*[(64, 64)] * 6)
    opt = Shampoo(params, **{**HYPER, "max_preconditioner_dim": 16})
    step(params, opt, 0)
    held = sum(v.numel() * v.element_size() for s in opt.state.values() for v in s.values())
    held += sum(param.numel() * 4 for param in params)
    assert len(pickle.dumps(opt)) < 2 * held


def test_a_pickle_of_a_version_with_fewer_arguments_steps_on():
    params = params_of((6, 5))
    opt = Shampoo(params, **HYPER)
    step(params, opt, 0)
    state = opt.__getstate__()
    for values in (state["defaults"], *state["param_groups"]):
        del values["refresh_schedule"], values["nonfinite"]
    older = Shampoo.__new__(Shampoo)
    older.__setstate__(state)
    older.step()
    assert older.param_groups[0]["refresh_schedule"] == "together"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_step_changes_nothing(dtype):
    params, twins = params_of((6, 5), (3, 4, 5)), params_of((6, 5), (3, 4, 5))
    opt, twin = Shampoo(params, **HYPER), Shampoo(twins, **HYPER)
    for t in range(6):
        with torch.autocast("cpu", dtype=dtype):
            step(params, opt, t)
        step(twins, twin, t)
    assert_equal(params, twins)


def test_the_closure_keeps_autocast():
    [param] = params_of((6, 5))
    opt, seen = Shampoo([param], **HYPER), []

    def closure() -> torch.Tensor:
        product = param @ param.mT
        seen.append(product.dtype)
        loss = product.float().sum()
        loss.backward()
        return loss

    with torch.autocast("cpu", dtype=torch.bfloat16):
        opt.step(closure)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_low_precision_products_of_the_process_stay_out_of_the_step(precision):
    shapes = ((40, 50), (12, 14, 16))
    params, twins = params_of(*shapes), params_of(*shapes)
    options = {**HYPER, "max_preconditioner_dim": 64}
    opt, twin = Shampoo(params, **options), Shampoo(twins, **options)
    for t in range(5):
        torch.set_float32_matmul_precision(precision)
        try:
            step(params, opt, t)
            assert torch.get_float32_matmul_precision() == precision
        finally:
            torch.set_float32_matmul_precision("highest")
        step(twins, twin, t)
    assert_equal(params, twins)


def test_swapped_tensors_and_changed_dtypes_are_noticed():
    torch.manual_seed(0)
    net = Net()
    opt = Shampoo(net.parameters(), **HYPER)
    step(list(net.parameters()), opt, 0)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for param in net.parameters():
            param.grad = None
        net.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    params = list(net.parameters())
    assert params[0].dtype == torch.float64
    step(params, opt, 1)
    assert opt.state[params[0]]["block0.momentum"].dtype == torch.float64
    assert int(opt.state[params[0]]["step"]) == 2


def test_a_parameter_that_changes_its_shape_is_refused_before_anything_moves():
    params = params_of((6, 5), (7, 3))
    opt = Shampoo(params, **HYPER)
    step(params, opt, 0)
    kept = params[1].clone()
    params[0].grad = None
    params[0].data = params[0].data[:5].clone()
    params[0].grad = torch.ones(5, 5)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*shape"):
        opt.step()
    assert torch.equal(params[1], kept)
    assert int(opt.state[params[1]]["step"]) == 1


def test_a_default_device_does_not_reach_the_optimizer():
    params, twins = params_of((6, 5), (5,)), params_of((6, 5), (5,))
    options = {**HYPER, "refresh_schedule": "staggered"}
    twin = Shampoo(twins, **options)
    for t in range(6):
        step(twins, twin, t)
    with torch.device("meta"):
        opt = Shampoo(params, **options)
        for t in range(6):
            generator = torch.Generator("cpu").manual_seed(10 + t)
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator, device="cpu")
            opt.step()
    assert_equal(params, twins)


@pytest.mark.parametrize(
    "options",
    [
        {"eps": 0.0, "relative_eps": 0.0, "grafting": "none"},
        {"eps": 0.0, "relative_eps": 0.0, "large_dim_method": "adagrad"},
        {"grafting_eps": 1e-60},
    ],
    ids=str,
)
def test_an_eps_that_vanishes_does_not_make_nan_of_zero_gradients(options):
    params = params_of((6, 5), (5,))
    opt = Shampoo(params, **{**HYPER, **options})
    for _ in range(4):
        for param in params:
            param.grad = torch.ones_like(param)
            param.grad[0] = 0.0
        opt.step()
    assert all(param.isfinite().all() for param in params)


def test_a_power_without_a_schedule_is_refused_before_anything_moves():
    params = params_of((6, 5))
    opt = Shampoo(params, **HYPER, root_method="minimax")
    step(params, opt, 0)
    opt.param_groups[0]["exponent"] = 9
    kept = {key: value.clone() for key, value in opt.state[params[0]].items()}
    with pytest.raises(ValueError, match=r"p=9.*minimax.*Must be one of"):
        step(params, opt, 1)
    assert all(torch.equal(value, kept[key]) for key, value in opt.state[params[0]].items())


def test_a_pseudo_inverse_with_an_empty_row_resumes_bit_for_bit():
    options = {**HYPER, "eps": 0.0, "relative_eps": 0.0, "max_preconditioner_dim": 8}
    params, others = params_of((6, 5)), params_of((6, 5))
    opt, other = Shampoo(params, **options), Shampoo(others, **options)

    def sparse_step(params: list[Parameter], opt: Shampoo, t: int) -> None:
        grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(t))
        grad[2] = 0.0
        params[0].grad = grad
        opt.step()

    for t in range(4):
        sparse_step(params, opt, t)
    other.load_state_dict(opt.state_dict())
    others[0].data.copy_(params[0].data)
    for t in range(4, 9):
        sparse_step(params, opt, t)
        sparse_step(others, other, t)
    assert_equal(params, others)


def test_slots_are_spread_again_after_a_time_together():
    params = params_of((16, 16))
    opt = Shampoo(params, **{**HYPER, "refresh_schedule": "staggered"})
    for t, schedule in enumerate(("staggered", "together", "staggered")):
        opt.param_groups[0]["refresh_schedule"] = schedule
        step(params, opt, t)
    slots = {int(v) for k, v in opt.state[params[0]].items() if ".slot" in k}
    assert slots == {0, 1}


def test_one_huge_gradient_is_skipped_and_training_goes_on():
    params, twins = params_of((6, 5), (5,)), params_of((6, 5), (5,))
    opt, twin = Shampoo(params, **HYPER), Shampoo(twins, **HYPER)
    for t in range(8):
        if t == 4:
            for param in params:
                param.grad = torch.ones_like(param)
            params[0].grad[1, 1] = 1e22
            opt.step()
            assert opt.skipped_steps == 1
        step(params, opt, t)
        step(twins, twin, t)
    assert_equal(params, twins)
    opt.param_groups[0]["nonfinite"] = "raise"
    params[0].grad[0, 0] = -1e22
    with pytest.raises(
        NonFiniteGradientError, match=r"parameter 0 of group 0.*too large to square"
    ):
        opt.step()


def test_a_run_that_skips_for_ever_does_not_flood_the_log(caplog):
    params = params_of((6, 5))
    opt = Shampoo(params, **HYPER)
    for _ in range(100):
        params[0].grad = torch.full((6, 5), math.nan)
        opt.step()
    assert opt.skipped_steps == 100
    assert len(caplog.records) == 7  # at 1, 2, 4 ... 64


@pytest.mark.parametrize("late", [False, True])
def test_a_warning_names_the_line_of_the_caller(late):
    params = params_of((6, 5), (3, 3))
    opt = Shampoo(params[:1], **HYPER) if late else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if opt is None:
            Shampoo(params, nesterov=True)
        else:
            opt.add_param_group({"params": params[1:], "nesterov": True, "momentum": 0.0})
    assert [warning.filename for warning in caught if "nesterov" in str(warning.message)] == [
        __file__
    ]


def test_workspaces_are_as_large_as_their_own_groups_need():
    params = [*params_of((512, 512)), *params_of((8, 8), dtype=torch.float64)]
    opt = Shampoo(
        [
            {"params": params[:1]},
            {"params": params[1:], "preconditioner_dtype": torch.float64},
        ],
        lr=0.1,
    )
    step(params, opt, 0)
    assert opt._plan is not None
    sizes = {dtype: space.numel() for (_, dtype), space in opt._plan._workspaces.items()}
    assert sizes == {torch.float32: 2 * 512 * 512, torch.float64: 2 * 64}


def test_gradients_are_not_held_beyond_a_step():
    params = params_of((6, 5), (5,))
    opt = Shampoo(params, **HYPER)
    step(params, opt, 0)
    held = [weakref.ref(param.grad) for param in params]
    opt.zero_grad()
    assert [reference() for reference in held] == [None, None]


def test_a_load_lets_go_of_the_state_before():
    params = params_of((6, 5))
    opt = Shampoo(params, **HYPER)
    step(params, opt, 0)
    [arena] = opt._plan.arenas
    before = weakref.ref(arena)
    saved = copy.deepcopy(opt.state_dict())
    del arena
    opt.load_state_dict(saved)
    gc.collect()
    assert before() is None
