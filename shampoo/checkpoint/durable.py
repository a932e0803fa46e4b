"""What is on the disk when a call returns, so that it outlives the machine."""

import os
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Makes a file that is not there yet.

    Raises:
        OSError: if it is there, or cannot be written.
    """
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """The names in a folder, which are not part of its files."""
    if os.name == "nt":
        return  # it opens no folders, and writes names through
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
