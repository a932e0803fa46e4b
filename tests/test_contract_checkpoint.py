"""Saving, loading, copying: K6, and what torch.optim and its checkpoints promise."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter
from trajectory import (
    apply,
    assert_same_bits,
    random_grads,
    random_params,
    snapshot,
    state_tensors,
    twins_of,
)

import shampoo
from shampoo import Shampoo

SHAPES = [(5, 4), (4,), (2, 3, 2), ()]
HYPER: dict[str, Any] = {
    **{"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1, "momentum": 0.5},
    **{"precondition_frequency": 3, "max_preconditioner_dim": 3},
}


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a checkpoint goes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def trained(
    steps: int, dtype: torch.dtype = torch.float32, **hyper: Any
) -> tuple[list[Parameter], Shampoo]:
    params = random_params(*SHAPES, dtype=dtype)
    opt = Shampoo(params, **{**HYPER, **hyper})
    for grads in random_grads(params, steps):
        apply(opt, params, grads)
    return params, opt


def continue_both(
    params: list[Parameter], opt: Shampoo, others: list[Parameter], other: Shampoo, steps: int = 5
) -> None:
    for grads in random_grads(params, steps, seed=7):
        apply(opt, params, grads)
        apply(other, others, grads)
        assert_same_bits(snapshot(other), snapshot(opt))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6])  # before, at and between the refreshes 3 and 6
@pytest.mark.parametrize("into", ["fresh", "stepped"])
def test_k6_a_resumed_run_has_the_bits_of_a_straight_one(dtype, steps, into):
    params, opt = trained(steps, dtype)
    state = saved_and_loaded(opt.state_dict())
    others = twins_of(params)
    other = Shampoo(others, **HYPER)
    if into == "stepped":
        for grads in random_grads(params, 4, seed=3):
            apply(other, others, grads)
        for param, value in zip(others, params, strict=True):
            param.data.copy_(value.detach())
    other.load_state_dict(state)
    assert_same_bits(snapshot(other), snapshot(opt))
    continue_both(params, opt, others, other)


@pytest.mark.parametrize(
    "hyper",
    [
        {"grafting": "none", "precondition_1d": True},
        {"grafting": "lamb", "nesterov": True},
        {"large_dim_method": "diagonal"},
        {"large_dim_method": "adagrad"},
        {"merge_dims": "none", "exponent": [2, 4, 6]},
        {"preconditioner_dtype": torch.float64},
        {"start_preconditioning_step": float("inf")},
    ],
    ids=str,
)
def test_k6_every_method_resumes_bit_for_bit(hyper):
    params, opt = trained(4, **hyper)
    others = twins_of(params)
    other = Shampoo(others, **{**HYPER, **hyper})
    other.load_state_dict(saved_and_loaded(opt.state_dict()))
    continue_both(params, opt, others, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_keeps_float32_statistics_under_low_precision_parameters(dtype):
    params, opt = trained(4, dtype)
    opt.state[params[0]]["step"].fill_(1_000_001)  # bf16 would make it 999424
    others = twins_of(params)
    other = Shampoo(others, **HYPER)
    other.load_state_dict(saved_and_loaded(opt.state_dict()))
    for (i, key), value in state_tensors(opt).items():
        loaded = other.state[others[i]][key]
        assert loaded.dtype == value.dtype, key
        assert torch.equal(loaded, value), key
    state = other.state[others[0]]
    assert state["block0.factor0"].dtype == torch.float32
    assert state["block0.root0"].dtype == torch.float32
    assert state["block0.exp_avg_sq"].dtype == torch.float32
    assert state["step"].dtype == torch.int64
    assert state["step"] == 1_000_001


def test_state_is_plain_and_flat():
    _, opt = trained(4)
    state = opt.state_dict()

    def check(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                assert isinstance(key, (str, int))
                check(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                check(inner)
        else:
            assert value is None or type(value) in (bool, int, float, str, torch.Tensor), value

    check(state)
    for per_param in state["state"].values():
        assert all(isinstance(value, torch.Tensor) for value in per_param.values())
    keys = set(state["state"][0])
    for k in range(4):  # 5x4 in blocks of 3: a grid of 2 x 2
        for name in ("factor0", "factor1", "root0", "root1", "failures0", "failures1"):
            assert f"block{k}.{name}" in keys
        for name in ("exp_avg", "exp_avg_sq", "momentum"):
            assert f"block{k}.{name}" in keys
    assert len(keys) == 1 + 4 * 9
    assert {k.split(".")[-1] for k in state["state"][1]} == {
        *("step", "exp_avg", "exp_avg_sq", "momentum")
    }


def test_blocks_are_numbered_row_major():
    (param,) = random_params((5, 4), dtype=torch.float32)
    opt = Shampoo([param], **HYPER)
    grad = torch.arange(20.0).reshape(5, 4) + 1
    apply(opt, [param], [grad])
    for k, (rows, cols) in enumerate([(0, 0), (0, 3), (3, 0), (3, 3)]):
        block = grad[rows : rows + 3, cols : cols + 3]
        torch.testing.assert_close(opt.state[param][f"block{k}.exp_avg"], 0.1 * block)
        torch.testing.assert_close(opt.state[param][f"block{k}.factor0"], 0.05 * block @ block.T)


def test_a_key_exists_only_when_it_is_used():
    (param,) = random_params((5, 4), dtype=torch.float32)
    opt = Shampoo([param], betas=(0.0, 0.9), grafting="sgd")
    apply(opt, [param], random_grads([param], 1)[0])
    names = {key.split(".")[-1] for key in opt.state[param]}
    assert names == {"step", "factor0", "factor1", "root0", "root1", "failures0", "failures1"}


def test_state_dict_takes_its_argument_by_keyword_and_runs_its_hooks():
    _, opt = trained(2)
    calls: list[str] = []
    opt.register_state_dict_pre_hook(lambda *_: calls.append("save-pre"))
    opt.register_state_dict_post_hook(lambda *_: calls.append("save-post"))
    opt.register_load_state_dict_pre_hook(lambda *_: calls.append("load-pre"))
    opt.register_load_state_dict_post_hook(lambda *_: calls.append("load-post"))
    state = opt.state_dict()
    opt.load_state_dict(state_dict=state)
    assert calls == ["save-pre", "save-post", "load-pre", "load-post"]


def test_the_state_dict_before_any_step_is_empty_and_loads():
    params = random_params(*SHAPES, dtype=torch.float32)
    opt = Shampoo(params, **HYPER)
    state = saved_and_loaded(opt.state_dict())
    assert state["state"] == {}
    others = twins_of(params)
    other = Shampoo(others, **HYPER)
    other.load_state_dict(state)
    continue_both(params, opt, others, other)


def test_loading_does_not_tie_the_optimizer_to_the_dict():
    """Saving and loading in memory: the next step of one changes nothing of the other."""
    params, opt = trained(4)
    others = twins_of(params)
    other = Shampoo(others, **HYPER)
    other.load_state_dict(opt.state_dict())
    before = snapshot(opt)
    apply(other, others, random_grads(others, 1, seed=5)[0])
    assert_same_bits(snapshot(opt), before)


def test_a_loaded_learning_rate_and_counter_are_used():
    params, opt = trained(3)
    opt.param_groups[0]["lr"] = 0.025
    bad = [torch.full_like(p, float("nan")) for p in params]
    apply(opt, params, bad)
    assert opt.skipped_steps == 1
    others = twins_of(params)
    other = Shampoo(others, **HYPER)
    other.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert other.param_groups[0]["lr"] == 0.025
    assert other.skipped_steps == 1
    continue_both(params, opt, others, other)


def assert_refused(opt: Shampoo, params: list[Parameter], state: Any, error: type) -> str:
    """Loading raises the named error and changes nothing, now or at the next step."""
    before, groups = snapshot(opt), copy.deepcopy(opt.state_dict()["param_groups"])
    twin_params, twin = copy.deepcopy((params, opt))
    with pytest.raises(error) as caught:
        opt.load_state_dict(state)
    assert issubclass(error, RuntimeError)
    assert_same_bits(snapshot(opt), before)
    assert opt.state_dict()["param_groups"] == groups
    continue_both(twin_params, twin, params, opt, steps=3)
    return str(caught.value)


@pytest.mark.parametrize("stepped", [True, False])
def test_a_checkpoint_without_one_of_its_blocks_is_incomplete(stepped):
    _, source = trained(4)
    state = source.state_dict()
    for key in [key for key in state["state"][0] if key.startswith("block1.")]:
        del state["state"][0][key]
    params, opt = trained(2 if stepped else 0)
    message = assert_refused(opt, params, state, shampoo.IncompleteCheckpointError)
    # 4 blocks of the matrix, 2 of the vector, one of the cube and of the scalar
    first = "1 of 8 blocks missing (first: parameter 0 of group 0, shape (5, 4) block 1); saved by"
    assert message.startswith(f"{first} rank 0 of 1. Use torch.distributed.checkpoint")


@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize("key", ["block2.factor0", "block0.exp_avg", "block3.root1", "step"])
def test_a_checkpoint_without_one_of_its_tensors_is_incomplete(stepped, key):
    _, source = trained(4)
    state = source.state_dict()
    del state["state"][0][key]
    params, opt = trained(2 if stepped else 0)
    message = assert_refused(opt, params, state, shampoo.IncompleteCheckpointError)
    block = " block {}: {}".format(*key[5:].split(".")) if "." in key else f": {key}"
    assert f"first: parameter 0 of group 0, shape (5, 4){block})" in message


@pytest.mark.parametrize("stepped", [True, False])
def test_a_checkpoint_of_another_block_size_is_refused_with_both_values(stepped):
    _, source = trained(4, max_preconditioner_dim=2)
    params, opt = trained(2 if stepped else 0)
    message = assert_refused(opt, params, source.state_dict(), shampoo.BlockGridMismatchError)
    assert "2" in message
    assert "3" in message
    assert "max_preconditioner_dim" in message


@pytest.mark.parametrize("stepped", [True, False])
def test_a_block_of_another_shape_is_refused(stepped):
    _, source = trained(4)
    state = source.state_dict()
    state["state"][0]["block1.factor0"] = torch.zeros(2, 2)
    params, opt = trained(2 if stepped else 0)
    assert_refused(opt, params, state, shampoo.BlockGridMismatchError)


def test_a_checkpoint_of_another_merge_is_refused():
    """2x3x2 is cut as 2x6 by "matrix", and not merged by "none"."""
    _, source = trained(4, merge_dims="none", max_preconditioner_dim=6)
    params, opt = trained(2, merge_dims="matrix", max_preconditioner_dim=6)
    assert_refused(opt, params, source.state_dict(), shampoo.BlockGridMismatchError)


def test_unknown_values_of_blocks_are_named_in_one_warning_and_kept(said):
    params, opt = trained(4)
    state = saved_and_loaded(opt.state_dict())
    for index in range(4):
        state["state"][index]["block0.from_the_future"] = torch.ones(2)
        state["state"][index]["block9.factor0"] = torch.ones(2, 2)
    others = twins_of(params)
    other = Shampoo(others, **HYPER)
    other.load_state_dict(state)
    [kept, ignored] = said().splitlines()
    assert "keeping 4 unknown values of state, which nothing uses: block0.from_the" in kept
    assert "ignoring 4 unknown values of state: block9.factor0 of parameter 0" in ignored
    assert all(words.endswith(" and 1 more") for words in (kept, ignored))
    for param in others:
        assert torch.equal(other.state[param].pop("block0.from_the_future"), torch.ones(2))
        assert "block9.factor0" not in other.state[param]
    continue_both(params, opt, others, other)


def test_group_keys_that_a_checkpoint_lacks_take_their_defaults_with_a_warning(said):
    params, opt = trained(4)
    state = saved_and_loaded(opt.state_dict())
    for key in ("relative_eps", "exponent_multiplier", "extra"):
        state["param_groups"][0].pop(key, None)
    others = twins_of(params)
    other = Shampoo(others, **HYPER)
    other.load_state_dict(state)
    assert other.param_groups[0]["relative_eps"] == 1e-6
    continue_both(params, opt, others, other)
    assert "relative_eps" in said()


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_k6_a_deep_copy_steps_like_its_original(steps):
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    opt = Shampoo(model.named_parameters(), **HYPER)

    def step(m: torch.nn.Module, o: Shampoo, x: torch.Tensor) -> None:
        o.zero_grad()
        m(x).square().mean().backward()
        o.step()

    for _ in range(steps):
        step(model, opt, torch.randn(6, 5))
    model_copy, opt_copy = copy.deepcopy((model, opt))
    before = snapshot(opt)
    x = torch.randn(6, 5)
    step(model_copy, opt_copy, x)
    assert_same_bits(snapshot(opt), before)  # the copy shares nothing with its original
    step(model, opt, x)
    for _ in range(4):
        assert_same_bits(snapshot(opt_copy), snapshot(opt))
        x = torch.randn(6, 5)
        step(model, opt, x)
        step(model_copy, opt_copy, x)


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_k6_an_unpickled_optimizer_steps_like_its_original(steps, dtype):
    params, opt = trained(steps, dtype)
    other = pickle.loads(pickle.dumps(opt))
    others = other.param_groups[0]["params"]
    assert_same_bits(snapshot(other), snapshot(opt))
    continue_both(params, opt, others, other)


def regressor() -> torch.nn.Module:
    torch.manual_seed(4)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))


def train(model: torch.nn.Module, opt: Shampoo, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        opt.zero_grad()
        model(torch.randn(6, 5, generator=generator)).square().mean().backward()
        opt.step()


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("frequency", [1, 3])
def test_asking_dcp_for_the_state_of_an_untouched_optimizer_is_inert(flatten, frequency):
    """It steps on zero gradients to materialise the state."""
    models = [regressor(), regressor()]
    hyper = {**HYPER, "precondition_frequency": frequency}
    opts = [Shampoo(m.parameters(), **hyper) for m in models]
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    get_optimizer_state_dict(models[0], opts[0], options=options)
    for param, twin in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(param, twin)
    for model, opt in zip(models, opts, strict=True):
        train(model, opt, 5, seed=1)
    assert_same_bits(snapshot(opts[0]), snapshot(opts[1]))


@pytest.mark.parametrize("flatten", [True, False])
def test_what_dcp_hands_over_without_a_block_is_incomplete(flatten):
    """torch takes a flattened state apart by the keys it wants; a missing one is an empty dict."""
    model = regressor()
    opt = Shampoo(model.named_parameters(), **HYPER)
    train(model, opt, 4, seed=1)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
    entries = state if flatten else state["state"]["2.weight"]
    for key in [key for key in entries if "block1." in key and (not flatten or "2.weight" in key)]:
        del entries[key]
    with pytest.raises(shampoo.IncompleteCheckpointError, match=r"first: 2\.weight block 1\)"):
        set_optimizer_state_dict(model, opt, state, options=options)


@pytest.mark.parametrize("flatten", [True, False])
def test_state_goes_through_dcp_and_back(flatten):
    models = [regressor(), regressor()]
    opts = [Shampoo(m.parameters(), **HYPER) for m in models]
    train(models[0], opts[0], 4, seed=1)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = copy.deepcopy(get_optimizer_state_dict(models[0], opts[0], options=options))
    models[1].load_state_dict(models[0].state_dict())
    set_optimizer_state_dict(models[1], opts[1], state, options=options)
    assert_same_bits(snapshot(opts[1]), snapshot(opts[0]))
    for model, opt in zip(models, opts, strict=True):
        train(model, opt, 4, seed=2)
    assert_same_bits(snapshot(opts[1]), snapshot(opts[0]))
