"""docs/coming_from.md: no argument of others is forgotten, and what is said to be equal is."""

import importlib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from shampoo import Shampoo

PAGE = (Path(__file__).parents[1] / "docs" / "coming_from.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
SHAPES = ((12, 8), (16, 4, 3, 3))


def rows(section: str) -> list[str]:
    """The first cells of a section's table."""
    return re.findall(r"^\| (.*?) \|", SECTIONS[section], re.M)


@pytest.mark.parametrize(
    ("section", "module", "name"),
    [
        ("AdamW", "torch.optim", "AdamW"),
        ("SGD", "torch.optim", "SGD"),
        ("Muon", "torch.optim", "Muon"),
        pytest.param("SOAP", "pytorch_optimizer", "SOAP", marks=pytest.mark.frameworks),
        pytest.param(
            "Meta's distributed_shampoo",
            "distributed_shampoo",
            "DistributedShampoo",
            marks=pytest.mark.frameworks,
        ),
    ],
)
def test_every_argument_has_a_row(section, module, name):
    optimizer = getattr(pytest.importorskip(module), name, None)
    if optimizer is None:
        pytest.skip(f"{module} has no {name}")
    arguments = set(inspect.signature(optimizer).parameters) - {"params", "kwargs"}
    named = set(re.findall(r"`(\w+)", " ".join(rows(section))))
    assert arguments <= named


@pytest.mark.parametrize("section", SECTIONS)
def test_arguments_that_are_named_here_exist(section):
    ours = set(inspect.signature(Shampoo).parameters)
    cells = re.findall(r"^\| .*? \| (.*?) \|", SECTIONS[section], re.M)
    named = {name for cell in cells for name in re.findall(r"`([a-z]\w+)[`=\[]", cell)}
    assert named <= ours


def trained(make: Callable[[list[Parameter]], Any]) -> list[Tensor]:
    """Where 25 steps end, in float64, by the same gradients whatever the weights."""
    generator = torch.Generator().manual_seed(0)
    params = [
        Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES
    ]
    optimizer = make(params)
    for step in range(25):
        for index, param in enumerate(params):
            generator = torch.Generator().manual_seed(100 * step + index)
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return [param.detach() for param in params]


def assert_both_end_alike(
    make: Callable[[list[Parameter]], Any], ours: dict[str, Any], atol: float
) -> None:
    def shampoo(params: Sequence[Parameter]) -> Shampoo:
        return Shampoo(params, **ours)

    for theirs, mine in zip(trained(make), trained(shampoo), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=atol)


def test_adamw_is_the_same_where_nothing_is_preconditioned():
    assert_both_end_alike(
        lambda params: torch.optim.AdamW(params, lr=1e-2),
        {
            **{"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.01},
            **{"start_preconditioning_step": math.inf, "preconditioner_dtype": torch.float64},
        },
        atol=1e-12,
    )


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_the_same_where_nothing_is_preconditioned(nesterov):
    given = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.01}
    assert_both_end_alike(
        lambda params: torch.optim.SGD(params, **given),
        {
            **given,
            **{"grafting": "sgd", "betas": (0.0, 0.999), "decoupled_weight_decay": False},
            **{"start_preconditioning_step": math.inf, "preconditioner_dtype": torch.float64},
        },
        atol=1e-12,
    )


# Without a graft, steps before the first root are not the same.
NO_GRAFT = {"weight_decay": 0.0, "precondition_frequency": 1, "start_preconditioning_step": 1}
# Of the official package and of this one, each beside what `official` and `OURS` have.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it is": ({}, {}),
    "every step": (
        {"precondition_frequency": 1, "start_preconditioning_step": 1},
        {"precondition_frequency": 1, "start_preconditioning_step": 1},
    ),
    "a later start": (
        {"start_preconditioning_step": 7},
        {"start_preconditioning_step": 7},
    ),
    "sums": ({"betas": (0.9, 1.0)}, {"betas": (0.9, 1.0), "grafting_beta2": 0.99}),
    "blocks": ({"max_preconditioner_dim": 4}, {"max_preconditioner_dim": 4}),
    "no correction": ({"use_bias_correction": False}, {"bias_correction": False}),
    "L2": ({"weight_decay_type": "L2"}, {"decoupled_weight_decay": False}),
    "momentum": (
        {"iterate_averaging_config": {"momentum": 0.9, "use_nesterov": True}},
        {"momentum": 0.9, "nesterov": True},
    ),
    "exponents": (
        {"preconditioner_config": {"inverse_exponent_override": {2: 0.5, 4: 0.5}}},
        {"exponent": "covariance"},
    ),
    "two dimensions": ({"distributed_config": 2}, {"merge_dims": "matrix"}),
    "sgd": ({"grafting_config": "SGD"}, {"grafting": "sgd"}),
    "adagrad": ({"grafting_config": "AdaGrad"}, {"grafting": "adagrad"}),
    "rmsprop": ({"grafting_config": "RMSprop"}, {"grafting": "rmsprop"}),
    "beta3 without a graft": (
        {"beta3": 0.81, **NO_GRAFT, "grafting_config": None, "epsilon": 1e-4},
        {"nesterov_average": True, **NO_GRAFT, "grafting": "none", "eps": 1e-4},
    ),
}
OURS: dict[str, Any] = {
    **{"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "relative_eps": 0.0, "weight_decay": 0.1},
    **{"max_preconditioner_dim": 16, "precondition_frequency": 5, "merge_dims": "none"},
    **{"start_preconditioning_step": -1, "large_dim_method": "blocking", "exponent": "paper"},
    **{"nesterov_average": False, "root_method": "eigh", "preconditioner_dtype": torch.float64},
}


def official(params: list[Parameter], **changes: Any) -> Any:
    package = importlib.import_module("distributed_shampoo")
    types = importlib.import_module("distributed_shampoo.shampoo_types")
    graft = changes.pop("grafting_config", "Adam")
    if graft is not None:
        moment = {"beta2": 0.99} if graft in ("Adam", "RMSprop") else {}
        eps = {} if graft == "SGD" else {"epsilon": 1e-8}
        graft = getattr(types, f"{graft}PreconditionerConfig")(**moment, **eps)
    if "weight_decay_type" in changes:
        changes["weight_decay_type"] = types.WeightDecayType[changes["weight_decay_type"]]
    if "iterate_averaging_config" in changes:
        momentum = types.ClassicMomentumConfig(**changes["iterate_averaging_config"])
        changes["iterate_averaging_config"] = momentum
    dimensions = changes.pop("distributed_config", math.inf)
    given = {
        **{"lr": 1e-2, "betas": (0.9, 0.99), "epsilon": 1e-8, "weight_decay": 0.1},
        **{"max_preconditioner_dim": 16, "precondition_frequency": 5},
        "distributed_config": package.SingleDeviceDistributedConfig(
            target_parameter_dimensionality=dimensions
        ),
        "preconditioner_config": package.RootInvShampooPreconditionerConfig(
            factor_matrix_dtype=torch.float64,
            inv_factor_matrix_dtype=torch.float64,
            **changes.pop("preconditioner_config", {}),
        ),
    }
    return package.DistributedShampoo(params, grafting_config=graft, **{**given, **changes})


@pytest.mark.frameworks
@pytest.mark.parametrize("pair", PAIRS)
def test_the_official_package_ends_in_the_same_weights(pair):
    pytest.importorskip("distributed_shampoo")
    theirs, ours = PAIRS[pair]
    # Its bias corrections are in float32.
    assert_both_end_alike(lambda params: official(params, **theirs), {**OURS, **ours}, atol=2e-6)
