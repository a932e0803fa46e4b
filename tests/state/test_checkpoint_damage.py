"""A checkpoint is what was written, or it is not loaded: damage of every kind, to every file.

``SHAMPOO_DAMAGES`` is the number of random ones (60).
"""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import resharded_runs as runs
from checkpoint_files import listing, make_former, reseal
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from shampoo import DamagedCheckpointError, Shampoo, checkpoint

DAMAGES = int(os.environ.get("SHAMPOO_DAMAGES", "60"))
FILES = [".metadata", "__0_0.distcp", "__1_0.distcp", "complete", "extra.pt", "manifest.json"]
OLDER, NEWEST = 3, 5


def _save_two(rank: int, folder: Path) -> list[str]:
    model, optimizer = runs.build("replicated")
    digests = []
    for step in range(NEWEST):
        runs.train(model, optimizer, [step])
        if step + 1 in (OLDER, NEWEST):
            checkpoint.save(folder, model, optimizer, step=step + 1)
            digests.append(runs.digest(model))
    return digests


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> tuple[Path, list[str]]:
    """Two checkpoints of two ranks, and the digests of the model in them."""
    folder = tmp_path_factory.mktemp("saved")
    digests, same = ranks.returns(_save_two, 2, folder)
    assert digests == same
    return folder, digests


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved[0], folder)
    return folder


def newest_of(folder: Path) -> Path:
    return folder / f"step-{NEWEST:08d}"


def load(folder: Path, **how: Any) -> tuple[int | None, str]:
    """The step that is found and the digest of the model that it is loaded into."""
    model, optimizer = runs.build("replicated", seed=1)
    return checkpoint.load(folder, model, optimizer, **how), runs.digest(model)


@pytest.fixture(scope="module")
def run() -> tuple[nn.Module, Shampoo]:
    """What refuses to load is as it was, and can be loaded into again."""
    return runs.build("replicated", seed=1)


def _flip(content: bytearray, other: bytes, chance: random.Random) -> None:
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def _cut(content: bytearray, other: bytes, chance: random.Random) -> None:
    del content[chance.randrange(len(content)) :]


def _grow(content: bytearray, other: bytes, chance: random.Random) -> None:
    content += chance.randbytes(chance.randrange(1, 100))


def _blank(content: bytearray, other: bytes, chance: random.Random) -> None:
    start = chance.randrange(len(content))
    end = min(len(content), start + 4096)
    content[start:end] = bytes(end - start)


def _swap_within(content: bytearray, other: bytes, chance: random.Random) -> None:
    half = len(content) // 2
    length = min(half, chance.choice([1, 8, 512, 4096]))
    first, second = chance.randrange(half - length + 1), half
    parts = bytes(content[first : first + length]), bytes(content[second : second + length])
    content[first : first + length], content[second : second + length] = reversed(parts)


def _take_the_older(content: bytearray, other: bytes, chance: random.Random) -> None:
    content[:] = other


CHANGES = [_flip, _flip, _flip, _cut, _grow, _blank, _swap_within, _take_the_older]


def damage(folder: Path, name: str, kind: str, chance: random.Random) -> set[str]:
    """Damages a file of the newest checkpoint; the names of those that differ then, if any."""
    place = newest_of(folder)
    path = place / name
    if kind == "delete":
        path.unlink()
        return {name}
    before = path.read_bytes()
    if kind == "exchange":
        partner = place / chance.choice([each for each in FILES if each != name])
        path.write_bytes(partner.read_bytes())
        partner.write_bytes(before)
        return {name, partner.name}
    change: Callable[..., None] = chance.choice(CHANGES)
    content = bytearray(before)
    change(content, (folder / f"step-{OLDER:08d}" / name).read_bytes(), chance)
    path.write_bytes(content)
    return {name} if content != before else set()


def test_all_damage_is_found_before_anything_changes(saved, run, tmp_path):
    chance = random.Random(0)
    model, optimizer = run
    before, count = runs.digest(model), 0
    while count < DAMAGES:
        name = FILES[count % len(FILES)]
        kind = chance.choice(["delete", "exchange", *["change"] * 6])
        folder = tmp_path / "damaged"
        shutil.copytree(saved[0], folder)
        if names := damage(folder, name, kind, chance):
            with pytest.raises(DamagedCheckpointError) as caught:
                checkpoint.load(folder, model, optimizer)
            said = str(caught.value)
            assert any(str(newest_of(folder) / each) in said for each in names), (names, kind, said)
            count += 1
        shutil.rmtree(folder)
    assert runs.digest(model) == before
    assert not optimizer.state


def test_what_is_whole_is_loaded(saved):
    folder, (_, newest) = saved
    assert sorted(path.name for path in newest_of(folder).iterdir()) == FILES
    assert load(folder) == (NEWEST, newest)


@pytest.mark.parametrize("name", FILES)
def test_the_newest_whole_one_is_loaded_where_that_is_asked_for(saved, copied, name, said):
    damage(copied, name, "delete", random.Random(0))
    assert load(copied, fallback=True) == (OLDER, saved[1][0])
    assert f"loading {copied / f'step-{OLDER:08d}'} instead" in said()
    assert f"{newest_of(copied) / name} is damaged: it is missing" in said()


def test_without_damage_fallback_says_nothing(saved, said):
    assert load(saved[0], fallback=True) == (NEWEST, saved[1][1])
    assert "instead" not in said()


def test_nothing_is_loaded_where_nothing_is_whole(copied):
    for place in copied.glob("step-*"):
        (place / "extra.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"No checkpoint is whole.*step-.*step-"):
        load(copied, fallback=True)
    with pytest.raises(ValueError, match="Invalid fallback=True with verify=False"):
        load(copied, fallback=True, verify=False)


def flip_a_weight(folder: Path) -> Path:
    """In the middle of the bytes of a weight, which nothing else would notice."""
    model, optimizer = runs.build("replicated")
    checkpoint.load(folder, model, optimizer)
    weight = next(model.parameters()).detach().numpy().tobytes()
    for path in newest_of(folder).glob("*.distcp"):
        content = bytearray(path.read_bytes())
        if (found := content.find(weight)) >= 0:
            content[found + len(weight) // 2] ^= 1
            path.write_bytes(content)
            return path
    raise AssertionError("no file has the weight")


def test_to_verify_can_be_left_out(saved, copied):
    path = flip_a_weight(copied)
    step, digest = load(copied, verify=False)
    assert step == NEWEST
    assert digest != saved[1][1]
    with pytest.raises(DamagedCheckpointError, match=f"{path} is damaged: its SHA-256"):
        load(copied)


def test_directories_of_another_name_are_told(copied):
    newest_of(copied).rename(copied / "step-00000009")
    with pytest.raises(DamagedCheckpointError, match="it is not the marker of step 9"):
        load(copied)
    assert load(copied, fallback=True)[0] == OLDER
    assert load(copied, verify=False)[0] == 9


def test_a_manifest_that_names_no_index_is_damaged(copied):
    place = newest_of(copied)
    metadata = (place / ".metadata").read_bytes()
    (place / ".metadata").unlink()
    reseal(place, NEWEST)
    (place / ".metadata").write_bytes(metadata)
    with pytest.raises(DamagedCheckpointError, match=r"it does not name \.metadata"):
        load(copied)


# Checkpoints of before there were manifests.


@pytest.fixture
def former(copied) -> Path:
    make_former(newest_of(copied), NEWEST)
    return copied


def test_a_former_checkpoint_is_loaded(saved, former, said):
    assert load(former, fallback=True) == (NEWEST, saved[1][1])
    assert "instead" not in said()


def test_a_flipped_weight_of_a_former_checkpoint_is_found(saved, former):
    path = flip_a_weight(former)
    with pytest.raises(DamagedCheckpointError, match=f"{path} is damaged: the checksum of"):
        load(former)
    assert load(former, fallback=True) == (OLDER, saved[1][0])


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp", "extra.pt"])
@pytest.mark.parametrize("kind", ["delete", "cut", "empty"])
def test_what_can_be_told_of_a_former_checkpoint_is(former, name, kind):
    path = newest_of(former) / name
    if kind == "delete":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size * 2 // 3 if kind == "cut" else 0)
    with pytest.raises(DamagedCheckpointError, match=f"{path} is damaged"):
        load(former)


def test_a_manifest_is_not_forgotten(copied):
    """A marker that has lost the manifest's checksum does not make a former one of it."""
    (newest_of(copied) / "complete").write_text(f"{NEWEST}\n")
    with pytest.raises(DamagedCheckpointError, match="lacks the checksum"):
        load(copied)


# Saves that fail.


def _fail_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    left, sync = moment, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def _error_of_a_save(folder: Path, model: nn.Module, optimizer: Shampoo) -> BaseException | None:
    try:
        checkpoint.save(folder, model, optimizer, step=2, keep=1)
    except (OSError, CheckpointException) as error:
        return error
    return None


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """Wherever the disk is full: at each of the files, and at the names."""
    model, optimizer = runs.build("replicated")
    checkpoint.save(tmp_path, model, optimizer, step=1)
    digest, moment = runs.digest(model), 0
    runs.train(model, optimizer, [1])
    while True:
        moment += 1
        with monkeypatch.context() as patch:
            _fail_at(patch, moment)
            error = _error_of_a_save(tmp_path, model, optimizer)
        if error is None:
            break
        assert "No space left" in str(error)
        assert listing(tmp_path) == ["step-00000001"]
        assert load(tmp_path) == (1, digest)
    assert moment == 9  # extra, data, index, manifest, marker, and three times names; then none
    assert listing(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize("limit", [100, 10_000])
def test_a_file_that_can_be_no_longer_leaves_nothing(tmp_path, limit):
    resource = pytest.importorskip("resource")
    model, optimizer = runs.build("replicated")
    checkpoint.save(tmp_path, model, optimizer, step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        error = _error_of_a_save(tmp_path, model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(error)
    assert listing(tmp_path) == ["step-00000001"]
    assert load(tmp_path)[0] == 1


def test_what_is_written_is_what_was_to_be(tmp_path, monkeypatch):
    """A disk that changes what it is given is found out, since checksums are not of its files."""
    model, optimizer = runs.build("replicated")
    rename = Path.rename

    def change(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            flip = bytearray((path / "__0_0.distcp").read_bytes())
            flip[-1000] ^= 4
            (path / "__0_0.distcp").write_bytes(flip)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", change)
        checkpoint.save(tmp_path, model, optimizer, step=1)
    with pytest.raises(DamagedCheckpointError, match=r"__0_0\.distcp"):
        load(tmp_path)


# On several ranks.


def _load_damaged(rank: int, folder: Path, name: str) -> tuple[str, int | None, str]:
    model, optimizer = runs.build("replicated", seed=1)
    try:
        checkpoint.load(folder, model, optimizer)
    except DamagedCheckpointError as error:
        step = checkpoint.load(folder, model, optimizer, fallback=True)
        return str(error), step, runs.digest(model)
    return "", None, ""


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", "manifest.json", ".metadata"])
def test_all_ranks_hear_of_damage_that_one_finds(ranks, saved, copied, name):
    path = newest_of(copied) / name
    os.truncate(path, path.stat().st_size - 1)
    for message, step, digest in ranks.returns(_load_damaged, 2, copied, name):
        assert message.startswith(f"{path} is damaged")
        assert (step, digest) == (OLDER, saved[1][0])
