"""Writes a checkpoint: all of it, or nothing that a load would find."""

import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import state_dict_saver
from torch.optim import Optimizer

from shampoo.checkpoint import folder as directories
from shampoo.checkpoint.durable import sync_folder
from shampoo.checkpoint.lock import hold
from shampoo.checkpoint.manifest import Record, seal
from shampoo.checkpoint.ranks import on_every_rank, on_first_rank
from shampoo.checkpoint.stateful import Stateful
from shampoo.checkpoint.states import listed, states_of, transfer
from shampoo.checkpoint.writing import Planner, Writer, write_extra
from shampoo.errors import shown

_MOST_STEPS = 10**18


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    step: int,
    extra: Mapping[str, Stateful] | None = None,
    keep: int | None = None,
) -> None:
    """Saves a checkpoint; all ranks must call it, and find the same ``folder``.

    When it returns, the checkpoint exists and is on the disk; if the run dies before, the one
    before it does, and what was written goes with the next save. If it raises, nothing is left.

    The first save takes the folder for this process, until its optimizers have gone or the process
    has ended: another one cannot save there, but load.

    Args:
        folder: of all checkpoints of a run; created if need be.
        model: plain, in DistributedDataParallel, or sharded by ``fully_shard``.
        optimizer: of the model; or several, of any kind, each with parameters of its own.
        step: how many the run has taken, >= 0; a checkpoint of the same step is replaced.
        extra: what else to save, by name; alike on all ranks, since the first one's is written.
        keep: how many checkpoints to keep, the newest ones, >= 1, and the one of ``step`` in any
            case; None for all.

    Raises:
        ValueError: for a value out of range, or a parameter that two optimizers have.
        FolderInUseError: on all ranks, naming the process that saves there.
        OSError: on all ranks if the first cannot write; with the checkpoint in its place if an
            older one cannot be removed.
        CheckpointException: torch's, a BaseException: on all ranks if one cannot write, or if a
            value is saved that could not be loaded.
    """
    if not _is_whole(step, 0):
        raise ValueError(f"Invalid step={shown(step)}. Must be an integer >= 0 and <= 1e18.")
    if keep is not None and not _is_whole(keep, 1):
        raise ValueError(f"Invalid keep={shown(keep)}. Must be >= 1, or None to keep all.")
    step, keep = int(step), None if keep is None else int(keep)
    place, optimizers = Path(folder), listed(optimizer)
    begun: list[Path] = []  # on the first rank
    records: dict[str, Record] = {}

    def prepare() -> Path:
        place.mkdir(parents=True, exist_ok=True)
        for each in optimizers:
            hold(place, each)
        directories.clean(place)
        partial = directories.begin(place, step)
        begun.append(partial)
        states = {name: stateful.state_dict() for name, stateful in (extra or {}).items()}
        records[directories.EXTRA] = write_extra(partial / directories.EXTRA, states)
        return partial

    def commit() -> None:
        seal(partial, step, records)
        directories.publish(partial, keep)

    try:
        partial = on_first_rank(prepare)
        writer = Writer(partial)
        states = states_of(model, optimizers)
        transfer(state_dict_saver.save, states, storage_writer=writer, planner=Planner())

        def finish() -> dict[str, Record]:
            sync_folder(partial)
            return writer.records

        for written in on_every_rank(finish):
            records.update(written)
        on_first_rank(commit)
    except BaseException:
        for each in begun:
            directories.discard(each)
        raise


def _is_whole(value: Any, least: int) -> bool:
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    return is_integer and least <= value <= _MOST_STEPS
