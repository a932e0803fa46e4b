"""The state in a safetensors file: what other programs find in it, and back to the bit."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import resharded_runs as runs
import torch
import torch.distributed as dist
from ranks import Ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from shampoo import DamagedCheckpointError, IncompleteCheckpointError, Shampoo, checkpoint


@pytest.fixture
def trained() -> tuple[nn.Module, Shampoo]:
    model, optimizer = runs.build("replicated")
    runs.train(model, optimizer, range(runs.SAVED))
    return model, optimizer


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [runs.whole(param).clone() for param in model.parameters()]


def resumed(path: Path, values: list[torch.Tensor], layout: str, **hyper: Any) -> str:
    """The digest of a run that goes on from a file, in another model."""
    model, optimizer = runs.build(layout, seed=1, **hyper)
    with torch.no_grad():
        for param, value in zip(model.parameters(), values, strict=True):
            param.copy_(runs.placed(value, param))
    checkpoint.import_safetensors(path, optimizer)
    runs.train(model, optimizer, range(runs.SAVED, runs.STEPS))
    return runs.digest(model)


def test_the_file_has_every_entry_by_the_name_of_its_parameter(trained, tmp_path):
    model, optimizer = trained
    checkpoint.export_safetensors(tmp_path / "state.safetensors", optimizer)
    found = load_file(tmp_path / "state.safetensors")
    expected = {
        f"{name}/{key}": value
        for name, param in model.named_parameters()
        for key, value in optimizer.state[param].items()
    }
    assert "0.weight/block0.factor1" in expected
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        groups = json.loads(file.metadata()["param_groups"])
    assert [group["params"] for group in groups] == [
        ["0.weight", "0.bias", "1.weight", "1.bias"],
        ["2.weight", "2.bias", "3.weight", "3.bias"],
    ]
    assert groups[1]["refresh_schedule"] == "staggered"
    assert os.listdir(tmp_path) == ["state.safetensors"]


def test_a_run_goes_on_to_the_bit(trained, tmp_path):
    model, optimizer = trained
    checkpoint.export_safetensors(tmp_path / "state", optimizer)
    values = weights(model)
    runs.train(model, optimizer, range(runs.SAVED, runs.STEPS))
    assert resumed(tmp_path / "state", values, "replicated", lr=1.0) == runs.digest(model)


def _export(rank: int, path: Path, layout: str) -> tuple[list[torch.Tensor], str]:
    model, optimizer = runs.build(layout)
    runs.train(model, optimizer, range(runs.SAVED))
    checkpoint.export_safetensors(path, optimizer)
    values = weights(model)
    runs.train(model, optimizer, range(runs.SAVED, runs.STEPS))
    return values, runs.digest(model)


def _resume(rank: int, path: Path, values: list[torch.Tensor], layout: str) -> str:
    return resumed(path, values, layout)


@pytest.mark.parametrize(("layout", "other"), [("fsdp", "replicated"), ("replicated", "fsdp")])
def test_ranks_write_one_file_and_others_go_on_from_it(ranks: Ranks, tmp_path, layout, other):
    path = tmp_path / "state"
    values, digest = ranks.returns(_export, 2, path, layout)[0]
    assert ranks.returns(_resume, 3, path, values, other) == [digest] * 3
    assert resumed(path, values, "replicated") == digest


def _fail(rank: int, path: Path) -> str:
    model, optimizer = runs.build("replicated")
    runs.train(model, optimizer, range(2))
    try:
        checkpoint.export_safetensors(path, optimizer)
    except OSError as error:
        dist.barrier()
        return type(error).__name__
    return ""


def test_all_ranks_raise_where_the_first_cannot_write(ranks: Ranks, tmp_path):
    (tmp_path / "state").mkdir()
    assert ranks.returns(_fail, 2, tmp_path / "state") == ["IsADirectoryError"] * 2
    assert os.listdir(tmp_path) == ["state"]


def _lack(rank: int, path: Path) -> str:
    """Each rank has a model of its own, as stages of a pipeline have."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("stage", "shard"))["shard"]
    param = nn.Parameter(distribute_tensor(torch.ones(4 + rank, 3), mesh, [Shard(0)]))
    optimizer = Shampoo([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    try:
        checkpoint.export_safetensors(path, optimizer)
    except ValueError as error:
        return str(error)
    return ""


def test_all_ranks_raise_where_the_first_holds_other_parameters(ranks: Ranks, tmp_path):
    said = ranks.returns(_lack, 2, tmp_path / "state")
    assert "rank 1 has [['0', [5, 3]]], rank 0 has [['0', [4, 3]]]. Must be" in said[0]
    assert said[1] == said[0]
    assert os.listdir(tmp_path) == []


def test_a_rate_on_the_device_and_a_state_without_names_go_through_too(tmp_path):
    def build(lr: float) -> Shampoo:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3).bfloat16())]
        return Shampoo(params, lr=torch.tensor(lr), betas=(0.5, 0.75))

    first, second = build(0.1), build(0.2)
    for each in first.param_groups[0]["params"]:
        each.grad = torch.ones_like(each)
    first.step()
    checkpoint.export_safetensors(tmp_path / "state", first)
    checkpoint.import_safetensors(tmp_path / "state", second)
    assert load_file(tmp_path / "state")["param_groups.0/lr"] == torch.tensor(0.1)
    assert "1/block0.exp_avg" in load_file(tmp_path / "state")
    one, two = first.state_dict(), second.state_dict()
    assert one["param_groups"][0] == two["param_groups"][0]
    assert one["state"][0].keys() == two["state"][0].keys()
    torch.testing.assert_close(two["state"], one["state"], rtol=0, atol=0)


def test_parameters_in_another_order_are_found_by_their_names(trained, tmp_path):
    model, optimizer = trained
    checkpoint.export_safetensors(tmp_path / "state", optimizer)
    named = list(model.named_parameters())
    groups = [{"params": named[3::-1]}, {"params": named[:3:-1], "refresh_schedule": "staggered"}]
    other = Shampoo(groups, **runs.HYPER)
    checkpoint.import_safetensors(tmp_path / "state", other)
    for name, param in named:
        assert other.state[param].keys() == optimizer.state[param].keys(), name
        for key, value in optimizer.state[param].items():
            assert torch.equal(other.state[param][key], value), (name, key)


def test_names_that_the_file_has_for_groups_are_refused(tmp_path):
    param = nn.Parameter(torch.ones(4, 3))
    optimizer = Shampoo([{"params": [("param_groups.0", param)]}])
    param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(ValueError, match=r"Invalid names=\['param_groups.0'\]. Must not be"):
        checkpoint.export_safetensors(tmp_path / "state", optimizer)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [float("inf"), {1: 2}, (1, (2,)), {1, 2}])
def test_what_would_not_come_back_is_refused(trained, tmp_path, value):
    _, optimizer = trained
    optimizer.param_groups[0]["note"] = value
    try:
        with pytest.raises(ValueError, match=r"Invalid note=.* of a parameter group\. Must be"):
            checkpoint.export_safetensors(tmp_path / "state", optimizer)
    finally:
        del optimizer.param_groups[0]["note"]
    assert os.listdir(tmp_path) == []


def test_other_parameters_are_refused_by_their_names(trained, tmp_path):
    model, optimizer = trained
    checkpoint.export_safetensors(tmp_path / "state", optimizer)
    other = Shampoo([{"params": list(model[0].named_parameters())}])
    with pytest.raises(ValueError, match=r"Invalid groups of parameters: .* Must be .*'weight'"):
        checkpoint.import_safetensors(tmp_path / "state", other)
    assert not other.state


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (None, "not JSON"),
        ({"param_groups": "[" * 100_000}, "nested too deeply"),
        ({"param_groups": "[3]"}, "a parameter group is 3"),
        ({"param_groups": '[{"params": [{}]}]'}, "a list of names"),
        ({"param_groups": '[{"params": [], "lr": NaN}]'}, "NaN"),
    ],
)
def test_a_file_of_something_else_is_named(trained, tmp_path, metadata, words):
    save_file({"0.weight/step": torch.zeros(())}, tmp_path / "state", metadata)
    with pytest.raises(DamagedCheckpointError, match=rf"state is not .*{words}"):
        checkpoint.import_safetensors(tmp_path / "state", trained[1])


def test_a_file_that_is_cut_or_lacks_state_is_refused(trained, tmp_path):
    _, optimizer = trained
    path = tmp_path / "state"
    checkpoint.export_safetensors(path, optimizer)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    before = {name: value.clone() for name, value in load_file(path).items()}
    refused = {
        IncompleteCheckpointError: {k: v for k, v in before.items() if "block1." not in k},
        ValueError: {**before, "4.weight/step": torch.zeros(())},
    }
    for error, tensors in refused.items():
        save_file(tensors, path, metadata)
        with pytest.raises(error):
            checkpoint.import_safetensors(path, optimizer)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DamagedCheckpointError, match="state is not"):
        checkpoint.import_safetensors(path, optimizer)
    checkpoint.export_safetensors(path, optimizer)
    torch.testing.assert_close(load_file(path), before, rtol=0, atol=0)


def test_without_the_package_the_extra_is_named(trained, tmp_path, monkeypatch):
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (checkpoint.export_safetensors, checkpoint.import_safetensors):
        with pytest.raises(ImportError, match=r"pip install 'shampoo\[safetensors\]'"):
            call(tmp_path / "state", trained[1])
