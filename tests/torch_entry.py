"""Shampoo's entry in the table of optimizers that drives torch's own suite.

``torch.testing._internal.common_optimizers`` ships with torch and holds an entry for each of its
optimizers: with what arguments its suite runs them, and which are refused with what words. The
checks that such entries go through are test_torch_suite*.py; AdamW's entry goes through them too,
so that a check which asked for more than torch gives would fail there first.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR

from shampoo import Shampoo

# What is imported forbids for the rest of the process that flags of torch.backends are set.
with torch.backends.__allow_nonbracketed_mutation():
    from torch.testing._internal.common_optimizers import (
        ErrorOptimizerInput,
        OptimizerErrorEnum,
        OptimizerInfo,
        OptimizerInput,
        optim_db,
    )

GRAFTINGS = (
    *("none", "sgd", "adagrad", "rmsprop", "adam"),
    *("adagrad_normalized", "rmsprop_normalized", "adam_normalized", "lars", "lamb"),
)


def shampoo_inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    """Every argument in use, and those together that share a buffer or a branch.

    An argument that stands in one of them beside others needs none of its own. Of the grafts, each
    kind of state once without ``betas[0]``, where its direction has no average to come from.
    """
    few = {"precondition_frequency": 3}  # roots within the few steps of a check
    # The recipe of docs/coming_from.md.
    sgd = {"grafting": "sgd", "betas": (0.0, 0.999), "momentum": 0.9}
    capturable = {"capturable": True, **few}
    described: dict[str, dict[str, Any]] = {
        "default": {},
        "tensor lr": {"lr": torch.tensor(0.01), **few},
        "tensor betas": {"betas": (torch.tensor(0.9), torch.tensor(0.99)), **few},
        **{f"grafting {name}": {"grafting": name, **few} for name in GRAFTINGS},
        **{
            f"grafting {name} without beta1": {"grafting": name, "betas": (0.0, 0.99), **few}
            for name in ("none", "sgd", "adam", "adagrad_normalized", "lars", "lamb")
        },
        "own beta2 and eps of the graft": {"grafting_beta2": 0.9, "grafting_eps": 1e-5, **few},
        "plain sums": {"betas": (0.9, 1.0), **few},
        "plain sums without beta1": {"betas": (0.0, 1.0), "grafting": "adagrad", **few},
        "nesterov": {"momentum": 0.9, "nesterov": True, **few},
        "SGD": {**sgd, **few},
        "SGD with coupled decay": {
            **{**sgd, "weight_decay": 0.1, "decoupled_weight_decay": False},
            **few,
        },
        "coupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": False, **few},
        "decay and momentum": {"weight_decay": 0.1, "momentum": 0.9, **few},
        "maximize with decay": {"maximize": True, "weight_decay": 0.1, **few},
        "blocks": {"max_preconditioner_dim": 2, **few},
        "large dims diagonal": {
            **{"large_dim_method": "diagonal", "max_preconditioner_dim": 2},
            **few,
        },
        "large dims adagrad": {
            **{"large_dim_method": "adagrad", "max_preconditioner_dim": 2},
            **few,
        },
        "merge none": {"merge_dims": "none", **few},
        "merge full": {"merge_dims": "full", **few},
        "1-d too": {"precondition_1d": True, **few},
        "no preconditioning": {"precondition": False},
        "a root at every step": {"precondition_frequency": 1},
        "a late start": {"start_preconditioning_step": 5, **few},
        "a start at the frequency": {"start_preconditioning_step": -1, **few},
        "no start": {"start_preconditioning_step": math.inf, **few},
        "staggered": {"refresh_schedule": "staggered", "max_preconditioner_dim": 2, **few},
        "exponents by order": {"exponent": [0, 3, 0], **few},
        "exponent multiplier": {"exponent_multiplier": 1.5, **few},
        "eigh": {"root_method": "eigh", **few},
        "coupled_newton": {"root_method": "coupled_newton", **few},
        "minimax": {"root_method": "minimax", **few},
        "pseudo-inverse": {"eps": 0.0, "relative_eps": 0.0, **few},
        "float64 statistics": {"preconditioner_dtype": torch.float64, **few},
        "stochastic rounding": {"stochastic_rounding": True, **few},
        "no bias correction": {"bias_correction": False, **few},
        "raise": {"nonfinite": "raise", "max_root_failures": 2, **few},
        "capturable": capturable,
        "capturable, tensor betas": {
            **{"lr": torch.tensor(0.01), "betas": (torch.tensor(0.9), torch.tensor(0.99))},
            **{"weight_decay": 0.1, **capturable},
        },
        "capturable SGD": {**sgd, **capturable},
        "neither foreach nor fused": {"foreach": False, "fused": False, **few},
    }
    return [OptimizerInput(None, kwargs, desc) for desc, kwargs in described.items()]


def shampoo_refusals(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    """What is refused, and the words that say why."""
    weight = [Parameter(torch.randn(3, 2))]
    device_waits = "when capturable=True.*waits for the device"
    named: list[tuple[dict[str, Any], str]] = [
        ({"lr": -0.1}, r"Invalid lr=-0.1. Must be >= 0.0"),
        ({"lr": math.nan}, r"Invalid lr=nan. Must be"),
        ({"lr": torch.tensor([0.1, 0.1])}, r"Invalid lr=.*one element"),
        ({"betas": (1.0, 0.9)}, r"Invalid betas\[0\]=1.0. Must be >= 0.0 and < 1.0"),
        ({"betas": (0.9, 0.0)}, r"Invalid betas\[1\]=0.0. Must be > 0.0 and <= 1.0"),
        ({"betas": 0.9}, r"Invalid betas=0.9. Must be a pair"),
        ({"eps": -1e-8}, r"Invalid eps=-1e-08. Must be >= 0.0"),
        ({"eps": 0.0}, r"Invalid eps=0.0. Must be > 0.0.*pseudo-inverse.*relative_eps=0.0"),
        ({"relative_eps": math.inf}, r"Invalid relative_eps=inf"),
        ({"weight_decay": -1.0}, r"Invalid weight_decay=-1.0"),
        ({"momentum": 1.0}, r"Invalid momentum=1.0. Must be >= 0.0 and < 1.0"),
        ({"max_preconditioner_dim": 0}, r"Invalid max_preconditioner_dim=0"),
        ({"precondition_frequency": 2.5}, r"Invalid precondition_frequency=2.5"),
        (
            {"start_preconditioning_step": 0, "precondition_frequency": 3},
            r"Invalid start_preconditioning_step=0. Must be -1 .means precondition_frequency",
        ),
        ({"grafting": "adamax"}, r"Invalid grafting='adamax'. Must be one of none, sgd"),
        ({"grafting_beta2": 2.0}, r"Invalid grafting_beta2=2.0"),
        ({"grafting_eps": 0.0}, r"Invalid grafting_eps=0.0"),
        ({"merge_dims": "all"}, r"Invalid merge_dims='all'"),
        ({"large_dim_method": "cut"}, r"Invalid large_dim_method='cut'"),
        ({"root_method": "svd"}, r"Invalid root_method='svd'"),
        ({"refresh_schedule": "never"}, r"Invalid refresh_schedule='never'"),
        ({"nonfinite": "ignore"}, r"Invalid nonfinite='ignore'"),
        ({"preconditioner_dtype": torch.float16}, r"Invalid preconditioner_dtype='float16'"),
        ({"max_root_failures": -1}, r"Invalid max_root_failures=-1"),
        ({"exponent": -2}, r"Invalid exponent=-2"),
        ({"exponent_multiplier": 0.0}, r"Invalid exponent_multiplier=0.0"),
        (
            {"exponent_multiplier": 1.5, "root_method": "minimax"},
            r"Invalid root_method='minimax'.*exponent_multiplier=1.5",
        ),
        ({"nesterov": 1}, r"Invalid nesterov=1. Must be True or False"),
        ({"foreach": "yes"}, r"Invalid foreach='yes'. Must be None, True or False"),
        (
            {"capturable": True, "nonfinite": "raise"},
            r"Invalid nonfinite='raise'.*when capturable=True.*cannot see a gradient",
        ),
        (
            {"capturable": True, "max_root_failures": 1},
            r"Invalid max_root_failures=1.*when capturable=True.*cannot see a root",
        ),
        (
            {"capturable": True, "root_method": "eigh"},
            rf"Invalid root_method='eigh'.*{device_waits}",
        ),
        (
            {"capturable": True, "exponent_multiplier": 1.5},
            rf"Invalid exponent_multiplier=1.5.*{device_waits}",
        ),
        (
            {"capturable": True, "preconditioner_dtype": torch.float64},
            rf"Invalid preconditioner_dtype='float64'.*{device_waits}",
        ),
        (
            {"capturable": True, "relative_eps": 0.0},
            rf"Invalid relative_eps=0.0.*{device_waits}",
        ),
    ]
    refusals = [
        ErrorOptimizerInput(
            OptimizerInput(weight, kwargs, str(kwargs)), error_type=ValueError, error_regex=words
        )
        for kwargs, words in named
    ]
    refusals.append(
        ErrorOptimizerInput(
            OptimizerInput(weight, {"differentiable": True}, "differentiable"),
            error_type=RuntimeError,
            error_regex="does not support differentiable=True: roots are computed without autograd",
        )
    )
    complex_weight = [Parameter(torch.randn(3, 2, dtype=torch.complex64))]
    refusals.append(
        ErrorOptimizerInput(
            OptimizerInput(complex_weight, {}, "complex"),
            error_type=RuntimeError,
            error_regex="complex",
        )
    )
    sparse = Parameter(torch.randn(3, 2))
    sparse.grad = torch.eye(3, 2).to_sparse()
    refusals.append(
        ErrorOptimizerInput(
            OptimizerInput([sparse], {}, "sparse gradient"),
            error_on=OptimizerErrorEnum.STEP_ERROR,
            error_type=RuntimeError,
            error_regex="does not support sparse gradients.*SparseAdam",
        )
    )
    return refusals


SHAMPOO = OptimizerInfo(
    Shampoo,
    optim_inputs_func=shampoo_inputs,
    optim_error_inputs_func=shampoo_refusals,
    scheduler_inputs=(
        [lambda opt: StepLR(opt, gamma=0.9, step_size=2), lambda opt: ReduceLROnPlateau(opt)],
        [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4)],
        [lambda opt: ExponentialLR(opt, gamma=0.99)],
    ),
    supported_impls=("foreach", "fused"),
    has_capturable_arg=True,
    supports_complex=False,
    supports_fused_on=("cpu", "cuda"),
)
[ADAMW] = [info for info in optim_db if info.name == "AdamW"]


@dataclass(frozen=True)
class Trial:
    """One configuration of one optimizer."""

    info: OptimizerInfo
    given: OptimizerInput

    def __str__(self) -> str:
        return f"{self.info.name}: {self.given.desc}"

    @property
    def kwargs(self) -> dict[str, Any]:
        """Of the constructor; tensors are the caller's own, since some checks write into them."""
        return copy.deepcopy(self.given.kwargs)

    def make(self, params: Iterable[Any], **more: Any) -> torch.optim.Optimizer:
        return self.info.optim_cls(params, **{**self.kwargs, **more})

    def trained(self, steps: int = 3, **more: Any) -> torch.optim.Optimizer:
        optimizer = self.make(new_params(), **more)
        take(optimizer, steps)
        return optimizer


TRIALS = [
    Trial(info, given) for info in (SHAMPOO, ADAMW) for given in info.optim_inputs_func("cpu")
]
every = pytest.mark.parametrize("trial", TRIALS, ids=str)


def all_together(check: Callable[[Trial], None]) -> Callable[[OptimizerInfo], None]:
    """One case of all configurations, for what no argument has a part in.

    Names, hooks and the like are of the class: where one configuration fails, so do all.
    """

    @pytest.mark.parametrize("info", [SHAMPOO, ADAMW], ids=lambda info: info.name)
    def together(info: OptimizerInfo) -> None:
        for trial in TRIALS:
            if trial.info is info:
                try:
                    check(trial)
                except (Exception, pytest.fail.Exception) as error:
                    raise AssertionError(f"{trial} fails") from error

    together.__doc__ = check.__doc__
    return together


def new_params(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """The same ones at each call: a matrix and a vector."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((3, 4), (3,))
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def params_of(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def take(optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    """Steps on gradients that a seed decides."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params_of(optimizer):
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def held(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all weights and state."""
    found = {}
    for index, param in enumerate(params_of(optimizer)):
        found[f"{index}"] = param.detach().clone()
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{index}.{key}"] = torch.as_tensor(value).clone()
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names and the same bits."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def assert_goes_on_alike(
    optimizers: Sequence[torch.optim.Optimizer], steps: int = 3, seed: int = 5
) -> None:
    """They hold the same and end in the same bits, roots between included."""
    first, *others = optimizers
    for other in others:
        assert_same(held(other), held(first))
    for optimizer in optimizers:
        take(optimizer, steps, seed)
    for other in others:
        assert_same(held(other), held(first))
