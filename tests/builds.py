"""Fresh processes that build, with caches of their own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

import shampoo
import shampoo.kernels
from shampoo.ops import jit

needs_compiler = pytest.mark.skipif(
    not jit.compiler_version(), reason="no C++ compiler: nothing can be built"
)

STEP = """
import json, sys, warnings
import torch
torch.set_num_threads(1)
from shampoo import Shampoo, ops
from shampoo.ops import jit
weight = torch.nn.Parameter(torch.ones(4, 3))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer = Shampoo([weight], lr=0.1)
    Shampoo([weight], lr=0.1)
weight.grad = torch.ones(4, 3)
optimizer.step()
print(json.dumps({
    "warnings": [str(warning.message) for warning in caught],
    "compiled": ops.runs_kernel_on_cpu("magnitudes_"),
    "moved": bool((weight != 1).all()),
}))
"""

BUILDING = "building kernels"

# Compiles in a few seconds, and registers one kernel, which passes its checks.
TINY = """
#include <ATen/core/Tensor.h>
#include <torch/library.h>
void magnitudes(const at::Tensor& out, at::TensorList tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) out.select(0, i).copy_(tensors[i].abs().max());
}
TORCH_LIBRARY_IMPL(shampoo, CPU, m) { m.impl("magnitudes_", &magnitudes); }
"""


def environment(cache: Path, package: Path | None = None, **changes: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SHAMPOO_")}
    if package is not None:
        kept["PYTHONPATH"] = str(package)
    return {**kept, "SHAMPOO_CACHE_DIR": str(cache), **changes}


def start(arguments: list[str], env: dict[str, str], cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=env,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


class Result:
    """What a process said: the JSON on its last line, and everything on stderr."""

    def __init__(self, process: subprocess.Popen) -> None:
        out, self.err = process.communicate(timeout=PATIENCE)
        self.code = process.returncode
        self.builds = self.err.count(BUILDING)
        self.said = json.loads(out.splitlines()[-1]) if self.code == 0 and out else {}


def step(cache: Path, cwd: Path, package: Path | None = None, **changes: str) -> Result:
    return Result(start(["-c", STEP], environment(cache, package, **changes), cwd))


def small_package(site: Path) -> Path:
    """The installed package, copied to a folder, with :data:`TINY` as its only source."""
    ignore = shutil.ignore_patterns("__pycache__", "kernels", "csrc")
    shutil.copytree(Path(shampoo.__file__).parent, site / "shampoo", ignore=ignore)
    kernels = Path(shampoo.kernels.__file__).parent
    shutil.copytree(kernels, site / "shampoo" / "kernels", ignore=shutil.ignore_patterns("__py*"))
    csrc = site / "shampoo" / "csrc"
    csrc.mkdir()
    (csrc / "__init__.py").write_text("")
    (csrc / "tiny.cpp").write_text(TINY)
    return site
