"""What load_state_dict takes, and what it refuses by name."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import resharded_runs as runs
import torch
from torch.nn import Parameter
from trajectory import apply, assert_same_bits, random_grads, random_params, snapshot

import shampoo
from shampoo import Shampoo, checkpoint
from shampoo.blocks.entries import check_value
from shampoo.grafting import GRAFTING

SHAPES = [(5, 4), (4,), ()]
HYPER: dict[str, Any] = {
    **{"lr": 0.1, "precondition_frequency": 2, "max_preconditioner_dim": 3},
    **{"momentum": 0.5},
}


def trained(steps: int, **hyper: Any) -> tuple[list[Parameter], Shampoo]:
    params = random_params(*SHAPES, dtype=torch.float32)
    opt = Shampoo(params, **{**HYPER, **hyper})
    for grads in random_grads(params, steps):
        apply(opt, params, grads)
    return params, opt


def twin(params: list[Parameter], **hyper: Any) -> tuple[list[Parameter], Shampoo]:
    others = [Parameter(param.detach().clone()) for param in params]
    return others, Shampoo(others, **{**HYPER, **hyper})


def go_on(*runs_: tuple[list[Parameter], Shampoo], seed: int = 7) -> None:
    """Steps that must keep all runs equal to the bit."""
    first, *others = runs_
    for step, grads in enumerate(random_grads(first[0], 3, seed=seed)):
        for params, opt in runs_:
            apply(opt, params, grads)
        for params, opt in others:
            assert_same_bits(snapshot(opt), snapshot(first[1]))
            assert params is not first[0], step


@pytest.mark.parametrize("grafting", GRAFTING)
def test_without_a_gradient_average_every_grafting_resumes(grafting):
    """``exp_avg`` is part of the word ``exp_avg_sq``; docs/coming_from.md has beta1 = 0 for SGD."""
    hyper = {"betas": (0.0, 0.9), "grafting": grafting, "momentum": 0.0}
    run = trained(3, **hyper)
    other = twin(run[0], **hyper)
    other[1].load_state_dict(copy.deepcopy(run[1].state_dict()))
    go_on(run, other)
    [added] = random_params((2, 2), dtype=torch.float32)
    names = {param: set(entries) for param, entries in run[1].state.items()}
    run[1].add_param_group({"params": [added]})
    added.grad = torch.ones(2, 2)
    run[1].step()
    assert not any("exp_avg" in key.split(".") for key in run[1].state[added])
    assert {param: set(run[1].state[param]) for param in names} == names  # a plan made anew


@pytest.mark.parametrize("change", [{"momentum": 0.9}, {"betas": (0.8, 0.999)}], ids=str)
@pytest.mark.parametrize("grafting", ["sgd", "adam", "none"])
def test_a_moment_raised_between_the_step_and_the_save_begins_at_zero(grafting, change, said):
    hyper = {"grafting": grafting, "momentum": 0.0, "betas": (0.0, 0.999)}
    run = trained(3, **hyper)
    run[1].param_groups[0].update(change)  # what a scheduler does
    other = twin(run[0], **hyper)
    other[1].load_state_dict(copy.deepcopy(run[1].state_dict()))
    kind = "momentum" if "momentum" in change else "exp_avg"
    assert f"calls for {kind} and has none in a group: it begins at zero" in said()
    assert not any(other[1].state[param][f"block0.{kind}"].any() for param in other[0])
    go_on(run, other)


def save_and_load(rank: int, folder: Path, changes: tuple[Any, Any]) -> list[str]:
    """Digests of a run, and of one that goes on from its checkpoint."""
    before, after = changes
    hyper: dict[str, Any] = {"momentum": 0.0, "betas": (0.0, 0.9), **before}
    model, optimizer = runs.build("replicated", **hyper)
    runs.train(model, optimizer, range(3))
    for group in optimizer.param_groups:
        group.update(after)
    checkpoint.save(folder, model, optimizer, step=3)
    runs.train(model, optimizer, range(3, 6))
    # The new optimizer is built with the values that the old one had at first, or with the last.
    found = [runs.digest(model)]
    for values in ({}, before, {**before, **after}):
        other, its = runs.build("replicated", seed=1, **{**hyper, **values})
        for group in its.param_groups:
            group.update({"momentum": 0.0, "betas": (0.0, 0.9), **values})
        checkpoint.load(folder, other, its)
        runs.train(other, its, range(3, 6))
        found.append(runs.digest(other))
    return found


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        ({}, {"momentum": 0.9}),
        ({}, {"betas": (0.7, 0.9)}),
        ({"momentum": 0.9}, {"momentum": 0.0}),
        ({"momentum": 0.9, "betas": (0.7, 0.9)}, {}),
    ],
    ids=str,
)
def test_a_folder_resumes_whatever_a_schedule_did_on_either_side(ranks, tmp_path, world, changes):
    for found in ranks.returns(save_and_load, world, tmp_path, changes):
        assert len(set(found)) == 1


@pytest.mark.parametrize(
    "convert",
    [
        lambda step: step.item(),
        lambda step: float(step),
        lambda step: np.int32(step),
        lambda step: np.array([float(step)]),
        lambda step: step.to(torch.float32),
        lambda step: step.to(torch.bfloat16).reshape(1),
        lambda step: step.to(torch.int16),
    ],
    ids=["int", "float", "numpy", "array", "float32", "bfloat16 [1]", "int16"],
)
def test_counts_are_taken_as_torch_takes_them(convert):
    run = trained(3, refresh_schedule="staggered")
    state = copy.deepcopy(run[1].state_dict())
    for entries in state["state"].values():
        for key in entries:
            if key == "step" or "failures" in key or "slot" in key:
                entries[key] = convert(entries[key])
    other = twin(run[0], refresh_schedule="staggered")
    other[1].load_state_dict(state)
    assert_same_bits(snapshot(other[1]), snapshot(run[1]))
    go_on(run, other)


def refuse(value: Any, key: str, error: type[Exception], **hyper: Any) -> str:
    """What is said of a value; asserts that a load of it changes nothing."""
    _, opt = trained(3, **hyper)
    state = copy.deepcopy(opt.state_dict())
    state["state"][0][key] = value(state["state"][0][key]) if callable(value) else value
    state["param_groups"][0]["lr"] = 0.7
    before, groups = snapshot(opt), copy.deepcopy(opt.state_dict()["param_groups"])
    with pytest.raises(error) as caught:
        opt.load_state_dict(state)
    assert_same_bits(snapshot(opt), before)
    assert opt.state_dict()["param_groups"] == groups
    return str(caught.value)


@pytest.mark.parametrize("step", [2.5, -1, float("nan"), float("inf"), torch.tensor(-3)])
def test_a_step_that_is_no_count_is_refused(step):
    words = refuse(step, "step", ValueError)
    assert words.startswith(f"Invalid step={float(step)!r} of parameter 0 of group 0, shape (5, 4)")
    assert words.endswith("Must be a whole number >= 0.")


@pytest.mark.parametrize("step", [torch.ones(2), "7", [3], 1j, torch.ones(1, 1)])
def test_a_step_that_is_no_number_is_refused(step):
    words = refuse(step, "step", shampoo.BlockGridMismatchError)
    assert words.startswith("parameter 0 of group 0, shape (5, 4): step is a ")
    assert words.endswith(", not one number.")


KEYS = ["block0.exp_avg", "block1.exp_avg_sq", "block2.momentum", "block3.factor0", "block0.root1"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_another_dtype_is_refused_with_both(key, dtype):
    words = refuse(lambda value: value.to(dtype), key, shampoo.BlockGridMismatchError)
    assert f"{key} is {dtype}, but this optimizer keeps it in torch.float32." in words
    assert "or, where rounding is meant, cast the value to torch.float32 first" in words


@pytest.mark.parametrize("key", KEYS)
def test_another_shape_is_refused_with_both(key):
    words = refuse(lambda value: value[:1].clone(), key, shampoo.BlockGridMismatchError)
    assert f"{key} has shape (1, " in words
    assert "but this optimizer cuts it to (" in words


def test_no_tensor_is_refused():
    words = refuse([1.0], "block0.factor0", shampoo.BlockGridMismatchError)
    assert "block0.factor0 is a list, not a tensor." in words


def test_the_check_of_a_value_looks_at_its_place_alone():
    place = torch.empty(2, 3, device="meta")
    value = torch.ones(2, 3)
    assert check_value("w", "block0.exp_avg", value, place) is value
    assert check_value("w", "block0.failures1", 3.0, place[0, 0]).dtype == torch.int64
    with pytest.raises(shampoo.BlockGridMismatchError, match=r"torch\.float16.*torch\.float32"):
        check_value("w", "block0.exp_avg", value.half(), place)
    with pytest.raises(shampoo.BlockGridMismatchError, match=r"\(3, 2\).*\(2, 3\)"):
        check_value("w", "block0.exp_avg", value.T, place)


OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.3, "eps": 0.1}, "exp_avg, exp_avg_sq"),
    "SGD": (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "nesterov": True}, "momentum_buffer"),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.3}, "sum"),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.3}, "col_var, row_var, variance"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_optimizers_state_is_named_and_nothing_of_it_taken(name, steps, strict):
    make, hyper, has = OPTIMIZERS[name]
    params, opt = trained(2)
    others = [Parameter(param.detach().clone()) for param in params]
    source = make(others, **hyper)
    for grads in random_grads(others, steps):
        apply(source, others, grads)
    if steps == 0:
        source.state.clear()  # Adagrad has state from the start
        has = "no max_preconditioner_dim"
    before, groups = snapshot(opt), copy.deepcopy(opt.state_dict()["param_groups"])
    with pytest.raises(shampoo.ForeignCheckpointError) as caught:
        opt.load_state_dict(source.state_dict(), strict=strict)
    assert str(caught.value).startswith("this is the state of another optimizer (it")
    assert has in str(caught.value)
    assert steps == 0 or f"(it has {has}; no block*)" in str(caught.value)
    assert_same_bits(snapshot(opt), before)
    assert opt.state_dict()["param_groups"] == groups


def test_blocks_are_counted_once_and_across_parameters():
    """4 blocks of the matrix, 2 of the vector, 1 of the scalar."""
    _, source = trained(3)
    state = copy.deepcopy(source.state_dict())
    for key in [key for key in state["state"][0] if key.startswith(("block1.", "block3."))]:
        del state["state"][0][key]
    del state["state"][0]["block2.factor0"], state["state"][0]["block2.root1"]
    del state["state"][1]["step"], state["state"][1]["block1.exp_avg"]
    first = r"^4 of 7 blocks missing \(first: parameter 0 of group 0, shape \(5, 4\) block 1\)"
    with pytest.raises(shampoo.IncompleteCheckpointError, match=first):
        trained(1)[1].load_state_dict(state)
    for index in (0, 1):
        state = copy.deepcopy(source.state_dict())
        for position in range(index + 1):
            del state["state"][position]["step"]
        words = (
            rf"^counts of {index + 1} of 3 parameters missing \(first: .* shape \(5, 4\): step\)"
        )
        with pytest.raises(shampoo.IncompleteCheckpointError, match=words):
            trained(1)[1].load_state_dict(state)


def test_many_tensors_are_one_line(said):
    params = random_params(*[(3, 2)] * 9, dtype=torch.float32)
    groups = [{"params": params[:4]}, {"params": params[4:]}]
    opt = Shampoo(groups, **HYPER)
    apply(opt, params, random_grads(params, 1)[0])
    state = copy.deepcopy(opt.state_dict())
    for group in state["param_groups"]:
        del group["relative_eps"], group["nesterov"]
    for index in range(1, 9):
        del state["state"][index]
    opt.load_state_dict(state)
    lacking, anew = said().splitlines()
    assert lacking == "shampoo: the checkpoint lacks nesterov, relative_eps; using the defaults"
    assert "has no state for 8 of 9 parameters (parameter 1 of group 0" in anew
    assert anew.endswith("and 5 more); they start anew")
