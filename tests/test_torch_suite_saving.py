"""The generic checks of torch's own suite that save, load, copy and hook, for every configuration.

As in test_torch_suite.py, AdamW's entry goes through the same functions.
"""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch_entry import (
    SHAMPOO,
    Trial,
    all_together,
    assert_goes_on_alike,
    assert_same,
    every,
    held,
    new_params,
    params_of,
    take,
)


def twin_of(
    trial: Trial, optimizer: torch.optim.Optimizer, *, name: bool = False
) -> torch.optim.Optimizer:
    """A new optimizer of copies of the weights, in the same group, that has not stepped."""
    params = [torch.nn.Parameter(param.detach().clone()) for param in params_of(optimizer)]
    return trial.make(list(zip(("weight", "bias"), params, strict=True)) if name else params)


def assert_equal_states(actual: Any, expected: Any) -> None:
    """Two state_dicts, or parts of them, hold the same, types included."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal_states(actual[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for ours, theirs in zip(actual, expected, strict=True):
            assert_equal_states(ours, theirs)
    elif isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    else:
        assert actual == expected


# -- round trips


@every
def test_a_loaded_state_goes_on_to_the_bit(trial):
    """Also a state that no step has filled, and one of before the first root."""
    for steps in (0, 1, 3):
        optimizer = trial.trained(steps)
        twin = twin_of(trial, optimizer)
        saved = copy.deepcopy(optimizer.state_dict())  # torch's own would share its tensors
        assert set(saved) == {"state", "param_groups"}
        kept = copy.deepcopy(saved)
        twin.load_state_dict(saved)
        assert_equal_states(saved, kept)
        assert_equal_states(twin.state_dict()["state"], kept["state"])
        assert_goes_on_alike([optimizer, twin])


@every
def test_a_state_loads_into_the_optimizer_that_saved_it(trial):
    """A run goes back to where it was: gradients and weights are its own, state is the file's."""
    optimizer = trial.trained(3)
    weights = [param.detach().clone() for param in params_of(optimizer)]
    twin, saved = copy.deepcopy(optimizer), copy.deepcopy(optimizer.state_dict())
    take(optimizer, 3, seed=7)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for param, weight in zip(params_of(optimizer), weights, strict=True):
            param.copy_(weight)
    assert_goes_on_alike([twin, optimizer])


@every
def test_a_file_loads_with_weights_only_and_is_equal(trial):
    optimizer = trial.trained(3)
    saved = optimizer.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_equal_states(loaded, saved)
    twin = twin_of(trial, optimizer)
    twin.load_state_dict(loaded)
    assert_goes_on_alike([optimizer, twin])


@all_together
def test_names_may_come_and_go_between_a_save_and_a_load(trial):
    for is_named in ((True, True), (True, False), (False, True)):
        saver = twin_of(trial, trial.make(new_params()), name=is_named[0])
        take(saver, 3)
        loader = twin_of(trial, saver, name=is_named[1])
        loader.load_state_dict(copy.deepcopy(saver.state_dict()))
        for optimizer, is_one in ((saver, is_named[0]), (loader, any(is_named))):
            assert ("param_names" in optimizer.param_groups[0]) == is_one, is_named
        assert_goes_on_alike([saver, loader])


@every
def test_an_older_state_without_flags_that_came_later_loads(trial):
    """They are what the constructor was given, or the defaults of it."""
    optimizer = trial.trained(3)
    for flags in (
        ("foreach", "differentiable", "maximize", "capturable"),
        ("foreach", "fused", "differentiable", "decoupled_weight_decay"),
    ):
        older = copy.deepcopy(optimizer.state_dict())
        for group in older["param_groups"]:
            for flag in flags:
                group.pop(flag, None)
        twin = twin_of(trial, optimizer)
        twin.load_state_dict(older)
        if trial.info is SHAMPOO or not {"maximize", "decoupled_weight_decay"} & set(trial.kwargs):
            assert_goes_on_alike([optimizer, twin])
        else:  # torch takes False, whatever was asked for
            take(twin, 1)
            assert all(param.isfinite().all() for param in params_of(twin))


@every
def test_a_step_that_is_a_number_is_taken(trial):
    """As very old files hold it, and those of other frameworks."""
    optimizer = trial.trained(3)
    for to in (int, float):
        saved = copy.deepcopy(optimizer.state_dict())
        for entries in saved["state"].values():
            entries["step"] = to(entries["step"].item())
        twin = twin_of(trial, optimizer)
        twin.load_state_dict(saved)
        assert_goes_on_alike([optimizer, twin])


@all_together
def test_a_state_of_other_groups_is_refused_and_changes_nothing(trial):
    optimizer = trial.trained(3)
    before, groups = held(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    matrix, vector = new_params()
    two, short = trial.make([{"params": matrix}, {"params": vector}]), trial.make([matrix])
    for other, words in (
        (two, "different number of parameter groups"),
        (short, "doesn't match the size"),
    ):
        take(other, 2)
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(other.state_dict())
        assert_same(held(optimizer), before)
        assert_equal_states(optimizer.state_dict()["param_groups"], groups)


@every
def test_entries_of_others_under_a_parameter_are_saved_and_loaded(trial):
    """A wrapper's average of weights: it lies under the parameter in torch's optimizers too."""
    optimizer = trial.trained(2)
    for index, param in enumerate(params_of(optimizer)):
        optimizer.state[param]["slow_weights"] = torch.full_like(param, index + 0.5)
        optimizer.state[param]["count"] = 7
    take(optimizer, 2)
    twin = twin_of(trial, optimizer)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take(twin, 1)
    for each in (optimizer, twin, copy.deepcopy(optimizer)):
        for index, param in enumerate(params_of(each)):
            expected = torch.full_like(param, index + 0.5)
            assert torch.equal(each.state[param]["slow_weights"], expected)
            assert each.state[param]["count"] == 7


@every
def test_values_of_state_replaced_by_copies_go_on_to_the_bit(trial):
    """What offloading to a host and back does to every optimizer."""
    optimizer = trial.trained(2)
    twin = copy.deepcopy(optimizer)
    for param in params_of(optimizer):
        for key, value in optimizer.state[param].items():
            optimizer.state[param][key] = value.clone()
    assert_goes_on_alike([optimizer, twin])
    reloaded = twin_of(trial, optimizer)
    reloaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_goes_on_alike([optimizer, reloaded])


@every
def test_a_cleared_state_starts_anew(trial):
    optimizer = trial.trained(3)
    optimizer.state.clear()
    fresh = twin_of(trial, optimizer)
    for each in (optimizer, fresh):
        take(each, 3, seed=9)
    assert_same(held(optimizer), held(fresh))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every
def test_a_state_saved_on_a_cpu_loads_under_parameters_on_a_gpu(trial):
    optimizer = trial.trained(3)
    params = [torch.nn.Parameter(param.detach().cuda()) for param in params_of(optimizer)]
    moved = trial.make(params)
    moved.load_state_dict(optimizer.state_dict())
    for param, origin in zip(params, params_of(optimizer), strict=True):
        for key, value in optimizer.state[origin].items():
            found = moved.state[param][key]
            torch.testing.assert_close(found.cpu(), value, rtol=0, atol=0)
            assert found.is_cuda or key == "step"
    back = twin_of(trial, optimizer)
    back.load_state_dict(moved.state_dict())
    assert_goes_on_alike([optimizer, back])


# -- copies


@every
def test_copies_go_on_to_the_bit_and_are_on_their_own(trial):
    for steps in (0, 3):
        optimizer = trial.trained(steps)
        before = held(optimizer)
        twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
        for twin in twins:
            assert not {id(p) for p in params_of(twin)} & {id(p) for p in params_of(optimizer)}
        assert_goes_on_alike(twins)
        assert_same(held(optimizer), before)
        take(optimizer, 3, seed=5)
        assert_same(held(optimizer), held(twins[0]))


@all_together
def test_a_deepcopy_has_every_public_attribute(trial):
    optimizer = trial.trained(2)

    def public(each: torch.optim.Optimizer) -> set[str]:
        return {name for name in vars(each) if not name.startswith("_")}

    assert public(copy.deepcopy(optimizer)) == public(optimizer) >= {"state", "param_groups"}
    assert copy.deepcopy(optimizer).defaults == optimizer.defaults


# -- hooks


@all_together
def test_hooks_of_a_step_are_called_around_it_until_removed(trial):
    optimizer = trial.make(new_params())
    calls: list[str] = []

    def note(name: str) -> Any:
        def hook(given: Any, args: Any, kwargs: Any) -> None:
            assert given is optimizer
            is_done = bool(optimizer.state)
            calls.append(f"{name} {'after' if is_done else 'before'}")

        return hook

    handles = [
        optimizer.register_step_pre_hook(note("own pre")),
        optimizer.register_step_post_hook(note("own post")),
        register_optimizer_step_pre_hook(note("any pre")),
        register_optimizer_step_post_hook(note("any post")),
    ]
    try:
        take(optimizer, 1)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["any pre before", "own pre before", "own post after", "any post after"]
    take(optimizer, 1)
    assert len(calls) == 4


@all_together
def test_a_hook_before_a_step_may_give_it_other_arguments(trial):
    optimizer = trial.trained(1)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 5.0), {}))
    assert optimizer.step(lambda: 3.0) == 5.0


@all_together
def test_hooks_of_state_dict_are_called_before_and_after(trial):
    optimizer = trial.trained(1)
    rate = optimizer.param_groups[0]["lr"]

    def before(opt: Any) -> None:
        opt.param_groups[0]["lr"] = 0.25

    def after(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        assert state_dict["param_groups"][0]["lr"] == 0.25
        return {**state_dict, "epoch": 7}

    handles = [
        optimizer.register_state_dict_pre_hook(before),
        optimizer.register_state_dict_post_hook(after),
    ]
    saved = optimizer.state_dict()
    assert saved["epoch"] == 7
    assert saved["param_groups"][0]["lr"] == 0.25
    for handle in handles:
        handle.remove()
    optimizer.param_groups[0]["lr"] = rate
    assert_equal_states(optimizer.state_dict()["param_groups"][0]["lr"], rate)


@all_together
def test_hooks_of_a_load_see_the_state_in_their_order(trial):
    optimizer = trial.trained(3)
    twin = twin_of(trial, optimizer)
    order: list[str] = []

    def first(opt: Any, state_dict: dict[str, Any]) -> None:
        order.append("first")
        state_dict["param_groups"][0]["lr"] = 0.125

    def second(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        order.append("second")
        assert state_dict["param_groups"][0]["lr"] == 0.125
        return {name: state_dict[name] for name in ("state", "param_groups")}

    def last(opt: Any) -> None:
        order.append("last")
        assert opt is twin
        assert opt.param_groups[0]["lr"] == 0.125
        assert_same(held(twin), held(optimizer))

    twin.register_load_state_dict_pre_hook(second)
    twin.register_load_state_dict_pre_hook(first, prepend=True)
    twin.register_load_state_dict_post_hook(last)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert order == ["first", "second", "last"]
    optimizer.param_groups[0]["lr"] = 0.125
    assert_goes_on_alike([optimizer, twin])


@all_together
def test_hooks_stay_with_the_optimizer_that_has_them(trial):
    optimizer = trial.trained(1)
    calls: list[Any] = []
    optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append(opt))
    twin = copy.deepcopy(optimizer)
    take(twin, 1)
    assert calls == []
    take(optimizer, 1)
    assert calls == [optimizer]
