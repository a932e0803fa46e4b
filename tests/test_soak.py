"""``tools/soak.py`` and ``tools/sanitize.py`` in their small form."""

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
