"""One job saves in a folder: the operating system's lock, which ends with the process.

A record lock of POSIX and no ``flock``, on which filelock builds: that one lives on in the forked
workers of a data loader when the job itself was killed. The file names its owner; it stays when the
lock is released, since to remove it would be a race.
"""

import errno
import json
import os
import stat
import weakref
from pathlib import Path
from typing import Any

from shampoo.checkpoint.heartbeat import Heartbeat
from shampoo.checkpoint.owner import MOST, in_use, this_process

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_TAKEN = {errno.EACCES, errno.EAGAIN}
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class FolderLock:
    """The right of this process to save in a folder, for as long as the object lives."""

    def __init__(self, folder: Path) -> None:
        """Takes the lock.

        Raises:
            FolderInUseError: if another process has it, naming that.
            OSError: if there can be no such file.
        """
        self._pid, self._path = os.getpid(), folder / LOCK
        self._heartbeat: Heartbeat | None = None
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        self._descriptor = os.open(self._path, flags, 0o666)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._file = os.fstat(self._descriptor)
        try:
            self._take()
        except BaseException:
            self.end()
            raise

    def _take(self) -> None:
        if not stat.S_ISREG(self._file.st_mode):
            raise OSError(errno.EINVAL, "Invalid lock. Must be a plain file", str(self._path))
        if self._is_locked():
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, json.dumps(this_process()).encode())
        else:
            self._heartbeat = Heartbeat(self._path.parent)

    def _is_locked(self) -> bool:
        """Takes the operating system's lock; False if it has none here."""
        if fcntl is None:
            return False
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            if error.errno not in _TAKEN:
                raise
            raise in_use(self._path.parent, os.read(self._descriptor, MOST)) from None
        return True

    def end(self) -> None:
        """Gives it back, before another one: to close a file ends all locks that one has on it."""
        self._heartbeat = None
        self._close()

    def is_held(self) -> bool:
        """Whether this process has it, by the file that is in the folder now."""
        if self._pid != os.getpid():  # a fork has the object, and not the lock
            return False
        if self._heartbeat is not None:
            return self._heartbeat.is_held()
        try:
            return os.path.samestat(os.stat(self._path), self._file)
        except FileNotFoundError:
            return False


def hold(folder: Path, job: Any) -> None:
    """Takes the lock of a folder, unless this process has it, until ``job`` has gone.

    Raises:
        FolderInUseError: if another process has it.
        OSError: if there can be no such file.
    """
    resolved = folder.resolve()
    lock = _locks.get(resolved)
    if lock is None or not lock.is_held():
        if lock is not None:
            lock.end()
        lock = _locks[resolved] = FolderLock(resolved)
    _held.setdefault(job, {})[resolved] = lock


_locks: "weakref.WeakValueDictionary[Path, FolderLock]" = weakref.WeakValueDictionary()
_held: "weakref.WeakKeyDictionary[Any, dict[Path, FolderLock]]" = weakref.WeakKeyDictionary()
