"""``max_preconditioner_dim="auto"``: a number that follows from what roots cost on the device."""

import copy
import inspect
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter
from trajectory import apply, assert_same_bits, snapshot

import shampoo
from shampoo import Shampoo, checkpoint, plan
from shampoo.blocks.cost import ACCELERATOR, CPU, DEFAULT_FREQUENCY, CostModel, default_side
from shampoo.blocks.layout import Geometry

NAME = "max_preconditioner_dim"
MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "cost_amd_epyc_2_cores.json"


def dim(optimizer: Shampoo, group: int = -1) -> Any:
    return optimizer.param_groups[group][NAME]


def test_it_is_256_on_a_cpu_and_1024_elsewhere():
    assert {device: default_side(device) for device in ("cpu", "cuda", "meta", "xpu")} == {
        **{"cpu": 256},
        **dict.fromkeys(("cuda", "meta", "xpu"), 1024),
    }
    assert CostModel.load(MEASURED).affordable_side() == 256


@pytest.mark.parametrize("model", [ACCELERATOR, CPU, CostModel.load(MEASURED)])
def test_it_is_the_last_power_of_two_that_the_criterion_allows(model):
    """Spelled out: two roots a period, against 28 bytes an element through memory."""

    def ratio(side: int) -> float:
        return 2 * model.root_seconds(side) / 10 / (28 * side**2 * model.byte)

    side = model.affordable_side()
    assert ratio(side) <= 12 < ratio(2 * side)
    assert ratio(side) < 10, "the choice does not hang on the bound"
    assert ratio(2 * side) > 16


def test_a_machine_without_costs_has_an_end():
    assert CostModel(root=((1, 0.0),)).affordable_side() == 1 << 16
    assert CostModel(root=((1, 1.0),)).affordable_side() == 1


def test_the_period_is_the_default_of_the_argument():
    parameters = inspect.signature(Shampoo).parameters
    assert parameters["precondition_frequency"].default == DEFAULT_FREQUENCY
    assert parameters[NAME].default == "auto"


def test_a_group_holds_the_number_of_its_first_parameter():
    on_cpu, on_meta = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2, device="meta"))
    assert dim(Shampoo([on_cpu])) == 256
    assert dim(Shampoo([on_meta])) == 1024
    assert dim(Shampoo([on_meta, on_cpu])) == 1024
    optimizer = Shampoo([{"params": [on_cpu], NAME: 64}], max_preconditioner_dim="auto")
    optimizer.add_param_group({"params": [on_meta]})
    assert [group[NAME] for group in optimizer.param_groups] == [64, 1024]
    assert optimizer.defaults[NAME] == "auto"
    assert Geometry.of({**optimizer.param_groups[0], NAME: "auto"}).max_preconditioner_dim == 256


def test_it_is_cut_by_the_number():
    param = Parameter(torch.randn(300, 2))
    optimizer = Shampoo([param], precondition=False)
    apply(optimizer, [param], [torch.ones(300, 2)])
    assert optimizer.state[param]["block0.exp_avg"].shape == (256, 2)


def test_it_may_be_written_into_a_group_later():
    param = Parameter(torch.randn(300, 2))
    optimizer = Shampoo([param], precondition=False, max_preconditioner_dim=64)
    optimizer.param_groups[0][NAME] = "auto"
    apply(optimizer, [param], [torch.ones(300, 2)])
    assert dim(optimizer) == 256
    assert optimizer.state[param]["block0.exp_avg"].shape == (256, 2)
    trained = Shampoo([param], precondition=False, max_preconditioner_dim=64)
    apply(trained, [param], [torch.ones(300, 2)])
    trained.param_groups[0][NAME] = "auto"
    with pytest.raises(RuntimeError, match=NAME):
        trained.step()


def make(**hyper: Any) -> tuple[nn.Module, Shampoo]:
    torch.manual_seed(0)
    model = nn.Linear(2, 300, bias=False)
    hyper = {"precondition_frequency": 2, "large_dim_method": "blocking", **hyper}
    return model, Shampoo(model.parameters(), precondition=False, **hyper)


def fit(model: nn.Module, optimizer: Shampoo, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        apply(optimizer, [model.weight], [torch.randn(300, 2, generator=generator)])
    optimizer.zero_grad()


WAYS_TO_LOAD = ("state_dict", "dcp", "full", "folder")


def load(way: str, model: nn.Module, optimizer: Shampoo, folder: Path, **hyper: Any):
    made = make(**hyper)
    hand_over(way, (model, optimizer), made, folder)
    return made


def hand_over(
    way: str, run: tuple[nn.Module, Shampoo], other_run: tuple[nn.Module, Shampoo], folder: Path
) -> None:
    (model, optimizer), (other_model, other) = run, other_run
    other_model.load_state_dict(model.state_dict())
    if way == "state_dict":
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif way == "folder":
        checkpoint.save(folder, model, optimizer, step=1)
        checkpoint.load(folder, other_model, other)
    else:
        how = StateDictOptions(full_state_dict=way == "full")
        if way == "flattened":
            how = StateDictOptions(flatten_optimizer_state_dict=True)
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))
        set_optimizer_state_dict(other_model, other, state, options=how)


# In a flattened file torch looks for the blocks that the optimizer has, and finds no others.
WAYS = [(way, dim) for way in WAYS_TO_LOAD for dim in (1024, 100)]


@pytest.mark.parametrize(("way", "trained_with"), [*WAYS, ("flattened", 1024)])
def test_a_checkpoint_keeps_its_own(way, trained_with, tmp_path):
    """Blocks longer than those of today's default, and shorter ones; to the bit."""
    model, optimizer = make(max_preconditioner_dim=trained_with)
    fit(model, optimizer, range(3))
    other_model, other = load(way, model, optimizer, tmp_path)
    assert dim(other) == trained_with
    assert_same_bits(snapshot(other), snapshot(optimizer))
    fit(model, optimizer, range(3, 6))
    fit(other_model, other, range(3, 6))
    assert_same_bits(snapshot(other), snapshot(optimizer))


@pytest.mark.parametrize("way", WAYS_TO_LOAD)
def test_a_number_that_was_named_is_held_to(way, tmp_path):
    model, optimizer = make(max_preconditioner_dim=100)
    fit(model, optimizer, range(3))
    with pytest.raises(shampoo.BlockGridMismatchError, match=f"{NAME}=100, .* uses 256"):
        load(way, model, optimizer, tmp_path, max_preconditioner_dim=256)


def test_a_number_that_a_group_names_is_held_to():
    model, optimizer = make(max_preconditioner_dim=100)
    fit(model, optimizer, range(3))
    other, _ = make()
    groups = [{"params": [other.weight], NAME: 512}]
    named = Shampoo(groups, precondition=False, large_dim_method="blocking")
    with pytest.raises(shampoo.BlockGridMismatchError, match=f"{NAME}=100, .* uses 512"):
        named.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("way", ["state_dict", "folder"])
@pytest.mark.parametrize("number", [256, 1024])
def test_a_group_that_names_the_number_of_auto_is_held_to_it(way, number, tmp_path):
    model, optimizer = make(max_preconditioner_dim=100)
    fit(model, optimizer, range(3))
    other_model, _ = make()
    groups = [{"params": [other_model.weight], NAME: number}]
    named = Shampoo(groups, precondition=False, large_dim_method="blocking")
    checkpoint.save(tmp_path, model, optimizer, step=1)
    for other in (named, copy.deepcopy(named), pickle.loads(pickle.dumps(named))):
        other_model.weight = other.param_groups[0]["params"][0]
        give = {
            "state_dict": partial(other.load_state_dict, optimizer.state_dict()),
            "folder": partial(checkpoint.load, tmp_path, other_model, other),
        }
        with pytest.raises(shampoo.BlockGridMismatchError, match=f"{NAME}=100, .* uses {number}"):
            give[way]()


def test_a_named_number_stays_named_when_a_file_brings_the_same():
    model, optimizer = make()
    fit(model, optimizer, range(3))
    _, named = make(max_preconditioner_dim=256)
    named.load_state_dict(optimizer.state_dict())
    model, shorter = make(max_preconditioner_dim=100)
    fit(model, shorter, range(1))
    with pytest.raises(shampoo.BlockGridMismatchError, match=f"{NAME}=100, .* uses 256"):
        named.load_state_dict(shorter.state_dict())


@pytest.mark.parametrize("way", WAYS_TO_LOAD)
def test_auto_takes_the_number_of_every_file_it_loads(way, tmp_path):
    """Copies and pickles remember it too; what is written into the group in between is named."""
    other_model, other = make()
    for number in (100, 1024, 256, 64):
        model, optimizer = make(max_preconditioner_dim=number)
        fit(model, optimizer, range(3))
        hand_over(way, (model, optimizer), (other_model, other), tmp_path / str(number))
        assert dim(other) == number
        assert_same_bits(snapshot(other), snapshot(optimizer))
        fit(other_model, other, range(1))
        if way == "state_dict":
            other_model, other = copy.deepcopy((other_model, other))
            other_model, other = pickle.loads(pickle.dumps((other_model, other)))
    other.state.clear()
    other.param_groups[0][NAME] = 128
    with pytest.raises(shampoo.BlockGridMismatchError, match=f"{NAME}=64, .* uses 128"):
        other.load_state_dict(optimizer.state_dict())


def test_what_is_loaded_is_left_as_it_is():
    model, optimizer = make(max_preconditioner_dim=100)
    fit(model, optimizer, range(3))
    state = optimizer.state_dict()
    before = copy.deepcopy(state["param_groups"])
    _, other = make()
    other.load_state_dict(state)
    assert state["param_groups"] == before
    assert other.state_dict()["param_groups"] == before


@pytest.mark.parametrize("number", [256, 100])
def test_a_pickle_that_does_not_remember_is_judged_by_its_number(number):
    model, optimizer = make(max_preconditioner_dim=64)
    fit(model, optimizer, range(3))
    _, other = make()
    other.param_groups[0][NAME] = number
    del other.param_groups[0]["extra"]["automatic_dim"]
    other = pickle.loads(pickle.dumps(other))
    if number == 256:
        other.load_state_dict(optimizer.state_dict())
        assert dim(other) == 64
    else:
        with pytest.raises(shampoo.BlockGridMismatchError, match=f"{NAME}=64, .* uses 100"):
            other.load_state_dict(optimizer.state_dict())


def test_a_plan_is_one_for_an_accelerator():
    shapes = {"w": (600, 600)}
    assert plan(shapes, 1).max_preconditioner_dim == 1024
    assert plan(shapes, 1, max_preconditioner_dim="auto") == plan(shapes, 1)
    assert plan(shapes, 1, max_preconditioner_dim=256).blocks == 9
