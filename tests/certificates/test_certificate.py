"""The file: who makes it, when it is read, and when it is not."""

import argparse
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compiled import load_compiled
from patience import PATIENCE

import shampoo
from shampoo import certificates, ops
from shampoo.__main__ import report
from shampoo.certificates import certificate, issue, runner, tune
from shampoo.certificates.certificate import Certificate
from shampoo.certificates.report import Report, Timing
from shampoo.certificates.runner import DoesNotLoadError, UnavailableError
from shampoo.ops import OPS, backends, jit, trust
from shampoo.ops.licence import Licence

CPU = torch.device("cpu")
KERNELS = [(name, "cpp") for name, op in OPS.items() if "cpp" in op.kinds("cpu")]


def reports(**failures):
    """Of every kernel of the CPU, one dtype each; some failed."""
    return [
        Report(op, kind, "float32", 3, 1e-7, 2e-7, "a case", failures.get(op, ""))
        for op, kind in KERNELS
    ]


@pytest.fixture
def machine(own_cache, tmp_path, monkeypatch):
    """A cache of its own, and an examination that only counts; returns its calls."""
    trust.private_folder.cache_clear()
    monkeypatch.setattr(trust.tempfile, "gettempdir", lambda: str(tmp_path))
    calls = []

    def examine(subjects, device, library, *, is_timed, progress, shapes):
        assert not shapes
        calls.append((len(subjects), device, is_timed))
        return reports()

    monkeypatch.setattr(issue, "examine", examine)
    yield calls
    trust.private_folder.cache_clear()


def the_path():
    return certificate.path_of(certificate.facts_of(CPU, jit.build()))


def new_process():
    issue._given.clear()
    issue._warned.clear()


def test_one_is_made_once_and_then_read(machine, capsys):
    first = certificates.certificate_of(CPU)
    assert machine == [(len(KERNELS), CPU, False)]
    assert "checking kernels on" in capsys.readouterr().err
    assert certificates.certificate_of(CPU) is first
    new_process()
    assert certificates.certificate_of(CPU) == first
    assert len(machine) == 1
    assert capsys.readouterr().err == ""
    suffixes = [path.suffix for path in sorted(the_path().parent.iterdir())]
    assert suffixes == [".json", trust.RECORD, ".lock"]


def test_times_are_added_where_they_are_asked_for(machine):
    certificates.certificate_of(CPU)
    certificates.certificate_of(CPU, is_timed=True)
    new_process()
    assert certificates.certificate_of(CPU).is_timed
    assert [is_timed for _, _, is_timed in machine] == [False, True]


@pytest.mark.parametrize(
    "spoil",
    {
        "torn": lambda path: path.write_text(path.read_text()[: path.stat().st_size // 2]),
        "empty": lambda path: path.write_text(""),
        "another version": lambda path: change(path, version=certificate.VERSION + 1),
        "of other facts": lambda path: change(path, facts={"device": "cpu", "name": "another"}),
        "of another form": lambda path: change(path, reports=[{"op": "gram_ema_"}]),
        "a list": lambda path: trust.write_recorded(path, "[]"),
        "of another verdict": lambda path: acquit(path),
        "without a digest": lambda path: path.with_name(path.name + trust.RECORD).unlink(),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_not_whole_or_of_this_machine_is_made_again(machine, spoil):
    whole = certificates.certificate_of(CPU)
    spoil[1](the_path())
    new_process()
    assert certificates.certificate_of(CPU).reports == whole.reports
    assert len(machine) == 2
    assert json.loads(the_path().read_text())["facts"] == whole.facts


def change(path, **changes):
    trust.write_recorded(path, json.dumps({**json.loads(path.read_text()), **changes}))


def acquit(path):
    """One figure of one report is another one than was found, in a file that is whole JSON."""
    text = path.read_text()
    assert text.count("1e-07") > 1
    path.write_text(text.replace("1e-07", "1e-09", 1))


@pytest.mark.parametrize(
    "place", ["file", "folder", "cache"], ids=["the file", "its folder", "the cache"]
)
@pytest.mark.parametrize("how", ["group", "others", "owner"])
def test_what_others_may_have_written_is_made_elsewhere(machine, place, how, capsys, tmp_path):
    if how == "owner" and os.getuid() != 0:
        pytest.skip("only root can give files away, and this user cannot: no GPU is missing")
    certificates.certificate_of(CPU)
    path = the_path()
    spoiled = {"file": path, "folder": path.parent, "cache": path.parents[1]}[place]
    if how == "owner":
        os.chown(spoiled, 12345, 12345)
    else:
        spoiled.chmod(spoiled.stat().st_mode | {"group": 0o020, "others": 0o002}[how])
    new_process()
    certificates.certificate_of(CPU)
    assert len(machine) == 2
    elsewhere = the_path()
    assert elsewhere.exists()
    assert not elsewhere.is_relative_to(tmp_path / "cache")
    assert elsewhere.parents[1].stat().st_mode & 0o077 == 0
    said = capsys.readouterr().err
    assert str(spoiled) in said
    assert "made anew in" in said
    assert said.count("made anew") == 1
    new_process()
    certificates.certificate_of(CPU)
    assert len(machine) == 2, "the one that was made elsewhere is read"


def test_a_folder_that_others_share_is_not_trusted_elsewhere_either(machine, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o777)
    (tmp_path / "cache").chmod(0o777)
    mine = tmp_path / f"shampoo-{os.getuid()}"
    mine.mkdir()
    mine.chmod(0o777)
    assert not the_path().is_relative_to(mine)


def test_a_library_that_others_may_have_written_is_not_used(machine, tmp_path, monkeypatch):
    library = jit.library_path()
    assert library.is_relative_to(tmp_path / "cache")
    library.parent.mkdir(parents=True)
    library.write_bytes(b"")
    assert jit.library_path() == library
    library.chmod(0o664)
    assert not jit.library_path().is_relative_to(tmp_path / "cache")


def test_one_line_speaks_of_a_cache_that_is_not_trusted(machine, tmp_path, capsys):
    """Library and certificate lie in it: all of it is open, from the top to the files."""
    paths = [jit.library_path(), the_path()]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    for each in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]:
        each.chmod(0o777)
    assert not any(
        path.is_relative_to(tmp_path / "cache") for path in (jit.library_path(), the_path())
    )
    said = capsys.readouterr().err
    assert said.count("made anew") == 1
    assert f"{tmp_path / 'cache'} (mode 777)" in said


def test_a_user_without_a_home_is_told_what_to_set_and_has_references(machine, monkeypatch, capsys):
    """As a container has it that runs as any number."""

    def unknown(user):
        raise KeyError(user)

    with monkeypatch.context() as there:
        for name in ("HOME", "XDG_CACHE_HOME", "SHAMPOO_CACHE_DIR"):
            there.delenv(name, raising=False)
        there.setattr(pwd, "getpwuid", unknown)
        assert certificates.certificate_of(CPU) is None
        assert "Set SHAMPOO_CACHE_DIR to a folder of yours." in capsys.readouterr().err
        used = certificates.kernels_in_use(CPU)
        facts = report(build=False)
    assert facts["cache"] == ""
    assert "Set SHAMPOO_CACHE_DIR" in facts["reason"]
    assert {kernel for op in used.values() for rows in op.values() for _, kernel in rows} == {
        "reference"
    }
    assert machine == []


@pytest.mark.parametrize("change", ["processor", "torch", "library", "sources", "card"])
def test_the_key_changes_with_everything_that_shapes_a_kernel(machine, change, monkeypatch):
    before = the_path()
    assert the_path() == before
    if change == "processor":
        monkeypatch.setattr(certificate, "_processor", lambda: ("another", "flags"))
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "0.0.0")
    elif change == "library":
        monkeypatch.setattr(certificate, "digest_of", lambda path: "0")
    elif change == "sources":
        monkeypatch.setattr(certificate, "_sources", lambda: "0")
    else:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert the_path() != before


def test_the_variable_forbids_and_repeats(machine, monkeypatch, capsys):
    monkeypatch.setenv("SHAMPOO_TUNE", "0")
    assert certificates.certificate_of(CPU) is None
    assert certificates.licence_of(CPU) == Licence()
    assert "SHAMPOO_TUNE=0 forbids checking" in capsys.readouterr().err
    certificates.load_kernels()
    assert not any(map(ops.runs_kernel_on_cpu, OPS)), "what was not checked is not used"
    with pytest.raises(jit.BuildError, match="were not checked on this machine"):
        certificates.load_kernels(required=True)
    monkeypatch.delenv("SHAMPOO_TUNE")
    certificates.load_kernels()
    assert all(ops.runs_kernel_on_cpu(op) for op, _ in KERNELS)
    monkeypatch.setenv("SHAMPOO_TUNE", "0")
    new_process()
    assert certificates.certificate_of(CPU) is not None, "what is there may be read"
    monkeypatch.setenv("SHAMPOO_TUNE", "1")
    new_process()
    certificates.certificate_of(CPU)
    certificates.certificate_of(CPU)
    assert len(machine) == 2
    monkeypatch.setenv("SHAMPOO_TUNE", "yes")
    with pytest.raises(ValueError, match=r"Invalid SHAMPOO_TUNE='yes'\. Must be 0, 1, or not set"):
        certificates.certificate_of(CPU)


def test_a_device_that_cannot_be_had_has_no_certificate(machine, monkeypatch, capsys):
    def examine(*_, **__):
        raise UnavailableError("no second process can use cuda:0 (exclusive). Run it alone.")

    monkeypatch.setattr(issue, "examine", examine)
    assert certificates.licence_of(CPU) == Licence()
    said = capsys.readouterr().err
    assert "kernels are not checked, and none is used: no second process can use cuda:0" in said
    assert not the_path().exists()


@pytest.mark.parametrize("asked", ["", "ACTIVE"])
def test_threads_wait_without_spinning_unless_somebody_wants_it(monkeypatch, asked):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if asked:
        monkeypatch.setenv("OMP_WAIT_POLICY", asked)

    def apart(environment):
        raise LookupError(environment["OMP_WAIT_POLICY"])

    monkeypatch.setattr(runner, "Apart", apart)
    with pytest.raises(LookupError, match=asked or "PASSIVE"):
        runner.examine([], CPU)


def test_a_library_that_is_none_is_built_again(machine, monkeypatch):
    built = []

    def examine(*_, **__):
        if not built:
            raise DoesNotLoadError("file too short")
        return reports()

    monkeypatch.setattr(issue, "examine", examine)
    monkeypatch.setattr(jit, "rebuild", built.append)
    assert certificates.certificate_of(CPU).reports
    assert built == [jit.build()]


def test_a_refused_kernel_is_named_in_one_warning_and_everywhere(machine, monkeypatch, capsys):
    found = reports(gram_ema_="error 0.1 exceeds 1e-07")
    monkeypatch.setattr(issue, "examine", lambda *_, **__: found)
    words = "gram_ema_ (cpp, float32): error 0.1 exceeds 1e-07 in a case"
    with pytest.warns(RuntimeWarning, match="did not pass their checks") as caught:
        certificates.load_kernels()
    certificates.load_kernels()
    [warning] = caught
    assert words in str(warning.message)
    assert not ops.runs_kernel_on_cpu("gram_ema_")
    assert ops.runs_kernel_on_cpu("precondition_")
    in_use = shampoo.kernels_in_use("cpu")
    assert in_use["gram_ema_"]["float32"] == [(float("inf"), "reference")]
    assert in_use["precondition_"]["float32"] == [(float("inf"), "cpp")]
    assert tune.in_words(CPU).endswith(f"{len(KERNELS) - 1} of {len(KERNELS)} passed, not timed")
    for settings in ({"SHAMPOO_BACKEND": "cuda"}, {}):
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(jit.BuildError, match=r"error 0\.1 exceeds 1e-07 in a case"):
            certificates.load_kernels(required=not settings)
        monkeypatch.delenv("SHAMPOO_BACKEND", raising=False)
    monkeypatch.setenv("SHAMPOO_BACKEND", "reference")
    certificates.load_kernels()
    assert not ops.runs_kernel_on_cpu("gram_ema_"), "it does not come back by another choice"


def options(**given):
    return argparse.Namespace(**{"device": "cpu", "force": False, "file": None, **given})


def test_the_command_says_how_kernels_did(machine, monkeypatch, capsys, tmp_path):
    assert tune.run(options(file=tmp_path / "found.json")) == 0
    assert "passed" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "found.json").read_text())["reports"]) == len(KERNELS)
    assert tune.run(options()) == 0
    assert len(machine) == 1
    slow = Timing(64, kernel=2e-5, reference=1e-5)
    for found in (
        reports(eigh_="died by SIGILL"),
        [Report("eigh_", "cpp", "float32", 3, timings=(slow,))],
    ):
        monkeypatch.setattr(issue, "examine", lambda *_, found=found, **__: found)
        assert tune.run(options(force=True)) == tune.SET_ASIDE
    out = capsys.readouterr().out
    assert "eigh_ (cpp, float32): died by SIGILL" in out
    assert "64: 0.5x" in out
    assert "slower" in out
    with pytest.raises(SystemExit, match="Invalid --device=mps"):
        tune.run(options(device="mps"))


def test_a_kernel_must_win_by_five_percent_somewhere():
    def licence(*speeds, kernel="triton", op="gram_ema_"):
        timings = tuple(Timing(size, 1.0, speed) for size, speed in speeds)
        return [Report(op, kernel, "float32", 1, timings=timings)]

    both = licence((64, 1.04), (256, 1.06), (1024, 0.5), op="minimax_root_") + licence(
        (64, 0.9), (256, 2.0), kernel="cuda", op="minimax_root_"
    )
    rows = Certificate({}, both, True, "", 0.0).licence.rows["minimax_root_"]["float32"]
    found = [(row["size"], row["kernel"]) for row in rows]
    assert found == [(64, "reference"), (256, "cuda"), (1024, "reference")]
    for kernel, speed, pays in (
        *(("triton", 1.04, False), ("triton", 1.06, True)),
        *(("cpp", 0.9, True), ("cpp", 0.7, False)),
    ):
        timed = licence((64, speed), (256, 0.5), kernel=kernel)
        assert Certificate({}, timed, True, "", 0.0).licence.pays("gram_ema_") is pays
        assert timed[0].is_used is pays


PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from shampoo import Shampoo, certificates, ops
weight = torch.nn.Parameter(torch.ones(4, 3))
optimizer = Shampoo([weight], lr=0.1)
print(ops.runs_kernel_on_cpu("gram_ema_"), certificates.certificate_of(torch.device("cpu")).made)
"""


@pytest.fixture
def start(tmp_path):
    """Starts the program above with a cache that holds a library and no certificate."""
    load_compiled()
    library = jit.build()
    copy = tmp_path / "cache" / library.relative_to(library.parents[2])
    copy.parent.mkdir(parents=True)
    shutil.copy(library, copy)
    shutil.copy(f"{library}{trust.RECORD}", f"{copy}{trust.RECORD}")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SHAMPOO_")}
    environment = {**kept, "SHAMPOO_CACHE_DIR": str(tmp_path / "cache")}

    def begin():
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def made(folder: Path) -> list[Path]:
    return [*(folder / "cache" / certificate.FOLDER).glob("*.json")]


@pytest.mark.slow
def test_four_processes_that_start_at_once_make_one(start, tmp_path):
    answers = [process.communicate(timeout=PATIENCE) for process in [start() for _ in range(4)]]
    assert len({out for out, _ in answers}) == 1, answers
    assert answers[0][0].startswith("True ")
    assert sum("checking kernels" in err for _, err in answers) == 1
    assert len(made(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the child of a killed process")
def test_a_killed_one_leaves_none_and_no_process(start, tmp_path):
    victim = start()
    assert victim.stderr is not None
    assert "checking kernels" in victim.stderr.readline()
    until = time.monotonic() + PATIENCE
    while not (children := children_of(victim.pid)) and time.monotonic() < until:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert made(tmp_path) == []
    out, err = start().communicate(timeout=PATIENCE)
    assert out.startswith("True ")
    assert "checking kernels" in err
    assert len(made(tmp_path)) == 1


def children_of(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in found]


def test_auto_takes_what_the_file_of_an_imaginary_card_says(tmp_path):
    facts = {"device": "cuda", "name": "a card to come", "capability": "17.0"}
    times = (Timing(64, 2e-5, 1e-5), Timing(512, 1e-5, 3e-5))
    found = [
        Report("gram_ema_", "triton", "float32", 9, timings=times),
        Report("precondition_", "triton", "float32", 9, failure="out is not symmetric"),
        Report("gather_blocks_", "cuda", "float32", 9, timings=(Timing(4096, 1e-6, 5e-6),)),
        Report("gather_blocks_", "cuda", "float64", 9, failure="error 1 exceeds 0"),
    ]
    path = tmp_path / "certificates" / "cuda.json"
    certificate.write(path, Certificate(facts, tuple(found), True, certificate.now(), 20.0))
    prepared = certificate.read(path, facts)
    assert prepared is not None
    assert certificate.read(path, {**facts, "name": "another"}) is None
    praised = {"size": 4096, "kernel": "triton"}
    table = {"cpu": {}, "cuda": {"17.0": {"ops": {"precondition_": {"float32": [praised]}}}}}

    def chosen(op, size, dtype="float32"):
        settings = {"backend": "auto", "card": "17.0", "table": table}
        return backends.choose(op, "cuda", dtype, size, **settings, licence=prepared.licence)

    assert [chosen("gram_ema_", size) for size in (1, 64, 65, 10**6)] == [
        *("reference", "reference", "triton", "triton")
    ]
    assert chosen("precondition_", 64) == "reference", "the table praises it, and it failed here"
    assert chosen("gather_blocks_", 10) == "cuda"
    assert chosen("gather_blocks_", 10, "float64") == "reference"
    assert chosen("update_blocks_", 10) == "reference"
