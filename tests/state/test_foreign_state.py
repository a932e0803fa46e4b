"""What wrappers and users put into ``optimizer.state`` goes where torch's optimizers take it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import resharded_runs as runs
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trajectory import assert_same_bits, snapshot

from shampoo import Shampoo, checkpoint


def entries(weight: Tensor) -> dict[Any, Any]:
    """An average, its count, timm's name, and what is no tensor; of another dtype than a weight."""
    return {
        "ema": torch.full(weight.shape, 0.1, dtype=torch.float64),
        "lookahead_slow": torch.full_like(weight, 3.0, requires_grad=False),
        "slot_weights": torch.arange(3),
        "block0": torch.ones(2),
        "decay": 0.999,
        "history": [torch.ones(1, dtype=torch.float64), 3],
        "nested": {"step": torch.tensor(4.0), "block0.factor0": torch.ones(1)},
        ("a", "tuple"): None,
    }


def build(
    make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype
) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)
    optimizer = make(model.parameters(), lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4, dtype=model.weight.dtype)).float().square().sum().backward()
    optimizer.step()


def loaded(optimizer: Any, make: Any, dtype: torch.dtype) -> tuple[nn.Linear, Any]:
    model, other = build(make, dtype)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return model, other


def alike(first: Any, second: Any) -> bool:
    """Whether two values are the same in type, dtype and bits."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(alike(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(alike, first, second))
    return bool(first == second)


WAYS: dict[str, Callable[..., Any]] = {
    "load": loaded,
    "deepcopy": lambda optimizer, *_: copy.deepcopy((None, optimizer)),
    "pickle": lambda optimizer, *_: pickle.loads(pickle.dumps((None, optimizer))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_ours_goes_where_torch_takes_it(way, dtype):
    found = []
    for make in (torch.optim.AdamW, Shampoo):
        model, optimizer = build(make, dtype)
        own = set(optimizer.state[model.weight])
        optimizer.state[model.weight].update(entries(model.weight))
        optimizer.state["global"] = {"seen": torch.ones(2), "step": 3}
        optimizer.state["word"] = 7
        _, other = WAYS[way](optimizer, make, dtype)
        weight = other.param_groups[0]["params"][0]
        theirs = {key: value for key, value in other.state[weight].items() if key not in own}
        found.append((theirs, other.state["global"], other.state["word"]))
    adam, ours = found
    assert alike(list(ours), list(adam))
    assert ours[0].keys() == entries(model.weight).keys()


def test_it_does_not_change_what_trains_and_outlives_a_plan():
    model, optimizer = build(Shampoo, torch.float32)
    plain, its = build(Shampoo, torch.float32)
    optimizer.state[model.weight].update(entries(model.weight))
    optimizer.state["word"] = 7
    kept = copy.deepcopy(entries(model.weight))
    step(model, optimizer)
    added = nn.Parameter(torch.ones(2, 2))
    added.grad = torch.ones(2, 2)
    for each in (optimizer, its):
        each.add_param_group({"params": [nn.Parameter(added.detach().clone())]})
    step(model, optimizer)
    for _ in range(2):
        step(plain, its)
    assert torch.equal(model.weight, plain.weight)
    assert alike({key: optimizer.state[model.weight][key] for key in kept}, kept)
    assert optimizer.state["word"] == 7


def test_it_makes_no_state_of_ours():
    """A frozen parameter with an average is not planned, nor a state without blocks refused."""
    model = nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    optimizer = Shampoo(model.parameters())
    optimizer.state[model.bias]["ema"] = torch.ones(3)
    other = Shampoo(model.parameters())
    other.load_state_dict(optimizer.state_dict())
    assert set(other.state[model.bias]) == {"ema"}
    step(model, other)
    assert set(other.state[model.bias]) == {"ema"}
    assert "step" in other.state[model.weight]


def on_ranks(rank: int, layout: str, folder: str) -> list[bool]:
    """Whether an average is there after each way to save and load; others see the same state."""
    model, optimizer = runs.build(layout)
    runs.train(model, optimizer, range(2))
    for param in model.parameters():
        optimizer.state[param]["ema"] = param.detach() * 2
        optimizer.state[param]["uses"] = 3

    def is_there(other: nn.Module, its: Shampoo) -> bool:
        return all(
            torch.equal(runs.whole(its.state[param]["ema"]), 2 * runs.whole(mine))
            and isinstance(its.state[param]["ema"], DTensor) == isinstance(param, DTensor)
            and its.state[param]["uses"] == 3
            for mine, param in zip(model.parameters(), other.parameters(), strict=True)
        )

    checkpoint.save(folder, model, optimizer, step=2)
    fresh = runs.build(layout, seed=1)
    checkpoint.load(folder, *fresh)
    found = [is_there(*fresh)]
    optimizer.consolidate_state_dict()
    if rank == 0:
        fresh = runs.build(layout, seed=1)
        fresh[1].load_state_dict(optimizer.state_dict())
        found.append(all("ema" in fresh[1].state[param] for param in fresh[0].parameters()))
    runs.train(model, optimizer, range(2, 4))
    assert all(optimizer.state[param]["uses"] == 3 for param in model.parameters())
    return found


@pytest.mark.parametrize("layout", ["replicated", "fsdp"])
def test_ranks_keep_it_too(ranks, tmp_path, layout):
    first, second = ranks.returns(on_ranks, 2, layout, str(tmp_path))
    assert first == [True, True]
    assert second == [True]


def test_a_folder_brings_it_to_a_new_optimizer(tmp_path):
    model, optimizer = build(Shampoo, torch.float32)
    optimizer.state[model.weight]["ema"] = torch.full((2, 7), 0.5, dtype=torch.float32)
    optimizer.state[model.bias]["uses"] = 5
    checkpoint.save(tmp_path, model, optimizer, step=1)
    other, its = build(Shampoo, torch.float32)
    checkpoint.load(tmp_path, other, its)
    assert torch.equal(its.state[other.weight]["ema"], optimizer.state[model.weight]["ema"])
    assert its.state[other.bias].pop("uses") == 5
    del optimizer.state[model.bias]["uses"]
    step(model, optimizer)
    step(other, its)
    assert_same_bits(snapshot(its), snapshot(optimizer))
