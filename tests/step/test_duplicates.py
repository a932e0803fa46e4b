"""A parameter stands in one place: what is there twice would move twice."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from trajectory import assert_same_bits, snapshot

from shampoo import Shampoo


def tensors(count: int) -> list[Parameter]:
    return [Parameter(torch.ones(4, index + 1)) for index in range(count)]


def test_the_constructor_names_both_places_and_the_remedy():
    a, b, c = tensors(3)
    both = r"shape \(4, 2\) at position 3 of group 0 is the one at position 1 of group 0"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's own warning would come too late
        with pytest.raises(ValueError, match=rf"{both}.*list\(dict.fromkeys\(parameters\)\)"):
            Shampoo([a, b, c, b])
        with pytest.raises(ValueError, match=both):
            Shampoo({"params": group} for group in [iter([a, b, c, b])])
        with pytest.raises(ValueError, match=r"position 1 of group 1 .* position 0 of group 1"):
            Shampoo([{"params": [a]}, {"params": [b, b]}])
        with pytest.raises(ValueError, match=r"3 of group 0.*; .*4 of .*; .*5 of .*, and 1 more"):
            Shampoo([a, b, c, a, a, b, c])
        Shampoo(dict.fromkeys([a, b, c, b]))


def test_names_are_said_where_there_are_some():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    twice = list(model.named_parameters(remove_duplicate=False))
    both = r"position 2 of group 0 \(1.weight\) is the one at position 0 of group 0 \(0.weight\)"
    with pytest.raises(ValueError, match=both):
        Shampoo(twice)
    Shampoo(model.named_parameters())


def test_a_refused_group_changes_nothing():
    a, b, c = tensors(3)
    opt = Shampoo([a])
    a.grad = torch.ones_like(a)
    opt.step()
    before, groups = snapshot(opt), copy.deepcopy(opt.state_dict()["param_groups"])
    for params in ([b, c, b], iter([b, b])):
        with pytest.raises(ValueError, match="duplicate"):
            opt.add_param_group({"params": params})
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [b, a]})
    assert opt.state_dict()["param_groups"] == groups
    assert_same_bits(snapshot(opt), before)
    opt.add_param_group({"params": (p for p in [b, c])})
    opt.add_param_group({"params": Parameter(torch.ones(3))})
    for param in (a, b, c):
        param.grad = torch.ones_like(param)
    opt.step()
    assert all((param < 1).all() for param in (a, b, c))


def test_one_that_is_written_into_a_group_is_refused_at_the_step():
    a, b = tensors(2)
    opt = Shampoo([{"params": [a]}, {"params": [b]}])
    for param in (a, b):
        param.grad = torch.ones_like(param)
    opt.step()
    before = snapshot(opt)
    opt.param_groups[1]["params"].append(a)
    with pytest.raises(ValueError, match=r"position 1 of group 1 .* position 0 of group 0"):
        opt.step()
    opt.param_groups[1]["params"].pop()
    assert_same_bits(snapshot(opt), before)
    opt.step()
    assert int(opt.state[a]["step"]) == 2
