"""Parts of a model that have gradients before a checkpoint and none after it, or the other way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from resharded_runs import digest, load_file, placed, whole
from three_layers import three_layers
from torch import nn
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from shampoo import IncompleteCheckpointError, Shampoo, checkpoint

SAVED, STEPS = 5, 12  # roots are refreshed in every third step of a parameter
HYPER: dict[str, Any] = {
    **{"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    **{"precondition_frequency": 3, "max_preconditioner_dim": 5, "large_dim_method": "blocking"},
}

# What becomes of the last layer.
TRAINED, SKIPPED, FROZEN = "has gradients", "has none", "does not require them"
HISTORIES: dict[str, Callable[[int], str]] = {
    "skipped before": lambda step: SKIPPED if step < SAVED else TRAINED,
    "skipped after": lambda step: SKIPPED if SAVED <= step < STEPS - 3 else TRAINED,
    "frozen before": lambda step: FROZEN if step < SAVED else TRAINED,
    "frozen after": lambda step: FROZEN if SAVED <= step < STEPS - 3 else TRAINED,
    "frozen in between": lambda step: FROZEN if SAVED - 2 <= step < STEPS - 3 else TRAINED,
}


def build(layout: str, seed: int = 0) -> tuple[nn.Module, Shampoo]:
    model = three_layers(layout, seed)
    named = list(model.named_parameters())
    return model, Shampoo([{"params": named[:2]}, {"params": named[2:]}], **HYPER)


def become(model: nn.Module, what: str) -> None:
    for param in list(model.parameters())[-2:]:
        param.requires_grad_(what != FROZEN)


def train(model: nn.Module, optimizer: Shampoo, history: str, first: int, last: int) -> None:
    """Steps on gradients that depend on the step alone."""
    for step in range(first, last):
        what = HISTORIES[history](step)
        become(model, what)
        generator = torch.Generator().manual_seed(step)
        params = list(model.parameters())
        for index, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator)
            is_there = what == TRAINED or index < len(params) - 2
            param.grad = placed(grad, param) if is_there else None
        optimizer.step()
        optimizer.zero_grad()


def save(folder: Path, rank: int, model: nn.Module, optimizer: Shampoo) -> None:
    """In all forms."""
    checkpoint.save(folder / "folder", model, optimizer, step=SAVED)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "dcp")
    weights = [whole(param) for param in model.parameters()]
    torch.save({"weights": weights, "optimizer": optimizer.state_dict()}, folder / f"rank{rank}.pt")
    optimizer.consolidate_state_dict(to=0)
    if rank == 0:
        torch.save(
            {"weights": weights, "optimizer": optimizer.state_dict()}, folder / "consolidated.pt"
        )


def load(
    form: str, folder: Path, rank: int, model: nn.Module, optimizer: Shampoo, **how: Any
) -> None:
    if form == "folder":
        checkpoint.load(folder / "folder", model, optimizer)
    elif form == "dcp":
        model_state, optimizer_state = get_state_dict(model, optimizer)
        states = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(states, checkpoint_id=folder / "dcp", **how)
        set_state_dict(
            *(model, optimizer),
            model_state_dict=states["model"],
            optim_state_dict=states["optimizer"],
        )
    else:
        name = f"rank{rank}" if form == "own" else form
        load_file(model, optimizer, folder / f"{name}.pt")


def _resume(rank: int, folder: Path, layout: str, history: str) -> tuple[str, dict[Any, str]]:
    """The digest of a run that nothing interrupts, and those of runs that go on from a form.

    By form and by what the last layer is when it is loaded: what it was when it was saved, or what
    it is then.
    """
    model, optimizer = build(layout)
    train(model, optimizer, history, 0, STEPS)
    straight = digest(model)
    model, optimizer = build(layout)
    train(model, optimizer, history, 0, SAVED)
    save(folder, rank, model, optimizer)
    train(model, optimizer, history, SAVED, STEPS)
    found = {("went on", ""): digest(model)}
    dist.barrier()  # the consolidated file is there
    for form in ("folder", "dcp", "own", "consolidated"):
        for what, how in _ways(form, layout, history).items():
            model, optimizer = build(layout, seed=1)
            become(model, what)
            load(form, folder, rank, model, optimizer, **how)
            is_required = [param.requires_grad for param in model.parameters()]
            assert is_required == [True] * 4 + [what != FROZEN] * 2
            train(model, optimizer, history, SAVED, STEPS)
            found[form, what] = digest(model)
    return straight, found


def _ways(form: str, layout: str, history: str) -> dict[str, dict[str, Any]]:
    """What the last layer can be when a form is loaded, and how that is done."""
    if form == "dcp" and history == "frozen before":
        return {FROZEN: {}, TRAINED: {"planner": DefaultLoadPlanner(allow_partial_load=True)}}
    if form == "dcp" and history.startswith("frozen"):
        return {TRAINED: {}}  # torch drops the state of what is frozen, of every optimizer
    if form == "own" and layout != "plain" and history == "frozen before":
        return {FROZEN: {}}  # more blocks have other owners, see the next test
    return {HISTORIES[history](step): {} for step in (SAVED - 1, SAVED)}


LAYOUTS = [(1, "plain"), (2, "ddp"), (2, "fsdp2")]


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_a_part_without_gradients_on_one_side_of_a_checkpoint_resumes_to_the_bit(
    ranks: Ranks, tmp_path: Path, world: int, layout: str, history: str
) -> None:
    for straight, found in ranks.returns(_resume, world, tmp_path, layout, history):
        assert {form for form, _ in found} == {"went on", "folder", "dcp", "own", "consolidated"}
        assert found == dict.fromkeys(found, straight)


def _load_unfrozen(rank: int, folder: Path, layout: str) -> list[str]:
    model, optimizer = build(layout)
    train(model, optimizer, "frozen before", 0, SAVED)
    save(folder, rank, model, optimizer)
    said = []
    for form in ("dcp", "own"):
        model, optimizer = build(layout, seed=1)
        try:
            load(form, folder, rank, model, optimizer)
        except (CheckpointException, IncompleteCheckpointError) as error:
            said.append(str(error))
    return said


def test_what_was_unfrozen_before_it_is_loaded_is_named(ranks: Ranks, tmp_path: Path) -> None:
    """Where torch reads, or each rank its own file: load first, or by shampoo.checkpoint."""
    for by_dcp, own in ranks.returns(_load_unfrozen, 2, tmp_path, "ddp"):
        assert "optimizer.state.2.weight.step" in by_dcp
        assert "blocks missing" in own
        assert "call consolidate_state_dict()" in own
