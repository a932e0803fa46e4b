"""The planner's errors, and its command."""

import itertools
import json
import math
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
        ((MODEL, 0), "Invalid world_size=0. Must be an integer >= 1 and <= 1048576."),
        ((MODEL, 2.0), "Invalid world_size=2.0. Must be an integer"),
        (([], 1), "nothing to train"),
        (([(0, 3)], 1), "nothing to train"),
        (([(3, -1)], 1), r"Invalid shape [3, -1] of 'tensor0'. Must be a list of integers >= 0"),
        (({"w": 3}, 1), "Invalid shape 3 of 'w'"),
        ((nn.ReLU(), 1), "nothing to train"),
        ((3, 1), "Invalid model_or_shapes=3. Must be a module, or shapes"),
        (([(True, 3)], 1), "Invalid shape [True, 3] of 'tensor0'"),
        (([(10**400, 3)], 1), "Invalid shape [1e400 or so, 3] of 'tensor0'. Must be a list"),
        (
            ([(10**18, 10**18)], 1),
            "Must have at most 8 dimensions and 1152921504606846976 elements",
        ),
        (([(1,) * 9], 1), "Must have at most 8 dimensions"),
        ((itertools.repeat((3, 3)), 1), "more than 65536 shapes. Must be fewer"),
        (([(3,) * 8] * 1025, 1), "1025 tensors with 262400 corners. Must have at most 262144"),
        (({"a\x1b[2J": (3, 3)}, 1), r"Invalid name 'a\x1b[2J'. Must have characters"),
        (({"\ud800": (3, 3)}, 1), r"Invalid name '\ud800'"),
        ((MODEL, 10**9), "Invalid world_size=1000000000. Must be an integer >= 1 and <= 1048576"),
        ((MODEL, 10**6000), "Invalid world_size=1e6000 or so"),
        ((MODEL, True), "Invalid world_size=True"),
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
        ({"devices_per_node": 10**9}, "Invalid devices_per_node=1000000000. Must be an integer"),
        ({"layout": "hsdp", "replicas": 10**10}, "Invalid replicas=10000000000. Must be an int"),
        ({"num_trainers_per_group": 10**5000}, "num_trainers_per_group=1e5000 or so. Must be"),
        ({"network_bandwidth": 0.0}, "Invalid network_bandwidth=0.0. Must be a number >= 1"),
        ({"island_bandwidth": 10**400}, "Invalid island_bandwidth=1e400 or so. Must be"),
        ({"island_bandwidth": math.nan}, "Invalid island_bandwidth=nan"),
        ({"island_bandwidth": "fast"}, "Invalid island_bandwidth='fast'"),
        ({"block_candidates": (8,) * 65}, "Must be a sequence of at most 64 integers"),
        ({"block_candidates": 8}, "Invalid block_candidates=8"),
        ({"block_candidates": (512, 0)}, "Invalid block_candidates[1]=0"),
        ({"grafted_only": ["embed*"]}, "Invalid grafted_only='embed*'. Must match a name, such as"),
        ({"grafted_only": "embed*"}, "Invalid grafted_only='embed*'"),
        ({"grafted_only": [3]}, "Invalid grafted_only=3. Must match a name"),
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


def test_too_many_blocks_are_refused_before_they_are_made():
    with pytest.raises(ValueError, match="Must be longer: it cuts 16,777,216 blocks, of which a"):
        plan([(4096, 4096)], 4, max_preconditioner_dim=1, large_dim_method="blocking")
    shape, side = (1 << 15, 1 << 15), 64  # 262,144 blocks; the candidate of 1 has 2^30
    report = plan([shape], 1, max_preconditioner_dim=1 << 15, block_candidates=(1,))
    assert report.recommended_block == 1 << 15
    assert report.blocks == 1, side


@pytest.mark.parametrize("schedule", ["together", "staggered"])
def test_a_period_costs_nothing_by_its_length(schedule):
    """A plan for a billion steps takes the time and memory of one for 10."""
    mean = {}
    for frequency in (100, 10**15):
        report = plan(
            {"w": (64, 48)}, 4, precondition_frequency=frequency, refresh_schedule=schedule
        )
        mean[frequency] = report.staggered.mean
        assert report.staggered.mean <= report.staggered.worst
    assert mean[10**15] < mean[100]


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


def refused(monkeypatch, capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert all(line.isprintable() for line in said.splitlines())
    assert len(said) < 5000
    return said


def test_command_names_what_is_wrong(tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken.json"
    for content, words in (
        ("{", "broken.json': it is not JSON"),
        ("[" * 100_000, "broken.json': it is nested too deeply"),
        ("[[1%s]]" % ("0" * 5000), "it has an integer of 5001 digits"),
        ("[[NaN, 4]]", "it has NaN"),
        ("3", "it is 3. Must be one of"),
        ('{"\\ud800": [3, 3]}', r"Invalid name '\ud800'"),
        ('{"a": "12"}', "Invalid shape '12' of 'a'"),
    ):
        broken.write_text(content)
        assert words in refused(monkeypatch, capsys, broken, "--world-size", 4)
    for model, words in (
        ("lama-7b", "No such file or directory. Must be one of resnet50, vit"),
        ("x" * 5000, "File name too long"),
        ("a\x1b[2J", r"Invalid model='a\x1b[2J'"),
        ("/dev/zero", "it is not a file"),
        ("/", "Is a directory"),
    ):
        assert words in refused(monkeypatch, capsys, model, "--world-size", 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--world-size", "1" + "0" * 5000), "invalid int value"),
        (("--world-size", 4, "--layout", "\x1b[2J"), "invalid choice"),
        (("--world-size", 4, "--\x1b]0;owned\x07"), r"unrecognized arguments: --\x1b]0;owned\x07"),
        (("--world-size", 4, "--grafted-only", "\x1b*"), r"grafted_only='\x1b*'"),
        (("--world-size", 4, "--cost-model", "/dev/zero"), "Invalid '/dev/zero': it is not a file"),
        (("--world-size", 4, "--cost-model", "a\x1b"), r"Invalid 'a\x1b': it cannot be read"),
        (("--world-size", 4, "--block", "1" + "0" * 400), "max_preconditioner_dim=1e400 or so"),
        (("--world-size", 4, "--frequency", "1" + "0" * 400), "precondition_frequency=1e400 or so"),
    ],
)
def test_command_repeats_nothing_that_a_terminal_would_obey(monkeypatch, capsys, arguments, words):
    assert words in refused(monkeypatch, capsys, "resnet50", *arguments)


def test_facts_escape_what_the_environment_says(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shampoo", "--no-build"])
    monkeypatch.setenv("SHAMPOO_CACHE_DIR", "/tmp/a\x1b[2J")
    assert main() == 0
    assert "/tmp/a\\x1b[2J" in capsys.readouterr().out
    monkeypatch.setenv("SHAMPOO_BACKEND", "\x1b[2J")
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert r"Invalid SHAMPOO_BACKEND='\x1b[2J'. Must be one of" in capsys.readouterr().err
