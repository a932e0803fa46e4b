"""Runs the package on given gradients, alone or beside the float64 reference."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from reference_shampoo import DEFAULTS, ReferenceShampoo
from torch import Tensor
from torch.nn import Parameter

from shampoo import Shampoo

Grads = Sequence[Tensor | None]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|actual - expected| over max|expected|; an expected zero must be met exactly."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    error = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return error / scale if scale > 0 else error


def assert_relative(actual: Tensor, expected: Tensor, tol: float = 1e-10, what: str = "") -> None:
    error = relative_error(actual.detach(), expected.detach())
    assert error <= tol, f"{what} relative error {error:.3e} > {tol:.0e}"


def random_params(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Parameter]:
    return [Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]


def twins_of(params: Sequence[Parameter]) -> list[Parameter]:
    """Parameters of their own with the same values."""
    return [Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in params]


def random_grads(
    params: Sequence[Tensor], steps: int, seed: int = 1, dtype: torch.dtype | None = None
) -> list[list[Tensor]]:
    """`steps` lists of gradients; each step has its own scale, as in training."""
    generator = torch.Generator().manual_seed(seed)
    history = []
    for step in range(steps):
        scale = 1.0 / (1 + step % 3)
        grads = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
        history.append(
            [(scale * g).to(dtype or p.dtype) for g, p in zip(grads, params, strict=True)]
        )
    return history


def apply(opt: torch.optim.Optimizer, params: Sequence[Tensor], grads: Grads) -> None:
    """One step on the given gradients, which stay the caller's."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()
    opt.step()


def double_shampoo(params: Any, **hyper: Any) -> Shampoo:
    """The package at float64, at which it is held to 1e-10, with the betas of the reference."""
    fixed = {"preconditioner_dtype": torch.float64, "betas": DEFAULTS["betas"]}
    return Shampoo(params, **{**fixed, **hyper})


def directions(history: Sequence[Tensor], **hyper: Any) -> list[Tensor]:
    """The direction P of every step for one float64 parameter held at zero: W <- 0 - 1 * P."""
    param = Parameter(torch.zeros_like(history[0], dtype=torch.float64))
    opt = double_shampoo([param], lr=1.0, **hyper)
    found = []
    for grad in history:
        apply(opt, [param], [grad])
        found.append(-param.detach().clone())
        with torch.no_grad():
            param.zero_()
    return found


PURE: dict[str, Any] = {
    # The paper's Shampoo and nothing else: no graft, no filter, plain sums, a root every step, full
    # factors
    "exponent": "paper",
    "grafting": "none",
    "betas": (0.0, 1.0),
    "precondition_frequency": 1,
    "relative_eps": 0.0,
    "merge_dims": "none",
    "precondition_1d": True,
    "large_dim_method": "blocking",
}


def compare(
    shapes: Sequence[tuple[int, ...]],
    steps: int,
    *,
    tol: float = 1e-10,
    change: dict[int, dict[str, Any]] | None = None,
    mask: Callable[[int, int], bool] | None = None,
    **hyper: Any,
) -> Shampoo:
    """Package and reference on one history of gradients, equal after every step.

    `change[t]` is written into the group before step t; `mask(t, i)` says whether parameter i
    has a gradient at step t. Displacements are compared, so the initial weights hide nothing.
    """
    params = random_params(*shapes)
    start = [p.detach().clone() for p in params]
    opt = double_shampoo(params, **hyper)
    hyper.pop("root_method", None)
    reference = ReferenceShampoo(params, **hyper)
    for t, full in enumerate(random_grads(params, steps), start=1):
        grads = [g if mask is None or mask(t, i) else None for i, g in enumerate(full)]
        for key, value in (change or {}).get(t, {}).items():
            assert key in opt.param_groups[0], f"{key} is not read from the group"
            opt.param_groups[0][key] = value
            reference.hyper[key] = value
        apply(opt, params, grads)
        reference.step(grads)
        for i, (param, expected) in enumerate(zip(params, reference.params, strict=True)):
            moved, should = param.detach() - start[i], expected - start[i]
            assert_relative(moved, should, tol, f"step {t}, shape {tuple(param.shape)}:")
    return opt


def state_tensors(opt: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    """Every state tensor by (position of the parameter, key)."""
    params = [p for group in opt.param_groups for p in group["params"]]
    return {
        (i, key): value
        for i, param in enumerate(params)
        for key, value in opt.state.get(param, {}).items()
    }


def snapshot(opt: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    """Copies of all weights and state, to be compared bit for bit."""
    params = [p for group in opt.param_groups for p in group["params"]]
    weights = {(i, "weight"): p.detach().clone() for i, p in enumerate(params)}
    return weights | {key: value.clone() for key, value in state_tensors(opt).items()}


def assert_same_bits(
    actual: dict[tuple[int, str], Tensor], expected: dict[tuple[int, str], Tensor]
) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, f"{key}: {actual[key].dtype} != {value.dtype}"
        same = torch.equal(actual[key], value) or (
            value.is_floating_point()
            and torch.equal(actual[key].nan_to_num(), value.nan_to_num())
            and torch.equal(actual[key].isnan(), value.isnan())
        )
        assert same, f"{key} differs"
