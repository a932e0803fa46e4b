"""The simulated study and the calibration: what they write is what the planner says and reads."""

import json
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

pytest.importorskip("matplotlib", reason="the plots need the extra: pip install 'shampoo[bench]'")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # after the installed package, which the checkout must not shadow

from benchmarks import calibrate, scale  # noqa: E402
from shampoo import Shampoo, plan  # noqa: E402
from shampoo.blocks.cost import CostModel  # noqa: E402
from shampoo.planner.architectures import ARCHITECTURES  # noqa: E402
from shampoo.step.block_plan import BlockPlan  # noqa: E402


def rows(document):
    return [line for line in document.read_text().splitlines() if line.startswith("| ")]


def test_the_document_is_what_the_command_writes_today(tmp_path):
    out = tmp_path / "scaling.md"
    models = ("resnet50", "vit-l16")
    assert scale.main(["--models", *models, "--ranks", "8", "512", "--out", str(out)]) == 0
    written = rows(out)
    assert sum(line.startswith(("| DDP", "| FSDP2", "| HSDP")) for line in written) == 2 * 4
    assert set(written) <= set(rows(ROOT / "docs/scaling.md"))
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize(("name", "world"), [("resnet50", 512), ("vit-l16", 8), ("llama-7b", 4096)])
def test_the_optimizer_plans_the_same_on_ranks_that_do_not_exist(name, world):
    shapes = ARCHITECTURES[name]().shapes
    report = plan(shapes, world, num_trainers_per_group=world, block_candidates=())
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes.values()]
    digests = set()
    for rank in {0, 5, world - 1}:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            optimizer = Shampoo(params, num_trainers_per_group=world)
            state = defaultdict(dict)
            real = BlockPlan(
                optimizer.param_groups, state, optimizer._process_groups, device="meta"
            )
        finally:
            dist.destroy_process_group()
        digests.add(real.digest)
        held = sum(view.nbytes for views in state.values() for view in views.values())
        assert report.state_bytes[rank] == held
    assert len(digests) == 1


def test_calibration_writes_a_model_the_planner_reads(tmp_path, capsys):
    path = tmp_path / "cost.json"
    arguments = ["--device", "cpu", "--sides", "4", "8", "--rounds", "1", "--seconds", "0"]
    assert calibrate.main([*arguments, "--json", str(path)]) == 0
    assert "coupled_newton" in capsys.readouterr().out
    found, model = json.loads(path.read_text()), CostModel.load(path)
    assert [side for side, _ in model.root] == [4, 8]
    assert model.root[1][1] * 8**3 == pytest.approx(found["roots_s"]["auto"]["8"])
    assert found["machine"]["command"].endswith(
        f"--json {path.name}"
    )  # and no path of this machine
    assert model.machine.startswith(found["machine"]["name"])
    report = plan([(8, 8)], 1, cost_model=model, block_candidates=())
    assert report.cost_model == model.machine
    assert min(report.compute_seconds) > 0


def test_predicted_steps_are_those_of_the_planner():
    row = {"model": "vit-b16", "block": 1024, "refresh": 10}
    ordinary, root = calibrate.predicted(row, CostModel())
    shapes = ARCHITECTURES["vit-b16"]().shapes
    report = plan(shapes, 1, precondition_frequency=10, block_candidates=())
    assert (9 * ordinary + root) / 10 == pytest.approx(report.together.mean)
    assert root == pytest.approx(report.together.worst)
    assert ordinary < root


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (calibrate, ["--sides", "0"], "Invalid --sides=0. Must be >= 1."),
        (calibrate, ["--rounds", "0"], "Invalid --rounds=0. Must be >= 1."),
        (scale, ["--ranks", "8", "0"], "Invalid --ranks=0. Must be >= 1."),
    ],
)
def test_bad_arguments_are_refused(module, arguments, message, capsys):
    with pytest.raises(SystemExit):
        module.parse(arguments)
    assert message in capsys.readouterr().err
