"""A folder of checkpoints: complete or not there. Fault row 14 of docs/faults.md."""

import os
from pathlib import Path
from typing import Any

import pytest
import resharded_runs as runs
import torch
from checkpoint_files import listing
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from shampoo import BlockGridMismatchError, Shampoo, checkpoint


@pytest.fixture
def run() -> tuple[nn.Module, Shampoo]:
    return runs.build("replicated")


def loaded(folder: Path, **how: Any) -> tuple[int | None, nn.Module, Shampoo]:
    model, optimizer = runs.build("replicated", seed=1)
    return checkpoint.load(folder, model, optimizer, **how), model, optimizer


def test_a_run_without_ranks_resumes_to_the_bit(run, tmp_path):
    model, optimizer = run
    runs.train(model, optimizer, range(runs.SAVED))
    checkpoint.save(tmp_path, model, optimizer, step=runs.SAVED)
    step, other, its_optimizer = loaded(tmp_path)
    assert step == runs.SAVED
    for pair in ((model, optimizer), (other, its_optimizer)):
        runs.train(*pair, range(runs.SAVED, runs.STEPS))
    assert runs.digest(other) == runs.digest(model)


def test_nothing_is_loaded_where_there_is_nothing(run, tmp_path):
    model, optimizer = run
    before = runs.digest(model)
    assert checkpoint.load(tmp_path / "nowhere", model, optimizer) is None
    (tmp_path / "step-none").mkdir()
    (tmp_path / "step-00000003").touch()
    assert checkpoint.load(tmp_path, model, optimizer) is None
    assert runs.digest(model) == before
    assert not optimizer.state


@pytest.mark.parametrize(
    "died", ["while writing", "before its name", "before there were manifests"]
)
def test_what_is_half_written_does_not_exist(run, tmp_path, died):
    model, optimizer = run
    digests = []
    for step in (1, 2):
        runs.train(model, optimizer, [step])
        checkpoint.save(tmp_path, model, optimizer, step=step)
        digests.append(runs.digest(model))
    newest = tmp_path / "step-00000002"
    if died == "before there were manifests":
        (newest / "manifest.json").unlink()
        (newest / "complete").rename(newest / "complete.tmp")
    else:
        newest = newest.rename(tmp_path / "step-00000002.partial-01234567")
    if died == "while writing":
        [data] = newest.glob("*.distcp")
        os.truncate(data, data.stat().st_size // 2)
        for name in (".metadata", "manifest.json", "complete"):
            (newest / name).unlink()
    step, other, its_optimizer = loaded(tmp_path)
    assert step == 1
    assert runs.digest(other) == digests[0]
    # The restarted run comes by the same step again.
    runs.train(other, its_optimizer, [2])
    checkpoint.save(tmp_path, other, its_optimizer, step=2)
    step, other, _ = loaded(tmp_path)
    assert step == 2
    assert runs.digest(other) == digests[1]
    assert listing(tmp_path) == ["step-00000001", "step-00000002"]


def test_what_a_save_left_of_the_same_step_is_the_checkpoint(run, tmp_path):
    """It died between two renames: that of its predecessor, and its own."""
    model, optimizer = run
    checkpoint.save(tmp_path, model, optimizer, step=1)
    digest = runs.digest(model)
    place = tmp_path / "step-00000001"
    place.rename(tmp_path / "step-00000001.replaced")
    step, other, _ = loaded(tmp_path)
    assert (step, runs.digest(other)) == (1, digest)
    checkpoint.save(tmp_path, model, optimizer, step=2)
    assert listing(tmp_path) == ["step-00000001", "step-00000002"]


def test_nothing_is_removed_that_is_not_the_packages_own(run, tmp_path):
    """What looks like a checkpoint of somebody else's, or is in the way, stays."""
    for name in (
        "step-3/.metadata",
        "step-4/__0_0.distcp",
        "step-00000005/notes",
        "step-x/extra.pt",
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "step-00000006").symlink_to(tmp_path / "step-3")
    before = {*tmp_path.rglob("*")}
    checkpoint.save(tmp_path, *run, step=1, keep=1)
    assert before <= {*tmp_path.rglob("*")}
    for step in (5, 6):
        with pytest.raises(FileExistsError, match="is no checkpoint"):
            checkpoint.save(tmp_path, *run, step=step)
    assert before <= {*tmp_path.rglob("*")}
    assert not [*tmp_path.glob("*partial*")]


def _load_into(rank: int, folder: Path, limit: int) -> tuple[str, bool]:
    model, optimizer = runs.build("replicated", seed=1, max_preconditioner_dim=limit)
    before = runs.digest(model)
    try:
        checkpoint.load(folder, model, optimizer)
    except BlockGridMismatchError as error:
        return str(error), before == runs.digest(model)
    return "", before == runs.digest(model)


@pytest.mark.parametrize("world", [1, 2])
def test_other_blocks_are_refused_with_both_values(ranks, run, tmp_path, world):
    checkpoint.save(tmp_path, *run, step=1)
    for message, is_untouched in ranks.returns(_load_into, world, tmp_path, 4):
        assert message.startswith(
            "0.weight was saved with max_preconditioner_dim=5, this optimizer"
        )
        assert "uses 4. Build the optimizer with the values of the checkpoint" in message
        assert is_untouched


def test_another_limit_that_cuts_the_same_blocks_is_none(tmp_path):
    model, optimizer = runs.build("replicated", max_preconditioner_dim=64)
    runs.train(model, optimizer, range(runs.SAVED))
    checkpoint.save(tmp_path, model, optimizer, step=1)
    assert _load_into(0, tmp_path, 80) == ("", False)


def test_groups_may_come_in_another_order(tmp_path):
    """DCP knows them by the names of their parameters."""

    def build(order: int) -> tuple[nn.Module, Shampoo]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12))
        groups = [
            {"params": list(layer.parameters()), "max_preconditioner_dim": limit}
            for layer, limit in zip(model, (8, 16), strict=True)
        ]
        return model, Shampoo(groups[::order], lr=0.1, precondition_frequency=1)

    def train(model: nn.Module, optimizer: Shampoo) -> None:
        for seed in range(3):
            batch = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

    model, optimizer = build(1)
    train(model, optimizer)
    checkpoint.save(tmp_path, model, optimizer, step=3)
    train(model, optimizer)
    other, loader = build(-1)
    checkpoint.load(tmp_path, other, loader)
    assert [group["max_preconditioner_dim"] for group in loader.param_groups] == [16, 8]
    train(other, loader)
    assert runs.digest(other) == runs.digest(model)
    loader.param_groups[0]["max_preconditioner_dim"] = 8
    with pytest.raises(BlockGridMismatchError, match=r"1.weight was saved.*=16, this .* uses 8"):
        checkpoint.load(tmp_path, other, loader)


def test_the_newest_are_kept(run, tmp_path):
    for step in (9, 10, 11, 100):
        checkpoint.save(tmp_path, *run, step=step, keep=2)
    assert listing(tmp_path) == ["step-00000011", "step-00000100"]
    assert loaded(tmp_path)[0] == 100
    checkpoint.save(tmp_path, *run, step=101)
    assert len(listing(tmp_path)) == 3
    # A run that began anew in the same folder does not lose what it has just saved.
    checkpoint.save(tmp_path, *run, step=1, keep=2)
    assert listing(tmp_path) == ["step-00000001", "step-00000100", "step-00000101"]


def test_a_checkpoint_is_there_until_the_one_of_the_same_step_replaces_it(
    run, tmp_path, monkeypatch
):
    model, optimizer = run
    checkpoint.save(tmp_path, model, optimizer, step=1)
    before = runs.digest(model)
    runs.train(model, optimizer, [1])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", _out_of_space_for("step-00000001", Path.rename))
        with pytest.raises(OSError, match="no space"):
            checkpoint.save(tmp_path, model, optimizer, step=1)
    step, other, _ = loaded(tmp_path)
    assert step == 1
    assert runs.digest(other) == before
    checkpoint.save(tmp_path, model, optimizer, step=1)
    assert runs.digest(loaded(tmp_path)[1]) == runs.digest(model)
    assert listing(tmp_path) == ["step-00000001"]


def _out_of_space_for(name: str, rename: Any) -> Any:
    """Renames, but not from what is partial to this name."""

    def try_it(path: Path, target: Path) -> Any:
        if ".partial-" in path.name and target.name == name:
            raise OSError("no space left on device")
        return rename(path, target)

    return try_it


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        *(({"step": bad}, "Must be an integer >= 0") for bad in (-1, True, 1.0, "3", 10**5000)),
        *(({"step": 1, "keep": bad}, "Must be >= 1") for bad in (0, True, 1.5, "a")),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_bad_values_are_refused(run, tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        checkpoint.save(tmp_path, *run, **wrong)
    assert list(tmp_path.iterdir()) == []


def test_schedulers_are_saved_too(run, tmp_path):
    model, optimizer = run
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    runs.train(model, optimizer, range(3))
    scheduler.step()
    checkpoint.save(tmp_path, model, optimizer, step=3, extra={"scheduler": scheduler})
    other, its_optimizer = runs.build("replicated", seed=1)
    its_scheduler = torch.optim.lr_scheduler.ExponentialLR(its_optimizer, 0.5)
    checkpoint.load(tmp_path, other, its_optimizer, extra={"scheduler": its_scheduler})
    assert its_scheduler.last_epoch == 1
    assert its_optimizer.param_groups[0]["lr"] == 0.025
    with pytest.raises(KeyError, match=r"no extra \['sampler'\]. It has \['scheduler'\]"):
        checkpoint.load(tmp_path, other, its_optimizer, extra={"sampler": its_scheduler})


@pytest.mark.parametrize("moment", ["before the first step", "after it"])
def test_gradients_are_neither_in_the_way_nor_lost(run, tmp_path, moment):
    """DCP fills an empty state by a step on zero gradients, unless it finds others."""
    model, optimizer = run
    if moment == "after it":
        runs.train(model, optimizer, [0])
    grads = [torch.randn_like(param) for param in model.parameters()]
    for param, grad in zip(model.parameters(), grads, strict=True):
        param.grad = grad
    checkpoint.save(tmp_path, model, optimizer, step=1)
    other, its_optimizer = runs.build("replicated", seed=1)
    for param in other.parameters():
        param.grad = torch.ones_like(param)
    assert checkpoint.load(tmp_path, other, its_optimizer) == 1
    for param, its, grad in zip(model.parameters(), other.parameters(), grads, strict=True):
        assert param.grad is grad
        its.grad = grad.clone()
    optimizer.step()
    its_optimizer.step()
    assert runs.digest(other) == runs.digest(model)


class Malicious:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)

    def state_dict(self) -> dict[str, Any]:
        return {"payload": self}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError("must not come so far")


@pytest.mark.parametrize("where", ["extra", "group", "state"])
def test_what_could_not_be_loaded_is_refused_when_it_is_saved(run, tmp_path, where):
    folder, (_, optimizer) = tmp_path / "checkpoints", run
    bad = Malicious(tmp_path / "executed")
    if where != "extra":
        holder = optimizer.param_groups[0]
        if where == "state":
            runs.train(*run, [0])
            holder = optimizer.state[holder["params"][0]]
        holder["hook"] = bad
        with pytest.raises(CheckpointException, match=r"Invalid optimizer.*hook of type Malicious"):
            checkpoint.save(folder, *run, step=1)
        assert listing(folder) == []
        return
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoint.save(folder, *run, step=1, extra={"x": Malicious(tmp_path / "executed")})
    assert loaded(folder)[0] is None


def _save(rank: int, folder: Path, layout: str) -> str:
    model, optimizer = runs.build(layout)
    for step in range(runs.SAVED):
        runs.train(model, optimizer, [step])
        checkpoint.save(folder, model, optimizer, step=step + 1, keep=2)
        assert (folder / f"step-{step + 1:08d}" / "complete").exists()
    runs.train(model, optimizer, range(runs.SAVED, runs.STEPS))
    return runs.digest(model)


def _resume(rank: int, folder: Path, layout: str) -> str:
    model, optimizer = runs.build(layout, seed=1)
    step = checkpoint.load(folder, model, optimizer)
    assert step == runs.SAVED
    runs.train(model, optimizer, range(step, runs.STEPS))
    return runs.digest(model)


def test_ranks_that_save_together_resume_as_others(ranks, tmp_path):
    straight, same = ranks.returns(_save, 2, tmp_path, "replicated")
    assert same == straight
    assert len(listing(tmp_path)) == 2
    for world, layout in ((2, "replicated"), (3, "fsdp"), (1, "replicated")):
        assert ranks.returns(_resume, world, tmp_path, layout) == [straight] * world


def _save_where_it_cannot(rank: int, folder: Path) -> None:
    checkpoint.save(folder, *runs.build("replicated"), step=1)


def test_all_ranks_hear_of_an_error_of_the_first(ranks, tmp_path):
    (tmp_path / "file").touch()
    for error in ranks.run(_save_where_it_cannot, 2, tmp_path / "file"):
        assert isinstance(error, OSError)
