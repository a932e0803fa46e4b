"""Checkpoints of a model and its optimizer that any number of ranks can load.

On ``torch.distributed.checkpoint`` (DCP): every rank writes the blocks it owns, and a run on other
ranks, or sharded otherwise, reads the blocks that it owns then. One directory a step::

    folder/step-00000100/   what DCP writes
                            extra.pt   what else was to be saved, by torch.save
                            complete   the marker: a directory without it does not exist

Never load a directory that you do not trust: DCP unpickles its metadata.
"""

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from shampoo.blocks.layout import AUTO, Geometry, is_automatic, take_dim
from shampoo.blocks.state_keys import is_own, may_begin
from shampoo.optimizer import Shampoo
from shampoo.preconditioner.choice import layout_of
from shampoo.state.former import FORMER_DEFAULTS, FORMER_NAMES
from shampoo.state.loading import check_blocks

_MARKER = "complete"
_EXTRA = "extra.pt"
_NAME = re.compile(r"step-(\d+)(\.replaced)?")
Result = TypeVar("Result")


class Stateful(Protocol):
    """A scheduler, a sampler, a counter: what has a state of plain values and tensors."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Takes on a state."""


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    *,
    step: int,
    extra: Mapping[str, Stateful] | None = None,
    keep: int | None = None,
) -> None:
    """Saves a checkpoint; all ranks must call it, and find the same ``folder``.

    When it returns, the checkpoint exists; if the run dies before, the one before it does.

    Args:
        folder: of all checkpoints of a run; created if need be.
        model: plain, in DistributedDataParallel, or sharded by ``fully_shard``.
        step: how many the run has taken, >= 0; a checkpoint of the same step is replaced.
        extra: what else to save, by name; alike on all ranks, since the first one's is written.
        keep: how many checkpoints to keep, the newest ones, >= 1; None for all.

    Raises:
        ValueError: for a value out of range.
        OSError: on all ranks if the first cannot write.
        CheckpointException: torch's, a BaseException: on all ranks if one cannot write.
    """
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"Invalid step={step!r}. Must be an integer >= 0.")
    if keep is not None and keep < 1:
        raise ValueError(f"Invalid keep={keep!r}. Must be >= 1, or None to keep all.")
    place = Path(folder) / f"step-{step:08d}"

    def prepare() -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        if (place / _MARKER).exists():
            # It stays what a restart would load until its successor is complete.
            replaced = place.with_suffix(".replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            place.rename(replaced)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        states = {name: stateful.state_dict() for name, stateful in (extra or {}).items()}
        with (place / _EXTRA).open("wb") as file:
            torch.save(states, file)
            _flush(file)
        # What cannot be loaded again is better known now than at the restart.
        torch.load(place / _EXTRA, weights_only=True)

    def commit() -> None:
        temporary = place / f"{_MARKER}.tmp"
        with temporary.open("w") as marker:
            marker.write(f"{step}\n")
            _flush(marker)
        temporary.replace(place / _MARKER)
        shutil.rmtree(place.with_suffix(".replaced"), ignore_errors=True)
        for old in _complete(Path(folder))[: -keep if keep is not None else 0]:
            # First the marker: a directory that is half removed must not look complete.
            (old / _MARKER).unlink()
            shutil.rmtree(old)

    _on_first_rank(prepare)
    states = _states(model, optimizer)
    _transfer(state_dict_saver.save, states, place)
    if _is_distributed():
        dist.barrier()
    _on_first_rank(commit)


def load(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    *,
    extra: Mapping[str, Stateful] | None = None,
) -> int | None:
    """Loads the newest complete checkpoint; training then continues bit for bit.

    All ranks must call it, after the model was wrapped or sharded. Their number and the sharding
    may differ from those that saved.

    Args:
        folder: of :func:`save`; need not exist.
        extra: what loads the states that were saved by these names.

    Returns:
        The step at which it was saved; None, with nothing changed, if there is no checkpoint.

    Raises:
        KeyError: for a name in ``extra`` that was not saved.
        BlockGridMismatchError: if the blocks of a :class:`shampoo.Shampoo` were cut otherwise, by
            another ``max_preconditioner_dim``, say. Nothing has changed.
        CheckpointException: torch's, a BaseException: if a file is damaged, or was saved of another
            model or optimizer. What model and optimizer hold then is of no use.
    """
    found = _on_first_rank(lambda: _complete(Path(folder))[-1:])
    if not found:
        return None
    [place] = found

    def read() -> dict[str, Any]:
        saved: dict[str, Any] = torch.load(place / _EXTRA, weights_only=True, map_location="cpu")
        if unknown := sorted((extra or {}).keys() - saved.keys()):
            raise KeyError(f"{place} has no extra {unknown}. It has {sorted(saved)}.")
        return saved

    saved = _on_first_rank(read)  # a rank that alone failed here would leave the others waiting
    states = _states(model, optimizer)
    groups: list[dict[str, Any]] = []
    former: dict[str, Any] = {}
    if isinstance(optimizer, Shampoo):
        former, names = _former_values(place)
        cuts = _check_blocks(optimizer, states["optimizer"]["param_groups"], place, former)
        if _adopt(optimizer, cuts):
            states = _states(model, optimizer)
        _ask_for_what_is_saved(optimizer, states["optimizer"], place)
        groups = states["optimizer"]["param_groups"]
        for group in groups:
            for name in former:
                del group[name]
            group.update(dict.fromkeys(names))  # DCP puts what was saved there
    _transfer(state_dict_loader.load, states, place)
    for group in groups:
        group.update(former)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
    )
    for name, stateful in (extra or {}).items():
        stateful.load_state_dict(saved[name])
    return _step_of(place)


def _former_values(place: Path) -> tuple[dict[str, Any], list[str]]:
    """With what a checkpoint was trained of which it says nothing, since there was one way only.

    Beside it the names in the checkpoint of arguments that are no more.
    """
    paths = (FileSystemReader(place).read_metadata().planner_data or {}).values()
    named = {path[-1] for path in paths if path[:2] == ("optimizer", "param_groups")}
    former = {name: value for name, value in FORMER_DEFAULTS.items() if name not in named}
    return former, [name for name in FORMER_NAMES if name in named]


def _check_blocks(
    optimizer: Shampoo,
    named: Sequence[Mapping[str, Any]],
    place: Path,
    former: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Compares what decides the shapes of blocks; DCP could only say that some size differs.

    Args:
        named: the optimizer's groups, whose ``params`` are names.
        former: values for what the checkpoint does not say.

    Returns:
        For every group what it takes from the checkpoint, since nobody has named another.
    """
    # DCP replaces what it finds in these by what was saved.
    saved: list[dict[str, Any]] = [
        {
            "params": [],
            **{k: v for k, v in asdict(Geometry.of(group)).items() if k not in former},
        }
        for group in optimizer.param_groups
    ]
    _transfer(state_dict_loader.load, {"optimizer": {"param_groups": saved}}, place)
    saved = [{**group, **former} for group in saved]
    group_of = {name: group for group in saved for name in group["params"]}
    cuts = []
    for group, names in zip(
        optimizer.param_groups, (each["params"] for each in named), strict=True
    ):
        first = next((group_of[name] for name in names if name in group_of), group)
        cut = {}
        if group["large_dim_method"] == AUTO:
            cut["large_dim_method"] = first["large_dim_method"]
        if is_automatic(group):
            cut["max_preconditioner_dim"] = first["max_preconditioner_dim"]
        cuts.append(cut)
        group = {**group, **cut}
        for param, name in zip(group["params"], names, strict=True):
            if name in group_of:  # if not, DCP says so
                alone = {**group, "params": [param], "param_names": [name]}
                check_blocks([alone], [group_of[name]], optimizer.state)
    return cuts


def _adopt(optimizer: Shampoo, cuts: Sequence[Mapping[str, Any]]) -> bool:
    """Gives groups these values of a checkpoint; whether that cuts parameters otherwise.

    DCP reads into the tensors that it finds. Where these are of other blocks the state is dropped,
    and the inert step of :func:`_states` makes it anew.
    """
    is_cut_otherwise = False
    for group, cut in zip(optimizer.param_groups, cuts, strict=True):
        before = Geometry.of(group)
        group.update(cut)
        if "max_preconditioner_dim" in cut:
            take_dim(group, cut["max_preconditioner_dim"])
        is_cut_otherwise |= any(
            layout_of(param.shape, before) != layout_of(param.shape, Geometry.of(group))
            for param in group["params"]
            if param.numel() > 0
        )
    if is_cut_otherwise:
        optimizer.state.clear()
    return is_cut_otherwise


def _ask_for_what_is_saved(optimizer: Shampoo, asked: dict[str, Any], place: Path) -> None:
    """Adds what is in the files, and takes away what may begin at zero and is not.

    DCP reads what it is asked for. A schedule may have raised momentum or beta1 on either side of
    the save, and what wrappers keep under parameters a new optimizer does not have.

    Args:
        asked: the state of the optimizer by names, in which DCP is about to load.
    """
    metadata = FileSystemReader(place).read_metadata()
    saved: dict[str, dict[str, Any]] = {}
    for flat, path in (metadata.planner_data or {}).items():
        if len(path) == 4 and path[:2] == ("optimizer", "state"):
            saved.setdefault(path[2], {})[path[3]] = metadata.state_dict_metadata[flat]
    moments = optimizer.fillable_moments()
    for group, named in zip(optimizer.param_groups, asked["param_groups"], strict=True):
        for param, name in zip(group["params"], named["params"], strict=True):
            if name not in saved:
                continue  # if its state is asked for, DCP says so
            entries, found = asked["state"].setdefault(name, {}), saved[name]
            for key, blank in moments.get(param, {}).items():
                if key in found and key not in entries:
                    entries[key] = torch.empty(blank.shape, dtype=blank.dtype, device=blank.device)
                elif key in entries and key not in found and may_begin(key):
                    del entries[key]
            for key in found.keys() - entries.keys():
                if not is_own(key):
                    entries[key] = _room_for(found[key], param)


def _room_for(saved: Any, param: Tensor) -> Any:
    """What DCP puts a value of somebody else's into."""
    if not isinstance(saved, TensorStorageMetadata):
        return None  # an object, of which it makes another
    if saved.size == param.shape:  # as its parameter is sharded, as torch's own state is
        return torch.empty_like(param, dtype=saved.properties.dtype, requires_grad=False)
    return torch.empty(saved.size, dtype=saved.properties.dtype, device=param.device)


def _transfer(move: Callable[..., Any], states: dict[str, Any], place: Path) -> None:
    """Between the tensors of ``states`` and files."""
    with warnings.catch_warnings():
        # On one process it guesses what no_dist has told it.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        move(states, checkpoint_id=place, no_dist=not _is_distributed())


def _states(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    with _set_aside_gradients(optimizer):
        model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


@contextmanager
def _set_aside_gradients(optimizer: Optimizer) -> Iterator[None]:
    """While there are any, DCP would leave a state empty that no step has filled yet."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    grads = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        yield
    finally:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad


def _complete(folder: Path) -> list[Path]:
    """The directories of complete checkpoints, the newest last."""
    named = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    complete = [path for path in named if (path / _MARKER).exists()]
    # A replaced one counts only where its successor is not complete.
    steps = {_step_of(path): path for path in sorted(complete, reverse=True)}
    return [steps[step] for step in sorted(steps)]


def _step_of(place: Path) -> int:
    name = _NAME.fullmatch(place.name)
    assert name is not None
    return int(name[1])


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _on_first_rank(work: Callable[[], Result]) -> Result:
    """What ``work`` returns or raises on rank 0, on all ranks, when it is done."""
    if not _is_distributed():
        return work()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result
