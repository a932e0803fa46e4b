"""Checkpoints of version 0.1, written by its own code, load and go on to where it went.

``tests/data/checkpoint_0_1_*.pt`` hold a model, an optimizer's ``state_dict()`` after 7 steps, and
the parameters in which the same code ended after 14. Gradients are all there: what changed since is
what a parameter does that has none, and the polynomials by which roots are found: they are off by
as much, and not by the same. In seven steps of 0.02 that is less than 1e-4; with the exponent of
today it would be ten times as much.
"""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from shampoo import Shampoo

DATA = Path(__file__).parents[1] / "data"


def build(schedule: str) -> tuple[nn.Module, Shampoo]:
    """The model and the optimizer of the files, by the defaults of today for what they name."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 10), nn.LayerNorm(10), nn.Linear(10, 3)
    )
    params = list(model.parameters())
    second = {"betas": (0.0, 0.99), "grafting": "sgd", "precondition_1d": True}
    groups = [{"params": params[:3]}, {"params": params[3:], **second}]
    return model, Shampoo(
        groups,
        lr=0.02,
        momentum=0.9,
        weight_decay=0.1,
        precondition_frequency=3,
        max_preconditioner_dim=8,
        refresh_schedule=schedule,
    )


@pytest.mark.filterwarnings("ignore:shampoo. large_dim_method")
@pytest.mark.parametrize("schedule", ["together", "staggered"])
def test_a_checkpoint_of_0_1_goes_on(schedule, caplog):
    saved = torch.load(DATA / f"checkpoint_0_1_{schedule}.pt", weights_only=True)
    model, optimizer = build(schedule)
    model.load_state_dict(saved["model"])
    with caplog.at_level(logging.WARNING):
        optimizer.load_state_dict(saved["optimizer"])
    assert not caplog.records
    # Its own, whatever the defaults have become.
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999), (0.0, 0.99)]
    assert {group["start_preconditioning_step"] for group in optimizer.param_groups} == {-1}
    for step in range(7, 14):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    assert {int(entries["step"]) for entries in optimizer.state.values()} == {14}
    for param, ended in zip(model.parameters(), saved["ended"], strict=True):
        torch.testing.assert_close(param.detach(), ended, rtol=1e-4, atol=2e-4)
