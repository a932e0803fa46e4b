"""`python -m shampoo explain`: the table that the optimizer of that model gives."""

import json
import math
import os
import sys
from typing import Any

import pytest
import torch
from torch import nn

from shampoo import Shampoo, plan
from shampoo.__main__ import main
from shampoo.commands.explain import explanation_of, read_model
from shampoo.planner.architectures import ARCHITECTURES


def build() -> nn.Module:
    return nn.Sequential(nn.Embedding(30, 12), nn.Flatten(), nn.Linear(48, 20), nn.LayerNorm(20))


def said(capsys: Any, monkeypatch: Any, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["shampoo", "explain", *arguments])
    assert main() == 0
    return capsys.readouterr().out


def test_an_import_path_gives_what_the_optimizer_of_the_model_says(capsys, monkeypatch):
    path = f"{__name__}:build"
    assert {param.device.type for param in read_model(path).parameters()} == {"meta"}
    expected = Shampoo(build(), max_preconditioner_dim=16, momentum=0.9).explain()
    table = said(capsys, monkeypatch, path, "--block", "16", "--momentum", "0.9")
    assert table.rstrip("\n") == str(expected)


def test_shapes_are_those_of_parameters(capsys, monkeypatch):
    params = [nn.Parameter(torch.empty(shape)) for shape in ((70, 40), (9,), (3, 4, 5))]
    names = [(f"tensor{index}", param) for index, param in enumerate(params)]
    expected = Shampoo(names, max_preconditioner_dim=1024, preconditioner="kl_shampoo").explain()
    table = said(capsys, monkeypatch, "70x40,9,3x4x5", "--preconditioner", "kl_shampoo")
    assert table.rstrip("\n") == str(expected)


@pytest.mark.parametrize("name", ["resnet50", "gpt2"])
def test_known_models_hold_what_the_planner_says(capsys, monkeypatch, name):
    rows = json.loads(said(capsys, monkeypatch, name, "--json", "--block", "512"))
    report = plan(ARCHITECTURES[name]().shapes, 1, max_preconditioner_dim=512)
    assert rows["numel"] == ARCHITECTURES[name]().numel
    counts = 8 * len(rows["tensors"])
    assert rows["state_bytes"] - counts == pytest.approx(max(report.state_bytes), rel=1e-3)
    assert len(rows["tensors"]) == len(ARCHITECTURES[name]().shapes)


def test_a_file_of_shapes(tmp_path, capsys, monkeypatch):
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"embed": [500, 8], "mlp": [32, 8], "norm": [32]}))
    found = said(capsys, monkeypatch, str(path), "--grafted-only", "embed*", "--json")
    rows = {row["name"]: row for row in json.loads(found)["tensors"]}
    assert rows["embed"]["kind"] == "grafted"
    assert rows["mlp"]["kind"] == "shampoo"
    assert rows["embed"]["start"] is None
    assert math.prod(rows["mlp"]["shape"]) == 256


def test_patterns_split_the_groups_of_a_module():
    found = explanation_of(build(), torch.float32, ["2.*"], {})
    groups = {row.name: row.group_name for row in found.tensors}
    assert groups["2.weight"] == "matrices, grafted only"
    assert groups["0.weight"] == "embeddings"
    assert {row.name: row.kind for row in found.tensors}["2.weight"] == "grafted"


def test_no_kernel_is_asked_for(monkeypatch):
    monkeypatch.setenv("SHAMPOO_BACKEND", "cuda")  # which insists, and raises
    assert explanation_of([[8, 8]], torch.float32, [], {}).blocks == 1
    assert os.environ["SHAMPOO_BACKEND"] == "cuda"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuch"], "or a JSON file of shapes, by name or in a list"),
        (["nosuch.module:build"], "ModuleNotFoundError"),
        (["torch.nn:Linear"], "Must be the import path of a callable without arguments"),
        (["torch:get_num_threads"], "it makes a int. Must make a torch.nn.Module."),
        (["8x8", "--grafted-only", "w"], "Must match a name, such as tensor0"),
        (["8x8", "--frequency", "0"], "precondition_frequency=0"),
        (["8x8", "--block", "0"], "max_preconditioner_dim=0"),
    ],
)
def test_bad_input_is_named(capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(sys, "argv", ["shampoo", "explain", *arguments])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("shapes", [[["8", 8]], {"w": 3}, [[-1, 2]], []])
def test_bad_shapes_are_named(shapes):
    with pytest.raises(ValueError, match=r"Must be a list of integers|at least one shape"):
        explanation_of(shapes, torch.float32, [], {})
