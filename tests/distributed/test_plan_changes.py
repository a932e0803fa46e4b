"""What users change between steps, on ranks and on one process: the same bits."""

from typing import Any

import pytest
import torch
from layouts import LAYOUTS, Case, Run, digest, inject
from ranks import Ranks
from torch import nn

from shampoo import Shampoo

CASE = Case("transformer", frozen="up.bias")


def run(model: nn.Module, optimizer: Shampoo, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        inject(model.parameters(), step)
        optimizer.step()


def owners(optimizer: Shampoo) -> dict[torch.Tensor, Any]:
    assert optimizer._plan is not None
    return dict(optimizer._plan.owners())


def train_through_changes(rank: int, layout: str, sharing: dict[str, Any]) -> list[str]:
    """The digest after each change; asserts that blocks keep their owners."""
    model = LAYOUTS[layout](CASE.build())
    params = list(model.parameters())
    optimizer = CASE.optimizer(params[:9], momentum=0.9, weight_decay=0.1, **sharing)
    found = []

    def steps() -> None:
        run(model, optimizer, 4 * len(found), 4)
        found.append(digest(params))

    steps()
    before = owners(optimizer)
    later = {"lr": 0.1, "precondition_frequency": 3, "momentum": 0.0, "max_preconditioner_dim": 6}
    optimizer.add_param_group({"params": params[9:], **later})
    steps()
    model.get_parameter("up.bias").requires_grad_(True)
    steps()
    after = owners(optimizer)
    assert len(after) == len(params)
    assert {param: after[param] for param in before} == before
    # Hyper-parameters that need state, or the weights on the wire, which there were not before.
    optimizer.param_groups[1].update(momentum=0.5, weight_decay=0.2, betas=(0.5, 0.9))
    steps()
    optimizer.param_groups[0].update(decoupled_weight_decay=False, lr=0.01, maximize=True)
    steps()
    model.get_parameter("query.weight").requires_grad_(False)
    steps()
    model.to(torch.bfloat16)  # of the same parameters
    steps()
    return found


RUNS: dict[str, tuple[int, Run]] = {
    "three": (3, ("replicated", {"num_trainers_per_group": 3})),
    "overlapping pairs": (4, ("replicated", {"num_trainers_per_group": 2, "overlap": True})),
    "fsdp2": (3, ("fsdp2", {})),
    "hsdp": (4, ("hsdp", {})),
    "tensor parallel": (4, ("tensor parallel", {})),
}


@pytest.fixture(scope="module")
def expected(ranks: Ranks) -> list[str]:
    return ranks.returns(train_through_changes, 1, "replicated", {})[0]


@pytest.mark.parametrize("name", RUNS)
def test_changes_between_steps_are_those_of_one_process(ranks: Ranks, expected, name):
    world, (layout, sharing) = RUNS[name]
    assert ranks.returns(train_through_changes, world, layout, sharing) == [expected] * world


def train_after_sharding(rank: int, is_sharded: bool) -> str:
    """Shards a model that has an optimizer already, as Accelerate does."""
    model = CASE.build()
    optimizer = CASE.optimizer(model.parameters(), num_trainers_per_group=2)
    if is_sharded:
        run(model, optimizer, 0, 1)
        model = LAYOUTS["fsdp2"](CASE.build())
        optimizer.param_groups[0]["params"] = list(model.parameters())
    run(model, optimizer, 1, 4)
    return digest(model.parameters())


def test_parameters_that_were_swapped_for_shards_are_trained_anew(ranks: Ranks):
    [alone] = ranks.returns(train_after_sharding, 1, False)
    assert ranks.returns(train_after_sharding, 2, True) == [alone] * 2
