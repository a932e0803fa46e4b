"""The build on first use, in fresh processes with caches of their own."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from builds import STEP, TINY, Result, environment, needs_compiler, small_package, start, step
from patience import PATIENCE
from torch.utils import cpp_extension

import shampoo
import shampoo.kernels
from shampoo import ops
from shampoo.ops import jit, trust


@pytest.fixture
def package(tmp_path):
    return small_package(tmp_path / "site")


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """Four processes that start at once on an empty cache, with the real sources."""
    folder = tmp_path_factory.mktemp("cold")
    before = installed_files()
    processes = [start(["-c", STEP], environment(folder / "cache"), folder) for _ in range(4)]
    results = [Result(process) for process in processes]
    return folder, results, before


def installed_files() -> set[Path]:
    folders = [Path(m.__file__).parent for m in (shampoo, shampoo.kernels)] + [jit.source_dir()]
    files = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    return {path for path in files if "__pycache__" not in path.parts}


@needs_compiler
@pytest.mark.slow
def test_processes_at_once_build_exactly_once(cold):
    _, results, _ = cold
    assert [result.code for result in results] == [0] * 4, results[0].err
    assert sum(result.builds for result in results) == 1
    assert all(result.said["compiled"] and result.said["moved"] for result in results)
    assert all(result.said["warnings"] == [] for result in results)


@needs_compiler
@pytest.mark.slow
def test_a_build_writes_into_the_cache_alone(cold):
    folder, _, before = cold
    assert installed_files() == before
    built = {path.name for path in (folder / "cache").glob("*/*/*") if path.is_file()}
    lock, record = Path(jit.LIBRARY).with_suffix(".lock").name, jit.LIBRARY + trust.RECORD
    assert built == {jit.LIBRARY, lock, record}
    proved = {path.suffix for path in (folder / "cache" / "certificates").iterdir()}
    assert proved == {".json", trust.RECORD, ".lock"}


@needs_compiler
@pytest.mark.slow
def test_a_later_process_loads_from_the_cache(cold):
    folder, _, _ = cold
    result = step(folder / "cache", folder)
    assert result.said == {"warnings": [], "compiled": True, "moved": True}
    assert result.builds == 0


@needs_compiler
@pytest.mark.slow
def test_a_machine_without_a_compiler_uses_what_another_has_built(cold):
    folder, _, _ = cold
    result = step(folder / "cache", folder, CXX="/nowhere/c++", SHAMPOO_BACKEND="cuda")
    assert result.said["compiled"], result.err


@needs_compiler
@pytest.mark.slow
def test_the_report_names_library_and_kernels(cold):
    folder, _, _ = cold
    process = start(["-m", "shampoo", "--json"], environment(folder / "cache"), folder)
    facts = json.loads(process.communicate(timeout=PATIENCE)[0])
    assert process.returncode == 0
    assert facts["torch"] == torch.__version__
    compiled = {name for name, kind in facts["cpu_kernels"].items() if kind == "cpp"}
    assert compiled >= {"gather_blocks_", "gram_ema_", "precondition_", "update_blocks_"}
    assert Path(facts["library"]).is_file()
    assert Path(facts["library"]).is_relative_to(folder / "cache")


def test_import_compiles_nothing(tmp_path):
    code = """
import json, sys
import shampoo, shampoo.ops
print(json.dumps([any(shampoo.ops.kernels().values()), "torch.utils.cpp_extension" in sys.modules]))
"""
    result = Result(start(["-c", code], environment(tmp_path / "cache"), tmp_path))
    assert result.said == [False, False], result.err
    assert not (tmp_path / "cache").exists()


def test_without_a_compiler_the_references_stay_after_one_warning(tmp_path):
    result = step(tmp_path / "cache", tmp_path, CXX="/nowhere/c++")
    [warning] = result.said["warnings"]
    assert "no C++ compiler: '/nowhere/c++' is not on PATH. Install g++ or set CXX." in warning
    assert result.said["moved"]
    assert not result.said["compiled"]


def test_without_a_compiler_a_named_backend_raises(tmp_path):
    changes = {"CXX": "/nowhere/c++", "SHAMPOO_BACKEND": "cuda"}
    result = step(tmp_path / "cache", tmp_path, **changes)
    assert result.code == 1
    assert "BuildError: no C++ compiler: '/nowhere/c++'" in result.err


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"SHAMPOO_DISABLE_JIT": "1"}, "SHAMPOO_DISABLE_JIT=1 forbids building"),
        ({"SHAMPOO_CACHE_DIR": "{file}/below"}, "Set SHAMPOO_CACHE_DIR to a writable folder"),
    ],
    ids=["disabled", "unwritable"],
)
def test_what_prevents_a_build_is_named(tmp_path, changes, cause):
    if "CACHE" in next(iter(changes)) and not jit.compiler_version():
        pytest.skip("no C++ compiler: the cache is not reached")
    (tmp_path / "file").write_text("")
    changes = {key: value.format(file=tmp_path / "file") for key, value in changes.items()}
    result = step(tmp_path / "cache", tmp_path, **changes)
    [warning] = result.said["warnings"]
    assert cause in warning
    assert result.said["moved"]
    assert not result.said["compiled"]


def test_the_reference_backend_does_not_try(tmp_path):
    result = step(tmp_path / "cache", tmp_path, SHAMPOO_BACKEND="reference", CXX="/nowhere/c++")
    assert result.said == {"warnings": [], "compiled": False, "moved": True}
    assert not (tmp_path / "cache").exists()


def test_a_misspelt_backend_lists_the_choices(monkeypatch):
    monkeypatch.setenv("SHAMPOO_BACKEND", "compiled")
    with pytest.raises(ValueError, match=r"'compiled'.*'auto', 'cuda', 'triton', 'reference'"):
        ops.load_kernels()


def test_required_contradicts_the_reference_backend(monkeypatch):
    monkeypatch.setenv("SHAMPOO_BACKEND", "reference")
    ops.load_kernels()
    with pytest.raises(jit.BuildError, match="SHAMPOO_BACKEND=reference forbids"):
        ops.load_kernels(required=True)


@needs_compiler
@pytest.mark.slow
def test_a_compile_error_is_found_once_and_remembered(tmp_path, package):
    cache, broken = tmp_path / "cache", package / "shampoo" / "csrc" / "broken.cpp"
    broken.write_text("#error broken on purpose\n")
    (broken.parent / "tiny.cpp").unlink()
    env = environment(cache, package, SHAMPOO_BACKEND="cuda")
    results = [Result(p) for p in [start(["-c", STEP], env, tmp_path) for _ in range(3)]]
    assert [result.code for result in results] == [1] * 3
    assert all("broken on purpose" in result.err for result in results)
    assert sum(result.builds for result in results) == 1
    assert sum("remembered from" in result.err for result in results) == 2

    later = step(cache, tmp_path, package)
    assert later.builds == 0
    assert "broken on purpose" in later.said["warnings"][0]
    assert later.said["moved"]

    elsewhere = step(cache, tmp_path, package, CPATH=str(tmp_path))
    assert elsewhere.builds == 1  # the compiler's surroundings changed

    asked = Result(start(["-m", "shampoo"], environment(cache, package), tmp_path))
    assert (asked.code, asked.builds) == (1, 1)

    [record] = cache.rglob(jit.FAILURE)
    old = time.time() - jit.FAILURE_LIFETIME - 60
    os.utime(record, (old, old))
    assert step(cache, tmp_path, package).builds == 1

    broken.write_text(TINY)
    mended = step(cache, tmp_path, package)
    assert mended.said["compiled"], mended.err
    assert mended.builds == 1


@needs_compiler
@pytest.mark.slow
def test_a_killed_builder_leaves_no_trace(tmp_path, package):
    cache = tmp_path / "cache"
    victim = start(["-c", STEP], environment(cache, package), tmp_path)
    while not list(cache.rglob("build-*/build.ninja")) and victim.poll() is None:
        time.sleep(0.02)
    os.killpg(victim.pid, signal.SIGKILL)  # a session of its own: the compiler dies with it
    victim.communicate()
    assert list(cache.rglob("build-*"))
    assert not list(cache.rglob(jit.LIBRARY))
    result = step(cache, tmp_path, package)
    assert result.said["compiled"], result.err
    assert result.builds == 1
    assert not list(cache.rglob("build-*"))


@needs_compiler
@pytest.mark.slow
def test_a_library_that_does_not_load_is_built_again(tmp_path, package):
    cache = tmp_path / "cache"
    assert step(cache, tmp_path, package).builds == 1
    [library] = cache.rglob(jit.LIBRARY)
    library.write_bytes(b"not a library")
    again = step(cache, tmp_path, package)
    assert again.said["compiled"], again.err
    assert again.builds == 1
    assert step(cache, tmp_path, package).builds == 0


def test_ninja_is_found_beside_the_interpreter(monkeypatch, tmp_path):
    if not (Path(sys.executable).parent / "ninja").exists():
        pytest.skip("ninja is not installed beside this interpreter")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("ninja") is None
    with jit._ninja_on_path():
        assert shutil.which("ninja")
    assert os.environ["PATH"] == str(tmp_path)


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """A copy of csrc/ that the test may edit."""
    folder = tmp_path / "csrc"
    shutil.copytree(jit.source_dir(), folder)
    monkeypatch.setattr(jit, "source_dir", lambda: folder)
    monkeypatch.setenv("SHAMPOO_CACHE_DIR", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def toolkits(sources, monkeypatch, tmp_path):
    """Two CUDA toolkits, named by what their nvcc says, for a torch that has CUDA."""
    folders = []
    for version in ("V13.0.88", "V13.1.80"):
        nvcc = tmp_path / version / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\necho release {version}\n")
        nvcc.chmod(0o755)
        folders.append(tmp_path / version)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("SHAMPOO_BACKEND", "cuda")
    monkeypatch.setenv("SHAMPOO_CUDA_ARCH", "9.0")
    monkeypatch.delenv("PYTORCH_NVCC", raising=False)
    return folders


def append(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


CHANGES = {
    "source": lambda folder, patch: append(folder / "cpu" / "update.cpp"),
    "header": lambda folder, patch: append(folder / "common" / "tiles.h"),
    "new file": lambda folder, patch: (folder / "new.h").write_text(""),
    "moved file": lambda folder, patch: (folder / "cpu" / "simd.h").rename(folder / "simd.h"),
    "torch": lambda folder, patch: patch.setattr(torch, "__version__", "0.0.0"),
    "cuda": lambda folder, patch: patch.setattr(torch.version, "cuda", "0.0"),
    "flags": lambda folder, patch: patch.setattr(jit, "CXX_FLAGS", ("-O0",)),
    "compiler": lambda folder, patch: patch.setattr(jit, "compiler_version", lambda: "g++ 0.0"),
    "processor": lambda folder, patch: patch.setattr(
        torch.backends.cpu, "get_cpu_capability", lambda: "another"
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_changes_with_everything_that_shapes_the_library(sources, monkeypatch, change):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    before = jit.library_path()
    assert jit.library_path() == before
    CHANGES[change](sources, monkeypatch)
    assert jit.library_path() != before


def test_the_key_changes_with_nvcc(toolkits, monkeypatch):
    first, second = toolkits
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(first))
    before = jit.library_path()
    assert jit.library_path() == before
    assert jit.nvcc_version() == "release V13.0.88"
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(second))
    after = jit.library_path()
    assert after.parent.parent == before.parent.parent, "found where a compiler is missing"
    assert after != before
    monkeypatch.setenv("PYTORCH_NVCC", str(first / "bin" / "nvcc"))
    assert jit.library_path() == before
    monkeypatch.setenv("SHAMPOO_BACKEND", "auto")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    on_cpu = jit.library_path()
    monkeypatch.delenv("PYTORCH_NVCC")
    assert jit.library_path() == on_cpu, "no nvcc is run for a library without CUDA"


def test_a_machine_without_nvcc_uses_what_another_has_built(toolkits, monkeypatch):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(toolkits[0]))
    library = jit.library_path()
    library.parent.mkdir(parents=True)
    scratch = library.with_suffix(".new")
    scratch.write_bytes(b"a library")
    trust.publish_recorded(scratch, library)
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(jit, "has_kernel", lambda name, device: True)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    jit.load()
    assert loaded == [str(library)]
    library.unlink()
    with pytest.raises(jit.BuildError, match="no CUDA toolkit in 'PATH'"):
        jit.load()


def test_no_cuda_toolkit_is_asked_for_without_cuda_sources(sources, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for source in sources.rglob("*.cu"):
        source.unlink()
    monkeypatch.setenv("SHAMPOO_BACKEND", "cuda")
    assert jit.cuda_flags() == []
    assert all(source.suffix == ".cpp" for source in jit.sources())
    (sources / "kernel.cu").write_text("")
    monkeypatch.setenv("SHAMPOO_BACKEND", "auto")
    assert jit.cuda_flags() == [], "CUDA kernels are built only where they are asked for"
    monkeypatch.setenv("SHAMPOO_BACKEND", "cuda")
    monkeypatch.setenv("SHAMPOO_CUDA_ARCH", "8.0;9.0a")
    assert jit.cuda_flags() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    monkeypatch.delenv("SHAMPOO_CUDA_ARCH")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(jit.BuildError, match=r"set SHAMPOO_CUDA_ARCH, for example to '9\.0'"):
        jit.library_path()


def test_vector_units_of_this_machine_are_used(monkeypatch):
    for capability, flag in jit.CPU_LEVELS.items():
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert flag in jit.cxx_flags()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not any(flag.startswith("-march") for flag in jit.cxx_flags())
