"""Groups are read again when, and only when, they have changed; an ordinary step is few calls."""

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from trajectory import apply, random_grads, random_params

import shampoo
from shampoo import Shampoo
from shampoo.hyperparameters import Hyperparameters
from shampoo.step.group_reader import GroupReader

OTHER: dict[str, Any] = {
    "betas": (0.8, 0.9),
    "eps": 1e-9,
    "weight_decay": 0.1,
    "relative_eps": 1e-3,
    "decoupled_weight_decay": False,
    "momentum": 0.5,
    "nesterov": True,
    "nesterov_average": False,
    "max_preconditioner_dim": 3,
    "precondition_frequency": 7,
    "start_preconditioning_step": 19,
    "merge_dims": "none",
    "precondition_1d": True,
    "precondition": False,
    "preconditioner": "kl_shampoo",
    "exponent": [0, 3],
    "exponent_multiplier": 2.0,
    "bias_correction": False,
    "grafting": "sgd",
    "grafting_beta2": 0.5,
    "grafting_eps": 1e-3,
    "large_dim_method": "blocking",
    "root_method": "eigh",
    "preconditioner_dtype": "float64",
    "nonfinite": "raise",
    "max_root_failures": 3,
    "refresh_schedule": "staggered",
    "maximize": True,
    "stochastic_rounding": True,
    "capturable": True,
}


def groups(**hyper: Any) -> list[dict[str, Any]]:
    return Shampoo(random_params((4, 3)), **hyper).param_groups


@pytest.mark.parametrize("name", OTHER)
def test_every_other_value_is_seen(name):
    found, reader = groups(), GroupReader()
    before, revision = reader.read(found), reader.revision
    found[0][name] = OTHER[name]
    after = reader.read(found)
    assert after == [Hyperparameters.read(found[0])]
    assert after != before
    assert reader.revision != revision


def test_no_argument_is_forgotten():
    not_kept = {"lr", "foreach", "fused", "differentiable"}  # tested apart
    assert set(OTHER) | not_kept == set(Shampoo(random_params((4, 3))).defaults)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("foreach", 3),
        ("differentiable", True),
        ("nesterov", 0),  # which equals False
        ("momentum", False),
        ("betas", (False, 0.999)),
        ("betas", (0.9, np.array([0.9, 0.9]))),
        ("weight_decay", np.zeros(2)),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", "0.1"),
        ("lr", True),
    ],
)
def test_a_bad_value_is_refused_however_equal(name, value):
    found, reader = groups(betas=(0.0, 0.999), momentum=0.0), GroupReader()
    before = reader.read(found)
    kept = found[0][name]
    found[0][name] = value
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError), match=name):
            reader.read(found)
    found[0][name] = kept
    assert reader.read(found) == before


@pytest.mark.parametrize("name", ["betas", "exponent"])
def test_what_is_written_into_a_list_is_seen(name):
    found, reader = groups(betas=[0.9, 0.999], exponent=[2, 4]), GroupReader()
    reader.read(found)
    found[0][name][0] = 0
    assert reader.read(found) == [Hyperparameters.read(found[0])]


@pytest.mark.parametrize("capturable", [False, True])
def test_what_is_written_into_a_tensor_is_seen(capturable):
    lr = torch.tensor(0.1)
    found, reader = groups(lr=lr, capturable=capturable), GroupReader()
    reader.read(found)
    lr.fill_(0.5)
    assert float(reader.read(found)[0].lr) == 0.5


def test_a_learning_rate_that_moves_is_checked_alone(monkeypatch):
    found, reader = groups(), GroupReader()
    reader.read(found)
    revision = reader.revision
    monkeypatch.setattr(Hyperparameters, "_check", None)  # which reading all of them calls
    found[0]["lr"] = 0.25
    assert reader.read(found)[0].lr == 0.25
    assert reader.revision == revision
    assert reader.read(found) is reader.read(found)


def test_groups_come_and_go():
    first, second = groups(), groups(lr=0.5)
    reader = GroupReader()
    assert len(reader.read(first)) == 1
    both = reader.read([*first, *second])
    assert [values.lr for values in both] == [1e-3, 0.5]
    assert [values.lr for values in reader.read(second)] == [0.5]


def test_a_schedule_trains_as_a_new_optimizer_would():
    """Every step of it takes the learning rate that stands in the group."""
    params = random_params((6, 4), (5,), dtype=torch.float32)
    twins = copy.deepcopy(params)
    opt, twin = Shampoo(params, lr=0.1), Shampoo(twins, lr=0.1)
    for step, grads in enumerate(random_grads(params, 6)):
        opt.param_groups[0]["lr"] = 0.1 / (1 + step)
        twin._reader = GroupReader()
        twin.param_groups[0]["lr"] = 0.1 / (1 + step)
        apply(opt, params, grads)
        apply(twin, twins, grads)
    assert all(param.equal(other) for param, other in zip(params, twins, strict=True))


PACKAGE = Path(shampoo.__file__).parent
FOLDERS = tuple(str(folder.resolve()) for folder in (PACKAGE, PACKAGE / "kernels"))


@pytest.mark.parametrize("moving", [False, True], ids=["lr stands", "lr moves"])
def test_an_ordinary_step_is_at_most_150_python_calls(moving):
    """Of one Linear layer, in the package's own files, comprehensions among them."""
    layer = nn.Linear(64, 64)
    opt = Shampoo(layer.parameters())
    calls = 0

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal calls
        if event == "call" and str(Path(frame.f_code.co_filename).resolve()).startswith(FOLDERS):
            calls += 1

    for _ in range(12):  # beyond the first refresh
        for param in layer.parameters():
            param.grad = torch.randn_like(param)
        opt.step()
    if moving:
        opt.param_groups[0]["lr"] = 5e-4
    step = opt.step
    sys.setprofile(count)
    step()
    sys.setprofile(None)
    assert 20 < calls <= 150
