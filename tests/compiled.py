"""The compiled kernels of the CPU, wherever a test asks for them."""

import pytest

from shampoo import ops
from shampoo.ops import jit


def load_compiled() -> None:
    """Builds and loads them; a test is skipped where there is no compiler."""
    if not jit.compiler_version():
        pytest.skip("no C++ compiler: the compiled kernels are not tested")
    ops.load_kernels(required=True)
