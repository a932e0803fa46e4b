"""What ``torch.distributed.checkpoint`` reads: tensors and plain values, of one folder."""

import io
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.futures import Future

from shampoo.checkpoint.manifest import damaged
from shampoo.checkpoint.metadata import unsafe
from shampoo.checkpoint.states import transfer
from shampoo.errors import ShampooError


def read_into(states: dict[str, Any], place: Path, metadata: Metadata) -> None:
    """Fills the tensors of ``states``, and replaces what else it holds. All ranks call it.

    Raises:
        UnsafeCheckpointError: if an entry is more than tensors and plain values.
        DamagedCheckpointError: if one cannot be read. Some tensors have changed.
        CheckpointException: torch's, if an entry is missing or has another size.
    """
    transfer(load, states, storage_reader=_Reader(place, metadata), planner=_Planner())


def read_extra(path: Path) -> dict[str, Any]:
    """What else was saved.

    Raises:
        UnsafeCheckpointError: if it is more than tensors and plain values.
        DamagedCheckpointError: if it cannot be read.
    """
    if not path.is_file():
        raise damaged(path, "it is missing")
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise _explained(path, error) from error
    if not isinstance(saved, dict):
        raise damaged(path, f"it holds a {type(saved).__name__}, and must hold a dict")
    return saved


def check_archives(path: Path, parts: Iterable[tuple[int, int]] | None) -> None:
    """Compares the checksums within a file of before there were manifests, one for each tensor.

    Args:
        parts: offset and length of what torch.save has written there, in bytes; None for all of it.

    Raises:
        DamagedCheckpointError: if one differs. Bytes between the tensors have none.
    """
    if not path.is_file():
        raise damaged(path, "it is missing")
    with path.open("rb") as file:
        for offset, length in parts or [(0, path.stat().st_size)]:
            file.seek(offset)
            try:
                with zipfile.ZipFile(io.BytesIO(file.read(length))) as archive:
                    wrong = archive.testzip()
            except Exception as error:
                raise damaged(
                    path,
                    f"{length} bytes at {offset} are not what torch.save writes"
                    f" ({type(error).__name__}: {error})",
                ) from error
            if wrong is not None:
                raise damaged(path, f"the checksum of {wrong!r} at {offset} differs")


def _explained(path: Path, error: Exception) -> ShampooError:
    # torch raises this error for a pickle that it refuses, and for one that it cannot read.
    if isinstance(error, pickle.UnpicklingError):
        return unsafe(path, str(error).strip().partition("\n")[0])
    return damaged(path, f"{type(error).__name__}: {error}")


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Replaces a value that is no tensor; torch's own planner would run what is in it."""
        *path, last = self.mappings[read_item.dest_index.fqn]
        holder: Any = self.original_state_dict
        for part in path:
            holder = holder[part]
        holder[last] = torch.load(value, weights_only=True)


class _Reader(FileSystemReader):
    def __init__(self, place: Path, metadata: Metadata) -> None:
        super().__init__(place)
        self._metadata = metadata

    # Without arguments, so that torch does not look for an index of each rank instead.
    def read_metadata(self) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """File by file, so that an error names its own."""
        files: dict[str, list[Any]] = {}
        for item in plan.items:
            name = self.storage_data[item.storage_index].relative_path
            files.setdefault(name, []).append(item)
        for name, items in files.items():
            try:
                super().read_data(replace(plan, items=items), planner).wait()
            except Exception as error:
                raise _explained(Path(self.path) / name, error) from error
        done: Future[None] = Future()
        done.set_result(None)
        return done
