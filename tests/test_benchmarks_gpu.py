"""The GPU command on a CPU: a dry run, what its checks refuse, and the table that it writes."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark needs the extra: pip install 'shampoo[bench]'")
pytest.importorskip("matplotlib", reason="the plots need the extra: pip install 'shampoo[bench]'")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # after the installed package, which the checkout must not shadow

from benchmarks import contest, gpu, kernels, models, peers, roofline, shapes, steps, suite  # noqa: E402
from benchmarks.worker import Worker  # noqa: E402
from shampoo.ops import OPS, backends  # noqa: E402

CPU = torch.device("cpu")
ALL_CASES = suite.cases

GPU_TESTS = """
import os, pytest
pytestmark = pytest.mark.gpu

def test_passes(): pass
def test_fails(): assert os.environ["SHAMPOO_BACKEND"] == "triton"
def test_is_skipped(): pytest.skip("no GPU")
"""


@pytest.fixture
def tests_folder(tmp_path, monkeypatch):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_kernels.py").write_text(GPU_TESTS)
    (folder / "test_other.py").write_text("def test_without_a_mark(): assert False\n")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    monkeypatch.setattr(suite, "TESTS", folder)
    return folder


def few_cases(small):
    """One row of every section, the first of it, but every kernel once."""
    seen = set()
    for case in ALL_CASES(small):
        key = case["section"], case.get("op"), case.get("peer")
        if key not in seen and (case["section"] != "steps" or case["refresh"] == 10):
            seen.add(key)
            yield case


def numbers(content):
    """Every number under an object, with its path."""
    if isinstance(content, bool) or content is None or isinstance(content, str):
        return
    if isinstance(content, (int, float)):
        yield content
        return
    for value in content.values() if isinstance(content, dict) else content:
        yield from numbers(value)


def are_positive(content):
    found = list(numbers(content))
    return bool(found) and all(math.isfinite(value) and value > 0 for value in found)


def test_dry_run(tmp_path, monkeypatch, capsys, tests_folder):
    monkeypatch.setattr(suite, "cases", few_cases)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    target = tmp_path / "out" / "gpu.json"
    results = set(gpu.RESULTS.iterdir())
    status = gpu.main(["--device", "cpu", "--small", "--json", str(target)])
    assert set(gpu.RESULTS.iterdir()) == results
    assert "Kernels, median us" in capsys.readouterr().out
    report = json.loads(target.read_text())

    assert set(report) == {"machine", *suite.SECTIONS, "table", "seconds"}
    assert report["machine"]["torch"] == torch.__version__
    assert "--device cpu --small" in report["machine"]["command"]
    cuda, triton = report["tests"]
    assert (cuda["backend"], triton["backend"]) == ("cuda", "triton")
    assert (cuda["passed"], cuda["skipped"]) == (1, 1)
    assert cuda["failed"] == ["test_kernels::test_fails"]
    assert (triton["passed"], triton["failed"]) == (2, [])
    assert status == 1  # for the failing test
    for section in ("rates", "kernels", "roots", "steps", "training"):
        assert report[section], section
        assert all("error" not in row for row in report[section]), report[section]
    [rates] = report["rates"]
    assert are_positive([rates["copy_bytes_per_s"], rates["flops_per_s"]])
    assert {row["op"] for row in report["kernels"]} == set(kernels.MEASURED)
    for row in report["kernels"]:
        assert row["failures"] == {}
        assert all(row["passed"].values())
        assert "reference" in row["seconds"]
        assert are_positive([row["seconds"], row["roofline_s"], row["of_roofline"], row["bytes"]])
    for row in report["roots"]:
        assert {"torch.linalg.eigh", "eigh", "coupled_newton", "minimax"} <= set(
            row["seconds_per_matrix"]
        )
        assert are_positive([row["seconds_per_matrix"], row["relative_error"]])
        assert all(error < 0.1 for error in row["relative_error"].values())
    for row in report["steps"]:
        assert set(row["found"]) == {"adamw-fused", "muon", "shampoo"}
        assert are_positive(row["found"])
        assert row["found"]["adamw-fused"]["mean_over_adamw"] == 1.0
        assert row["found"]["shampoo"]["waits"] == ""
    for row in report["training"]:
        assert set(row["seconds"]) == {"adamw-fused", "shampoo"}
        assert are_positive([row["seconds"], row["mean_over_adamw"], row["median_over_adamw"]])
    assert {row["peer"] for row in report["peers"]} == set(peers.PEERS)
    for row in report["peers"]:  # what is not installed, or fails, is text
        assert isinstance(row["error"], str) if "error" in row else are_positive(row["found"])


def test_what_does_not_fit_into_the_budget_is_written_as_skipped(tmp_path):
    target = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--small", "--json", str(target), "--budget-seconds", "1e-6"]
    assert gpu.main(arguments) == 0
    report = json.loads(target.read_text())
    for section in suite.SECTIONS:
        assert report[section]
        for row in report[section]:
            assert row.get("skipped") == "skipped: budget" or "not installed" in row["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--budget-seconds", "0"], "Invalid --budget-seconds=0.0. Must be > 0"),
        (["--device", "cpu", "--write-table"], "Invalid --write-table with --device cpu"),
        (["--device", "cpu", "--sections", "eigh"], "invalid choice: 'eigh'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpu.parse(arguments)
    assert message in capsys.readouterr().err


def test_nothing_is_written_on_a_cpu_unless_told():
    assert gpu.parse(["--device", "cpu"]).json is None


def test_a_lost_worker_costs_one_row():
    worker = Worker("cpu")
    case = {"section": "rates", "small": True}
    try:
        assert worker.ask(case, 0.0)["error"] == "no answer after 0 s: the process was ended"
        assert worker.ask({"section": "nothing"}, 60)["error"].startswith("KeyError")
        worker._process.kill()
        worker._process.join()
        assert "the process was lost (exit status -9)" in worker.ask(case, 60)["error"]
        assert worker.ask(case, 60)["copy_bytes_per_s"] > 0
    finally:
        worker.stop()


@pytest.mark.parametrize("op", kernels.MEASURED)
def test_a_wrong_kernel_does_not_pass(op):
    def wrong(*arguments):
        OPS[op].reference(*arguments)
        written = arguments[OPS[op].arguments.index(OPS[op].outputs[0])]
        for out in written if isinstance(written, list) else [written]:
            if out is not None:
                out.copy_(~out if out.dtype == torch.bool else out * 1.1)

    assert kernels.check(op, "triton", lambda overload: (wrong, None), CPU).failure
    right = kernels.check(op, "reference", lambda overload: (OPS[op].reference, None), CPU)
    assert not right.failure
    assert right.error <= right.limit


def test_the_table_holds_the_fastest_that_passed_and_is_followed(tmp_path):
    def row(op, size, **seconds):
        times = {kind: {"p50": s} for kind, s in seconds.items()}
        return {"op": op, "size": size, "dtype": "float32", "seconds": times}

    rows = [
        row("gram_ema_", 64, reference=1e-5, triton=2e-5, library=1e-6),
        row("gram_ema_", 1024, reference=3e-3, triton=1e-3),
        row("minimax_root_", 128, reference=9e-3, triton=2e-3, cuda=1e-3),
        row("minimax_root_", 1024, reference=9e-3, triton=2e-3),  # what failed has no time
        {"op": "precondition_", "size": 64, "error": "the process was lost"},
        {"op": "check_roots_", "size": 64, "skipped": "skipped: budget"},
    ]
    facts = {"card": "synthetic", "torch": "2", "triton": None, "commit": "0"}
    target = tmp_path / "table.json"
    gpu.merge_table(target, "9.0", kernels.measured_table(rows, facts))
    again = [row("gram_ema_", 64, reference=1e-5, triton=1e-6)]
    gpu.merge_table(target, "8.0", kernels.measured_table(again, facts))
    table = backends.read_table(str(target))
    assert table["cpu"] == backends.read_table("")["cpu"]

    def chosen(op, size, card="9.0"):
        return backends.choose(op, "cuda", "float32", size, backend="auto", card=card, table=table)

    assert [chosen("gram_ema_", n) for n in (64, 65)] == ["reference", "triton"]
    assert [chosen("minimax_root_", n) for n in (128, 129)] == ["cuda", "triton"]
    assert chosen("precondition_", 64) == chosen("check_roots_", 64) == "reference"
    assert chosen("gram_ema_", 64, card="8.0") == "triton"
    assert backends.describe("auto", "9.0", table)["gram_ema_"].startswith(
        "64: reference (triton 0.5x)"
    )


def test_the_roofline_is_the_larger_bound():
    rates = {"copy_bytes_per_s": 100.0, "flops_per_s": {"float32": 10.0, "float16": 50.0}}
    times = {"triton": {"p50": 80.0}}
    row = {"bytes": 200, "flops": 1000, "passes": 3, "unit": "float16", "seconds": times}
    assert roofline.annotated(row, rates)["roofline_s"] == 60.0
    assert roofline.annotated(row, rates)["of_roofline"] == {"triton": 0.75}
    assert roofline.annotated({**row, "unit": "tf32"}, rates)["roofline_s"] == 100.0
    assert roofline.annotated({**row, "bytes": 10**5}, rates)["roofline_s"] == 1000.0
    assert roofline.annotated({"error": "lost"}, rates) == {"error": "lost"}


@pytest.mark.parametrize(("name", "build"), [("resnet50", models.ResNet50), ("gpt2", models.GPT2)])
def test_models_have_the_published_shapes(name, build):
    with torch.device("meta"):
        found = sorted(tuple(p.shape) for p in build().parameters())
    expected = sorted(shapes.MODELS[name]().shapes)
    if name == "gpt2":  # published weights are stored [in, out], torch's [out, in]
        found, expected = (sorted(tuple(sorted(shape)) for shape in x) for x in (found, expected))
    assert found == expected


def test_muon_moves_every_parameter_through_views():
    model = shapes.Model(
        "tiny",
        (
            shapes.Parameter((6, 4)),
            shapes.Parameter((3, 2, 2, 2)),
            shapes.Parameter((5,)),
            shapes.Parameter((9, 4), 1, True),
        ),
    )
    plan = contest.Plan(CPU, 1, True, 0.0, 1)
    contestant = contest.Contestant(model, peers.factory("muon", 4, 1), plan)
    contestant.receive([torch.randn_like(grad) for grad in contestant.grads])
    steps._require_motion("muon", contestant)
    elements = 6 * 4 + 3 * 8 + 2 * (5 + 9 * 4)
    steps_of_adamw = 4 * 2
    assert contestant.state_bytes() == 4 * elements + steps_of_adamw


def test_an_optimizer_that_does_nothing_has_no_times():
    model = shapes.Model("tiny", (shapes.Parameter((6, 4)),))
    idle = contest.Contestant(
        model,
        lambda groups: torch.optim.SGD(groups, lr=0.0),
        contest.Plan(CPU, 1, False, 0.0, 1),
    )
    idle.receive([torch.ones(6, 4)])
    with pytest.raises(RuntimeError, match=r"a step of idle leaves a parameter of shape \(6, 4\)"):
        steps._require_motion("idle", idle)


def test_what_makes_a_step_wait_is_said():
    class Reading(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("called a synchronizing CUDA operation\nException raised from ...")

    model = shapes.Model("tiny", (shapes.Parameter((6, 4)),))
    plan = contest.Plan(CPU, 1, False, 0.0, 1)
    reading = contest.Contestant(model, lambda groups: Reading(groups, lr=0.1), plan)
    assert steps.waits(reading, 2, CPU) == "called a synchronizing CUDA operation"


class Clearing(torch.optim.SGD):
    """SGD that takes the gradients away, as HeavyBall does."""

    def step(self, closure=None):
        super().step()
        self.zero_grad(set_to_none=True)


def test_gradients_that_an_optimizer_clears_come_back():
    model = shapes.Model("tiny", (shapes.Parameter((6, 4)),))
    plan = contest.Plan(CPU, 1, False, 0.0, 1)
    clearing = contest.Contestant(model, lambda groups: Clearing(groups, lr=0.1), plan)
    clearing.receive([torch.ones(6, 4)])
    clearing.optimizer.step()
    steps._require_motion("clearing", clearing)
