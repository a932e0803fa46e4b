"""The average that roots are applied to: looked ahead by one gradient, or not (step 5)."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from pairwise import pairwise
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from trajectory import (
    apply,
    assert_relative,
    compare,
    double_shampoo,
    random_grads,
    random_params,
    snapshot,
    twins_of,
)

from shampoo import Shampoo, ops

SHAPES = [(9, 5), (4, 3, 2), (7,)]
CASES: dict[str, dict[str, Any]] = {
    "adam": {},
    "no graft": {"grafting": "none", "eps": 1e-3},
    "no correction": {"grafting": "none", "bias_correction": False, "eps": 1e-3},
    "a late start": {"start_preconditioning_step": 4, "precondition_frequency": 3},
    "momentum": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "kept by the layer": {"grafting": "lamb", "weight_decay": 0.1},
    "coupled": {"decoupled_weight_decay": False, "weight_decay": 0.1},
    "little average": {"betas": (1e-9, 0.95)},
}


@pytest.fixture(params=[False, True], ids=["one segment", "segments"])
def segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments gather twice in a step with a refresh."""
    if request.param:
        monkeypatch.setattr("shampoo.blocks.segments.CPU_SEGMENT", 24)


@pytest.mark.usefixtures("segments", "nan_filled_empty")
@pytest.mark.parametrize("looks_ahead", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_reference(case, looks_ahead):
    compare(SHAPES, 9, **{"lr": 0.1, "nesterov_average": looks_ahead, **CASES[case]})


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is not asked to look ahead: torch does, in the operations that define it."""
    moments = ops.graft_moments_

    def run(grad: Tensor | None, exp_avg: Tensor | None, *rest: Any) -> None:
        *rest, ahead = rest
        moments(grad, exp_avg, *rest)
        if ahead is not None:
            beta1 = rest[7]
            assert grad is not None
            ahead.copy_((grad - exp_avg).mul_(1.0 - beta1).add_(exp_avg))

    monkeypatch.setattr("shampoo.ops.graft_moments_", run)


def trained(case: dict[str, Any], dtype: torch.dtype, comes_and_goes: bool) -> dict[Any, Tensor]:
    """Weights and state after 20 steps of parameters that keep to themselves, or not."""
    torch.manual_seed(0)
    params = random_params((37, 21), (21, 37), (5, 4, 3), (5, 4, 3), (9,), dtype=dtype)
    opt = Shampoo(params, lr=0.1, **case)
    for t, grads in enumerate(random_grads(params, 20)):
        grads[0] = grads[0].mT.contiguous().mT
        is_here = [not comes_and_goes or (t + 3 * i) % 4 > 0 for i in range(len(params))]
        apply(opt, params, [g if here else None for g, here in zip(grads, is_here, strict=True)])
    return snapshot(opt)


BITS: dict[str, dict[str, Any]] = {
    **{name: CASES[name] for name in ("adam", "a late start", "kept by the layer", "coupled")},
    "normalized": {"grafting": "adam_normalized"},
    "kl": {"preconditioner": "kl_shampoo"},
    "staggered": {"refresh_schedule": "staggered", "precondition_frequency": 5},
    "captured": {"capturable": True, "root_method": "minimax", "start_preconditioning_step": 3},
}


@pytest.mark.parametrize(
    ("dtype", "comes_and_goes", "is_cut", "case"),
    pairwise([torch.float32, torch.bfloat16], [False, True], [False, True], BITS),
    ids=str,
)
def test_the_kernel_has_the_bits_of_torch(
    case, dtype, comes_and_goes, is_cut, request, monkeypatch
):
    if is_cut:
        monkeypatch.setattr("shampoo.blocks.segments.CPU_SEGMENT", 24)
    compiled = trained(BITS[case], dtype, comes_and_goes)
    request.getfixturevalue("one_by_one")
    expected = trained(BITS[case], dtype, comes_and_goes)
    assert compiled.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(compiled[key], value), key


class _Long(TorchDispatchMode):
    """What torch itself does with tensors of some length, views aside."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        is_long = any(each.numel() >= self.length for each in _tensors((args, out)))
        if is_long and func.namespace == "aten" and not func.is_view:
            self.found.append(str(func))
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


@pytest.mark.parametrize("hyper", [{}, {"nesterov_average": False}, {"precondition_1d": True}])
def test_an_ordinary_step_makes_no_pass_for_it(hyper):
    params = random_params((64, 40), (64, 40), (30, 20), (7,), dtype=torch.float32)
    opt = Shampoo(params, lr=0.1, **hyper)
    *history, last = random_grads(params, 6)
    for grads in history:
        apply(opt, params, grads)
    for param, grad in zip(params, last, strict=True):
        param.grad = grad
    with _Long(600) as torchs_own:
        opt.step()
    assert torchs_own.found == []


def test_it_is_asked_for_only_where_it_is_applied(monkeypatch):
    asked: list[bool] = []
    moments = ops.graft_moments_

    def run(*given: Any) -> None:
        asked.append(given[-1] is not None)
        moments(*given)

    monkeypatch.setattr("shampoo.ops.graft_moments_", run)
    late = {"start_preconditioning_step": 3, "precondition_frequency": 3}
    for hyper in (late, {**late, "nesterov_average": False}, {**late, "betas": (0.0, 0.9)}):
        params = random_params((6, 5), dtype=torch.float32)
        opt = Shampoo(params, lr=0.1, **hyper)
        for grads in random_grads(params, 4):
            apply(opt, params, grads)
    assert asked == [False, False, True, True, *[False] * 8]


def test_it_is_what_trains_unless_it_is_switched_off():
    ends, start = [], random_params((9, 5))
    for hyper in ({}, {"nesterov_average": True}, {"nesterov_average": False}):
        params = twins_of(start)
        opt = double_shampoo(params, lr=0.1, **hyper)
        for grads in random_grads(params, 5):
            apply(opt, params, grads)
        ends.append(params[0])
    assert torch.equal(ends[0], ends[1])
    assert not torch.allclose(ends[0], ends[2], rtol=1e-3)


@pytest.mark.parametrize("hyper", [{"betas": (0.0, 0.95)}, {"precondition": False}])
def test_it_changes_nothing_without_an_average_or_without_roots(hyper):
    params = random_params(*SHAPES)
    twins = twins_of(params)
    ours = double_shampoo(params, lr=0.1, nesterov_average=True, **hyper)
    theirs = double_shampoo(twins, lr=0.1, nesterov_average=False, **hyper)
    for grads in random_grads(params, 5):
        apply(ours, params, grads)
        apply(theirs, twins, grads)
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(param, twin)


def test_a_gradient_that_stays_is_its_own_average_whichever_way():
    params = random_params((6, 5))
    twins = twins_of(params)
    hyper = {"lr": 0.1, "grafting": "none", "eps": 1e-3}
    ours = double_shampoo(params, nesterov_average=True, **hyper)
    theirs = double_shampoo(twins, nesterov_average=False, **hyper)
    [grads] = random_grads(params, 1)
    for _ in range(8):
        apply(ours, params, grads)
        apply(theirs, twins, grads)
    assert_relative(params[0], twins[0], 1e-12)


def test_gradients_are_left_as_they_are():
    param = Parameter(torch.randn(8, 6))
    param.grad = torch.randn(8, 6)
    before = param.grad.clone()
    opt = Shampoo([param], lr=0.1)
    for _ in range(3):
        opt.step()
        assert torch.equal(param.grad, before)


def test_betas_that_are_tensors_look_ahead_alike():
    params = random_params((6, 5), (4, 4))
    twins = twins_of(params)
    live = {"capturable": True, "root_method": "minimax"}
    betas = (torch.tensor(0.9), torch.tensor(0.95))
    ours = double_shampoo(params, lr=0.1, betas=betas, **live)
    theirs = double_shampoo(twins, lr=0.1, betas=(float(betas[0]), float(betas[1])), **live)
    for grads in random_grads(params, 6):
        apply(ours, params, grads)
        apply(theirs, twins, grads)
    for param, twin in zip(params, twins, strict=True):
        assert_relative(param, twin, 1e-12)


def test_a_value_that_is_no_flag_is_refused():
    with pytest.raises(ValueError, match=r"Invalid nesterov_average=1\. Must be True or False"):
        Shampoo([Parameter(torch.ones(2, 2))], nesterov_average=1)
