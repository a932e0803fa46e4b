"""Runs on some ranks that save in every form, and runs on others that go on from there."""

import copy
import hashlib
import io
import logging
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from shampoo import Shampoo

SAVED, STEPS = 6, 11  # roots are refreshed in steps 4 and 8
HYPER: dict[str, Any] = {
    **{"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    **{"precondition_frequency": 4, "max_preconditioner_dim": 5, "large_dim_method": "blocking"},
}


def build(layout: str, seed: int = 0, **hyper: Any) -> tuple[nn.Module, Shampoo]:
    """Ragged shapes, one with fewer rows than ranks; two groups, one of them staggered."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(11, 13), nn.Conv2d(3, 7, 3), nn.Linear(7, 3), nn.LayerNorm(9))
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    named = list(model.named_parameters())
    groups = [
        {"params": named[:4]},
        {"params": named[4:], "refresh_schedule": "staggered", "betas": (0.8, 0.9)},
    ]
    trainers = 2 if layout == "groups" else -1
    return model, Shampoo(groups, **{**HYPER, "num_trainers_per_group": trainers, **hyper})


def whole(param: Tensor) -> Tensor:
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach()


def placed(value: Tensor, param: Tensor) -> Tensor:
    if not isinstance(param, DTensor):
        return value.clone()
    mesh, placements = param.device_mesh, param.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def train(model: nn.Module, optimizer: Shampoo, steps: Sequence[int]) -> None:
    """Steps on gradients that depend on the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for index, param in enumerate(model.parameters()):
            grad = torch.randn(param.shape, generator=generator)
            is_absent = not param.requires_grad or (step + index) % 5 == 4
            param.grad = None if is_absent else placed(grad, param)
        optimizer.step()
        optimizer.zero_grad()


def digest(model: nn.Module) -> str:
    values = [whole(param).contiguous().view(torch.uint8) for param in model.parameters()]
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest()


def through_a_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def straight(rank: int, layout: str) -> str:
    """The digest at the end of a run that nothing interrupts."""
    model, optimizer = build(layout)
    train(model, optimizer, range(STEPS))
    return digest(model)


def keys_of_the_state(rank: int) -> dict[int, list[str]]:
    """What one process has in its state."""
    model, optimizer = build("replicated")
    train(model, optimizer, range(SAVED))
    return {index: sorted(entries) for index, entries in optimizer.state_dict()["state"].items()}


def save_all_forms(rank: int, folder: Path, layout: str) -> str:
    """Returns the digest at the end of a run that saves midway."""
    model, optimizer = build(layout)
    train(model, optimizer, range(SAVED))
    for form in ("nested", "flat"):
        options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
        model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / form)
    weights = [whole(param) for param in model.parameters()]
    own = {"weights": weights, "optimizer": optimizer.state_dict()}
    torch.save(own, folder / f"rank{rank}.pt")
    optimizer.consolidate_state_dict(to=dist.get_world_size() - 1)
    consolidated = optimizer.state_dict()
    if rank == dist.get_world_size() - 1:
        torch.save({"weights": weights, "optimizer": consolidated}, folder / "consolidated.pt")
    train(model, optimizer, range(SAVED, SAVED + 1))
    kept = [len(entries) for entries in optimizer.state_dict()["state"].values()]
    assert kept == [len(entries) for entries in own["optimizer"]["state"].values()]
    train(model, optimizer, range(SAVED + 1, STEPS))
    return digest(model)


def resume_all_forms(rank: int, folder: Path, layout: str, forms: Sequence[str]) -> dict[str, str]:
    """Digests at the end of runs that go on from each form."""
    found = {}
    complaints: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = complaints.append
    logging.getLogger("shampoo").addHandler(handler)
    for form in forms:
        model, optimizer = build(layout, seed=1)
        if form in ("nested", "flat"):
            options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
            model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
            states = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(states, checkpoint_id=folder / form)
            set_state_dict(
                *(model, optimizer),
                model_state_dict=states["model"],
                optim_state_dict=states["optimizer"],
                options=options,
            )
        else:
            name = "consolidated" if form == "consolidated" else f"rank{rank}"
            load_file(model, optimizer, folder / f"{name}.pt")
        train(model, optimizer, range(SAVED, STEPS))
        found[form] = digest(model)
    assert not complaints, [record.getMessage() for record in complaints]
    return found


def consolidated_in_groups(rank: int) -> tuple[dict[int, Any], dict[int, Any], str]:
    """The state on a rank before and after it is gathered on the last, and why not elsewhere."""
    model, optimizer = build("groups")
    train(model, optimizer, range(SAVED))
    own = through_a_file(optimizer.state_dict()["state"])
    refused = ""
    try:
        optimizer.consolidate_state_dict(to=4)
    except ValueError as error:
        refused = str(error)
    optimizer.consolidate_state_dict(to=3)
    return own, optimizer.state_dict()["state"], refused


def load_file(model: nn.Module, optimizer: Shampoo, path: Path) -> None:
    saved = torch.load(path, weights_only=True)
    with torch.no_grad():
        for param, value in zip(model.parameters(), saved["weights"], strict=True):
            param.copy_(placed(value, param))
    optimizer.load_state_dict(saved["optimizer"])


def persist_on_the_last_rank_alone(rank: int, layout: str) -> str:
    """All that must not communicate, where nobody would answer: digest of a run afterwards."""
    model, optimizer = build(layout)
    train(model, optimizer, range(SAVED))
    if rank == dist.get_world_size() - 1:
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
        Shampoo(model.parameters()).state_dict()
        pickle.loads(pickle.dumps(optimizer.state_dict()))
        if layout != "fsdp":
            pickle.loads(pickle.dumps(optimizer))
        copy.deepcopy(optimizer)
    train(model, optimizer, range(SAVED, STEPS))
    return digest(model)


def copies_after_unfreezing(rank: int) -> list[str]:
    """Blocks that joined late have owners that a new plan would not choose: digests."""
    found = []
    persist: list[Callable[[Any], Any]] = [
        lambda pair: pair,
        copy.deepcopy,
        lambda pair: pickle.loads(pickle.dumps(pair)),
        _rolled_back,
    ]
    for how in persist:
        model, optimizer = build("replicated")
        model[0].weight.requires_grad_(False)
        train(model, optimizer, range(2))
        model[0].weight.requires_grad_(True)
        train(model, optimizer, range(2, SAVED))
        model, optimizer = how((model, optimizer))
        train(model, optimizer, range(SAVED, STEPS))
        found.append(digest(model))
    return found


def _rolled_back(pair: tuple[nn.Module, Shampoo]) -> tuple[nn.Module, Shampoo]:
    """Some steps ahead, and back through DCP's state in memory."""
    model, optimizer = pair
    model_state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer))
    train(model, optimizer, range(20, 23))
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return pair


def pickled_on_two(rank: int) -> bytes:
    model, optimizer = build("replicated")
    train(model, optimizer, range(SAVED))
    return pickle.dumps((model, optimizer))


def unpickled(rank: int, pickled: bytes) -> str:
    model, optimizer = pickle.loads(pickled)
    train(model, optimizer, range(SAVED, STEPS))
    return digest(model)


def refuse(rank: int, path: Path) -> str:
    """What loading one rank's file says, having changed nothing; empty if it can be loaded."""
    model, optimizer = build("replicated")
    train(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    try:
        optimizer.load_state_dict(torch.load(path, weights_only=True)["optimizer"])
    except RuntimeError as error:
        after = optimizer.state_dict()
        assert before["param_groups"] == after["param_groups"]
        for index, entries in before["state"].items():
            for key, value in entries.items():
                assert torch.equal(value, after["state"][index][key])
        return f"{type(error).__name__}: {error}"
    return ""


def restart_missing(rank: int, path: Path) -> tuple[dict[int, int], str]:
    """Steps of the parameters after loading one rank's file with ``strict=False``; a digest."""
    model, optimizer = build("replicated")
    saved = torch.load(path, weights_only=True)
    optimizer.load_state_dict(saved["optimizer"], strict=False)
    train(model, optimizer, [SAVED])
    state = optimizer.state_dict()["state"]
    return {index: int(entries["step"]) for index, entries in state.items()}, digest(model)


def step_apart(rank: int) -> None:
    model, optimizer = build("replicated")
    train(model, optimizer, range(SAVED - 1))
    older = through_a_file(optimizer.state_dict())
    train(model, optimizer, [SAVED])
    if rank == 1:
        optimizer.load_state_dict(older)
    train(model, optimizer, [SAVED + 1])
