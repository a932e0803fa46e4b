"""One warning where roots are older than half of what the factors remember."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from shampoo import Shampoo

WORDS = "precondition_frequency={} uses a root for more than half"


def one() -> Parameter:
    return Parameter(torch.ones(3, 2))


def said(work: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    assert all(each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught if "uses a root" in str(each.message)]


@pytest.mark.parametrize(
    ("frequency", "beta2"), [(30, 0.95), (11, 0.95), (10, 0.9499), (6, 0.9), (501, 0.999)]
)
def test_old_roots_are_said_with_a_remedy_that_ends_it(frequency, beta2):
    hyper = {"precondition_frequency": frequency, "betas": (0.9, beta2)}
    [message] = said(lambda: Shampoo([one()], **hyper))
    assert WORDS.format(frequency) in message
    most, least = message.split("Choose ")[1].removesuffix(".").split(", or ")
    shorter = {**hyper, "precondition_frequency": int(most.split("<= ")[1])}
    longer = {**hyper, "betas": (0.9, float(least.split(">= ")[1]))}
    assert not said(lambda: Shampoo([one()], **shorter))
    assert not said(lambda: Shampoo([one()], **longer))
    assert said(lambda: Shampoo([one()], **{**hyper, "precondition_frequency": frequency + 1}))


@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"betas": (0.9, 0.95)},  # 10 * (1 - 0.95) is above 0.5 by rounding
        {"betas": (0.9, 0.9), "precondition_frequency": 5},
        {"betas": (0.9, 0.99), "precondition_frequency": 50},
        {"betas": (0.9, 1.0), "precondition_frequency": 10**6},
        {"betas": (0.9, 0.9), "precondition": False},
        {"betas": (0.9, 0.9), "start_preconditioning_step": math.inf},
        {"betas": (torch.tensor(0.9), torch.tensor(0.5)), "capturable": True},
    ],
    ids=str,
)
def test_what_is_young_enough_is_not_mentioned(hyper):
    assert not said(lambda: Shampoo([one()], **hyper))


def test_it_is_said_once():
    def work() -> None:
        hyper = {"betas": (0.9, 0.9)}
        optimizer = Shampoo([{"params": [one()]}, {"params": [one()]}], **hyper)
        optimizer.add_param_group({"params": [one()]})
        for lr in (0.1, 0.2, 0.3):
            for group in optimizer.param_groups:
                group["lr"] = lr
                group["weight_decay"] = lr
                group["params"][0].grad = torch.ones(3, 2)
            optimizer.step()

    assert len(said(work)) == 1


def test_a_later_change_is_said_at_the_step():
    optimizer = Shampoo([one()])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 2)

    def step(**changes: Any) -> list[str]:
        optimizer.param_groups[0].update(changes)
        return said(lambda: optimizer.step())

    assert not step(lr=0.1)
    assert not step(betas=(0.9, 0.95))
    assert len(step(precondition_frequency=30, start_preconditioning_step=-1)) == 1
    assert not step(precondition_frequency=31)


def test_a_value_that_a_checkpoint_brings_is_said_too():
    optimizer, other = Shampoo([one()]), Shampoo([one()])
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["betas"] = (0.9, 0.5)
    other.load_state_dict(state)
    other.param_groups[0]["params"][0].grad = torch.ones(3, 2)
    assert len(said(lambda: other.step())) == 1
