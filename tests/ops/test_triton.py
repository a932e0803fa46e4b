"""The Triton kernels in Triton's interpreter, each file of ``triton_interpreter/`` in a process.

Kernels are interpreted or compiled for the life of a process, so the variable that decides must be
set before the first import. ``TRITON_INTERPRET=1 pytest tests/triton_interpreter`` runs them here.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "triton_interpreter"
PYTEST = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: its kernels are not tested",
)
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("test_*.py")))
def test_in_the_interpreter(name):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # Not "python -m pytest" from the root: a checkout would shadow the installed package.
    command = [sys.executable, "-c", PYTEST, "-q", "-x", f"{name}.py"]
    result = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_package_imports_no_kernel_in_triton():
    code = (
        "import shampoo, shampoo.roots, sys;"
        "sys.exit('shampoo.kernels.triton.arch' in sys.modules or 'triton.language' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
