"""Reads the newest checkpoint, once it is known to be what was written."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.optim import Optimizer

from shampoo.checkpoint.folder import EXTRA, checkpoints, step_of
from shampoo.checkpoint.manifest import MANIFEST, check_file, damaged, read_manifest
from shampoo.checkpoint.matching import asking
from shampoo.checkpoint.metadata import METADATA, read_metadata
from shampoo.checkpoint.ranks import on_every_rank, on_first_rank, rank_and_world
from shampoo.checkpoint.reading import check_archives, read_extra, read_into
from shampoo.checkpoint.stateful import Stateful
from shampoo.checkpoint.states import listed
from shampoo.errors import DamagedCheckpointError, UnsafeCheckpointError

logger = logging.getLogger(__name__)


def load(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    extra: Mapping[str, Stateful] | None = None,
    verify: bool = True,
    fallback: bool = False,
) -> int | None:
    """Loads the newest checkpoint; training then continues bit for bit.

    All ranks must call it, after the model was wrapped or sharded. Their number and the sharding
    may differ from those that saved. No code of a checkpoint is run.

    Args:
        folder: of :func:`save`; need not exist.
        optimizer: one, or several in the order in which they were saved.
        extra: what loads the states that were saved by these names.
        verify: compare every file with the length and the SHA-256 that it was written with, before
            anything changes. Ranks divide the files; it takes one more reading of them. Of a
            checkpoint from before there were manifests, what torch keeps checksums of is compared.
        fallback: where the newest is damaged, log a warning and load the newest that is whole.

    Returns:
        The step at which it was saved; None, with nothing changed, if there is no checkpoint.

    Raises:
        ValueError: for ``fallback`` without ``verify``, or a parameter that two optimizers have.
        DamagedCheckpointError: naming a file that is missing or is not what was written; with
            ``fallback`` if no checkpoint is whole. Nothing has changed, with ``verify``.
        UnsafeCheckpointError: naming a file that holds more than tensors and plain values.
        KeyError: for a name in ``extra`` that was not saved.
        BlockGridMismatchError: if the blocks of a :class:`shampoo.Shampoo` were cut otherwise, by
            another ``max_preconditioner_dim``, say. Nothing has changed.
        CheckpointException: torch's, a BaseException: if it was saved of another model or
            optimizer. What model and optimizer hold then is of no use.
    """
    if fallback and not verify:
        raise ValueError("Invalid fallback=True with verify=False. Must be with verify=True.")
    optimizers = listed(optimizer)
    found = on_first_rank(lambda: checkpoints(Path(folder)))
    if not found:
        return None
    place, metadata = _choose(found, verify=verify, fallback=fallback)

    def read() -> dict[str, Any]:
        saved = read_extra(place / EXTRA)
        if unknown := sorted((extra or {}).keys() - saved.keys()):
            raise KeyError(f"{place} has no extra {unknown}. It has {sorted(saved)}.")
        return saved

    saved = on_first_rank(read)  # a rank that alone failed here would leave the others waiting
    with asking(model, optimizers, place, metadata) as (states, former):
        read_into(states, place, metadata)
        for group in former.groups:
            group.update(former.values)
        set_state_dict(
            model,
            optimizers,
            model_state_dict=states["model"],
            optim_state_dict=states["optimizer"],
        )
    for name, stateful in (extra or {}).items():
        stateful.load_state_dict(saved[name])
    return step_of(place)


def _choose(found: Sequence[Path], *, verify: bool, fallback: bool) -> tuple[Path, Metadata]:
    """The newest checkpoint, or the newest that is whole, and its index."""
    complaints: list[str] = []
    for place in reversed(found):
        try:
            if verify:
                _verify(place)
            metadata = on_first_rank(lambda place=place: read_metadata(place))  # type: ignore[misc]
        except (DamagedCheckpointError, UnsafeCheckpointError) as error:
            if not fallback:
                raise
            complaints.append(str(error))
            continue
        if complaints and rank_and_world()[0] == 0:
            logger.warning("shampoo: loading %s instead: %s", place, " ".join(complaints))
        return place, metadata
    raise DamagedCheckpointError(f"No checkpoint is whole: {' '.join(complaints)}")


def _verify(place: Path) -> None:
    """Raises on all ranks what is wrong with a file, if one finds it; each reads some of them."""
    records = on_first_rank(lambda: read_manifest(place, step_of(place)))
    if records is None:
        _verify_former(place)
        return
    for name in (EXTRA, METADATA):
        if name not in records:
            raise damaged(place / MANIFEST, f"it does not name {name}")
    mine = _share({name: record.bytes for name, record in records.items()})

    def check() -> None:
        for name in mine:
            check_file(place / name, records[name])

    on_every_rank(check)


def _verify_former(place: Path) -> None:
    """What can be told without a manifest: torch's index is one, and its archives are whole."""
    metadata = on_first_rank(lambda: read_metadata(place))
    parts: dict[str, list[tuple[int, int]]] = {}
    for info in metadata.storage_data.values():
        parts.setdefault(info.relative_path, []).append((info.offset, info.length))
    mine = _share({name: sum(length for _, length in each) for name, each in parts.items()})

    def check() -> None:
        for name in mine:
            check_archives(place / name, parts[name])

    on_every_rank(check)
    on_first_rank(lambda: check_archives(place / EXTRA, None))


def _share(sizes: Mapping[str, int]) -> list[str]:
    """The files that this rank reads, of about as many bytes as those of the others."""
    rank, world = rank_and_world()
    loads, mine = [0] * world, []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        loads[least] += sizes[name]
        if least == rank:
            mine.append(name)
    return mine
