"""What stands in ``optimizer.state`` at ``step()`` is what trains, and what is saved."""

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layouts import LAYOUTS, Case, digest, inject
from ranks import Ranks
from torch import Tensor, nn
from torch.nn import Parameter
from trajectory import apply, assert_same_bits, random_grads, random_params, snapshot

import shampoo
from shampoo import Shampoo

SHAPES = (6, 4), (5,), (2, 3, 3)
HYPER: dict[str, Any] = {
    "lr": 0.05,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "precondition_frequency": 3,
    "max_preconditioner_dim": 4,
    "precondition_1d": True,
}


def trained(steps: int, **hyper: Any) -> tuple[list[Parameter], Shampoo]:
    params = random_params(*SHAPES, dtype=torch.float32)
    opt = Shampoo(params, **{**HYPER, **hyper})
    go_on(params, opt, steps)
    return params, opt


def go_on(params: list[Parameter], opt: Shampoo, steps: int, seed: int = 1) -> None:
    for grads in random_grads(params, steps, seed):
        apply(opt, params, grads)


def twin_of(params: list[Parameter], opt: Shampoo) -> tuple[list[Parameter], Shampoo]:
    return copy.deepcopy((params, opt))


def copies(opt: Shampoo) -> None:
    """As frameworks do that keep the state on the host while something else has the device."""
    for entries in opt.state.values():
        for key, value in entries.items():
            entries[key] = value.clone()


def through_another_dtype(opt: Shampoo) -> None:
    for entries in opt.state.values():
        for key in list(entries):
            entries[key] = entries[key].double().to(entries[key].dtype)


def other_inner_dictionaries(opt: Shampoo) -> None:
    for param in list(opt.state):
        opt.state[param] = {key: value.clone() for key, value in opt.state[param].items()}


def another_outer_dictionary(opt: Shampoo) -> None:
    opt.state = {param: dict(entries) for param, entries in opt.state.items()}


def a_defaultdict_of_copies(opt: Shampoo) -> None:
    opt.state = defaultdict(dict, copy.deepcopy(dict(opt.state.items())))


def a_load_of_its_own(opt: Shampoo) -> None:
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def in_another_order(opt: Shampoo) -> None:
    opt.state = {
        param: dict(reversed(entries.items())) for param, entries in reversed(opt.state.items())
    }


def swapped_and_back(opt: Shampoo) -> None:
    first = next(iter(opt.state.values()))
    first["block0.factor0"], first["block0.root0"] = first["block0.root0"], first["block0.factor0"]
    go = {key: value.clone() for key, value in first.items()}
    first["block0.factor0"], first["block0.root0"] = go["block0.root0"], go["block0.factor0"]


EQUAL: list[Callable[[Shampoo], None]] = [
    copies,
    through_another_dtype,
    other_inner_dictionaries,
    another_outer_dictionary,
    a_load_of_its_own,
    in_another_order,
    swapped_and_back,
]


def unshared(opt: Shampoo) -> None:
    """State is views again: every tensor shares its storage with others of its kind."""
    plan = opt._plan
    assert plan is not None
    held = {
        view.data_ptr()
        for arena in plan.arenas
        for _, _, view in arena.views(("exp_avg", "exp_avg_sq", "momentum"))
    }
    shown = {value.data_ptr() for entries in opt.state.values() for value in entries.values()}
    assert shown <= held, "a copy is held beside the memory that trains"


@pytest.mark.parametrize("replace", EQUAL, ids=lambda replace: replace.__name__)
@pytest.mark.parametrize("then", ["goes on", "plans anew"])
def test_equal_values_go_on_to_the_bit(replace, then):
    params, opt = trained(5)
    others, other = twin_of(params, opt)
    replace(opt)
    for at in range(2):
        if then == "plans anew":
            for each in (opt, other):
                torch.manual_seed(at)
                each.add_param_group({"params": [Parameter(torch.zeros(3, 2))]})
        go_on(params, opt, 4, seed=7 + at)
        go_on(others, other, 4, seed=7 + at)
        assert_same_bits(snapshot(opt), snapshot(other))
        unshared(opt)
        if at == 0:
            replace(opt)


def test_what_is_put_there_trains():
    params, opt = trained(7)
    others, other = twin_of(params, opt)
    for entries in opt.state.values():
        for key in [key for key in entries if key.endswith("exp_avg")]:
            entries[key] = torch.full_like(entries[key], 0.25)
    for entries in other.state.values():
        for key in [key for key in entries if key.endswith("exp_avg")]:
            entries[key].fill_(0.25)
    untouched = twin_of(params, other)
    go_on(params, opt, 3, seed=3)
    go_on(others, other, 3, seed=3)
    assert_same_bits(snapshot(opt), snapshot(other))
    assert any(value.any() for value in snapshot(opt).values())
    assert untouched[0][0].equal(others[0]) is False


@pytest.mark.parametrize("in_place", [True, False])
def test_a_root_or_a_count_that_is_changed_is_followed(in_place):
    """Roots taken away leave the graft; a count set back restarts corrections and schedule."""
    params, opt = trained(7)
    fresh, other = trained(7, start_preconditioning_step=10**6)
    for param, twin in zip(params, fresh, strict=True):
        twin.data.copy_(param.detach())
    for param, twin in zip(params, fresh, strict=True):
        for key, value in opt.state[param].items():
            if key.startswith("block") and "root" in key:
                if in_place:
                    value.zero_()
                else:
                    opt.state[param][key] = torch.zeros_like(value)
            else:
                other.state[twin][key] = value.clone()
    for entries in (*opt.state.values(), *other.state.values()):
        if in_place:
            entries["step"].fill_(3)
        else:
            entries["step"] = torch.tensor(3)
    go_on(params, opt, 1, seed=9)  # its fourth step: no refresh is due, no root is left
    go_on(fresh, other, 1, seed=9)
    for param, twin in zip(params, fresh, strict=True):
        assert opt.state[param]["step"] == 4
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", ["clear", "assign", "plain", "pop", "empty", "del keys"])
@pytest.mark.parametrize("schedule", ["together", "staggered"])
def test_what_is_missing_starts_anew(how, schedule):
    params, opt = trained(8, refresh_schedule=schedule)
    if how == "clear":
        opt.state.clear()
    elif how == "assign":
        opt.state = defaultdict(dict)
    elif how == "plain":
        opt.state = {}
    elif how == "pop":
        for param in params:
            opt.state.pop(param)
    elif how == "empty":
        for param in params:
            opt.state[param] = {}
    else:
        for entries in opt.state.values():
            for key in list(entries):
                del entries[key]
    others = [Parameter(param.detach().clone()) for param in params]
    other = Shampoo(others, **HYPER, refresh_schedule=schedule)
    go_on(params, opt, 8, seed=2)
    go_on(others, other, 8, seed=2)
    assert_same_bits(snapshot(opt), snapshot(other))


def test_one_entry_that_is_missing_leaves_the_others():
    params, opt = trained(8)
    others, other = twin_of(params, opt)
    opt.state.pop(params[0])
    go_on(params, opt, 5, seed=2)
    go_on(others, other, 5, seed=2)
    assert opt.state[params[0]]["step"] == 5
    assert not params[0].equal(others[0])
    for i in (1, 2):
        assert params[i].equal(others[i])
        for key, value in opt.state[params[i]].items():
            assert value.equal(other.state[others[i]][key]), key


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("block0.factor0", torch.zeros(3, 3), r"factor0 has shape \(3, 3\).*\(4, 4\)"),
        ("block0.exp_avg", torch.zeros(4, 4).double(), "exp_avg is torch.float64.*torch.float32"),
        ("block0.root1", torch.zeros(4, 4).bfloat16(), "root1 is torch.bfloat16.*torch.float32"),
        ("block0.momentum", "lost", "momentum is a str"),
        ("step", torch.zeros(2), "step is a Tensor of shape"),
    ],
)
def test_a_value_of_another_shape_or_dtype_is_refused_before_anything_changes(key, value, words):
    params, opt = trained(5)
    copies(opt)
    opt.state[params[0]][key] = value
    before = [param.detach().clone() for param in params]
    entries = {param: dict(opt.state[param]) for param in params}
    with pytest.raises(shampoo.BlockGridMismatchError, match=words):
        go_on(params, opt, 1)
    for param, old in zip(params, before, strict=True):
        assert param.equal(old)
        assert all(opt.state[param][each] is value for each, value in entries[param].items())


def test_an_entry_without_a_factor_is_refused():
    params, opt = trained(5)
    del opt.state[params[0]]["block0.factor0"]
    with pytest.raises(shampoo.IncompleteCheckpointError, match=r"block0.factor0 of parameter 0"):
        go_on(params, opt, 1)


def test_an_entry_that_moves_to_another_parameter_goes_on_there():
    """Across groups too, whose blocks lie in other memory."""
    first, second = random_params((6, 4), (6, 4), dtype=torch.float32)
    opt = Shampoo([{"params": [first]}, {"params": [second], "lr": 0.1}], **HYPER)
    go_on([first, second], opt, 5)
    was = {key: value.clone() for key, value in opt.state[first].items()}
    opt.state[second] = opt.state.pop(first)
    apply(opt, [first, second], [torch.zeros(6, 4), None])
    assert all(opt.state[second][key].equal(value) for key, value in was.items())
    assert opt.state[first]["step"] == 1


def test_one_dictionary_for_two_parameters_becomes_two():
    params = random_params((6, 4), (6, 4), dtype=torch.float32)
    opt = Shampoo(params, **HYPER)
    go_on(params, opt, 5)
    opt.state[params[1]] = opt.state[params[0]]
    go_on(params, opt, 2, seed=2)
    one, other = (opt.state[param] for param in params)
    assert one is not other
    assert not one["block0.exp_avg"].equal(other["block0.exp_avg"])
    assert one["step"] == other["step"] == 7


def test_a_step_that_was_removed_or_is_negative_is_refused():
    params, opt = trained(5)
    del opt.state[params[0]]["step"]
    with pytest.raises(shampoo.IncompleteCheckpointError, match=r"step of parameter 0.*missing"):
        go_on(params, opt, 1)
    params, opt = trained(5)
    opt.state[params[1]]["step"].fill_(-3)
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=r"Invalid step=-3 in the state of parameter 1"):
        go_on(params, opt, 1)
    assert all(param.equal(old) for param, old in zip(params, before, strict=True))


@pytest.mark.parametrize(
    "make", [lambda v: v.to("meta"), lambda v: v.to_sparse()], ids=["meta", "sparse"]
)
def test_a_value_without_dense_data_is_refused_before_anything_changes(make):
    params, opt = trained(5)
    copies(opt)
    opt.state[params[1]]["block0.exp_avg"] = make(opt.state[params[1]]["block0.exp_avg"])
    opt.state[params[0]]["block0.exp_avg"].fill_(7.0)
    before = [param.detach().clone() for param in params]
    with pytest.raises(shampoo.BlockGridMismatchError, match=r"block0.exp_avg.*plain dense"):
        go_on(params, opt, 1)
    assert all(param.equal(old) for param, old in zip(params, before, strict=True))


def swapped(opt: Shampoo) -> None:
    first, *_, last = opt.state
    opt.state[first], opt.state[last] = opt.state[last], opt.state[first]


def emptied(opt: Shampoo) -> None:
    next(iter(opt.state.values())).clear()


def moved(opt: Shampoo) -> None:
    """To a parameter of the same shape, beside which its own memory starts anew."""
    first, *_, last = opt.state
    opt.state[last] = opt.state.pop(first)


@pytest.mark.parametrize("change", [copies, emptied, moved, swapped, other_inner_dictionaries])
def test_a_step_that_is_refused_leaves_what_was_put_into_the_state(change):
    params = random_params((6, 4), (5,), (6, 4), dtype=torch.float32)
    opt = Shampoo(params, **HYPER, nonfinite="raise")
    go_on(params, opt, 4)
    change(opt)
    held = dict(opt.state)
    was = {
        param: {key: value.clone() for key, value in entries.items()}
        for param, entries in held.items()
    }
    twins, twin = twin_of(params, opt)
    with pytest.raises(shampoo.NonFiniteGradientError):
        apply(opt, params, [torch.full_like(param, torch.nan) for param in params])
    assert list(opt.state) == list(held)
    for param, entries in opt.state.items():
        assert entries is held[param]
        assert list(entries) == list(was[param])
        assert all(value.equal(was[param][key]) for key, value in entries.items())
    go_on(params, opt, 3, seed=2)
    go_on(twins, twin, 3, seed=2)
    assert_same_bits(snapshot(opt), snapshot(twin))


@pytest.mark.parametrize("how", ["before", "rebuilt", "copied"])
def test_what_is_not_ours_alone_is_no_state_of_a_parameter(how):
    params = random_params(*SHAPES, dtype=torch.float32)
    opt = Shampoo(params, **HYPER)
    if how != "before":
        go_on(params, opt, 3)
        opt.state.clear()
    opt.state[params[0]] = {"ema": torch.ones(2)}
    stranger = torch.zeros(1)
    opt.state[stranger] = {"count": 3}
    if how == "rebuilt":
        opt.add_param_group({"params": [Parameter(torch.zeros(2, 2))]})
    elif how == "copied":
        params, opt = twin_of(params, opt)
    go_on(params, opt, 2, seed=5)
    assert opt.state[params[0]]["step"] == 2
    assert opt.state[params[0]]["ema"].tolist() == [1.0, 1.0]
    if how != "copied":
        assert opt.state[stranger] == {"count": 3}


def test_a_count_may_be_a_number():
    params, opt = trained(5)
    others, other = twin_of(params, opt)
    for entries in opt.state.values():
        entries["step"] = int(entries["step"])
    go_on(params, opt, 4, seed=2)
    go_on(others, other, 4, seed=2)
    assert_same_bits(snapshot(opt), snapshot(other))


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_what_is_not_ours_stays(how):
    params, opt = trained(3)
    opt.state[params[0]]["ema"] = torch.ones(2)
    opt.state[params[1]]["block0.ema"] = 0.5
    opt.state["everywhere"] = {"count": 3}
    go_on(params, opt, 2)
    opt.add_param_group({"params": [Parameter(torch.zeros(2, 2))]})
    go_on(params, opt, 2)
    if how == "state_dict":
        others = [Parameter(p.detach().clone()) for p in params]
        other = Shampoo(others, **HYPER)
        other.add_param_group({"params": [Parameter(torch.zeros(2, 2))]})
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    elif how == "deepcopy":
        others, other = twin_of(params, opt)
    else:
        others, other = pickle.loads(pickle.dumps((params, opt)))
    go_on(others, other, 1)
    go_on(params, opt, 1)
    for each, own in ((opt, params), (other, others)):
        assert each.state[own[0]]["ema"].tolist() == [1.0, 1.0]
        assert each.state[own[1]]["block0.ema"] == 0.5
        assert each.state["everywhere"] == {"count": 3}
    assert all(p.equal(q) for p, q in zip(params, others, strict=True))


def test_what_is_not_ours_and_moves_every_step_costs_no_tables():
    params, opt = trained(3)
    plan = opt._plan
    assert plan is not None
    for _ in range(3):
        opt.state[params[0]]["ema"] = torch.ones(2)
        segments = plan._segments
        go_on(params, opt, 1)
        assert opt._plan is plan
        assert plan._segments is segments


CASE = Case("transformer", {"momentum": 0.9, "large_dim_method": "blocking"}, is_sparse=False)


def replaced_among_ranks(rank: int, layout: str, how: str) -> tuple[str, list[Tensor]]:
    """A job: a run whose state is replaced by copies after 7 and 13 steps, or is not."""
    model = LAYOUTS[layout](CASE.build())
    params = list(model.parameters())
    opt = CASE.optimizer(params)
    for step in range(20):
        if step in (7, 13) and how != "not":
            other_inner_dictionaries(opt)
        if step == 13 and how == "plans anew":
            opt.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
            opt.param_groups.pop()
        inject(params, step, is_sparse=False)
        opt.step()
    counts = [entries["step"] for entries in opt.state_dict()["state"].values()]
    return digest(params), counts


@pytest.mark.parametrize("layout", ["replicated", "fsdp2"])
def test_copies_train_on_among_ranks(ranks: Ranks, layout):
    expected = ranks.returns(replaced_among_ranks, 2, layout, "not")
    for how in ("goes on", "plans anew"):
        for (own, counts), (other, _) in zip(
            ranks.returns(replaced_among_ranks, 2, layout, how), expected, strict=True
        ):
            assert own == other
            assert set(map(int, counts)) == {20}


def cleared_on_one_rank(rank: int) -> str:
    """A job: one of two ranks loses its state."""
    model = CASE.build()
    params = list(model.parameters())
    opt = CASE.optimizer(params)
    for step in range(3):
        inject(params, step, is_sparse=False)
        opt.step()
    if rank == 1:
        opt.state.clear()
    inject(params, 3, is_sparse=False)
    before = digest(params)
    with pytest.raises(shampoo.PlanMismatchError, match="steps="):
        opt.step()
    assert digest(params) == before
    return before


def test_state_that_one_rank_lost_is_named_on_all(ranks: Ranks):
    first, second = ranks.returns(cleared_on_one_rank, 2)
    assert first == second
