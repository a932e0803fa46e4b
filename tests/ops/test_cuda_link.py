"""The whole extension against a CUDA build of torch: compiled, linked and loaded without a GPU.

``SHAMPOO_CUDA_TORCH_PYTHON`` names the interpreter of an environment with such a torch: `make test`
makes one where there is an nvcc. Its package ``shampoo`` is not used: the one under test is copied
beside it.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import shampoo
import shampoo.kernels
from shampoo.ops import OPS, jit

IN_CUDA = {name for name, op in OPS.items() if op.has_cuda_name}

SCRIPT = (
    f"IN_CUDA = {sorted(IN_CUDA)}"
    + """
import json, time
import torch
from shampoo import ops
from shampoo.ops import jit
assert torch.version.cuda, "SHAMPOO_CUDA_TORCH_PYTHON has a torch without CUDA"
start = time.perf_counter()
jit.load(retry=True)
seconds = time.perf_counter() - start
loaded = {name: ops.has_kernel(f"cuda_{name}", "CUDA") for name in IN_CUDA}
before = ops.kernels("CUDA")
ops.load_kernels(required=True)
print(json.dumps({
    "seconds": seconds,
    "flags": jit.cuda_flags(),
    "cpu": ops.kernels("CPU"),
    "loaded": loaded,
    "before": before,
    "routed": ops.kernels("CUDA"),
}))
"""
)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the package as it installs."""
    folder = tmp_path / "site"
    ignore = shutil.ignore_patterns("__pycache__", "kernels", "csrc")
    shutil.copytree(Path(shampoo.__file__).parent, folder / "shampoo", ignore=ignore)
    ignore = shutil.ignore_patterns("__pycache__")
    kernels = Path(shampoo.kernels.__file__).parent
    shutil.copytree(kernels, folder / "shampoo" / "kernels", ignore=ignore)
    shutil.copytree(jit.source_dir(), folder / "shampoo" / "csrc", ignore=ignore)
    return folder


def toolkit() -> Path:
    """The toolkit of the ``nvcc`` on PATH, which may be a script that runs the real one."""
    told = subprocess.run(["nvcc", "--dryrun", "any.cu"], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.*)$", told, re.MULTILINE)
    assert found, told
    return Path(found[1]).resolve()


@pytest.mark.slow
def test_the_extension_builds_and_loads_against_cuda(site: Path, tmp_path: Path) -> None:
    python = os.environ.get("SHAMPOO_CUDA_TORCH_PYTHON")
    if not python:
        pytest.skip("SHAMPOO_CUDA_TORCH_PYTHON names no Python with a CUDA build of torch")
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc on PATH: the extension cannot be built for CUDA")
    environment = {
        "CUDA_HOME": str(toolkit()),
        "SHAMPOO_CUDA_ARCH": "8.0 9.0",
        "SHAMPOO_BACKEND": "cuda",
        **os.environ,
        "PYTHONPATH": str(site),
        "SHAMPOO_CACHE_DIR": str(tmp_path / "cache"),
    }
    command = [python, "-c", SCRIPT]
    results = []
    for _ in range(2):
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        results.append((json.loads(done.stdout.splitlines()[-1]), done.stderr))
    (first, said), (second, said_again) = results
    print(f"{first['seconds']:.0f} s to build, {second['seconds']:.1f} s to load")
    assert "building kernels" in said
    assert "building" not in said_again
    assert len(first["flags"]) == len(environment["SHAMPOO_CUDA_ARCH"].replace(";", " ").split())
    assert all(first["loaded"].values())
    assert not any(first["before"].values())
    sharded = {name for name, there in first["routed"].items() if there}
    assert sharded == {name for name, op in OPS.items() if "cuda" in op.kinds("cuda")}
    assert first["cpu"]["gather_blocks_"]
