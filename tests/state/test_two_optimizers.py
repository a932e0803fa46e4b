"""Two optimizers, each with some parameters of one model, in one checkpoint."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from resharded_runs import digest, placed
from three_layers import three_layers
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.optim import SGD, AdamW, Optimizer

from shampoo import BlockGridMismatchError, Shampoo, checkpoint

SAVED, STEPS = 4, 8
HYPER: dict[str, Any] = {
    **{"lr": 0.05, "momentum": 0.9, "precondition_frequency": 3},
    **{"max_preconditioner_dim": 5, "large_dim_method": "blocking"},
}
PAIRS = ("adamw", "shampoo", "sgd")  # beside a Shampoo of the first layers; SGD in front of it


def build(layout: str, pair: str, seed: int = 0, **hyper: Any) -> tuple[nn.Module, list[Optimizer]]:
    model = three_layers(layout, seed)
    named = list(model.named_parameters())
    body = Shampoo(
        [{"params": named[:2]}, {"params": named[2:4], "lr": 0.01}], **{**HYPER, **hyper}
    )
    rest = named[4:]
    if pair in ("sgd", "stateless"):
        return model, [SGD(rest, lr=0.1, momentum=0.0 if pair == "stateless" else 0.9), body]
    other = AdamW(rest, lr=0.02) if pair == "adamw" else Shampoo(rest, precondition_frequency=2)
    return model, [body, other]


def train(model: nn.Module, optimizers: Sequence[Optimizer], first: int, last: int) -> None:
    """Steps on gradients that depend on the step alone."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = placed(torch.randn(param.shape, generator=generator), param)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] *= 0.9  # as a schedule does
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def _resume(rank: int, folder: Path, layout: str, pair: str) -> tuple[str, dict[str, str]]:
    """Digests of a run that nothing interrupts, and of those that go on from a checkpoint."""
    model, optimizers = build(layout, pair)
    train(model, optimizers, 0, STEPS)
    straight = digest(model)
    model, optimizers = build(layout, pair)
    train(model, optimizers, 0, SAVED)
    forms = {
        "nested": StateDictOptions(),
        "flat": StateDictOptions(flatten_optimizer_state_dict=True),
        "full": StateDictOptions(full_state_dict=True),
    }
    for form, options in forms.items():
        model_state, optimizer_state = get_state_dict(model, optimizers, options=options)
        states = {"model": model_state, "optimizer": optimizer_state}
        if form == "full":
            torch.save(states, folder / f"full{rank}.pt")
        else:
            dcp.save(states, checkpoint_id=folder / form)
    checkpoint.save(folder / "folder", model, optimizers, step=SAVED)
    train(model, optimizers, SAVED, STEPS)
    found = {"went on": digest(model)}
    complaints: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = complaints.append  # type: ignore[method-assign]
    logging.getLogger("shampoo").addHandler(handler)
    for form, options in forms.items():
        model, optimizers = build(layout, pair, seed=1)
        if form == "full":
            states = torch.load(folder / f"full{rank}.pt", weights_only=True)
        else:
            model_state, optimizer_state = get_state_dict(model, optimizers, options=options)
            states = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(states, checkpoint_id=folder / form)
        set_state_dict(
            *(model, optimizers),
            model_state_dict=states["model"],
            optim_state_dict=states["optimizer"],
            options=options,
        )
        train(model, optimizers, SAVED, STEPS)
        found[form] = digest(model)
    model, optimizers = build(layout, pair, seed=1)
    assert checkpoint.load(folder / "folder", model, optimizers) == SAVED
    train(model, optimizers, SAVED, STEPS)
    found["folder"] = digest(model)
    logging.getLogger("shampoo").removeHandler(handler)
    assert not complaints, [record.getMessage() for record in complaints]
    return straight, found


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("world", "layout"), [(1, "plain"), (2, "ddp"), (2, "fsdp2")])
def test_two_optimizers_in_one_checkpoint_resume_to_the_bit(
    ranks: Ranks, tmp_path: Path, world: int, layout: str, pair: str
) -> None:
    for straight, found in ranks.returns(_resume, world, tmp_path, layout, pair):
        assert found == dict.fromkeys(("went on", "nested", "flat", "full", "folder"), straight)


def _save(rank: int, folder: Path, layout: str, pair: str) -> str:
    model, optimizers = build(layout, pair)
    train(model, optimizers, 0, SAVED)
    checkpoint.save(folder, model, optimizers, step=SAVED)
    train(model, optimizers, SAVED, STEPS)
    return digest(model)


def _go_on(rank: int, folder: Path, layout: str, pair: str) -> str:
    model, optimizers = build(layout, pair, seed=1)
    checkpoint.load(folder, model, optimizers)
    train(model, optimizers, SAVED, STEPS)
    return digest(model)


@pytest.mark.parametrize("pair", ["adamw", "stateless"])  # torch alone refuses to load the latter
def test_two_optimizers_go_on_in_another_layout_on_other_ranks(
    ranks: Ranks, tmp_path: Path, pair: str
) -> None:
    expected = ranks.returns(_save, 2, tmp_path, "fsdp2", pair)
    assert ranks.returns(_go_on, 1, tmp_path, "plain", pair) == expected[:1]
    assert ranks.returns(_go_on, 3, tmp_path, "ddp", pair) == expected[:1] * 3


@pytest.mark.parametrize("pair", ["adamw", "shampoo"])
def test_a_part_that_is_frozen_when_it_is_loaded_keeps_its_state(tmp_path: Path, pair: str) -> None:
    """torch would drop it; whether the optimizer has a state already or not."""
    model, optimizers = build("plain", pair)
    train(model, optimizers, 0, SAVED)
    checkpoint.save(tmp_path, model, optimizers, step=SAVED)
    train(model, optimizers, SAVED, STEPS)
    expected = digest(model)
    for steps in (0, 2):
        model, optimizers = build("plain", pair, seed=1)
        train(model, optimizers, 0, steps)
        for param in model.parameters():
            param.requires_grad_(False)
        model[0].weight.requires_grad_(True)
        checkpoint.load(tmp_path, model, optimizers)
        assert [param.requires_grad for param in model.parameters()] == [True] + [False] * 5
        for param in model.parameters():
            param.requires_grad_(True)
        train(model, optimizers, SAVED, STEPS)
        assert digest(model) == expected


def test_blocks_of_the_second_optimizer_are_compared_too(tmp_path: Path) -> None:
    model, optimizers = build("plain", "sgd")
    checkpoint.save(tmp_path, model, optimizers, step=1)
    model, optimizers = build("plain", "sgd", max_preconditioner_dim=4)
    before = digest(model)
    with pytest.raises(BlockGridMismatchError, match=r"max_preconditioner_dim=5, .* uses 4"):
        checkpoint.load(tmp_path, model, optimizers)
    assert digest(model) == before


def test_the_folder_is_held_for_as_long_as_one_of_them_lives(tmp_path: Path) -> None:
    from shampoo.checkpoint import lock

    model, optimizers = build("plain", "adamw")
    checkpoint.save(tmp_path, model, optimizers, step=1)
    held = lock._locks[tmp_path.resolve()]
    for _ in range(2):
        assert held.is_held()
        optimizers.pop()
    del held
    assert tmp_path.resolve() not in lock._locks


def test_what_is_no_list_of_optimizers_is_refused(tmp_path: Path) -> None:
    model, optimizers = build("plain", "adamw")
    twice = [*optimizers, AdamW(model[0].parameters())]
    for given, words in (
        ([], "Must be an optimizer, or a list"),
        ([*optimizers, model], "Must be an optimizer, or a list"),
        ({"body": optimizers[0]}, "Must be an optimizer, or a list"),
        (twice, r"shape \(13, 11\) is in number 0 and in number 2"),
        ([optimizers[0], optimizers[0]], r"is in number 0 and in number 1"),
    ):
        for call in (
            lambda given=given: checkpoint.save(tmp_path, model, given, step=1),
            lambda given=given: checkpoint.load(tmp_path, model, given),
        ):
            with pytest.raises(ValueError, match=words):
                call()
    assert not [*tmp_path.iterdir()]
