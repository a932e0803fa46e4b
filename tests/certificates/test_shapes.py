"""What a plan holds: kernels are asked for it too, and a resumed run finds what it had."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from compiled import load_compiled
from patience import PATIENCE
from torch import nn

from shampoo import Shampoo, certificates, ops
from shampoo.agreement import _shapes_of
from shampoo.certificates import certificate, issue, tune
from shampoo.certificates.cases import shapes as of_shapes
from shampoo.certificates.cases.shapes import Shape, lacking, shape_cases, sizes_of
from shampoo.certificates.certificate import Certificate
from shampoo.certificates.checks import Trial
from shampoo.certificates.loading import prepare
from shampoo.certificates.report import Report, Timing
from shampoo.certificates.workloads import grid, shape_grid
from shampoo.ops import OPS, backends, jit, trust

CPU = torch.device("cpu")
FULL, DIAGONAL, NONE = of_shapes.FULL, of_shapes.DIAGONAL, of_shapes.NONE
WIDE = Shape((40, 300), (FULL, FULL), "float32")
KERNELS = [(name, "cpp") for name, op in OPS.items() if "cpp" in op.kinds("cpu")]


def test_a_plan_is_asked_for_what_ragged_sizes_do_not_stand_for():
    small = Shape((257, 64), (FULL, FULL), "float32")
    unkept = Shape((50_000, 768), (NONE, NONE), "float32")
    held = [WIDE, small, unkept, WIDE]
    assert lacking(held, "cpu") == (WIDE,)
    assert lacking(held, "cuda") == (WIDE, small), "on a GPU kernels are chosen by size"
    assert lacking(held, "meta") == ()


def test_the_shapes_of_a_plan_are_those_of_its_blocks():
    params = [nn.Parameter(torch.ones(shape)) for shape in ((40, 700), (5,), (3, 4))]
    groups = [
        {"params": params[:2], "max_preconditioner_dim": 300, "large_dim_method": "blocking"},
        {"params": params[2:], "precondition": False},
    ]
    optimizer = Shampoo(groups, lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    [(device, found)] = _shapes_of(optimizer._plan).items()
    assert device == CPU
    assert {shape for shape in found if FULL in shape.kept} == {
        WIDE,
        Shape((40, 100), (FULL, FULL), "float32"),
    }
    assert Shape((3, 4), (NONE, NONE), "float32") in found


HELD = [
    WIDE,
    Shape((290, 6), (FULL, DIAGONAL), "float32"),
    Shape((7, 270, 5), (FULL, NONE, DIAGONAL), "float64"),
]


@pytest.mark.parametrize("kind", ["reference", "cpp"])
def test_kernels_do_the_cases_of_shapes_right(kind):
    load_compiled()
    cases = shape_cases(lacking(HELD, "cpu"), "cpu")
    assert set(cases) == {"gram_ema_", "precondition_", "minimax_root_"}
    words = " ".join(case.words for each in cases.values() for case in each)
    for part in ("mode 1 of [40, 300]", "mode 1 of [290, 6] float32, diagonal", "n=300", "n=7"):
        assert part in words
    for name, each in cases.items():
        for case in each:
            assert tuple(case.arguments()) == OPS[name].arguments
            trial = Trial(case, OPS[name], CPU, kind)
            finding = trial.examine(lambda over, op=OPS[name]: op.load(kind, over)[0])
            assert not finding.failure, (case.name, finding)


def test_what_would_take_long_is_left_out_the_small_first():
    huge = Shape((20_000, 20_000), (FULL, FULL), "float32")
    assert shape_cases([huge], "cuda") == {}
    several = [Shape((side, side), (FULL, FULL), "float32") for side in (300, 900, 2000)]
    by_op = shape_cases(several, "cpu")
    assert [case.words for case in by_op["minimax_root_"]] == ["n=300, p=4, relative_eps=1e-06"]
    assert any("[900, 900]" in case.words for case in by_op["gram_ema_"])
    assert not any("[900, 900]" in case.words for case in by_op["precondition_"])
    assert "check_roots_" in shape_cases(several, "cuda")


def test_kernels_are_timed_at_the_sides_of_a_plan():
    held = [Shape((side, 64), (FULL, FULL), "float32") for side in range(300, 320)]
    assert sizes_of(held) == list(range(312, 320))
    long = Shape((50_000, 8, 5000), (DIAGONAL, FULL, FULL), "float32")
    assert sizes_of([long]) == [8], "a matrix of that size would take all memory"
    sizes = [*sizes_of([WIDE]), 256]
    cuda = torch.device("cuda", 0)
    assert [size for size, _ in grid(OPS["gram_ema_"], cuda)].count(256) == 1
    assert shape_grid(OPS["gram_ema_"], cuda, sizes) == [(40, 512), (300, 186)]
    assert shape_grid(OPS["update_blocks_"], cuda, sizes) == ()


@pytest.fixture
def asked(own_cache, monkeypatch):
    """An examination that only counts, for which everything passes; what it was asked for."""
    calls = []

    def examine(subjects, device, library, *, is_timed, progress, shapes):
        calls.append(([op.name for op, _ in subjects], shapes))
        return [Report(op.name, kind, "float32", 2, 1e-7, 2e-7, "a case") for op, kind in subjects]

    monkeypatch.setattr(issue, "examine", examine)
    certificates.load_kernels()
    return calls


def new_process():
    issue._given.clear()
    issue._warned.clear()


def files():
    return {path.name: path.read_bytes() for path in folder().glob("*.json")}


def folder():
    return certificate.path_of(certificate.facts_of(CPU, jit.build())).parent


def test_a_plan_is_asked_for_once(asked, capsys, monkeypatch):
    [(every, nothing)] = asked
    assert (sorted(every), nothing) == (sorted(name for name, _ in KERNELS), ())
    [(name, base)] = files().items()
    prepare({CPU: {Shape((64, 32), (FULL, FULL), "float32")}})
    assert len(asked) == 1, "the ragged sizes stand for it"
    capsys.readouterr()
    prepare({CPU: {WIDE}})
    prepare({CPU: {WIDE}})
    new_process()
    prepare({CPU: {WIDE}})
    assert asked[1:] == [(["gram_ema_", "precondition_", "minimax_root_"], (WIDE,))]
    assert capsys.readouterr().err.count("checking kernels for the sizes of this model") == 1
    assert len(files()) == 2
    prepare({CPU: set(HELD)})
    assert asked[2:] == [(asked[1][0], tuple(sorted(HELD)))]
    assert files()[name] == base, "what one plan adds changes nothing for another"
    monkeypatch.setenv("SHAMPOO_TUNE", "0")
    prepare({CPU: {Shape((300,), (FULL,), "float32")}})
    assert len(asked) == 3
    assert ops.runs_kernel_on_cpu("gram_ema_")
    assert capsys.readouterr().err.count("SHAMPOO_TUNE") == 0


def test_a_kernel_that_failed_already_is_not_asked_again(asked, monkeypatch):
    new_process()
    [path] = folder().glob("*.json")
    spoil(path, "gram_ema_")
    with pytest.warns(RuntimeWarning, match="did not pass"):
        prepare({CPU: {WIDE}})
    assert asked[1:] == [(["precondition_", "minimax_root_"], (WIDE,))]


def test_what_failed_in_a_model_is_known_to_all(asked, tmp_path):
    """`python -m shampoo` has no model at hand."""
    prepare({CPU: {WIDE}})
    assert certificates.complaints_of(CPU) == []
    [path] = [path for path in folder().glob("*.json") if b"40x300" in path.read_bytes()]
    spoil(path, "gram_ema_")
    (folder() / "cpu-torn.json").write_text("{")
    (folder() / "cpu-of-other-facts.json").write_text('{"facts": {"shapes": "3:float32"}}')
    new_process()
    line = "gram_ema_ (cpp, float32): error 0.1 exceeds 1e-07 in a case (in one model)"
    assert certificates.complaints_of(CPU) == [line]
    assert tune.in_words(CPU).endswith(", not timed, sizes of models: 1")


def spoil(path, op):
    content = json.loads(path.read_text())
    for report in content["reports"]:
        if report["op"] == op:
            report["failure"] = "error 0.1 exceeds 1e-07"
    trust.write_recorded(path, json.dumps(content))


def test_sizes_of_another_plan_change_no_choice():
    """On a card, by size: each plan finds its own sizes measured, whatever else there is."""

    def found(*speeds):
        timings = tuple(Timing(size, 1.0, speed) for size, speed in speeds)
        reports = (Report("gram_ema_", "triton", "float32", 3, timings=timings),)
        return Certificate({"device": "cuda"}, reports, True, "", 1.0)

    base = found((64, 0.9), (256, 2.0), (1024, 0.8))
    mine, other = found((160, 0.7), (700, 3.0)), found((160, 5.0), (150, 5.0), (300, 0.6))
    how = {"backend": "auto", "card": "17.0", "table": {"cpu": {}, "cuda": {}}}

    def chosen(certificate, size):
        return backends.choose(
            "gram_ema_", "cuda", "float32", size, **how, licence=certificate.licence
        )

    alone, both = base.joined(mine), base.joined(mine).joined(other)
    assert chosen(base, 160) == "triton", "by the next size above"
    assert [chosen(alone, size) for size in (64, 160, 256, 700, 1024)] == [
        *("reference", "reference", "triton", "triton", "reference")
    ]
    for size in (64, 160, 256, 700, 1024):
        assert chosen(both, size) == chosen(alone, size)
    failing = Report("gram_ema_", "triton", "float32", 1, 1.0, 0.1, "n=300", "error 1 exceeds 0.1")
    refused = alone.joined(Certificate({}, (failing,), True, "", 1.0))
    assert chosen(refused, 256) == "reference"
    [report] = refused.reports
    assert (report.cases, report.worst, report.timings) == (7, "n=300", ())


PROGRAM = """
import hashlib, json, sys, torch
torch.set_num_threads(1)
import shampoo
saved, steps = sys.argv[1], [int(each) for each in sys.argv[2:]]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(300, 24), torch.nn.Tanh(), torch.nn.Linear(24, 3))
arguments = {"precondition_frequency": 2, "max_preconditioner_dim": 512}
arguments["large_dim_method"] = "blocking"
optimizer = shampoo.Shampoo(model.parameters(), lr=0.01, **arguments)
if steps[0] > 0:
    state = torch.load(saved)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
for step in range(*steps):
    if step == 3 and steps[0] == 0:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, saved)
    inputs = torch.randn(16, 300, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()
bits = b"".join(param.detach().numpy().tobytes() for param in model.parameters())
in_use = {op: each["float32"] for op, each in shampoo.kernels_in_use("cpu").items()}
print(json.dumps([hashlib.sha256(bits).hexdigest(), in_use]))
"""


@pytest.mark.slow
def test_a_resumed_run_keeps_its_kernels_and_its_bits(tmp_path):
    """Also where a kernel was refused, and where another plan has been examined in between."""
    load_compiled()
    library = jit.build()
    copy = tmp_path / "cache" / library.relative_to(library.parents[2])
    copy.parent.mkdir(parents=True)
    for suffix in ("", trust.RECORD):
        shutil.copy(f"{library}{suffix}", f"{copy}{suffix}")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SHAMPOO_")}
    environment = {**kept, "SHAMPOO_CACHE_DIR": str(tmp_path / "cache")}

    def run(*steps):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "saved.pt"), *map(str, steps)]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    def made():
        return sorted((tmp_path / "cache" / certificate.FOLDER).glob("*.json"))

    straight, said = run(0, 6)
    assert said.count("checking kernels") == 2
    before = {path: path.read_bytes() for path in made()}
    assert len(before) == 2, "of all, and of this plan"
    assert set(straight[1]["gram_ema_"][0]) >= {"cpp"}
    resumed, said = run(3, 6)
    assert (resumed, said) == (straight, "")
    assert {path: path.read_bytes() for path in made()} == before
    [for_all] = [path for path in before if "shapes" not in json.loads(before[path])["facts"]]
    spoil(for_all, "gram_ema_")
    refusing, said = run(0, 6)
    assert "gram_ema_ (cpp, float32): error 0.1 exceeds" in said
    assert refusing[1]["gram_ema_"][0][1] == "reference"
    assert run(3, 6)[0] == refusing
