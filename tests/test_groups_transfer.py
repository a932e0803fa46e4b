"""Rates and decay by width, as maximal update parametrization has them."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from grouped_models import GPT, HYPER, Adapted, ViT, build, fit, group_of, named
from torch import nn
from trajectory import assert_same_bits

import shampoo
from shampoo import Shampoo


def rates(groups: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    return {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}


def test_rates_follow_the_width():
    """Adam's column of muP's table 3, and a product of rate and decay that falls with the width."""
    model = GPT(tied=False, width=32)
    found = shampoo.groups(model, lr=0.02, weight_decay=0.3, transfer="mup", base_width=8)
    kept, scaled = (0.02, 0.3 / 4), (0.02 / 4, 0.3)
    assert rates(found) == {
        "embeddings": kept,
        "heads": scaled,
        "positional": kept,
        "vectors": kept,
        "matrices": scaled,
    }
    for rate, decay in rates(found).values():
        assert rate * decay == pytest.approx(0.02 * 0.3 / 4)
    assert rates(shampoo.groups(ViT(32), lr=1.0, weight_decay=1.0, transfer="mup", base_width=8))[
        "inputs"
    ] == (1.0, 0.25)


@pytest.mark.parametrize("width", [None, 16])
def test_nothing_changes_at_the_base_width(width: int | None):
    first, second = build(False), build(False)
    found = shampoo.groups(
        first, lr=0.01, weight_decay=0.1, transfer="mup", base_width=16, width=width
    )
    assert set(rates(found).values()) == {(0.01, 0.1)}
    expected = fit(second, Shampoo(second, **HYPER))
    assert_same_bits(fit(first, Shampoo(found, precondition_frequency=2)), expected)


def perceptron(width: int, inputs: int = 20, outputs: int = 10) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, outputs),
    )  # fmt: skip


class HuggingFace(nn.Module):
    """GPT-2's linear layer there has its inputs in front."""

    class Conv1D(nn.Module):
        def __init__(self, outputs: int, inputs: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(inputs, outputs))

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(50, width)
        self.c_attn, self.c_fc = self.Conv1D(3 * width, width), self.Conv1D(4 * width, width)
        self.c_proj = self.Conv1D(width, 4 * width)


def convolutions(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, width, 3),
        nn.Conv2d(width, width, 3, groups=width), nn.ConvTranspose2d(width, 7, 2),
        nn.Flatten(), nn.Linear(width, 10),
    )  # fmt: skip


def adapted(width: int) -> nn.Sequential:
    return nn.Sequential(Adapted(width), Adapted(width))


@pytest.mark.parametrize(
    "make",
    [perceptron, convolutions, HuggingFace, ViT, lambda width: GPT(width=width), adapted],
    ids=["perceptron", "convolutions", "huggingface", "vit", "gpt", "adapted"],
)
def test_the_width_is_inferred(make: Any):
    for width in (24, 40):
        [matrices] = [
            group
            for group in shampoo.groups(
                make(width), lr=1.0, weight_decay=0.0, transfer="mup", base_width=8
            )
            if group["name"] == "matrices"
        ]
        assert matrices["lr"] == 8 / width


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (perceptron(16), ["0.weight"]),
        (convolutions(16), ["0.weight", "3.weight"]),
        (ViT(), ["patches.weight"]),
        (GPT(), []),
        (GPT(tied=False), []),
        (nn.TransformerEncoderLayer(8, 2, 16), []),
    ],
    ids=["perceptron", "convolutions", "vit", "gpt", "untied", "attention"],
)
def test_what_reads_a_fixed_input_keeps_its_rate(model: nn.Module, expected: list[str]):
    arguments: dict[str, Any] = {"lr": 1.0, "weight_decay": 1.0, "transfer": "mup"}
    found = named(model, **arguments, base_width=8)
    assert found.get("inputs", []) == expected
    assert group_of(model).keys() == group_of(model, **arguments, base_width=8).keys()
    assert "inputs" not in named(model)


def test_inputs_can_be_named():
    model = Adapted(16)
    arguments: dict[str, Any] = {"lr": 1.0, "weight_decay": 1.0, "transfer": "mup"}
    found = named(model, inputs=["lora_B"], matrices=["base"], **arguments, base_width=8)
    assert found["inputs"] == ["lora_B.weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transfer": "sp"}, "Invalid transfer='sp'. Must be None or \"mup\""),
        ({"base_width": None}, "Invalid base_width=None. Must be an integer >= 1"),
        ({"base_width": 0}, "Invalid base_width=0. Must be an integer >= 1"),
        ({"base_width": 8.0}, "Invalid base_width=8.0. Must be an integer >= 1"),
        ({"width": -1}, "Invalid width=-1. Must be an integer >= 1"),
        ({"lr": None}, "Invalid lr=None. Must be a number >= 0.0 and finite"),
        ({"lr": -1.0}, "Invalid lr=-1.0. Must be a number >= 0.0"),
        ({"weight_decay": None}, "Invalid weight_decay=None. Must be a number >= 0.0"),
        ({"weight_decay": float("nan")}, "Invalid weight_decay=nan. Must be a number"),
    ],
    ids=str,
)
def test_arguments_of_a_transfer_are_checked(arguments: dict[str, Any], message: str):
    good = {"lr": 1.0, "weight_decay": 0.1, "transfer": "mup", "base_width": 8}
    shampoo.groups(GPT(), **good)
    with pytest.raises(ValueError, match=message):
        shampoo.groups(GPT(), **{**good, **arguments})


def test_a_width_that_cannot_be_inferred_must_be_given():
    arguments: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.1, "transfer": "mup"}
    model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"Invalid width=None\. Must be an integer >= 1"):
        shampoo.groups(model, **arguments, base_width=8)
    assert rates(shampoo.groups(model, **arguments, base_width=8, width=16)) == {
        "embeddings": (1.0, 0.05),
        "vectors": (1.0, 0.05),
    }


def test_schedulers_start_from_the_rate_of_each_group():
    model = GPT(width=32)
    opt = Shampoo(shampoo.groups(model, lr=0.4, weight_decay=0.0, transfer="mup", base_width=8))
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    assert [group["initial_lr"] for group in opt.param_groups] == [0.1, 0.4, 0.4, 0.1]
    fit(model, opt, 1)
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.05, 0.2, 0.2, 0.05]


def change(width: int, transfer: bool, optimizer: Any) -> list[float]:
    """How far three steps move the features inside and the outputs (a coordinate check)."""
    torch.manual_seed(0)
    model = perceptron(width)
    with torch.no_grad():
        model[4].weight.mul_(width**-0.5)  # as muP wants it: variance 1 / width^2
    how = {"transfer": "mup", "base_width": 64, "width": width} if transfer else {}
    opt = optimizer(shampoo.groups(model, lr=2e-3, weight_decay=0.0, **how))
    inputs, targets = torch.randn(32, 20), torch.randn(32, 10)
    before = model[:3](inputs).detach(), model(inputs).detach()
    for _ in range(3):
        opt.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        opt.step()
    after = model[:3](inputs).detach(), model(inputs).detach()
    return [
        (new - old).square().mean().sqrt().item() for new, old in zip(after, before, strict=True)
    ]


@pytest.mark.filterwarnings("ignore:shampoo")
@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.AdamW, lambda groups: Shampoo(groups, precondition_frequency=1)],
    ids=["adamw", "shampoo"],
)
def test_features_move_as_far_at_any_width(optimizer: Any):
    """What muP is for; without it they move the further the wider the model is."""
    narrow, wide = (change(width, True, optimizer) for width in (64, 1024))
    for one, two in zip(narrow, wide, strict=True):
        assert 0.5 < two / one < 2.0
    narrow, wide = (change(width, False, optimizer) for width in (64, 1024))
    for one, two in zip(narrow, wide, strict=True):
        assert two / one > 3.0
