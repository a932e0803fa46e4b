"""What ``torch.distributed.checkpoint`` writes, with checksums of it on the way to the files."""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from shampoo.checkpoint.manifest import Record


class Writer(FileSystemWriter):
    """Knows what each file must be: by what was to be written, not by what a disk made of it."""

    def __init__(self, place: Path) -> None:
        super().__init__(place, sync_files=True)
        self.fs = _Checksums()

    @property
    def records(self) -> dict[str, Record]:
        """Of the files of this rank."""
        return cast(_Checksums, self.fs).records


class Planner(DefaultSavePlanner):
    """Refuses what could not be loaded again."""

    def transform_object(self, write_item: Any, object: Any) -> Any:
        """The bytes of what is no tensor.

        Raises:
            TypeError: if it is more than tensors and plain values.
        """
        written = super().transform_object(write_item, object)
        if isinstance(written, io.BytesIO) and not _is_plain(object):
            try:
                torch.load(io.BytesIO(written.getbuffer()), weights_only=True)
            except Exception as error:
                raise TypeError(
                    f"Invalid {write_item.index.fqn} of type {type(object).__name__}. Must be plain"
                    " values and tensors, which load with weights_only=True, or of a type that was"
                    " given to torch.serialization.add_safe_globals, here and where it is loaded."
                ) from error
        return written


def _is_plain(value: Any) -> bool:
    """What surely loads: to try costs as much as to write it, for each of thousands of values."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str, torch.dtype)


class _Checksums(FileSystem):
    def __init__(self) -> None:
        self.records: dict[str, Record] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with Path(path).open(mode) as file:
            stream = _Stream(file)
            yield stream
        self.records[Path(path).name] = stream.record()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _Stream:
    """A file that is written from its beginning to its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0
        # Of the rest of a file torch asks for these.
        self.tell, self.fileno = file.tell, file.fileno
        self.flush, self.close = file.flush, file.close

    def write(self, data: Any) -> int:
        """All of the data."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._bytes += len(view)
        return self._file.write(view)

    def record(self) -> Record:
        """What the file must be."""
        return Record(self._bytes, self._digest.hexdigest())


def write_extra(path: Path, states: Any) -> Record:
    """What else was to be saved, as bytes that load again.

    Raises:
        UnpicklingError: if it is more than tensors and plain values.
    """
    with path.open("xb") as file:
        stream = _Stream(file)
        torch.save(states, cast(IO[bytes], stream))
        file.flush()
        os.fsync(file.fileno())
    # What cannot be loaded again is better known now than at the restart.
    torch.load(path, weights_only=True)
    return stream.record()
