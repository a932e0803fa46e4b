"""Checkpoints of DistributedShampoo: what is loaded, what is refused, leaving all as it was.

They are made here of our own state, in the layout of that package, so that it need not be
installed; beside it, ``tests/migrate/test_official_package.py`` loads those that it has saved.
"""

import copy
from typing import Any

import official
import pytest
import torch
from torch.nn import Parameter
from trajectory import apply, random_grads, random_params, twins_of

from shampoo import (
    BlockGridMismatchError,
    ForeignCheckpointError,
    IncompleteCheckpointError,
    Shampoo,
)
from shampoo.migrate import from_distributed_shampoo, load_distributed_shampoo

SHAPES = [(7, 5), (4,)]
CONFIG = {
    **{"lr": 0.125, "betas": (0.9, 0.99), "epsilon": 1e-4, "max_preconditioner_dim": 4},
    **{"precondition_frequency": 2, "start_preconditioning_step": 3},
    "grafting_config": official.AdamPreconditionerConfig(),
    "iterate_averaging_config": official.ClassicMomentumConfig(),
}
NAMES = {"exp_avg": "filtered_grad", "exp_avg_sq": "adagrad", "momentum": "momentum_buffer"}


def theirs(opt: Shampoo, packed: bool = True, config: Any = CONFIG) -> dict[str, Any]:
    """A state of ours as DistributedShampoo would have saved it."""
    state: dict[int, Any] = {}
    for identity, entries in opt.state_dict()["state"].items():
        found = state.setdefault(identity, {"step": entries["step"].clone()})
        for key, value in entries.items():
            block, _, name = key.partition(".")
            if not name or name.startswith("failures"):
                continue
            kept = found.setdefault(block.replace("block", "block_"), {"shampoo": {}})
            if name in NAMES:
                kept[NAMES[name]] = value.clone()
                continue
            place = "factor_matrices" if name.startswith("factor") else "inv_factor_matrices"
            if place == "inv_factor_matrices" and not value.any():
                value = torch.eye(len(value))  # as it begins there
            upper = value[tuple(torch.triu_indices(*value.shape))] if packed else value.clone()
            kept["shampoo"].setdefault(place, {})[int(name[-1])] = upper
    groups = [{"params": list(range(len(opt.param_groups[0]["params"]))), **full(config)}]
    return {"state": state, "param_groups": groups}


def full(config):
    """As it stands in a group: with every configuration, and what is derived filled in."""
    return {
        **{"preconditioner_config": official.RootInvShampooPreconditionerConfig()},
        **{"beta3": config["betas"][0], "peak_lr": config["lr"], "use_pin_memory": False},
        "distributed_config": official.SingleDeviceDistributedConfig(),
        **config,
    }


def trained(steps: int = 4) -> tuple[list[Parameter], Shampoo]:
    torch.manual_seed(0)
    params = random_params(*SHAPES, dtype=torch.float32)
    opt = Shampoo(params, **from_distributed_shampoo(**CONFIG))
    for grads in random_grads(params, steps):
        apply(opt, params, grads)
    return params, opt


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("packed", [True, False])
def test_a_run_goes_on_to_the_bit(packed, steps):
    params, opt = trained(steps)
    state, ours = theirs(opt, packed), twins_of(params)
    other = Shampoo(ours, **from_distributed_shampoo(**CONFIG))
    load_distributed_shampoo(other, state)
    for param, twin in zip(params, ours, strict=True):
        for key, value in opt.state[param].items():
            assert torch.equal(other.state[twin][key], value), key
    for grads in random_grads(params, 5, seed=2):
        apply(opt, params, grads)
        apply(other, ours, grads)
    assert all(map(torch.equal, ours, params))


def test_blocks_come_from_the_files_of_all_ranks():
    params, opt = trained()
    state = theirs(opt)
    parts = [copy.deepcopy(state), copy.deepcopy(state)]
    for entries in state["state"].values():
        assert any(key.startswith("block_") for key in entries)
    for identity, entries in state["state"].items():
        for place, key in enumerate(key for key in entries if key.startswith("block_")):
            del parts[place % 2]["state"][identity][key]
    ours = twins_of(params)
    other = Shampoo(ours, **from_distributed_shampoo(**CONFIG))
    with pytest.raises(IncompleteCheckpointError, match="give the state of all"):
        load_distributed_shampoo(other, parts[0])
    load_distributed_shampoo(other, *parts)
    [grads] = random_grads(params, 1, seed=2)
    apply(opt, params, grads)
    apply(other, ours, grads)
    assert all(map(torch.equal, ours, params))


def test_hyperparameters_come_with_the_state():
    _, opt = trained()
    state = theirs(opt, config={**CONFIG, "lr": 0.0625})
    state["param_groups"][0]["initial_lr"] = 0.125
    _, other = trained(0)
    load_distributed_shampoo(other, state)
    assert other.param_groups[0]["lr"] == 0.0625
    assert other.param_groups[0]["initial_lr"] == 0.125


def test_groups_without_configurations_leave_those_of_the_optimizer():
    _, opt = trained()
    state = theirs(opt)
    state["param_groups"][0] = {"params": state["param_groups"][0]["params"], "lr": 9.0}
    _, other = trained(0)
    load_distributed_shampoo(other, state)
    assert other.param_groups[0]["lr"] == 0.125


def block(state):
    return state["state"][0]["block_1"]


def set_group(**values):
    return lambda state: state["param_groups"][0].update(values)


def drop(key, *path):
    def change(state):
        of = block(state)
        for name in path:
            of = of[name]
        del of[key]

    return change


def put(key, value):
    return lambda state: block(state).update({key: value})


def rename_blocks(state):
    entries = state["state"][0]
    entries["rank_0-block_0"] = entries.pop("block_0")


REFUSED = [
    (set_group(max_preconditioner_dim=3), BlockGridMismatchError, "max_preconditioner_dim=3"),
    (set_group(max_preconditioner_dim=5), BlockGridMismatchError, "max_preconditioner_dim=5"),
    (
        set_group(grafting_config=official.SGDPreconditionerConfig()),
        ValueError,
        "grafting='sgd'.*adagrad",
    ),
    (set_group(iterate_averaging_config=None), ValueError, "momentum=0.0.*momentum_buffer"),
    (set_group(betas=(0.0, 0.99), beta3=0.0), ValueError, "betas=.*filtered_grad"),
    (set_group(betas=(0.0, 0.0)), ValueError, "betas"),
    (drop("adagrad"), IncompleteCheckpointError, "block_1 .*no adagrad.*grafting='adam'"),
    (drop("momentum_buffer"), IncompleteCheckpointError, "no momentum_buffer"),
    (drop("shampoo"), BlockGridMismatchError, "block_1 .*0 factor_matrices"),
    (drop(1, "shampoo", "inv_factor_matrices"), BlockGridMismatchError, "1 inv_factor_matrices"),
    (put("weight_buffer", torch.ones(1)), BlockGridMismatchError, "weight_buffer"),
    (put("adagrad", torch.ones(2, 2)), BlockGridMismatchError, r"adagrad of shape \(2, 2\)"),
    (
        put("shampoo", {"factor_matrices_eigenvectors": {}}),
        BlockGridMismatchError,
        "factor_matrices_eigenvectors.*cannot be converted",
    ),
    (
        put(
            "shampoo",
            {
                name: [torch.ones(3), torch.ones(7)]
                for name in ("factor_matrices", "inv_factor_matrices")
            },
        ),
        BlockGridMismatchError,
        r"factor of shape \(3,\)",
    ),
    (rename_blocks, BlockGridMismatchError, "rank_0-block_0"),
    (lambda state: state["state"][0].update(lr_sum=1.0), BlockGridMismatchError, "lr_sum"),
    (lambda state: state["state"][0].pop("block_2"), IncompleteCheckpointError, "block_2"),
    (lambda state: state["param_groups"][0]["params"].pop(), ValueError, r"\[1\].*\[2\]"),
    (lambda state: state["state"].clear(), ForeignCheckpointError, "block_0"),
    (
        lambda state: block(state)["shampoo"]["factor_matrices"].update(
            {0: torch.ones(10, dtype=torch.float64)}
        ),
        BlockGridMismatchError,
        "float64",
    ),
]


@pytest.mark.parametrize(("change", "error", "said"), REFUSED)
def test_what_does_not_agree_is_refused_and_nothing_has_changed(change, error, said):
    params, opt = trained()
    state = theirs(opt)
    change(state)
    ours = twins_of(params)
    other = Shampoo(ours, **from_distributed_shampoo(**CONFIG))
    for grads in random_grads(params, 2, seed=5):
        apply(other, ours, grads)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(error, match=f"(?s){said}"):
        load_distributed_shampoo(other, state)
    after = other.state_dict()
    assert str(after["param_groups"]) == str(before["param_groups"])
    for identity, entries in before["state"].items():
        for key, value in entries.items():
            assert torch.equal(after["state"][identity][key], value), key


def test_our_own_state_is_for_load_state_dict():
    _, opt = trained()
    with pytest.raises(ForeignCheckpointError, match="load_state_dict"):
        load_distributed_shampoo(opt, opt.state_dict())
    with pytest.raises(ValueError, match="state_dicts"):
        load_distributed_shampoo(opt)


def test_tensors_that_are_not_preconditioned_here_are_refused():
    params, opt = trained()
    translated = {**from_distributed_shampoo(**CONFIG), "precondition_1d": False}
    state = theirs(opt)
    state["param_groups"][0] = {"params": [0, 1]}  # the values of this optimizer count
    other = Shampoo(twins_of(params), **translated)
    with pytest.raises(BlockGridMismatchError, match="from_distributed_shampoo"):
        load_distributed_shampoo(other, state)
