"""The snippets of docs/metrics.md, run as they stand, offline."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE
from torch import nn

from shampoo import Shampoo
from shampoo.commands.log import read_log

DOCUMENT = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
NEEDS = "the extra: pip install 'shampoo[loggers]'"


def block(word: str) -> str:
    """The one snippet that has a word in it."""
    [found] = [each for each in BLOCKS if word in each]
    return found


class Run:
    """What the snippets take for granted: a model that trains, and a folder."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
        self.optimizer = Shampoo(self.model, lr=1e-2)
        self.optimizer.record_metrics(every=10)
        self.seen: dict[int, dict[str, float]] = {}
        self.names = {
            "optimizer": self.optimizer,
            "folder": str(folder),
            "train": self.train,
            "loss": lambda: float(self.last),
        }

    def train(self, step: int) -> None:
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(4, 6)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.last = loss.detach()
        if step % 10 == 0:
            self.seen[step] = self.optimizer.metrics()

    def execute(self, word: str) -> dict[str, Any]:
        exec(block(word), self.names)
        assert self.seen.keys() == {10, 20}
        assert len(self.seen[20]) > 25
        return self.names


@pytest.mark.frameworks
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason=NEEDS)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(tmp_path)
    run.execute("SummaryWriter")
    events = EventAccumulator(str(tmp_path)).Reload()
    for name, value in run.seen[20].items():
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found.keys() == {10, 20}, name
        assert found[20] == pytest.approx(value, rel=1e-6)
    data = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"shampoo/matrices/betas.0" in data


@pytest.mark.frameworks
def test_tensorboard_takes_no_group(tmp_path):
    """Which is why there is `hparams()`; a logger that learns to may make it needless."""
    pytest.importorskip("tensorboard", reason=NEEDS)
    from torch.utils.tensorboard import SummaryWriter

    run = Run(tmp_path)
    writer = SummaryWriter(tmp_path)
    with pytest.raises(ValueError, match="value should be one of"):
        writer.add_hparams(dict(run.optimizer.param_groups[0]), {})
    writer.add_hparams(run.optimizer.hparams(), {})
    writer.close()


@pytest.mark.frameworks
def test_weights_and_biases(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason=NEEDS)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged: dict[int, dict[str, float]] = {}
    plain = wandb.sdk.wandb_run.Run.log

    def log(self: Any, data: dict[str, Any], step: int | None = None, **others: Any) -> None:
        logged[step] = dict(data)
        plain(self, data, step=step, **others)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", log)
    run = Run(tmp_path)
    names = run.execute("wandb.init")
    assert logged == run.seen
    assert names["run"].config["shampoo/matrices/lr"] == 1e-2
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    end = time.monotonic() + PATIENCE  # another process writes it
    while b"shampoo/matrices/update_rms" not in (held := file.read_bytes()):
        assert time.monotonic() < end, held
        time.sleep(0.1)


@pytest.mark.frameworks
def test_mlflow(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason=NEEDS)
    run = Run(tmp_path)
    run.execute("mlflow.start_run")
    client = mlflow.MlflowClient()
    [found] = client.search_runs(["0"])
    assert found.data.params["shampoo/vectors/betas.1"] == "0.95"
    for name, value in run.seen[20].items():
        history = {m.step: m.value for m in client.get_metric_history(found.info.run_id, name)}
        assert history.keys() == {10, 20}
        assert history[20] == value


def test_lines_of_json(tmp_path):
    run = Run(tmp_path)
    run.execute("json.dumps")
    log = read_log(tmp_path / "metrics.jsonl")
    assert log["shampoo/update_rms"] == [
        (step, numbers["shampoo/update_rms"]) for step, numbers in run.seen.items()
    ]
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    numbers = json.loads(last, parse_constant=pytest.fail)  # no NaN, no Infinity
    assert numbers["step"] == 20


def test_the_loop(capsys):
    names: dict[str, Any] = {
        "Shampoo": Shampoo,
        "model": nn.Linear(6, 3),
        "batches": [torch.randn(4, 6) for _ in range(20)],
    }
    exec(block("record_metrics(every=10)"), names)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["10", "20"]


@pytest.mark.frameworks
def test_accelerate_shows_what_was_skipped():
    accelerate = pytest.importorskip("accelerate", reason="no accelerate to prepare an optimizer")
    accelerator = accelerate.Accelerator(cpu=True)
    model, prepared = accelerator.prepare(model := nn.Linear(4, 4), Shampoo(model.parameters()))
    names = {"prepared": prepared, "skipped": 0}
    for bad in (1.0, torch.nan, torch.inf, 2.0):
        prepared.zero_grad()
        accelerator.backward((model(torch.randn(3, 4)) * bad).sum())
        prepared.step()
        exec(block("last_step_skipped"), names)
    assert names["skipped"] == 2


def test_every_key_is_documented():
    table = DOCUMENT.partition("## 1. Keys")[2].partition("## 2.")[0]
    documented = set(re.findall(r"`(_?[a-z_]+)`", table))
    opt = Shampoo(model := nn.Linear(6, 9))
    opt.record_metrics()
    model(torch.randn(3, 6)).sum().backward()
    opt.step()
    names = {key.rpartition("/")[2] for key in opt.metrics()}
    assert {"graft_scale", "root_error"} <= names
    assert names - documented == {"eig_over_ridge_max"}  # which is there as `_max`
    assert "_max" in documented
