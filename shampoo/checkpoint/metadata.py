"""The index of ``torch.distributed.checkpoint``, read without running what its pickle asks for.

``.metadata`` is a pickle, which may call whatever it names. Here a name stands for a blank record
of our own, or for a plain value, and every other name is refused; what comes of it is checked field
by field, and only then torch's own classes are made of it.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from shampoo.checkpoint.manifest import damaged
from shampoo.errors import ShampooError, UnsafeCheckpointError

METADATA = ".metadata"

_HOME = "torch.distributed.checkpoint"
_RECORDS = {
    *((f"{_HOME}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((f"{_HOME}.metadata", f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    (f"{_HOME}.metadata", "TensorProperties"),
    (f"{_HOME}.filesystem", "_StorageInfo"),
}
# Values that are of no use to a load: the folder that was saved in, and what tensors no longer say.
_PATHS = {"Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"}
_PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    (f"{_HOME}.metadata", "_MEM_FORMAT_ENCODING"): int,
}


def read_metadata(place: Path) -> Metadata:
    """The index of a checkpoint; every entry lies within a file of the folder itself.

    Raises:
        UnsafeCheckpointError: if it names what no index has to name, or a file elsewhere.
        DamagedCheckpointError: if it is missing, or is no index.
    """
    path = place / METADATA
    if not path.is_file():
        raise damaged(path, "it is missing")
    try:
        with path.open("rb") as file:
            return _Reading(place).metadata(_Unpickler(file).load())
    except (ShampooError, OSError):
        raise
    except _RefusedError as error:
        raise unsafe(path, f"it calls for {error}") from None
    except Exception as error:  # of random bytes, a pickle may raise anything
        raise damaged(path, f"it is no index ({type(error).__name__}: {error})") from error


def unsafe(path: Path, reason: str) -> UnsafeCheckpointError:
    """The error that names a file."""
    return UnsafeCheckpointError(
        f"{path} is not safe to load: {reason}. Nothing of it was run. Types of your own in a"
        " checkpoint that you trust: torch.serialization.add_safe_globals."
    )


class _RefusedError(Exception):
    """A name that no index has to name."""


class _Record:
    """What is said of something, by name."""

    def __init__(self, *arguments: Any) -> None:
        pass  # of a path, which is of no use

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, dict) else {"state": state})


class _Unpickler(pickle._Unpickler):
    """Makes records and plain values of what torch's index is made of, and nothing else.

    The one in Python: that in C asks for 32 GiB where five bytes name a place in its memory.
    """

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        # A pickle can write into a class too: these are its own.
        self._records = {name: type(name[1], (_Record,), {}) for name in sorted(_RECORDS)}
        self._path = type("Path", (_Record,), {})

    def get_extension(self, code: int) -> Any:
        raise _RefusedError(f"extension {code}")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._records:
            return self._records[module, name]
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module.split(".")[0] == "pathlib" and name in _PATHS:
            return self._path
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise _RefusedError(f"{module}.{name}"[:200].encode("ascii", "backslashreplace").decode())


class _Reading:
    """Checks records, and turns them into torch's; raises whatever a wrong one leads to."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._sizes: dict[str, int] = {}  # bytes of the files that are named

    def metadata(self, record: Any) -> Metadata:
        self._expect(record, "Metadata")
        storage = {}
        for key, value in _typed(record.storage_data, dict).items():
            index = self._index(key)
            storage[index] = self._storage(value)
        entries = {
            _typed(name, str): self._entry(value)
            for name, value in _typed(record.state_dict_metadata, dict).items()
        }
        paths = {
            _typed(name, str): tuple(_part(each) for each in _typed(path, tuple))
            for name, path in _typed(record.planner_data or {}, dict).items()
        }
        return Metadata(
            state_dict_metadata=entries,
            planner_data=paths,
            storage_data=storage,
            storage_meta=StorageMeta(),
        )

    def _expect(self, record: Any, name: str) -> Any:
        if not isinstance(record, _Record) or type(record).__name__ != name:
            raise TypeError(f"{type(record).__name__} where {name} must be")
        return record

    def _index(self, record: Any) -> MetadataIndex:
        self._expect(record, "MetadataIndex")
        said = vars(record)
        offset = None if said.get("offset") is None else _size(said["offset"])
        return MetadataIndex(_typed(said["fqn"], str), offset)

    def _storage(self, record: Any) -> _StorageInfo:
        self._expect(record, "_StorageInfo")
        said = vars(record)
        name = _typed(said["relative_path"], str)
        offset, length = _count(said["offset"]), _count(said["length"])
        if said.get("transform_descriptors") is not None:
            raise ValueError(f"{name} is transformed")
        path = self._place / name
        if name not in self._sizes:
            if name in {"", ".", ".."} or not set(name).isdisjoint("/\\:\0"):
                raise unsafe(self._place / METADATA, f"it names a file elsewhere, {name[:200]!r}")
            if not path.is_file():
                raise damaged(path, "it is missing")
            self._sizes[name] = path.stat().st_size
        if offset + length > self._sizes[name]:
            raise damaged(path, f"it has {self._sizes[name]} bytes and must have more")
        return _StorageInfo(name, offset, length)

    def _entry(self, record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
        if type(record).__name__ == "BytesStorageMetadata":
            self._expect(record, "BytesStorageMetadata")
            return BytesStorageMetadata()
        self._expect(record, "TensorStorageMetadata")
        properties = self._properties(record.properties)
        size = _size(record.size)
        if size.numel() * properties.dtype.itemsize > sum(self._sizes.values()):
            raise ValueError(f"a tensor of {size} is larger than all files")
        chunks = []
        for chunk in _typed(record.chunks, list):
            self._expect(chunk, "ChunkStorageMetadata")
            chunks.append(ChunkStorageMetadata(_size(chunk.offsets), _size(chunk.sizes)))
        return TensorStorageMetadata(properties, size, chunks)

    def _properties(self, record: Any) -> TensorProperties:
        self._expect(record, "TensorProperties")
        return TensorProperties(dtype=_typed(record.state[0], torch.dtype))


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} where {kind.__name__} must be")
    return value


def _count(value: Any) -> int:
    count: int = _typed(value, int)
    if not 0 <= count < 1 << 62:
        raise ValueError(f"{count} is no number of bytes or rows")
    return count


def _size(value: Any) -> torch.Size:
    return torch.Size([_count(each) for each in _typed(value, tuple)])


def _part(value: Any) -> str | int:
    if type(value) not in (str, int):
        raise TypeError(f"{type(value).__name__} in the path of an entry")
    part: str | int = value
    return part
