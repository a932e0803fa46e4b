"""What may be read and run: files that nobody else can have written, and that are whole.

Files of the cache appear by one rename, which replaces a symbolic link and does not follow it, once
their content is on the disk. Whoever reads one compares it with the digest recorded beside it: a
disk that was full, or a machine that lost power, leaves a library whose pages kill the process that
touches them.
"""

import contextlib
import functools
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

RECORD = ".sha256"  # of a file of this name without it


def objection(path: Path, within: Path) -> str:
    """Why a file is not to be trusted; nothing if it is, or if there is none.

    It and the folders above it, up to ``within``, must belong to the user or to root, and nobody
    else may write to them. The outermost is named: it is the same for all files below.
    """
    if not hasattr(os, "getuid"):
        return ""  # a system without owners
    for each in reversed((path, *path.parents)):
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
    """Makes a folder that only its owner enters, whatever the umask, and those above it."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        with contextlib.suppress(FileExistsError):
            each.mkdir(mode=0o700 if each.is_relative_to(within) else 0o777)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock, which the system drops with its holder.

    Raises:
        OSError: if the file cannot be made.
    """
    if path.is_symlink():
        path.unlink()  # opening a lock empties what it points to
    with FileLock(path, mode=0o600):
        yield


def write_text(path: Path, text: str) -> None:
    """Writes a small file, whole or not at all."""
    publish(_scratch(path, text), path)


def write_recorded(path: Path, text: str) -> None:
    """:func:`write_text`, with the digest that :func:`is_whole` compares."""
    publish_recorded(_scratch(path, text), path)


def _scratch(path: Path, text: str) -> Path:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    scratch.write_text(text, encoding="utf-8")
    return scratch


def publish(scratch: Path, path: Path) -> None:
    """Moves a file that is written to where it is read, its content first."""
    scratch.chmod(0o600)  # whatever the umask
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(scratch, path)
    if os.name != "nt":  # which opens no folders, and writes names through
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def publish_recorded(scratch: Path, path: Path) -> None:
    """:func:`publish`, with the digest that :func:`is_whole` compares.

    The digest goes first: between the two renames a reader finds nothing that is whole, and waits
    for the lock of who writes.
    """
    write_text(_record(path), digest_of(scratch))
    publish(scratch, path)


def is_whole(path: Path) -> bool:
    """Whether a file is there, with the content that was recorded."""
    try:
        recorded = _record(path).read_text(encoding="utf-8", errors="replace").strip()
        return recorded == digest_of(path)
    except OSError:
        return False


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        found = hashlib.sha256()
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def _record(path: Path) -> Path:
    return path.with_name(path.name + RECORD)


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
