"""Who saves in a folder, in words: what a lock says of its owner."""

import datetime
import json
import os
import socket
from pathlib import Path
from typing import Any

from shampoo.errors import FolderInUseError

MOST = 4096  # bytes that are read of a name


def this_process() -> dict[str, Any]:
    """The name of this one."""
    since = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def in_use(folder: Path, said: bytes) -> FolderInUseError:
    """The error that names who saves in a folder, from the file in which it says so."""
    who = "another process"
    try:
        owner = json.loads(said)
        who = f"process {owner['pid']!r} on {owner['host']!r}, since {owner['since']!r},"
    except (ValueError, TypeError, KeyError, RecursionError):
        pass  # it has just come, and has not written its name yet
    return FolderInUseError(
        f"{folder} is in use: {who} saves its checkpoints there. Save to another folder, or end"
        " that job first."
    )
