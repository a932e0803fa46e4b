"""The planner's errors, and its command."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from shampoo import plan
from shampoo.__main__ import main
from shampoo.blocks.cost import CostModel
from shampoo.planner.architectures import ARCHITECTURES

MODEL = [(8, 8)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((MODEL, 0), "Invalid world_size=0. Must be an integer >= 1."),
        ((MODEL, 2.0), "Invalid world_size=2.0. Must be an integer"),
        (([], 1), "nothing to train"),
        (([(0, 3)], 1), "nothing to train"),
        (([(3, -1)], 1), r"Invalid shape (3, -1) of tensor0. Must be a list of integers >= 0."),
        (({"w": 3}, 1), "Invalid shape 3 of w"),
        ((nn.ReLU(), 1), "nothing to train"),
    ],
)
def test_bad_models_and_worlds_are_named(arguments, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        plan(*arguments)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layout": "fsdp"}, "Invalid layout='fsdp'. Must be one of ddp, fsdp2, hsdp."),
        ({"layout": "hsdp"}, "Invalid replicas=1. Must divide the 12 ranks and be >= 2"),
        ({"layout": "hsdp", "replicas": 5}, "one of 2, 3, 4, 6, 12"),
        ({"replicas": 2}, 'Must be 1 unless layout="hsdp"'),
        ({"num_trainers_per_group": 5}, "one of 1, 2, 3, 4, 6, 12."),
        ({"num_trainers_per_group": -2}, "Invalid num_trainers_per_group=-2"),
        ({"devices_per_node": 0}, "Invalid devices_per_node=0"),
        ({"network_bandwidth": 0.0}, "Invalid network_bandwidth=0.0. Must be > 0"),
        ({"block_candidates": (512, 0)}, "Invalid block_candidates[1]=0"),
        ({"grafted_only": ["embed*"]}, "Invalid grafted_only='embed*'. Must match a name, such as"),
        ({"grafted_only": "embed*"}, "Invalid grafted_only='embed*'"),
        ({"parameter_dtype": "bfloat16"}, "Invalid parameter_dtype='bfloat16'. Must be a floating"),
        ({"communication_dtype": torch.int8}, "Invalid communication_dtype=torch.int8"),
        ({"precondition_frequency": 0}, "Invalid precondition_frequency=0"),
        ({"grafting": "adagard"}, "Invalid grafting='adagard'"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        plan(MODEL, 12, **arguments)
    assert words in str(error.value)


def test_an_argument_shampoo_does_not_have_is_refused():
    with pytest.raises(TypeError, match="'block_size', which is not an argument of Shampoo"):
        plan(MODEL, 1, block_size=3)


def test_command_prints_the_same_numbers_in_every_process(tmp_path):
    arguments = ["vit-l16", "--world-size", "64", "--layout", "fsdp2", "--dtype", "bfloat16"]
    command = [sys.executable, "-m", "shampoo", "plan", *arguments, "--json", "--frequency", "50"]
    outputs = [
        subprocess.run(
            command,
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=tmp_path,
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    expected = plan(
        ARCHITECTURES["vit-l16"]().shapes,
        64,
        layout="fsdp2",
        parameter_dtype=torch.bfloat16,
        precondition_frequency=50,
    )
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0]) == json.loads(json.dumps(expected.to_json()))


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["shampoo", "plan", *map(str, arguments)])
    return main()


def test_command_reads_shapes_and_a_cost_model(tmp_path, monkeypatch, capsys):
    shapes, model = tmp_path / "shapes.json", tmp_path / "model.json"
    shapes.write_text(json.dumps({"embed": [40, 6], "head": [10, 6]}))
    constants = CostModel(machine="a machine of tests").to_json()
    model.write_text(json.dumps({"cost_model": constants}))
    options = ("--world-size", 4, "--block", 4, "--group", 2, "--cost-model", model)
    assert command(monkeypatch, shapes, *options, "--grafted-only", "emb*") == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["layout"] == "ddp, 4 ranks: groups of 2 share the blocks"
    assert lines["blocks"] == "26 of at most 4 a side, 6 with factors"
    assert lines["model"] == "of cost  a machine of tests"
    assert "num_trainers_per_group=4" in lines["recommended"]


def test_command_names_what_is_wrong(tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for model, words in ((broken, "broken.json is not JSON"), ("lama-7b", "one of resnet50, vit")):
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, model, "--world-size", 4)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
