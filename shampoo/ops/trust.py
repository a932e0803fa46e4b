"""What may be read and run: files that nobody else can have written."""

import contextlib
import functools
import os
import stat
import sys
import tempfile
from pathlib import Path


def objection(path: Path, within: Path) -> str:
    """Why a file is not to be trusted; nothing if it is, or if there is none.

    It and the folders above it, up to ``within``, must belong to the user or to root, and nobody
    else may write to them.
    """
    if not hasattr(os, "getuid"):
        return ""  # a system without owners
    for each in (path, *path.parents):
        if each.is_relative_to(within) and (reason := _objection(each)):
            return reason
    return ""


def _objection(path: Path) -> str:
    try:
        found = path.stat()
    except FileNotFoundError:
        return ""
    if found.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {path} (mode {stat.S_IMODE(found.st_mode):o})"
    return ""


def make_folder(path: Path, within: Path) -> None:
    """Makes a folder to which only its owner writes, whatever the umask, and those above it."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        with contextlib.suppress(FileExistsError):
            each.mkdir(mode=0o755 if each.is_relative_to(within) else 0o777)


@functools.cache
def private_folder(reason: str) -> Path:
    """Where files go instead of a folder that is not trusted, which one line says."""
    folder = Path(tempfile.gettempdir(), f"shampoo-{os.getuid() if hasattr(os, 'getuid') else 0}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or not folder.is_dir() or _objection(folder):
        folder = Path(tempfile.mkdtemp(prefix="shampoo-"))
    print(
        f"shampoo: {reason}: kernels and certificates are made anew in {folder}. Let nobody else"
        " write to the folder, or set SHAMPOO_CACHE_DIR.",
        file=sys.stderr,
        flush=True,
    )
    return folder
