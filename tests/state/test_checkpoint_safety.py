"""Nothing in a checkpoint is run, wherever it hides. Fault row 15 of docs/faults.md."""

import dataclasses
import io
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import resharded_runs as runs
import torch
from checkpoint_files import make_former, reseal
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from shampoo import DamagedCheckpointError, UnsafeCheckpointError, checkpoint
from shampoo.checkpoint.metadata import read_metadata

DATA = "__0_0.distcp"


class Malicious:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model, optimizer = runs.build("replicated")
    runs.train(model, optimizer, [0])
    checkpoint.save(folder, model, optimizer, step=1)
    return folder


@pytest.fixture
def place(saved, tmp_path) -> Path:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    return folder / "step-00000001"


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "executed"


def index_of(place: Path) -> Metadata:
    with (place / ".metadata").open("rb") as file:
        return pickle.load(file)


def saved_by_torch(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def redirect(place: Path, name: str, content: bytes) -> None:
    """Lets an entry be other bytes, at the end of its file."""
    metadata = index_of(place)
    [key] = [key for key in metadata.storage_data if key.fqn == name]
    path = place / metadata.storage_data[key].relative_path
    metadata.storage_data[key] = dataclasses.replace(
        metadata.storage_data[key], offset=path.stat().st_size, length=len(content)
    )
    with path.open("ab") as file:
        file.write(content)
    with (place / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)


def in_metadata(place: Path, mark: Path) -> str:
    (place / ".metadata").write_bytes(pickle.dumps(Malicious(mark)))
    return ".metadata"


def deep_in_metadata(place: Path, mark: Path) -> str:
    metadata = index_of(place)
    metadata.planner_data["x"] = ("optimizer", Malicious(mark))
    (place / ".metadata").write_bytes(pickle.dumps(metadata))
    return ".metadata"


def behind_an_allowed_name(place: Path, mark: Path) -> str:
    """What is allowed is a name, not what can be reached from there."""
    calls = f"ctorch\nSize.__class__\n(S'{mark}'\ntR."
    (place / ".metadata").write_bytes(calls.encode())
    return ".metadata"


def in_an_entry(place: Path, mark: Path) -> str:
    redirect(place, "optimizer.param_groups.0.lr", saved_by_torch(Malicious(mark)))
    return DATA


def in_an_entry_by_pickle(place: Path, mark: Path) -> str:
    content = pickle.dumps(Malicious(mark))
    redirect(place, "optimizer.param_groups.0.lr", content)
    return DATA


def in_a_tensor(place: Path, mark: Path) -> str:
    redirect(place, "model.0.weight", saved_by_torch(Malicious(mark)))
    return DATA


def in_extra(place: Path, mark: Path) -> str:
    torch.save({"scheduler": {"payload": Malicious(mark)}}, place / "extra.pt")
    return "extra.pt"


def in_extra_by_pickle(place: Path, mark: Path) -> str:
    (place / "extra.pt").write_bytes(pickle.dumps(Malicious(mark)))
    return "extra.pt"


HIDDEN = [
    *(in_metadata, deep_in_metadata, behind_an_allowed_name, in_an_entry, in_an_entry_by_pickle),
    *(in_a_tensor, in_extra, in_extra_by_pickle),
]


def load(place: Path, **how: Any) -> Any:
    return checkpoint.load(place.parent, *runs.build("replicated", seed=1), **how)


@pytest.mark.parametrize("hide", HIDDEN, ids=lambda hide: hide.__name__)
@pytest.mark.parametrize("seal", ["a manifest that fits", "none, as before", "not verified"])
def test_a_malicious_file_is_not_executed(place, mark, hide, seal):
    name = hide(place, mark)
    if seal == "a manifest that fits":
        reseal(place)
    elif seal == "none, as before":
        make_former(place, 1)
    errors = (UnsafeCheckpointError, DamagedCheckpointError)
    with pytest.raises(errors, match=f"{place / name} is ") as caught:
        load(place, verify=seal != "not verified")
    assert not mark.exists()
    if seal != "none, as before":  # there, checksums of tensors come first
        assert isinstance(caught.value, UnsafeCheckpointError)


@pytest.mark.parametrize("hide", [in_metadata, deep_in_metadata])
def test_it_would_have_been(place, mark, hide):
    hide(place, mark)
    index_of(place)
    assert mark.exists()


@pytest.mark.parametrize("name", ["manifest.json", "complete"])
def test_a_pickle_for_a_manifest_is_damage(place, mark, name):
    (place / name).write_bytes(pickle.dumps(Malicious(mark)))
    with pytest.raises(DamagedCheckpointError, match=f"{place / name}"):
        load(place)
    assert not mark.exists()


def test_an_index_of_a_rank_is_not_read_instead(place, mark):
    """torch takes one where it cannot read that of all."""
    (place / "__0.metadata").write_bytes(pickle.dumps(Malicious(mark)))
    (place / ".metadata").write_bytes(b"")
    reseal(place)
    with pytest.raises(DamagedCheckpointError, match=r"\.metadata is damaged: it is no index"):
        load(place)
    (place / ".metadata").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"\.metadata is damaged: it is missing"):
        load(place, verify=False)
    assert not mark.exists()


def _edited(place: Path, edit: Callable[[Metadata], None]) -> None:
    metadata = index_of(place)
    edit(metadata)
    (place / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(place)


def _name_a_file(name: str) -> Callable[[Metadata], None]:
    def edit(metadata: Metadata) -> None:
        for key, info in metadata.storage_data.items():
            metadata.storage_data[key] = _StorageInfo(name, info.offset, info.length)

    return edit


def _make_huge(metadata: Metadata) -> None:
    entry = metadata.state_dict_metadata["model.0.weight"]
    assert isinstance(entry, TensorStorageMetadata)
    entry.size = torch.Size([1 << 40])


def _let_a_path_be(part: Any) -> Callable[[Metadata], None]:
    def edit(metadata: Metadata) -> None:
        metadata.planner_data["model.0.weight"] = ("model", part)

    return edit


def _reach_further(metadata: Metadata) -> None:
    key = next(iter(metadata.storage_data))
    info = metadata.storage_data[key]
    metadata.storage_data[key] = dataclasses.replace(info, length=1 << 50)


def _count_below_zero(metadata: Metadata) -> None:
    key = next(iter(metadata.storage_data))
    info = metadata.storage_data[key]
    metadata.storage_data[key] = dataclasses.replace(info, offset=-1)


def _transform(metadata: Metadata) -> None:
    key = next(iter(metadata.storage_data))
    info = metadata.storage_data[key]
    metadata.storage_data[key] = dataclasses.replace(info, transform_descriptors=["zstd"])


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (_name_a_file("../outside"), UnsafeCheckpointError, "names a file elsewhere, '../outside'"),
        (_name_a_file("/dev/zero"), UnsafeCheckpointError, "names a file elsewhere"),
        (_name_a_file("nothing"), DamagedCheckpointError, "it is missing"),
        (_make_huge, DamagedCheckpointError, "larger than all files"),
        (_let_a_path_be(1.5), DamagedCheckpointError, "float in the path"),
        (_reach_further, DamagedCheckpointError, "must have more"),
        (_count_below_zero, DamagedCheckpointError, "-1 is no number of bytes"),
        (_transform, DamagedCheckpointError, "is transformed"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_an_index_is_checked_field_by_field(place, edit, error, words):
    (place.parent / "outside").write_bytes((place / DATA).read_bytes())
    _edited(place, edit)
    with pytest.raises(error, match=words):
        load(place)


def test_a_pipe_is_not_waited_for(place):
    for name in (".metadata", DATA, "extra.pt", "manifest.json", "complete"):
        content = (place / name).read_bytes()
        (place / name).unlink()
        os.mkfifo(place / name)
        with pytest.raises(DamagedCheckpointError, match=f"{place / name} is damaged"):
            load(place)
        (place / name).unlink()
        (place / name).write_bytes(content)
    assert load(place) == 1


def test_a_pickle_cannot_write_into_classes(place):
    """``BUILD`` on a class with two states sets its attributes."""
    before = dict(vars(MetadataIndex))
    program = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
    program += b"(N}X\x08\x00\x00\x00__hash__K\x01st" + b"b."
    (place / ".metadata").write_bytes(program)
    with pytest.raises(DamagedCheckpointError):
        load(place, verify=False)
    assert dict(vars(MetadataIndex)) == before


def test_a_place_in_a_memory_costs_nothing(place):
    """``LONG_BINPUT`` of the last one: the unpickler in C would ask for 32 GiB."""
    (place / ".metadata").write_bytes(b"\x80\x04Nr\xff\xff\xff\x7f.")
    with pytest.raises(DamagedCheckpointError, match="NoneType where Metadata must"):
        load(place, verify=False)


def test_random_damage_to_an_index_is_told_or_harmless(place):
    """Without a manifest that fits: whatever the bytes say, it is an error of ours, or none."""
    chance, content = random.Random(0), (place / ".metadata").read_bytes()
    told = 0
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(chance.randrange(1, 4)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        (place / ".metadata").write_bytes(changed)
        try:
            read_metadata(place)
        except (DamagedCheckpointError, UnsafeCheckpointError):
            told += 1
    assert told > 100


def test_the_package_loads_no_more_than_weights():
    for path in Path(checkpoint.__file__).parent.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        for line in lines:
            assert "torch.load(" not in line or "weights_only=True" in line, path.name
            assert "pickle.load" not in line, path.name
