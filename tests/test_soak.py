"""``tools/soak.py`` and ``tools/sanitize.py`` in their small form."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from shampoo.ops import jit

ROOT = Path(__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_bits_of_one_that_is_not():
    done = run("tools/soak.py", "--steps", "120", "--save-every", "20", "--kills", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills 3 of 3" in done.stdout
    assert "checkpoints left step-00000100 step-00000120\n" in done.stdout
    assert "digest after kills the same" in done.stdout
    for kind in ("dropped", "huge", "inf", "lr", "nan", "none", "root"):
        assert f'"{kind}": ' in done.stdout, "this seed has met every fault"


@pytest.mark.slow
def test_the_soak_tells_other_bits_apart(tmp_path):
    """Its own check is checked: a resumed run that loses one step is another one."""
    script = (ROOT / "tools" / "soak.py").read_text()
    lossy = script.replace("range((done or 0) + 1,", "range((done or 0) + 1 + bool(done),")
    assert lossy != script
    (tmp_path / "soak.py").write_text(lossy)
    done = run(str(tmp_path / "soak.py"), "--steps", "45", "--save-every", "10", "--kills", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "digest after kills the same" not in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not jit.compiler_version(), reason="no C++ compiler to build with sanitizers")
def test_the_sanitizers_are_in_the_library_that_is_tested():
    given = ("--workers", "0", "tests/ops/test_index_arithmetic.py")
    done = run("tools/sanitize.py", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sanitized: shampoo_csrc.so" in done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
    assert "reports 0\n" in done.stdout


@pytest.mark.skipif(not jit.compiler_version(), reason="no C++ compiler to build with sanitizers")
def test_a_report_is_printed_whichever_process_it_is_of(tmp_path, capsys):
    sanitize = runpy.run_path(str(ROOT / "tools" / "sanitize.py"))
    variables = sanitize["environment"](tmp_path)
    source, library = tmp_path / "faulty.cpp", tmp_path / "faulty.so"
    source.write_text(
        'extern "C" int read(int i) { auto p = new int[4](); int v = p[i]; delete[] p; return v; }'
        'extern "C" int add(int n) { return n + 2147483647; }'
    )
    build = [variables["CXX"], "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(build, check=True)

    def call(what: str) -> tuple[int, str]:
        command = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r}).{what}"]
        done = subprocess.run(
            command, env=variables, stderr=subprocess.PIPE, text=True, check=False
        )
        return done.returncode, done.stderr

    for harmless in ("read(3)", "add(0)"):
        assert call(harmless) == (0, "")
    (tmp_path / "report.1").write_text("==1==WARNING: ASan is ignoring a request")
    assert sanitize["reports"](tmp_path) == 0
    status, said = call("add(1)")
    assert status
    assert "signed integer overflow" in said
    assert call("read(4)")[0]
    assert sanitize["reports"](tmp_path) == 1
    assert "heap-buffer-overflow" in capsys.readouterr().out
