"""Dtypes, layouts and shapes that a torch.optim.Optimizer meets."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from trajectory import (
    apply,
    assert_relative,
    double_shampoo,
    random_grads,
    random_params,
    snapshot,
    state_tensors,
)

from shampoo import Shampoo


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_have_float32_statistics(dtype):
    """Without decay the directions do not depend on the weights: an fp32 twin has the same ones."""
    params = random_params((6, 5), (4,), (2, 3, 2), dtype=dtype)
    twins = [Parameter(p.detach().float()) for p in params]
    hyper: dict[str, Any] = {"lr": 0.05, "precondition_frequency": 2, "max_preconditioner_dim": 4}
    ours, theirs = Shampoo(params, **hyper), Shampoo(twins, **hyper)
    for grads in random_grads(params, 7):
        before = [p.detach().float() for p in params]
        twins_before = [p.detach().clone() for p in twins]
        apply(ours, params, grads)
        apply(theirs, twins, [g.float() for g in grads])
        for param, old, twin, twin_old in zip(params, before, twins, twins_before, strict=True):
            assert param.dtype == dtype
            expected = old + (twin.detach() - twin_old)
            ulp = torch.finfo(dtype).eps * expected.abs().max()
            assert (param.float() - expected).abs().max() <= ulp
    for (i, key), value in state_tensors(ours).items():
        if value.is_floating_point() and "momentum" not in key:
            assert value.dtype == torch.float32, key
            expected = theirs.state[twins[i]][key]
            assert_relative(value, expected, 1e-6, key)


@pytest.mark.parametrize("grafting", ["adam", "rmsprop", "adagrad", "none"])
def test_fp16_with_a_small_grafting_eps_is_never_nan(grafting):
    """1e-8 is zero in fp16, and so are the squares of small gradients."""
    params = random_params((4, 4), (4,), dtype=torch.float16)
    opt = Shampoo(params, grafting=grafting, grafting_eps=1e-8, precondition_frequency=2)
    for step in range(5):
        small = [torch.full_like(p, 6e-8) for p in params]
        small[0][0] = 0
        if step == 2:
            small[1].zero_()
        apply(opt, params, small)
        assert all(p.isfinite().all() for p in params)
        assert all(value.isfinite().all() for value in state_tensors(opt).values())


def test_large_fp16_gradients_do_not_overflow_the_factors():
    (param,) = random_params((4, 4), dtype=torch.float16)
    opt = Shampoo([param], precondition_frequency=1)
    for _ in range(3):
        apply(opt, [param], [(6e4 * torch.rand(4, 4)).half()])
    assert param.isfinite().all()
    assert all(value.isfinite().all() for value in state_tensors(opt).values())


def test_mixed_dtypes_in_one_group_equal_separate_optimizers():
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    params = [random_params((4, 3), dtype=dtype)[0] for dtype in dtypes]
    twins = [Parameter(p.detach().clone()) for p in params]
    hyper: dict[str, Any] = {
        **{"lr": 0.1, "precondition_frequency": 2, "momentum": 0.9, "weight_decay": 0.1},
        "max_preconditioner_dim": 3,
    }
    together = Shampoo(params, **hyper)
    apart = [Shampoo([twin], **hyper) for twin in twins]
    for grads in random_grads(params, 5):
        apply(together, params, grads)
        for opt, twin, grad in zip(apart, twins, grads, strict=True):
            apply(opt, [twin], [grad])
        for param, twin in zip(params, twins, strict=True):
            assert param.dtype == twin.dtype
            # stacks of another height may round differently in the last place
            assert_relative(param, twin, 2 * torch.finfo(param.dtype).eps)


@pytest.mark.parametrize("preconditioner_dtype", [torch.float32, torch.float64])
def test_statistics_have_the_dtype_that_was_asked_for(preconditioner_dtype):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        (param,) = random_params((4, 3), dtype=dtype)
        opt = Shampoo([param], preconditioner_dtype=preconditioner_dtype)
        apply(opt, [param], [torch.randn(4, 3).to(dtype)])
        state = opt.state[param]
        for key in ("block0.factor0", "block0.root1", "block0.exp_avg"):
            assert state[key].dtype == preconditioner_dtype, key
        assert state["step"].dtype == torch.int64
        assert state["step"].ndim == 0
        assert state["block0.failures0"].dtype == torch.int32


def test_momentum_and_weights_work_in_the_dtype_of_the_parameter_or_better():
    """Section 1.3, from step 7 on: a float64 run is not rounded to the dtype of the factors."""
    (param,) = random_params((4, 3), dtype=torch.float64)
    (twin,) = [Parameter(param.detach().clone())]
    hyper: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    ours = Shampoo(
        [param],
        **{**hyper, "grafting": "sgd", "betas": (0.0, 0.9), "weight_decay": 0.1},
        start_preconditioning_step=float("inf"),
    )
    # the directions are the gradients, exact in float32; decay flows through the momentum
    theirs = torch.optim.SGD([twin], weight_decay=0.1, **hyper)
    for _ in range(5):
        grad = torch.randn(4, 3).double()
        apply(ours, [param], [grad])
        apply(theirs, [twin], [grad])
    assert_relative(param, twin, 1e-12)


@pytest.mark.parametrize("root_method", ["auto", "eigh", "coupled_newton", "minimax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_float32_run_stays_near_its_float64_twin(dtype, root_method):
    params = random_params((6, 5), (3, 4), dtype=dtype)
    twins = [Parameter(p.detach().double()) for p in params]
    hyper: dict[str, Any] = {"lr": 0.05, "precondition_frequency": 3, "relative_eps": 1e-3}
    ours = Shampoo(params, root_method=root_method, **hyper)
    theirs = double_shampoo(twins, root_method="eigh", **hyper)
    for grads in random_grads(params, 10):
        apply(ours, params, grads)
        apply(theirs, twins, [g.double() for g in grads])
    tol = 1e-5 if root_method in ("eigh", "coupled_newton") else 1e-4  # minimax roots are coarser
    for param, twin in zip(params, twins, strict=True):
        assert_relative(param, twin, tol)


def layouts(values: Tensor) -> dict[str, Tensor]:
    """The same 4-d values in other memory orders."""
    n, c, h, w = values.shape
    return {
        "channels_last": values.contiguous(memory_format=torch.channels_last),
        "transposed": values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "sliced": torch.zeros(2 * n, c, h, w + 3, dtype=values.dtype)[::2, :, :, 1 : w + 1].copy_(
            values
        ),
        "negative_order": values.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2),
    }


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "negative_order"])
@pytest.mark.parametrize("what", ["parameter", "gradient", "both"])
@pytest.mark.parametrize("grafting", ["adam", "lamb"])
def test_layouts_equal_their_contiguous_twin(layout, what, grafting):
    values = torch.randn(4, 3, 2, 3, dtype=torch.float64)
    weights = layouts(values)[layout].detach() if what != "gradient" else values.clone()
    param, twin = Parameter(weights), Parameter(values.clone())
    hyper: dict[str, Any] = {
        **{"lr": 0.1, "weight_decay": 0.1, "momentum": 0.5, "grafting": grafting},
        **{"precondition_frequency": 2, "max_preconditioner_dim": 3},
    }
    ours, theirs = double_shampoo([param], **hyper), double_shampoo([twin], **hyper)
    for _ in range(5):
        grad = torch.randn(4, 3, 2, 3, dtype=torch.float64)
        param.grad = layouts(grad)[layout] if what != "parameter" else grad.clone()
        held = param.grad.clone()
        ours.step()
        apply(theirs, [twin], [grad])
        assert torch.equal(param.grad, held)
        assert_relative(param, twin, 1e-12)


def test_a_channels_last_model_equals_its_contiguous_twin():
    """Real backward passes; the twin takes their gradients, for a convolution rounds by layout."""
    layers = [torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 2)]
    layers += [torch.nn.Flatten(), torch.nn.Linear(4 * 2 * 2, 3)]
    model = torch.nn.Sequential(*layers).double()
    twins = [Parameter(p.detach().clone()) for p in model.parameters()]
    model = model.to(memory_format=torch.channels_last)
    params = list(model.parameters())
    hyper: dict[str, Any] = {"lr": 0.01, "precondition_frequency": 2}
    ours, theirs = double_shampoo(params, **hyper), double_shampoo(twins, **hyper)
    for _ in range(5):
        ours.zero_grad()
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
        model(x.to(memory_format=torch.channels_last)).square().mean().backward()
        ours.step()
        apply(theirs, twins, [p.grad.contiguous() for p in params])
        for param, twin in zip(params, twins, strict=True):
            assert_relative(param, twin, 1e-12)
    assert params[0].is_contiguous(memory_format=torch.channels_last)
    assert not params[0].is_contiguous()


def test_a_model_of_every_degenerate_shape_steps():
    shapes = [(), (1,), (0,), (1, 1), (2, 0), (5,), (1, 5), (5, 1), (1, 5, 1, 2), (2, 3, 2, 2)]
    params = random_params(*shapes, dtype=torch.float32)
    before = [p.detach().clone() for p in params]
    opt = Shampoo(params, lr=0.1, precondition_frequency=2, precondition_1d=True)
    for grads in random_grads(params, 4):
        apply(opt, params, grads)
    for param, old in zip(params, before, strict=True):
        assert param.isfinite().all()
        assert param.numel() == 0 or (param != old).any()


def refusal(name: str | None, param: Parameter, grad: Tensor) -> str:
    """What the optimizer says, at construction or at the step, leaving all as it was."""
    good = Parameter(torch.randn(2, 2))
    params: Any = [("good", good), (name, param)] if name else [good, param]
    before = [good.detach().clone(), param.detach().clone()]
    with pytest.raises(RuntimeError) as caught:  # noqa: PT012 (either line may raise)
        opt = Shampoo(params)
        good.grad, param.grad = torch.randn(2, 2), grad
        opt.step()
    assert torch.equal(good, before[0])
    assert torch.equal(param, before[1])
    return str(caught.value)


@pytest.mark.parametrize("name", ["embed.weight", None])
def test_sparse_gradients_are_refused_with_the_remedy(name):
    grad = torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.ones(1, 3), (4, 3), check_invariants=True
    )
    message = refusal(name, Parameter(torch.randn(4, 3)), grad)
    assert "sparse" in message
    assert "SparseAdam" in message
    assert (name or "1") in message


@pytest.mark.parametrize("name", ["spectral.weight", None])
def test_complex_parameters_are_refused_with_the_remedy(name):
    param = Parameter(torch.randn(4, 3, dtype=torch.complex64))
    message = refusal(name, param, torch.randn(4, 3, dtype=torch.complex64))
    assert "complex" in message
    assert "view_as_real" in message or "AdamW" in message
    assert (name or "1") in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_two_runs_have_the_same_bits_also_on_poisoned_memory(dtype, nan_filled_empty):
    def run() -> dict[tuple[int, str], Tensor]:
        torch.manual_seed(5)
        params = random_params((6, 5), (4,), (3, 2, 4), (), dtype=dtype)
        opt = Shampoo(
            params,
            **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
            precondition_frequency=2,
            max_preconditioner_dim=4,
        )
        for grads in random_grads(params, 6):
            apply(opt, params, grads)
        return snapshot(opt)

    first, second = run(), run()
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.isfinite().all(), key
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("late", [False, True])
def test_flat_parameters_are_refused_with_the_remedy(late):
    """By the attribute that FSDP1 gives them; no process group is needed to see it."""
    param = Parameter(torch.randn(2, 3))
    opt = Shampoo([param]) if late else None
    param._fsdp_flattened = True
    param.grad = torch.ones(2, 3)
    message = r"flat parameter of 6 elements \(parameter 0 of group 0.*fully_shard"
    with pytest.raises(RuntimeError, match=message):
        (opt or Shampoo([param])).step()
