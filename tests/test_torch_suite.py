"""The generic checks of torch's own suite that step: every configuration goes through every one.

A case is a check and a configuration, or a check and all of them where no argument has a part in
it. Only ``Trial`` decides what runs, so that AdamW's entry, which goes through the same functions,
says that they ask for what torch gives. What a check is about is in its name.
"""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch_entry import (
    SHAMPOO,
    TRIALS,
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    Trial,
    all_together,
    assert_goes_on_alike,
    assert_same,
    every,
    held,
    new_params,
    params_of,
    shampoo_refusals,
    take,
)

from shampoo import Shampoo

# Of torch.testing: what it holds against every optimizer of its own.
from torch.testing._internal.common_optimizers import (  # isort: skip
    get_error_inputs_for_all_optims,
)

# The slots of a schedule and the numbers that rounding draws depend on what else is trained.
independent = pytest.mark.parametrize(
    "trial",
    [
        trial
        for trial in TRIALS
        if not trial.kwargs.get("stochastic_rounding") and "refresh_schedule" not in trial.kwargs
    ],
    ids=str,
)


class Fit:
    """A least squares problem in a matrix and a vector."""

    def __init__(self, params: list[Parameter]) -> None:
        generator = torch.Generator().manual_seed(1)
        self.params = params
        self.inputs = torch.randn(16, params[0].shape[1], generator=generator)
        self.targets = torch.randn(16, params[0].shape[0], generator=generator)

    def loss(self) -> Tensor:
        weight, bias = self.params
        return (self.inputs @ weight.T + bias - self.targets).square().mean()

    def closure(self, optimizer: torch.optim.Optimizer) -> Any:
        def evaluate() -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return evaluate


def transposed(params: list[Parameter]) -> list[Parameter]:
    """The same numbers, the matrix stored column by column."""
    columns = [Parameter(p.detach().t().contiguous().t() if p.dim() == 2 else p) for p in params]
    assert not columns[0].is_contiguous()
    return columns


def assert_goes_its_way(trial: Trial, before: Tensor, after: Tensor) -> None:
    """Down, or up if it maximizes."""
    assert after.isfinite()
    assert after > before if trial.kwargs.get("maximize") else after < before


def test_torch_has_an_entry_for_at_least_40_configurations():
    ours = [trial for trial in TRIALS if trial.info is SHAMPOO]
    assert len({trial.given.desc for trial in ours}) == len(ours) >= 40
    without_beta1 = [t for t in ours if t.kwargs.get("betas", (0.9, 0.999))[0] == 0]
    assert {t.kwargs.get("grafting", "adam") for t in without_beta1} >= {"none", "adam", "sgd"}


# -- where it goes


@every
def test_the_loss_goes_the_right_direction(trial):
    """Also where the memory of a matrix is not contiguous."""
    for params in (new_params(), transposed(new_params())):
        fit, optimizer = Fit(params), trial.make(params)
        first = fit.loss().detach()
        for _ in range(6):
            optimizer.step(fit.closure(optimizer))
        assert_goes_its_way(trial, first, fit.loss().detach())


@every
def test_the_loss_goes_the_right_direction_in_groups_under_schedulers(trial):
    """The learning rates are those of the schedulers, whether numbers or tensors."""
    for makers in trial.info.scheduler_inputs[:3]:
        fit = Fit(new_params())
        weight, bias = fit.params
        # A tensor of its own for each group: schedulers write into it.
        rates = [trial.kwargs.get("lr", 1e-3) for _ in range(2)]
        optimizer = trial.make(
            [{"params": [weight], "lr": rates[0]}, {"params": [bias], "lr": rates[1]}]
        )
        schedulers = [make(optimizer) for make in makers]
        first = fit.loss().detach()
        for _ in range(6):
            loss = optimizer.step(fit.closure(optimizer))
            for scheduler in schedulers:
                is_plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(loss.detach()) if is_plateau else scheduler.step()
        assert_goes_its_way(trial, first, fit.loss().detach())


@every
def test_a_group_has_its_own_value_and_leaves_the_others_alone(trial):
    for name, value in (("lr", 0.0), ("weight_decay", 0.7)):
        ours, twins = new_params(), new_params()
        optimizer = trial.make([{"params": ours[:1], name: value}, {"params": ours[1:]}])
        twin = trial.make([{"params": twins[:1]}, {"params": twins[1:]}])
        assert optimizer.param_groups[0][name] == value != optimizer.param_groups[1][name]
        for each in (optimizer, twin):
            take(each, 3)
        assert not torch.equal(ours[0], twins[0]), name
        assert torch.equal(ours[1], twins[1]), name
        if name == "lr":
            assert torch.equal(ours[0], new_params()[0])


@every
def test_a_tensor_is_a_learning_rate(trial):
    """Of no dimension, and of one with a single element."""
    for shape in ((), (1,)):
        rate = torch.full(shape, 0.01)
        optimizer = trial.make(new_params(), lr=rate)
        twin = trial.make(new_params(), lr=rate.item())
        for each in (optimizer, twin):
            take(each, 3)
        for param, expected in zip(params_of(optimizer), params_of(twin), strict=True):
            torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(rate, torch.full(shape, 0.01)), "it is read, never written"
        before = [param.detach().clone() for param in params_of(optimizer)]
        rate.zero_()  # what a scheduler does to it
        take(optimizer, 1)
        assert all(map(torch.equal, params_of(optimizer), before)), shape


# -- when it must not move


@every
def test_a_step_without_gradients_changes_nothing(trial):
    optimizer = trial.make(new_params())
    optimizer.step()
    for param, expected in zip(params_of(optimizer), new_params(), strict=True):
        assert torch.equal(param, expected)
        assert not any(value.any() for value in optimizer.state.get(param, {}).values())
    take(optimizer, 3)
    before = held(optimizer)
    for set_to_none in (True, False):
        optimizer.zero_grad(set_to_none=True)
        optimizer.zero_grad(set_to_none=set_to_none)  # nothing is there to be zeroed
        optimizer.step()
        assert_same(held(optimizer), before)


@every
def test_a_first_step_on_zero_gradients_moves_no_weight(trial):
    optimizer = trial.make(new_params(), weight_decay=0.0)
    for param in params_of(optimizer):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, expected in zip(params_of(optimizer), new_params(), strict=True):
        assert torch.equal(param, expected)


@independent
def test_an_empty_parameter_and_one_without_a_gradient_are_passed_by(trial):
    params = new_params()
    empty, idle = Parameter(torch.empty(0, 3)), Parameter(torch.ones(2, 2))
    optimizer, twin = trial.make([empty, *params, idle]), trial.make(new_params())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        empty.grad = torch.empty(0, 3)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    take(twin, 3)
    assert torch.equal(idle, torch.ones(2, 2))
    assert all(torch.equal(p, q) for p, q in zip(params, params_of(twin), strict=True))


@every
def test_gradients_are_never_written_into(trial):
    optimizer = trial.make(new_params())
    take(optimizer, 2)
    for _ in range(3):
        grads = [param.grad for param in params_of(optimizer)]
        copies = [grad.clone() for grad in grads]
        versions = [grad._version for grad in grads]
        optimizer.step()
        for param, grad, expected in zip(params_of(optimizer), grads, copies, strict=True):
            assert param.grad is grad
            assert torch.equal(grad, expected)
        assert [grad._version for grad in grads] == versions


# -- how it is called


@every
def test_a_closure_is_called_once_with_gradients_enabled(trial):
    fits = Fit(new_params()), Fit(new_params())
    with_closure, without = (trial.make(fit.params) for fit in fits)
    for _ in range(3):
        calls = []
        evaluate = fits[0].closure(with_closure)

        def counted(evaluate=evaluate, calls=calls):
            calls.append(evaluate())
            return calls[-1]

        with torch.no_grad():
            assert with_closure.step(counted) is calls[0]
        assert len(calls) == 1
        fits[1].closure(without)()
        assert without.step() is None
    assert_same(held(with_closure), held(without))


@every
def test_the_mode_of_autograd_changes_no_bit_and_stays(trial):
    modes = [torch.enable_grad, torch.no_grad]
    optimizers = [trial.make(new_params()) for _ in modes]
    for mode, optimizer in zip(modes, optimizers, strict=True):
        with mode():
            before = torch.is_grad_enabled()
            take(optimizer, 3)
            assert torch.is_grad_enabled() == before
        for param in params_of(optimizer):
            assert param.is_leaf
            assert param.requires_grad
            assert param.grad_fn is None
        assert not any(value.requires_grad for value in held(optimizer).values())
    assert_same(held(optimizers[1]), held(optimizers[0]))


@every
def test_the_default_dtype_decides_nothing(trial):
    """A process that computes in float64 may train a float32 model."""
    optimizer, twin = trial.make(new_params()), trial.make(new_params())
    params = [param.detach() for param in params_of(optimizer)]
    take(twin, 3)
    torch.set_default_dtype(torch.float64)
    try:
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for param in params_of(optimizer):
                param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float32)
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert [param.dtype for param in params] == [torch.float32] * 2
    if isinstance(optimizer, Shampoo):
        assert_same(held(optimizer), held(twin))
    else:  # torch's own step counts follow the default dtype
        assert all(map(torch.equal, params_of(optimizer), params_of(twin)))


@independent
def test_dtypes_side_by_side_go_as_they_would_alone(trial):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    mixed = [param for dtype in dtypes for param in new_params(dtype)]
    together = trial.make(mixed)
    alone = [trial.make(new_params(dtype)) for dtype in dtypes]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(param.shape, generator=generator) for param in mixed]
        params = [param for optimizer in alone for param in params_of(optimizer)]
        for param, twin, grad in zip(mixed, params, grads, strict=True):
            param.grad, twin.grad = grad.to(param.dtype), grad.to(param.dtype)
        for optimizer in (together, *alone):
            optimizer.step()
    for param, twin in zip(mixed, params, strict=True):
        assert param.dtype == twin.dtype
        assert torch.equal(param, twin), param.dtype


# -- how it looks


@all_together
def test_it_can_be_printed(trial):
    optimizer = trial.make(new_params())
    for _ in range(2):
        words = repr(optimizer)
        assert words.startswith(f"{trial.info.name} (")
        for name in trial.kwargs:
            assert re.search(rf"^ +{name}: ", words, re.MULTILINE), name
        take(optimizer, 3)


@all_together
def test_every_parameter_with_a_gradient_has_state_after_a_step(trial):
    optimizer = trial.trained(1)
    for param in params_of(optimizer):
        assert optimizer.state[param]
        assert all(torch.is_tensor(value) for value in optimizer.state[param].values())
    assert set(optimizer.state) == set(params_of(optimizer))


@all_together
def test_params_may_come_named_and_lazily(trial):
    def lazily():
        yield from zip(("weight", "bias"), new_params(), strict=True)

    optimizer, twin = trial.make(lazily()), trial.make(new_params())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert_goes_on_alike([optimizer, twin])


@every
def test_a_group_that_joins_trains_from_its_first_step(trial):
    optimizer = trial.make(new_params()[:1])
    take(optimizer, 3)
    late = Parameter(torch.ones(2, 3))
    optimizer.add_param_group({"params": [late], "lr": 0.05})
    twin = Parameter(torch.ones(2, 3))
    alone = trial.make([twin], lr=0.05)
    for step in range(5):
        late.grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        twin.grad = late.grad.clone()
        optimizer.step()
        alone.step()
        assert torch.equal(late, twin), step


# -- flags that every optimizer of torch knows, and errors


@pytest.mark.parametrize("trial", [t for t in TRIALS if t.info is SHAMPOO], ids=str)
def test_flags_of_implementation_change_no_bit(trial):
    """Work is always batched; ``fused=True``, which may raise, has tests of its own."""
    flags = [{}, {"foreach": False}, {"foreach": True}, {"fused": False}]
    neither = {"foreach": None, "fused": None}
    assert_goes_on_alike([trial.make(new_params(), **{**neither, **more}) for more in flags])


def refusal_id(refusal: ErrorOptimizerInput) -> str:
    return refusal.optimizer_error_input.desc


def assert_refused(cls: Any, refusal: ErrorOptimizerInput, error: Any, words: str) -> None:
    given = refusal.optimizer_error_input
    params = new_params() if given.params is None else given.params
    if refusal.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(error, match=words):
            cls(params, **given.kwargs)
        return
    optimizer = cls(params, **given.kwargs)
    before = held(optimizer)
    with pytest.raises(error, match=words):
        optimizer.step()
    assert_same(held(optimizer), before)


@pytest.mark.parametrize("refusal", shampoo_refusals("cpu", torch.float32), ids=refusal_id)
def test_what_shampoo_refuses_it_refuses_with_the_reason(refusal):
    assert_refused(SHAMPOO.optim_cls, refusal, refusal.error_type, refusal.error_regex)


# torch warns of duplicates in one group and moves them twice; here they are refused by name.
OUR_WORDS = {
    "a param group cannot have duplicate parameters": (
        ValueError,
        "(?i)twice|more than once|duplicate",
    ),
    "Tensor lr must be 1-element": (ValueError, "Invalid lr=.*one element"),
}


@pytest.mark.parametrize(
    "refusal", get_error_inputs_for_all_optims("cpu", torch.float32), ids=refusal_id
)
def test_what_torch_refuses_of_every_optimizer_is_refused(refusal):
    default = refusal.error_type, refusal.error_regex
    error, words = OUR_WORDS.get(refusal.optimizer_error_input.desc, default)
    assert_refused(SHAMPOO.optim_cls, refusal, error, words)


@all_together
def test_a_bad_group_is_refused_and_nothing_joins(trial):
    optimizer = trial.trained(3)
    groups, before = copy.copy(optimizer.param_groups), held(optimizer)
    [shared] = params_of(optimizer)[:1]
    for group, words in (
        ({"params": [shared]}, "more than one parameter group"),
        ({"params": [torch.ones(2) * torch.ones(2, requires_grad=True)]}, "non-leaf"),
        ({"params": [3]}, "int"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            optimizer.add_param_group(group)
        assert optimizer.param_groups == groups
    assert_same(held(optimizer), before)
    take(optimizer, 1)
