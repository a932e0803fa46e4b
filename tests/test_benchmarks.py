"""The benchmark's shapes and formulas against published totals and brute force; a dry run of it."""

import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from patience import PATIENCE

pytest.importorskip("rich", reason="the benchmark needs the extra: pip install 'shampoo[bench]'")
pytest.importorskip("matplotlib", reason="the plots need the extra: pip install 'shampoo[bench]'")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # after the installed package, which the checkout must not shadow

from benchmarks import checkpoint, contest, floor, presence, shapes, step_time  # noqa: E402
from shampoo.blocks.blocking import merge_dims  # noqa: E402
from shampoo.certificates import timing  # noqa: E402

BLOCK = 4
SHAPES = [(9, 6), (4, 4), (2, 3, 5), (3, 1, 7), (7,), (1, 5), (1,), (), (5, 2, 3, 2), (2, 2, 8)]


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("resnet50", 25_557_032, 161),
        ("vit-b16", 86_567_656, 152),
        ("gpt2", 124_439_808, 148),
        ("llama-1b", 1_235_814_400, 146),
        ("transformer-512", 3 * (4 * 512 * 512 + 2 * 2048 * 512), 18),
        ("mlp", 784 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10, 6),
    ],
)
def test_model_totals_are_the_published_ones(name, parameters, tensors):
    model = shapes.MODELS[name]()
    assert (model.name, model.numel, len(model.shapes)) == (name, parameters, tensors)
    assert sum(math.prod(shape) for shape in model.shapes) == parameters


def test_embeddings_are_the_tables_looked_up_by_an_index():
    def tables(name):
        model = shapes.MODELS[name]()
        return [s for s, is_table in zip(model.shapes, model.embeddings, strict=True) if is_table]

    assert tables("gpt2") == [(50257, 768), (1024, 768)]
    assert tables("llama-1b") == [(128256, 2048)]
    assert tables("vit-b16") == [(1, 197, 768)]
    assert tables("resnet50") == []


def loops_over_the_step(shape):
    """Multiplications, additions and numbers of one tensor's step, counted one by one."""
    dims = merge_dims(shape, BLOCK, "matrix")
    starts = [range(0, size, BLOCK) for size in dims]
    factor = full = apply = numbers = 0
    for corner in product(*starts):
        extent = [min(BLOCK, size - start) for size, start in zip(dims, corner, strict=True)]
        numel = math.prod(extent)
        for size in extent:
            numbers += size * size
            for row, column in product(range(size), repeat=2):
                terms = 2 * (numel // size)  # a product and a sum for each of the other axes
                full += terms
                apply += terms
                # row > column is the mirror image; half of the diagonal's terms stand for the
                # halving of algorithm.md, which counts d^2 / 2 entries
                factor += terms if row < column else terms / 2 if row == column else 0
    return factor, full, apply, numbers


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_floor_formulas_equal_brute_force(shape):
    numel = math.prod(shape)
    factor, full, apply, numbers = loops_over_the_step(shape)
    if sum(size > 1 for size in shape) <= 1:
        factor = full = apply = numbers = 0
    work = floor.ordinary_step([shape], BLOCK)
    assert (work.factor_flops, work.apply_flops) == (factor, apply)
    assert work.flops == factor + apply
    assert work.full_flops == full + apply
    reads_and_writes = numel * (1 + 2 + 2 + 2) + numbers * (2 + 1)
    assert work.bytes == 4 * reads_and_writes
    assert floor.state_bytes([shape], BLOCK) == 4 * (2 * numel + 2 * numbers)
    grafted = floor.ordinary_step([], BLOCK, [shape])
    assert grafted == floor.Work(4 * 7 * numel, 0, 0)
    assert floor.state_bytes([], BLOCK, [shape]) == 8 * numel


def test_floor_divides_by_the_rates():
    work = floor.Work(bytes=600, factor_flops=100, apply_flops=200)
    bounds = floor.floor(work, floor.Rates(copy=1.0, bandwidth=60.0, flops=10.0))
    assert bounds == floor.Floor(floor=10 + 30, full=10 + 40, overlapped=30)


def test_measured_rates_are_positive_and_the_bandwidth_the_best():
    rates = floor.measure_rates(torch.device("cpu"), [64], repeats=1)
    assert 0 < rates.copy <= rates.bandwidth
    assert rates.flops > 0


def test_quantiles_and_mean():
    summary = timing.quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 15.0])
    assert summary == pytest.approx(timing.Quantiles(2.0, 3.5, 5.0, 5.0, 6))
    with pytest.raises(ValueError, match="at least one"):
        timing.quantiles([])


def test_variants_take_turns_and_the_order_rotates():
    calls: list[str] = []
    samples = timing.interleaved(
        {name: (lambda name=name: calls.append(name)) for name in "abc"},
        timing.Clock(torch.device("cpu")),
        rounds=3,
        first_round=1,
        before_round=lambda: calls.append("|"),
        before_call=lambda name: calls.append(f"-{name}"),
    )
    assert "".join(calls) == "|-b" + "b-cc-aa" + "|-cc-aa-bb" + "|-aa-bb-cc"
    assert [len(samples[name]) for name in "abc"] == [3, 3, 3]


class Recorder(torch.optim.SGD):
    """SGD that remembers what it was given; every fourth step is marked by the gradient's norm."""

    def __init__(self, groups):
        super().__init__([{"params": g["params"]} for g in groups], lr=0.0, momentum=0.9)
        self.seen: list[float] = []
        self.workspace = torch.zeros(100)
        self.flags = [group.get("precondition", True) for group in groups]

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        self.seen.append(sum(p.grad.double().square().sum().item() for p in params))
        super().step()


def test_contestants_get_equal_new_gradients_and_whole_periods():
    plan = contest.Plan(torch.device("cpu"), 4, True, seconds=0.0, periods=2)
    model = shapes.Model("tiny", (shapes.Parameter((6, 4)), shapes.Parameter((3, 4), 2, True)))
    factories = {"one": Recorder, "two": Recorder}
    first, measured, contestants = contest.run(model, factories, plan)
    assert [len(first[name]) for name in factories] == [4, 4]
    assert [len(measured[name]) for name in factories] == [8, 8]
    one, two = (contestants[name].optimizer for name in factories)
    assert one.seen == two.seen
    assert len(set(one.seen)) == 12
    assert one.flags == [True, False]
    # momentum alone is state; the workspace is held beside it
    assert contestants["one"].state_bytes() == 4 * 48
    assert contestants["one"].held_bytes() == 4 * 48 + 400


def test_row_tells_root_steps_from_ordinary_ones():
    plan = contest.Plan(torch.device("cpu"), 4, False, seconds=0.0, periods=3)
    model = shapes.Model("tiny", (shapes.Parameter((6, 4)),))
    rates = floor.Rates(1e9, 1e9, 1e9)
    row = contest.row(model, 4, Recorder, plan, rates)
    assert row["ordinary_s"]["samples"] == 9
    assert row["root_s"]["samples"] == 3
    total = 9 * row["ordinary_s"]["mean"] + 3 * row["root_s"]["mean"]
    assert row["amortised_s"] == pytest.approx(total / 12)
    base = row["baselines_s"]["adamw-foreach"]
    assert row["amortised_over_base"] == pytest.approx(row["amortised_s"] / base["mean"])
    assert row["ordinary_over_floor"]["floor"] == pytest.approx(
        row["ordinary_s"]["p50"] / floor.floor(floor.ordinary_step([(6, 4)], 4), rates).floor
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--refresh", "1"], "Invalid --refresh=1. Must be >= 2"),
        (["--block", "0"], "Invalid --block=0. Must be >= 1"),
        (["--models", "lenet"], "invalid choice: 'lenet'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        step_time.parse(arguments)
    assert message in capsys.readouterr().err


def test_targets_judge_only_rows_run_as_the_targets_state():
    row = {
        "model": "transformer-512",
        "block": 256,
        "refresh": 10,
        "machine": {"device": "cpu"},
        "ordinary_over_base": 5.4,
        "amortised_over_base": 12.5,
        "ordinary_over_floor": {"floor": 1.6},
    }
    first, second = step_time.targets([row])
    assert first.endswith("<= 5.5: 5.40, met")
    assert second.endswith("<= 1.5: 1.60, NOT MET")
    assert step_time.targets([{**row, "refresh": 20}, {**row, "block": 1024}]) == []
    mlp = {**row, "model": "mlp"}
    assert step_time.targets([mlp])[0].endswith("<= 12.0: 12.50, NOT MET")


def test_command_writes_json_and_png(tmp_path):
    target = tmp_path / "out" / "steps.json"
    arguments = ["--device", "cpu", "--threads", "1", "--small", "--refresh", "3", "--models"]
    command = [sys.executable, "-c", RUN, *arguments, "mlp", "vit-b16-layer", "--json", str(target)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ.copy(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    for word in ("ordinary step", "root step", "amortised", "adamw-fused", "floor ms"):
        assert word in done.stdout
    rows = json.loads(target.read_text())
    assert [row["model"] for row in rows] == ["mlp", "vit-b16-layer"]
    for row in rows:
        assert (row["refresh"], row["ordinary_s"]["samples"], row["root_s"]["samples"]) == (3, 2, 1)
        assert set(row["ordinary_s"]) == {"p20", "p50", "p80", "mean", "samples"}
        assert set(row["baselines_s"]) == {"adamw-foreach", "adamw-fused"}
        assert row["state_bytes_per_parameter"] == pytest.approx(
            row["formula_bytes_per_parameter"], rel=0.05
        )
        assert row["machine"]["torch"] == torch.__version__
        assert row["machine"]["threads"] == 1
        assert "--small --refresh 3" in row["machine"]["command"]
    assert target.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n")


RUN = (
    f"import sys; sys.path.append({str(ROOT)!r});"
    "from benchmarks.step_time import main; sys.exit(main(sys.argv[1:]))"
)


def test_presence_prints_a_row_for_every_count(capsys):
    assert presence.main(["--counts", "3", "7", "--side", "4", "--rounds", "3"]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.count(" ms ") == 2]
    assert [row.split()[1] for row in rows] == ["3", "7"]


def test_checkpoint_prints_a_rate_for_all_that_is_done_with_one(tmp_path, capsys):
    checkpoint.main(["--mib", "1", "--repeats", "1", "--folder", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:42].rstrip() for line in lines] == [
        *("SHA-256 of bytes in memory", "length and SHA-256 of all files compared"),
        *("save", "load", "load, verify=False"),
    ]
    assert all(float(line[42:].split()[0]) > 0 for line in lines)
    [place] = tmp_path.glob("step-*")
    size = sum(path.stat().st_size for path in place.iterdir())
    assert 0.9 < size / 2**20 < 1.2, "as many bytes as were asked for"
