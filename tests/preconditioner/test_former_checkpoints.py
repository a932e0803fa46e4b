"""What was saved before there were kinds was saved by Shampoo, whatever loads it."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from trajectory import assert_same_bits, snapshot

from shampoo import BlockGridMismatchError, Shampoo, checkpoint


def make(**hyper: Any) -> tuple[nn.Module, Shampoo]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    return model, Shampoo(model.parameters(), lr=0.1, precondition_frequency=2, **hyper)


def fit(model: nn.Module, optimizer: Shampoo, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()


def forget(optimizer: Shampoo) -> None:
    """Makes the groups those of a version before there was a choice."""
    for group in optimizer.param_groups:
        del group["preconditioner"]


@pytest.fixture
def saved(tmp_path):
    """A run of 4 steps and its state as it was saved then: a dictionary, a directory, a pickle."""
    model, optimizer = make()
    fit(model, optimizer, range(4))
    forget(optimizer)
    checkpoint.save(tmp_path, model, optimizer, step=4)
    state, pickled = copy.deepcopy(optimizer.state_dict()), pickle.dumps((model, optimizer))
    for group in optimizer.param_groups:
        group["preconditioner"] = "shampoo"
    return model, optimizer, state, tmp_path, pickled


@pytest.mark.parametrize("way", ["state_dict", "directory", "pickle"])
def test_it_goes_on_to_the_bit_without_a_word(saved, way, said):
    model, optimizer, state, folder, pickled = saved
    other_model, other = make()
    if way == "state_dict":
        other_model.load_state_dict(model.state_dict())
        other.load_state_dict(state)
    elif way == "directory":
        assert checkpoint.load(folder, other_model, other) == 4
    else:
        other_model, other = pickle.loads(pickled)
    assert [group["preconditioner"] for group in other.param_groups] == ["shampoo"]
    fit(model, optimizer, range(4, 9))
    fit(other_model, other, range(4, 9))
    assert_same_bits(snapshot(other), snapshot(optimizer))
    assert "preconditioner" not in said()


@pytest.mark.parametrize("way", ["state_dict", "directory"])
def test_another_kind_refuses_it(saved, way):
    *_, state, folder, _ = saved
    model, optimizer = make(preconditioner="kl_shampoo")
    fit(model, optimizer, range(3))
    before = snapshot(optimizer)
    words = "preconditioner='shampoo', this optimizer uses 'kl_shampoo'"
    load = {
        "state_dict": lambda: optimizer.load_state_dict(state),
        "directory": lambda: checkpoint.load(folder, model, optimizer),
    }[way]
    with pytest.raises(BlockGridMismatchError, match=words):
        load()
    assert_same_bits(snapshot(optimizer), before)


def test_a_directory_of_another_kind_is_refused_too(tmp_path):
    model, optimizer = make(preconditioner="kl_shampoo")
    fit(model, optimizer, range(3))
    checkpoint.save(tmp_path, model, optimizer, step=3)
    other_model, other = make()
    with pytest.raises(BlockGridMismatchError, match="preconditioner='kl_shampoo'"):
        checkpoint.load(tmp_path, other_model, other)
    twin_model, twin = make(preconditioner="kl_shampoo")
    assert checkpoint.load(tmp_path, twin_model, twin) == 3
    fit(model, optimizer, range(3, 8))
    fit(twin_model, twin, range(3, 8))
    assert_same_bits(snapshot(twin), snapshot(optimizer))
