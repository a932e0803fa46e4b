"""One job saves in a folder; the second is told who the first is."""

import errno
import gc
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import resharded_runs as runs
from checkpoint_files import listing
from ranks import DiedError

from shampoo import FolderInUseError, Shampoo, checkpoint
from shampoo.checkpoint import heartbeat, lock

_kept: list[Any] = []  # what keeps a job alive after its function has returned


def _save(rank: int, folder: Path, then: str = "") -> tuple[str, int]:
    """What a save says, and the process it is in."""
    model, optimizer = runs.build("replicated")
    try:
        checkpoint.save(folder, model, optimizer, step=2)
    except FolderInUseError as error:
        return str(error), os.getpid()
    if then == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if then == "stay":
        _kept.append(optimizer)
    return "", os.getpid()


def _end(rank: int) -> None:
    _kept.clear()
    gc.collect()


def _load(rank: int, folder: Path) -> int | None:
    return checkpoint.load(folder, *runs.build("replicated"))


@pytest.fixture
def run() -> tuple[Any, Shampoo]:
    return runs.build("replicated")


@pytest.mark.parametrize("world", [1, 2])
def test_the_second_job_is_refused_by_the_name_of_the_first(ranks, run, tmp_path, world):
    checkpoint.save(tmp_path, *run, step=1)
    living = tmp_path / "step-00000002.partial-01234567"  # a save of the first
    living.mkdir()
    for message, _ in ranks.returns(_save, world, tmp_path):
        assert message.startswith(f"{tmp_path} is in use: process {os.getpid()} on '")
        assert message.endswith("Save to another folder, or end that job first.")
    assert living.exists()
    assert ranks.returns(_load, world, tmp_path) == [1] * world  # a look is no save
    checkpoint.save(tmp_path, *run, step=2)
    assert listing(tmp_path) == ["step-00000001", "step-00000002"]


def test_it_may_save_when_the_first_has_gone(ranks, tmp_path):
    model, optimizer = runs.build("replicated")
    checkpoint.save(tmp_path, model, optimizer, step=1)
    del model, optimizer
    gc.collect()
    [(message, other)] = ranks.returns(_save, 1, tmp_path, "stay")
    assert message == ""
    model, optimizer = runs.build("replicated")
    with pytest.raises(FolderInUseError, match=f"process {other} on ") as caught:
        checkpoint.save(tmp_path, model, optimizer, step=3)
    ranks.returns(_end, 1)
    checkpoint.save(tmp_path, model, optimizer, step=3)
    del caught  # and what it holds of the attempt
    gc.collect()
    [(message, _)] = ranks.returns(_save, 1, tmp_path)
    assert "is in use" in message


def test_it_may_save_when_the_first_was_killed(ranks, run, tmp_path):
    [died] = ranks.run(_save, 1, tmp_path, "die")
    assert isinstance(died, DiedError)
    checkpoint.save(tmp_path, *run, step=3)


def test_two_optimizers_of_a_process_share_a_folder(ranks, run, tmp_path):
    other_model, other = runs.build("replicated")
    checkpoint.save(tmp_path, *run, step=1)
    checkpoint.save(tmp_path, other_model, other, step=2)
    del other_model, other
    gc.collect()
    [(message, _)] = ranks.returns(_save, 1, tmp_path)
    assert "is in use" in message


def test_a_folder_that_was_made_anew_is_locked_anew(ranks, run, tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, *run, step=1)
    folder.rename(tmp_path / "moved")
    checkpoint.save(folder, *run, step=1)
    [(message, _)] = ranks.returns(_save, 1, folder)
    assert "is in use" in message


def test_a_fork_has_no_right_of_its_parent(run, tmp_path):
    """A worker of a data loader, say; nor does it keep the folder when its parent has gone."""
    checkpoint.save(tmp_path, *run, step=1)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            lock.hold(tmp_path, runs.build)
        except FolderInUseError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    held = lock.FolderLock(tmp_path.parent)
    there, here = os.pipe()
    pid = os.fork()
    if pid == 0:  # has the descriptor too
        os.close(here)
        os.read(there, 1)
        os._exit(0)
    os.close(there)
    del held
    lock.FolderLock(tmp_path.parent)
    os.close(here)
    os.waitpid(pid, 0)


def test_a_lock_is_not_written_through_a_link(run, tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        checkpoint.save(tmp_path / "checkpoints", *run, step=1)
    assert (tmp_path / "precious").read_text() == "precious"


# Where the operating system has no locks.


@pytest.fixture
def _no_locks(monkeypatch) -> None:
    def lockf(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    monkeypatch.setattr(heartbeat, "PERIOD", 0.1)
    monkeypatch.setattr(heartbeat, "PATIENCE", 3.0)


@pytest.mark.usefixtures("_no_locks")
def test_a_heartbeat_keeps_a_folder(tmp_path):
    model, optimizer = runs.build("replicated")
    checkpoint.save(tmp_path, model, optimizer, step=1)
    with pytest.raises(FolderInUseError, match=f"process {os.getpid()} on "):
        heartbeat.Heartbeat(tmp_path)
    checkpoint.save(tmp_path, model, optimizer, step=2)
    del model, optimizer
    gc.collect()
    assert listing(tmp_path) == ["step-00000001", "step-00000002"]
    began = time.monotonic()
    heartbeat.Heartbeat(tmp_path)
    assert time.monotonic() - began < heartbeat.PATIENCE


@pytest.mark.usefixtures("_no_locks")
def test_a_heart_that_has_stopped_does_not(tmp_path):
    pid = os.fork()
    if pid == 0:
        kept = heartbeat.Heartbeat(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
        del kept
    os.waitpid(pid, 0)
    dead = (tmp_path / heartbeat.FILE).read_bytes()
    assert f'"pid": {pid}' in dead.decode()
    beat = heartbeat.Heartbeat(tmp_path)
    assert beat.is_held()


@pytest.mark.usefixtures("_no_locks")
def test_who_loses_a_folder_notices(run, tmp_path):
    """It was suspended for long, and another has taken it for dead."""
    checkpoint.save(tmp_path, *run, step=1)
    other = b'{"pid": 1, "host": "elsewhere", "since": "now", "token": "another"}'
    (tmp_path / heartbeat.FILE).write_bytes(other)
    time.sleep(0.5)
    assert (tmp_path / heartbeat.FILE).read_bytes() == other  # it is not renewed over it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heartbeat.time, "sleep", lambda _: _touch(tmp_path / heartbeat.FILE, other))
        with pytest.raises(FolderInUseError, match="process 1 on 'elsewhere'"):
            checkpoint.save(tmp_path, *run, step=2)
    assert listing(tmp_path) == [heartbeat.FILE, "step-00000001"]


def _touch(path: Path, content: bytes) -> None:
    path.write_bytes(content[:-1] + b', "count": 2}')
