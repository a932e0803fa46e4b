"""What was trained with ``exponent_override`` goes on with its own exponent, however it is loaded.

``tests/data/checkpoint_exponent_override.pt`` was written by the code before ``exponent``: of every
case a model, an optimizer's ``state_dict()`` and a pickle of both after 7 steps, and the parameters
in which the same code ended after 14.
"""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import resharded_runs as runs
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from trajectory import assert_same_bits, snapshot

from shampoo import ForeignCheckpointError, Shampoo, checkpoint

DATA = Path(__file__).parents[1] / "data" / "checkpoint_exponent_override.pt"
CASES: dict[str, tuple[dict[str, Any], Any, Any]] = {  # arguments, the name of then and of now
    "default": ({}, 0, "paper"),
    "number": ({}, 3, 3),
    "list": ({}, [0, 2, 0, 5], [0, 2, 0, 5]),
    "kl_shampoo": ({"preconditioner": "kl_shampoo"}, 0, "covariance"),
}
FULL = StateDictOptions(full_state_dict=True)
WAYS = ("state_dict", "dcp", "full", "flattened", "folder", "pickle")
# Blocks of the files are those of both, but a longer one would not be.
THEN = {"max_preconditioner_dim": 1024}


def build(**hyper: Any) -> tuple[nn.Module, Shampoo]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 10), nn.Linear(10, 3))
    params = list(model.parameters())
    groups = [
        {"params": params[:2], "merge_dims": "none"},
        {"params": params[2:], "precondition_1d": True},
    ]
    hyper = {"lr": 0.02, "betas": (0.9, 0.99), "precondition_frequency": 3, **hyper}
    return model, Shampoo(groups, **hyper)


def fit(model: nn.Module, optimizer: Shampoo) -> None:
    for step in range(7, 14):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def by_name(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """As torch's ``get_optimizer_state_dict`` has it."""
    names = [name for name, _ in model.named_parameters()]
    groups = [
        {**group, "params": [names[index] for index in group["params"]]}
        for group in state["param_groups"]
    ]
    return {"state": {names[k]: v for k, v in state["state"].items()}, "param_groups": groups}


def flattened(state: dict[str, Any]) -> dict[str, Any]:
    """As torch has it with ``flatten_optimizer_state_dict=True``."""
    flat = {
        f"state.{name}.{key}": value
        for name, entries in state["state"].items()
        for key, value in entries.items()
    }
    for group in state["param_groups"]:
        for name in group["params"]:
            for key, value in group.items():
                if key != "params":
                    flat[f"param_groups.{name}.{key}"] = value
    return flat


def rename(groups: list[dict[str, Any]], then: Any) -> None:
    """Makes groups those of before."""
    for group in groups:
        del group["exponent"]
        group["exponent_override"] = then


def load(way: str, saved: dict[str, Any], then: Any, folder: Path, **hyper: Any):
    model, optimizer = build(**hyper)
    model.load_state_dict(saved["model"])
    state = copy.deepcopy(saved["optimizer"])
    assert all(group["exponent_override"] == then for group in state["param_groups"])
    assert all("exponent" not in group for group in state["param_groups"])
    if way == "state_dict":
        optimizer.load_state_dict(state)
    elif way == "dcp":
        set_optimizer_state_dict(model, optimizer, by_name(state, model))
    elif way == "full":
        set_optimizer_state_dict(model, optimizer, by_name(state, model), options=FULL)
    elif way == "flattened":
        how = StateDictOptions(flatten_optimizer_state_dict=True)
        flat = flattened(by_name(state, model))
        kept = dict(flat)
        set_optimizer_state_dict(model, optimizer, flat, options=how)
        assert flat.keys() == kept.keys()
    elif way == "folder":
        its_model, its = build(**hyper)
        its.load_state_dict(state)
        its_model.load_state_dict(saved["model"])
        rename(its.param_groups, then)
        checkpoint.save(folder, its_model, its, step=7)
        assert checkpoint.load(folder, model, optimizer) == 7
    else:
        model, optimizer = pickle.loads(saved["pickle"].numpy().tobytes())
    return model, optimizer


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_it_goes_on_with_its_own_exponent_to_the_bit(case, way, tmp_path, said):
    hyper, then, now = CASES[case]
    saved = torch.load(DATA, weights_only=True)[case]
    # What it should be, by the arguments of today alone.
    twin_model, twin = build(**hyper, **THEN, exponent=now)
    twin_model.load_state_dict(saved["model"])
    state = copy.deepcopy(saved["optimizer"])
    for group in state["param_groups"]:
        assert group["max_preconditioner_dim"] == 1024
        del group["exponent_override"]
        group["exponent"] = now
    twin.load_state_dict(state)
    model, optimizer = load(way, saved, then, tmp_path, **hyper)
    assert "exponent" not in said()
    for group in optimizer.param_groups:
        assert group["exponent"] == now
        assert "exponent_override" not in group
        assert group["max_preconditioner_dim"] == 1024
        assert group["start_preconditioning_step"] == -1
    assert "exponent_override" not in optimizer.defaults
    fit(twin_model, twin)
    fit(model, optimizer)
    assert_same_bits(snapshot(optimizer), snapshot(twin))
    for param, ended in zip(model.parameters(), saved["ended"], strict=True):
        torch.testing.assert_close(param.detach(), ended, rtol=1e-4, atol=2e-4)
    again = build(**hyper)[1]
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["exponent"] for group in again.param_groups] == [now, now]


def test_the_default_of_today_would_go_elsewhere():
    saved = torch.load(DATA, weights_only=True)["default"]
    model, optimizer = load("state_dict", saved, 0, Path())
    for group in optimizer.param_groups:
        group["exponent"] = "covariance"
    fit(model, optimizer)
    param, ended = next(model.parameters()).detach(), saved["ended"][0]
    assert not torch.allclose(param, ended, rtol=1e-2, atol=1e-3)


def test_groups_that_join_an_old_pickle_have_its_defaults():
    saved = torch.load(DATA, weights_only=True)["number"]
    _, optimizer = pickle.loads(saved["pickle"].numpy().tobytes())
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 3))]})
    group = optimizer.param_groups[-1]
    assert (group["exponent"], group["max_preconditioner_dim"]) == (3, 1024)
    assert (group["betas"], group["start_preconditioning_step"]) == ((0.9, 0.99), -1)
    assert group["nesterov_average"] is False


def test_a_flattened_file_of_another_optimizer_is_named():
    model, optimizer = build()
    adam = torch.optim.AdamW(model.parameters())
    how = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, adam, options=how)
    with pytest.raises(ForeignCheckpointError, match="another optimizer"):
        set_optimizer_state_dict(model, optimizer, state, options=how)


def broadcast(rank: int, then: Any) -> tuple[list[Any], bool]:
    """The exponents of a rank that hears of an old file from the first, and whether it trains."""
    model, optimizer = runs.build("replicated", exponent="paper" if then == 0 else then)
    runs.train(model, optimizer, range(4))
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FULL))
    rename(state["param_groups"], then)
    for group in state["param_groups"]:
        del group["preconditioner"], group["large_dim_method"]
    runs.train(model, optimizer, range(4, 9))
    other, its = runs.build("replicated", seed=1)
    other.load_state_dict(weights)
    how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(other, its, state if rank == 0 else {}, options=how)
    found = [(group["exponent"], group["large_dim_method"]) for group in its.param_groups]
    runs.train(other, its, range(4, 9))
    return found, runs.digest(other) == runs.digest(model)


@pytest.mark.parametrize(("then", "now"), [(0, "paper"), (3, 3)])
def test_ranks_hear_of_it_from_the_first(ranks, then, now):
    for found, is_same in ranks.returns(broadcast, 2, then):
        assert set(found) == {(now, "blocking")}
        assert is_same
