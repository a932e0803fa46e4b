"""A side as long as a vocabulary, preconditioned though nobody has asked for it: one warning."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import shampoo
from shampoo import Shampoo

LONG = 10_001
HYPER: dict[str, Any] = {"large_dim_method": "blocking", "precondition_frequency": 7}


def table(rows: int = LONG, columns: int = 600) -> Parameter:
    return Parameter(torch.zeros(rows, columns))


def held(param: Parameter, **hyper: Any) -> int:
    """Bytes of a real state, the count of steps aside."""
    opt = Shampoo([{"params": [param], "precondition": True}], **{**HYPER, **hyper})
    param.grad = torch.ones_like(param)
    opt.step()
    return sum(value.nbytes for key, value in opt.state[param].items() if key != "step")


def test_the_warning_names_tensors_cost_and_remedies():
    model = nn.ModuleDict({"wte": nn.Embedding(LONG, 600), "fc": nn.Linear(600, 600)})
    model["head"] = nn.Linear(600, LONG, bias=False)
    with pytest.warns(UserWarning, match="a side of more than 10,000 is preconditioned") as seen:
        Shampoo(model.named_parameters(), max_preconditioner_dim=4096, **HYPER)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    message = str(seen[0].message)
    assert f"wte.weight, shape ({LONG}, 600), head.weight, shape (600, {LONG})" not in message
    assert f"wte.weight, shape ({LONG}, 600), head.weight, shape ({LONG}, 600)." in message
    assert "fc" not in message
    for remedy in ("Shampoo(model, ...)", "shampoo.groups(model)", '"precondition": False'):
        assert remedy in message
    # 10,001 in blocks of 1,000 and one row: what it says is what a real state takes.
    small = table(columns=3)
    with pytest.warns(UserWarning, match="a side of more than 10,000") as seen:
        Shampoo([small], max_preconditioner_dim=1000, **HYPER)
    full = held(small, max_preconditioner_dim=1000)
    plain = held(small, max_preconditioner_dim=1000, large_dim_method="adagrad", betas=(0.9, 0.9))
    assert f"It takes {full:,} bytes of state instead of {plain:,}" in str(seen[0].message)
    assert "and 22 roots every 7 steps" in str(seen[0].message)
    assert f"parameter 0 of group 0, shape ({LONG}, 3)." in str(seen[0].message)


def test_many_are_counted():
    params = [table() for _ in range(6)]
    with pytest.warns(UserWarning, match=r"parameter 3 of group 0, shape \S+ 600\), and 2 more\."):
        Shampoo(params, **HYPER)


def test_groups_that_say_so_models_and_what_is_not_preconditioned_are_silent():
    frozen = table().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = Shampoo([table(LONG - 1)], **HYPER)
        Shampoo([{"params": [table()], "precondition": True}], **HYPER)
        Shampoo([{"params": [table()], "precondition": False}], **HYPER)
        Shampoo([table()], precondition=False, **HYPER)
        Shampoo([table()], large_dim_method="adagrad")
        Shampoo([frozen, Parameter(torch.zeros(LONG))], **HYPER)
        Shampoo([Parameter(torch.zeros(LONG)), table(3)], precondition_1d=True, **HYPER)
        Shampoo(nn.Embedding(LONG, 600), **HYPER)
        Shampoo(shampoo.groups(nn.Linear(600, LONG)), **HYPER)
        opt.add_param_group({"params": [table()], "precondition": True})
    with pytest.warns(UserWarning, match="parameter 0 of group 2, shape") as seen:
        opt.add_param_group({"params": [table()]})
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match="parameter 0 of group 1, shape") as seen:
        Shampoo(
            [{"params": [table()], "precondition": True}, {"params": [table()]}],
            **HYPER,
        )
    assert len(seen) == 1


def test_one_warning_is_for_all_groups():
    names = r"parameter 0 of group 0, shape \S+ 600\), parameter 0 of group 2, shape"
    with pytest.warns(UserWarning, match=names) as seen:
        Shampoo(
            [
                {"params": [table()]},
                {"params": [table()], "precondition": True},
                {"params": [table()]},
            ],
            **HYPER,
        )
    assert len(seen) == 1
