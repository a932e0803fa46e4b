"""Directories of a folder of checkpoints: which are there, which are being written, which go.

``step-00000100``           a checkpoint
``step-00000100.replaced``  one until its successor of the same step is in its place
``step-00000100.partial-…`` one that is written, or removed; for :func:`checkpoints` it is not there

Nothing is written into a checkpoint, and nothing removed from one: it comes and goes by a rename.
"""

import contextlib
import os
import re
import secrets
import shutil
from pathlib import Path

from shampoo.checkpoint.durable import sync_folder
from shampoo.checkpoint.manifest import MANIFEST, MARKER

EXTRA = "extra.pt"
_NAME = re.compile(r"step-(\d+)(\.replaced)?")
_PARTIAL = re.compile(r"step-\d+\.partial-[0-9a-f]{8}")
_REPLACED = ".replaced"
# What a save of before there were partial directories had written when it died.
_FORMER = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|complete\.tmp|extra\.pt")


def checkpoints(folder: Path) -> list[Path]:
    """The directories of all checkpoints, the newest last."""
    found = sorted((path for path in _named(folder) if is_checkpoint(path)), reverse=True)
    # A replaced one counts only where its successor is not there.
    steps = {step_of(path): path for path in found}
    return [steps[step] for step in sorted(steps)]


def is_checkpoint(place: Path) -> bool:
    """Whether it has been one; if but one of two files tells so, the other is missing."""
    return (place / MARKER).exists() or (place / MANIFEST).exists()


def step_of(place: Path) -> int:
    """The step in the name of a checkpoint."""
    name = _NAME.fullmatch(place.name)
    assert name is not None
    return int(name[1])


def place_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def begin(folder: Path, step: int) -> Path:
    """An empty directory to write a checkpoint into.

    Its name is its own: what ranks of a run that was killed still write goes elsewhere.

    Raises:
        FileExistsError: if something else is where the checkpoint is to be.
    """
    place = place_of(folder, step)
    if os.path.lexists(place) and not is_checkpoint(place):
        raise FileExistsError(f"{place} is there and is no checkpoint. Move it out of the way.")
    partial = _partial_of(place)
    partial.mkdir()
    return partial


def publish(partial: Path, keep: int | None) -> None:
    """Makes it a checkpoint, in place of one of the same step, and keeps the newest ones alone."""
    folder = partial.parent
    sync_folder(partial)
    place = place_of(folder, int(partial.name.partition(".")[0].removeprefix("step-")))
    replaced = place.with_suffix(_REPLACED)
    if os.path.lexists(place):
        # It stays what a restart would load until its successor is there.
        place.rename(replaced)
    try:
        partial.rename(place)
        sync_folder(folder)
    except OSError:
        with contextlib.suppress(OSError):
            place.rename(partial)
        with contextlib.suppress(OSError):
            replaced.rename(place)
        raise
    old = [path for path in checkpoints(folder)[: -keep if keep else 0] if path != place]
    for path in (replaced, *old):
        if os.path.lexists(path):
            _remove(path)


def clean(folder: Path) -> None:
    """Removes what saves have left that died. The caller has the lock: none of them lives."""
    for path in list(folder.glob("step-*")):
        if _PARTIAL.fullmatch(path.name) or _is_former_leftover(path):
            _remove(path)
    for path in [path for path in _named(folder) if path.suffix == _REPLACED]:
        place = path.with_suffix("")
        if not is_checkpoint(path) or is_checkpoint(place):
            _remove(path)
        elif not os.path.lexists(place):
            path.rename(place)


def discard(partial: Path) -> None:
    """Removes what a save has written that failed."""
    # The error of that save is told, and what cannot be removed goes with the next one.
    with contextlib.suppress(OSError):
        _remove(partial)


def _named(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]


def _is_former_leftover(place: Path) -> bool:
    if not _NAME.fullmatch(place.name) or place.is_symlink() or not place.is_dir():
        return False
    names = {path.name for path in place.iterdir()}
    return EXTRA in names and all(map(_FORMER.fullmatch, names))


def _partial_of(place: Path) -> Path:
    return place.with_name(f"{place.name.partition('.')[0]}.partial-{secrets.token_hex(4)}")


def _remove(path: Path) -> None:
    """By a rename first: what is half removed must not look like a checkpoint."""
    if not _PARTIAL.fullmatch(path.name):
        path = path.rename(_partial_of(path))
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)
