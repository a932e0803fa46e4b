"""A lock by a file alone, where the operating system has none: its owner renews it all the time.

Nobody compares clocks. Who wants the folder watches the file of the one that has had it for as long
as a living owner would need to renew it many times; if it does not change, the owner is dead.
"""

import contextlib
import json
import os
import secrets
import threading
import time
import weakref
from pathlib import Path

from shampoo.checkpoint.owner import MOST, in_use, this_process

FILE = ".heartbeat"
PERIOD = 5.0  # seconds between two beats
PATIENCE = 60.0  # seconds without one, after which an owner counts as dead


class Heartbeat:
    """The right of this process to save in a folder, for as long as the object lives."""

    def __init__(self, folder: Path) -> None:
        """Takes the folder; watches for ``PATIENCE`` first where somebody has had it.

        Raises:
            FolderInUseError: if its owner lives, or another came at the same time.
        """
        self._path, self._pid = folder / FILE, os.getpid()
        self._token = secrets.token_hex(8)
        before = _read(self._path)
        deadline = time.monotonic() + PATIENCE
        while before and time.monotonic() < deadline:
            time.sleep(PERIOD / 4)
            if (now := _read(self._path)) != before:
                if now:
                    raise in_use(folder, now)
                break  # its owner has ended well
        for abandoned in folder.glob(f"{FILE}-*"):
            abandoned.unlink(missing_ok=True)
        beat = _Beat(self._path, self._token)
        beat.renew()
        time.sleep(PERIOD / 4)  # of several that come at once the last one has it
        if not self.is_held():
            raise in_use(folder, _read(self._path))
        thread = threading.Thread(target=beat.go_on, daemon=True)
        thread.start()
        self._end = weakref.finalize(self, beat.end, thread, self._pid)

    def is_held(self) -> bool:
        """Whether nobody has taken the folder since."""
        return self._token.encode() in _read(self._path)


class _Beat:
    """What the thread of a heartbeat knows: not the object whose end it waits for."""

    def __init__(self, path: Path, token: str) -> None:
        self._path, self._token = path, token
        self._content = {**this_process(), "token": token, "count": 0}
        self._is_over = threading.Event()

    def renew(self) -> None:
        """Writes another count."""
        self._content["count"] += 1
        temporary = self._path.with_name(f"{FILE}-{self._token}")
        temporary.write_text(json.dumps(self._content))
        os.replace(temporary, self._path)

    def go_on(self) -> None:
        """Renews for as long as the folder is this process's."""
        while not self._is_over.wait(PERIOD) and self._token.encode() in _read(self._path):
            # A full disk does not end a job, but others may think that it has ended.
            with contextlib.suppress(OSError):
                self.renew()

    def end(self, thread: threading.Thread, pid: int) -> None:
        """Gives the folder back; a fork has the object, and not the folder."""
        if pid == os.getpid():
            self._is_over.set()
            thread.join()
            if self._token.encode() in _read(self._path):
                self._path.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MOST)
    except FileNotFoundError:
        return b""
