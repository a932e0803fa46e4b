"""A rank that leaves a step out on its own, and goes on: noticed at its next one."""

from typing import Any

import pytest
import torch
from fault_runs import TIMEOUT, Run, said_by, wait_for_all
from ranks import Ranks
from torch.nn import Parameter

from shampoo import Shampoo


def _leave_out(rank: int, layout: str, how: str) -> Any:
    """Rank 1 drops the gradients of batch 3 as ``how`` says; then both step until one cannot."""
    run = Run(layout)
    for batch in (1, 2):
        run.feed(batch)
        run.opt.step()
        run.opt.zero_grad(set_to_none=how == "to None")
    before, said = run.parts(), []
    for batch in (3, 4):
        run.opt.zero_grad(set_to_none=how == "to None")
        if how == "to None":
            run.feed(batch)
        else:  # in place, as a backward pass adds to what is there
            for param in run.params:
                param.grad.add_(1.0)
        if batch == 3 and rank == 1:
            continue
        said.append(said_by(run.opt.step))
        if said[-1][0] != "nothing":
            break
    wait_for_all(how)
    is_same = before == run.parts()
    run.opt.load_state_dict(run.opt.state_dict())  # all ranks do
    run.step(5)
    return said, is_same, run.weights()


@pytest.mark.parametrize("how", ["to None", "in place"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_rank_that_leaves_a_step_out_is_noticed_at_its_next(
    ranks: Ranks, layout: str, how: str
) -> None:
    world = {"ddp": 2, "fsdp2": 3}[layout]
    answers = ranks.run(_leave_out, world, layout, how, timeout=TIMEOUT)
    weights = set()
    for answer in answers:
        assert isinstance(answer, tuple), answer
        [(error, words)], is_same, after = answer
        assert error == "PlanMismatchError"
        assert (
            "rank 1 has zero_grad() with calls that dropped unused gradients=1, rank 0 has" in words
        )
        assert "All ranks must leave a step out, or none." in words
        assert is_same
        weights.add(after)
    assert len(weights) == 1, "after a checkpoint is loaded on all ranks, training goes on"


def _drop_together(rank: int) -> Any:
    """What all ranks do alike is no fault: a batch that is left out, a second zero_grad()."""
    run = Run("ddp")
    for batch in range(1, 7):
        run.feed(batch)
        if batch == 3:  # too many tokens masked, say: by all ranks
            run.opt.zero_grad()
            continue
        run.opt.step()
        for _ in range(batch % 3):
            run.opt.zero_grad(set_to_none=bool(batch % 2))
    return run.weights()


def test_what_all_ranks_leave_out_is_left_out(ranks: Ranks) -> None:
    zero, one = ranks.run(_drop_together, 2)
    assert zero == one
    assert len(zero) == 64


def count(optimizer: Shampoo) -> int:
    return optimizer._left_out.count


@pytest.mark.parametrize("to_none", [True, False])
def test_only_gradients_that_no_step_has_seen_count(to_none: bool) -> None:
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2, 2))]
    optimizer = Shampoo(params, lr=0.1)

    def backward() -> None:
        (2 * params[1]).sum().backward()

    def zero_grad() -> None:
        optimizer.zero_grad(set_to_none=to_none)

    zero_grad()
    for _ in range(3):
        backward()
        backward()  # of another part of the batch
        optimizer.step()
        zero_grad()
        zero_grad()
    assert count(optimizer) == 0
    backward()
    zero_grad()
    assert count(optimizer) == 1
    backward()
    optimizer.step(lambda: (zero_grad(), backward()))
    assert count(optimizer) == 2
    optimizer.load_state_dict(optimizer.state_dict())
    assert count(optimizer) == 0
