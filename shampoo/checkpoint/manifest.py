"""What a checkpoint is made of: length and SHA-256 of every file, in a file written after them.

``complete``, written last of all, holds the step and the checksum of the manifest itself. SHA-256
is part of Python and takes 1.8 GB/s of a core with instructions for it, several hundred MB/s
without, which is more than most file systems take from one rank.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from shampoo.checkpoint.durable import write
from shampoo.errors import DamagedCheckpointError

MANIFEST = "manifest.json"
MARKER = "complete"

_FORMAT = 1
_CHUNK = 1 << 22  # bytes
_LARGEST = 1 << 26  # bytes of a manifest: half a million files
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"(?!\.+$)[\w.-]+")  # of a file in the folder itself


@dataclass(frozen=True)
class Record:
    """What a file must be."""

    bytes: int
    sha256: str


def seal(place: Path, step: int, records: Mapping[str, Record]) -> None:
    """Writes manifest and marker, in this order; the files they speak of must be on the disk."""
    files = {name: asdict(record) for name, record in sorted(records.items())}
    content = {"format": _FORMAT, "step": step, "files": files}
    text = json.dumps(content, indent=1) + "\n"
    write(place / MANIFEST, text.encode())
    digest = hashlib.sha256(text.encode()).hexdigest()
    write(place / MARKER, f"{step}\n{digest}\n".encode())


def read_manifest(place: Path, step: int) -> dict[str, Record] | None:
    """The records of all files; None for a checkpoint from before there were manifests.

    Raises:
        DamagedCheckpointError: if the manifest or the marker is missing, is damaged, or is of
            another step than its directory.
    """
    marker, manifest = place / MARKER, place / MANIFEST
    if not marker.is_file():
        raise damaged(marker, "it is missing")
    said = _read(marker).split(b"\n")
    if said[:1] != [str(step).encode()] or said[-1:] != [b""] or len(said) not in (2, 3):
        raise damaged(marker, f"it is not the marker of step {step}")
    if len(said) == 2:
        if manifest.exists():
            raise damaged(marker, f"it lacks the checksum of {MANIFEST}")
        return None
    if not manifest.is_file():
        raise damaged(manifest, "it is missing")
    text = _read(manifest)
    if hashlib.sha256(text).hexdigest().encode() != said[1]:
        raise damaged(manifest, f"its SHA-256 is not what {marker} says")
    try:
        return _parse(text, step)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(manifest, f"{type(error).__name__}: {error}") from error


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise damaged(path, f"it has more than {_LARGEST} bytes")
    return text


def _parse(text: bytes, step: int) -> dict[str, Record]:
    content = json.loads(text)
    if content["format"] != _FORMAT or content["step"] != step:
        raise ValueError(f"it is not of format {_FORMAT} and of step {step}")
    records = {}
    for name, entry in content["files"].items():
        record = Record(entry["bytes"], entry["sha256"])
        if not _NAME.fullmatch(name) or type(record.bytes) is not int:
            raise ValueError(f"the entry {name!r} is not one of a file in this folder")
        if not _SHA256.fullmatch(record.sha256):
            raise ValueError(f"the entry {name!r} has no SHA-256")
        records[name] = record
    return records


def check_file(path: Path, record: Record) -> None:
    """Compares a file with what it must be.

    Raises:
        DamagedCheckpointError: if they differ.
    """
    if not path.is_file():  # nor a pipe, which would never end
        raise damaged(path, "it is missing" if not path.exists() else "it is no file")
    try:
        length = path.stat().st_size
        if length != record.bytes:
            raise damaged(path, f"it has {length} bytes and must have {record.bytes}")
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise damaged(path, f"it cannot be read ({error.strerror})") from error
    if digest.hexdigest() != record.sha256:
        raise damaged(path, "its SHA-256 is not that of what was written")


def damaged(path: Path, reason: str) -> DamagedCheckpointError:
    """The error that names a file."""
    return DamagedCheckpointError(
        f"{path} is damaged: {reason}. Restore it, or pass fallback=True to load the newest"
        " checkpoint that is whole."
    )
