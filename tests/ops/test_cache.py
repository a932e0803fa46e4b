"""What is taken from the cache: what is whole, and what nobody else can have written."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from builds import STEP, Result, environment, needs_compiler, small_package, start, step

from shampoo.ops import jit, trust

NOWHERE = "/nowhere"  # a PATH without a compiler


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A package of one small kernel, and a cache in which it was built under a umask of 0."""
    folder = tmp_path_factory.mktemp("built")
    site, cache = small_package(folder / "site"), folder / "cache"
    before = os.umask(0)
    try:
        assert step(cache, folder, site).builds == 1
    finally:
        os.umask(before)
    return site, cache


@pytest.fixture
def copied(built, tmp_path):
    """The package, and a copy of its cache that a test may spoil."""
    site, cache = built
    subprocess.run(["cp", "-a", cache, tmp_path / "cache"], check=True)
    return site, tmp_path / "cache"


def library_in(cache):
    [library] = cache.rglob(jit.LIBRARY)
    return library


@needs_compiler
@pytest.mark.slow
def test_only_the_owner_may_read_and_write_what_is_made(built):
    _, cache = built
    kept = [cache, *cache.rglob("*")]
    assert {jit.LIBRARY, jit.LIBRARY + trust.RECORD} < {path.name for path in kept}
    assert any(path.suffix == ".json" for path in kept), "the certificate"
    for path in kept:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), f"{path.name}: {mode:o}"


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("cut", [0, 5000, -4096])
def test_a_torn_library_is_not_touched(copied, tmp_path, cut):
    site, cache = copied
    library = library_in(cache)
    content = library.read_bytes()
    library.write_bytes(content[:cut])
    alone = step(cache, tmp_path, site, PATH=NOWHERE)
    assert alone.code == 0, alone.err
    assert not alone.said["compiled"]
    assert alone.said["moved"]
    mended = step(cache, tmp_path, site)
    assert mended.builds == 1
    assert mended.said["compiled"], mended.err
    assert step(cache, tmp_path, site).builds == 0


MARKER = """
#include <stdio.h>
__attribute__((constructor)) static void ran(void) {
  FILE* file = fopen("MARK", "w");
  if (file) fclose(file);
}
"""


@pytest.fixture
def foreign(tmp_path):
    """A library that leaves a file behind where it is loaded, and that file."""
    mark, source = tmp_path / "mark", tmp_path / "foreign.c"
    source.write_text(MARKER.replace("MARK", str(mark)))
    library = tmp_path / "foreign.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library, mark


@needs_compiler
@pytest.mark.slow
def test_other_content_than_was_recorded_is_not_loaded(copied, foreign, tmp_path):
    site, cache = copied
    library, mark = foreign
    library_in(cache).write_bytes(library.read_bytes())
    assert step(cache, tmp_path, site, PATH=NOWHERE).code == 0
    assert not mark.exists()


@needs_compiler
@pytest.mark.slow
def test_without_a_compiler_no_library_is_taken_that_nobody_recorded(copied, foreign, tmp_path):
    site, cache = copied
    library, mark = foreign
    folder = library_in(cache).parent
    other = folder.with_name("0" * 16)
    folder.rename(other)
    assert step(cache, tmp_path, site, PATH=NOWHERE).said["compiled"], "of another compiler"
    (other / jit.LIBRARY).write_bytes(library.read_bytes())
    assert not step(cache, tmp_path, site, PATH=NOWHERE).said["compiled"]
    assert not mark.exists()


@needs_compiler
@pytest.mark.slow
def test_a_library_without_kernels_is_none(copied, foreign, tmp_path):
    site, cache = copied
    library = library_in(cache)
    library.write_bytes(foreign[0].read_bytes())
    trust.write_text(library.with_name(library.name + trust.RECORD), trust.digest_of(library))
    insisting = STEP.replace("lr=0.1", "lr=0.1, fused=True")
    env = environment(cache, site, PATH=NOWHERE)
    refused = Result(start(["-c", insisting], env, tmp_path))
    assert refused.code == 1
    assert "BuildError" in refused.err


@needs_compiler
@pytest.mark.slow
def test_no_link_is_followed_where_something_is_written(tmp_path):
    site, cache = small_package(tmp_path / "site"), tmp_path / "cache"
    (site / "shampoo" / "csrc" / "tiny.cpp").write_text("#error broken on purpose\n")
    assert "broken on purpose" in step(cache, tmp_path, site).said["warnings"][0]
    [failure] = cache.rglob(jit.FAILURE)
    victims = []
    for path in (failure, failure.with_name(jit.LIBRARY).with_suffix(".lock")):
        victim = tmp_path / f"{path.name}.victim"
        victim.write_text("precious")
        path.unlink(missing_ok=True)
        path.symlink_to(victim)
        victims.append(victim)
    old = time.time() - jit.FAILURE_LIFETIME - 60
    os.utime(victims[0], (old, old))
    assert step(cache, tmp_path, site).builds == 1
    assert [victim.read_text() for victim in victims] == ["precious"] * 2
    assert not failure.is_symlink()


LIMITS = """
from shampoo.ops import jit
jit._LONGEST_ANSWER, jit._LONGEST = 3.0, 12.0
"""


def compiler_that(folder, *lines):
    path = folder / "cxx"
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_says_nothing_is_not_waited_for(tmp_path):
    hangs = compiler_that(tmp_path, "sleep 1000")
    env = environment(tmp_path / "cache", CXX=hangs)
    result = Result(start(["-c", LIMITS + STEP], env, tmp_path))
    assert result.code == 0, result.err
    [warning] = result.said["warnings"]
    assert "does not answer --version within 3 s" in warning
    assert result.said["moved"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_compiler_that_never_ends_is_ended(tmp_path):
    answers = '[ "$1" = --version ] && echo fake 1.0 && exit 0'
    hangs = compiler_that(tmp_path, answers, f"exec -a {tmp_path.name} sleep 1000")
    (tmp_path / "cxx").write_text((tmp_path / "cxx").read_text().replace("/bin/sh", "/bin/bash"))
    env = environment(tmp_path / "cache", CXX=hangs)
    result = Result(start(["-c", LIMITS + STEP], env, tmp_path))
    assert result.code == 0, result.err
    assert "did not end within 12 s" in result.said["warnings"][0]
    assert tmp_path.name not in running(), "what the compiler has started"


def test_what_a_dead_parent_has_started_is_ended(tmp_path):
    name = f"child-of-{tmp_path.name}"
    child = f"import subprocess; subprocess.run(['bash', '-c', 'exec -a {name} sleep 1000'])"
    code = (
        "import apart_children\n"
        "from shampoo.ops.apart import Apart\n"
        f"Apart().ask(apart_children.run, {child!r}, timeout=1000)\n"
    )
    (tmp_path / "apart_children.py").write_text(
        "from shampoo.ops.apart import take_children_along\n"
        "def run(code):\n    take_children_along()\n    exec(code)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    parent = start(["-c", code], {**os.environ, "PYTHONPATH": path}, tmp_path)
    wait_until(lambda: name in running() or parent.poll() is not None)
    assert name in running(), parent.communicate()[1]
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    wait_until(lambda: name not in running())
    assert name not in running()


def running() -> str:
    """The commands of all processes."""
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def wait_until(is_so, seconds=60.0):
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.05)


@pytest.mark.parametrize("command", ["'unbalanced", "/nonexistent", "; touch injected"])
def test_an_odd_compiler_leaves_the_references_after_one_line(tmp_path, command):
    result = step(tmp_path / "cache", tmp_path, CXX=command)
    assert result.code == 0, result.err
    [warning] = result.said["warnings"]
    assert "Invalid CXX=" in warning or "no C++ compiler" in warning
    assert result.said["moved"]
    assert not (tmp_path / "injected").exists()
