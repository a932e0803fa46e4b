"""Every .cu file through nvcc for three architectures, without torch and without a GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from shampoo.ops import jit

pytestmark = pytest.mark.slow

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
FILES = sorted(path.name for path in jit.source_dir().glob("cuda/*.cu"))

# Every kernel: threads of a block, and blocks that one multiprocessor must hold.
KERNELS = {
    "gather_kernel": (256, 4),
    "magnitudes_kernel": (256, 6),
    "update_kernel<float>": (256, 4),
    "update_kernel<double>": (256, 3),
    "moments_kernel<float>": (256, 3),
    "moments_kernel<double>": (256, 2),
    "coefficients_kernel": (256, 1),
    "norms_kernel": (256, 4),
    "graft_scale_kernel": (128, 8),
    "minimax_small_root_kernel<32>": (64, 8),
    "minimax_small_root_kernel<64>": (128, 3),
    "minimax_small_root_kernel<96>": (192, 1),
    "minimax_small_root_kernel<128>": (256, 1),
}
REGISTERS = 65536  # of a multiprocessor


def nvcc() -> str:
    command = shutil.which("nvcc")
    if command is None:
        pytest.skip("no nvcc on PATH: the CUDA kernels are not compiled")
    return command


def kernel_of(symbol: str) -> str:
    """The key of KERNELS for a mangled name."""
    for name in KERNELS:
        stem, _, argument = name.partition("<")
        mangled = {"float>": "If", "double>": "Id"}.get(argument, f"ILi{argument[:-1]}E")
        if stem in symbol and (not argument or mangled in symbol):
            return name
    raise AssertionError(f"{symbol} is not in KERNELS: list it")


def resources(report: str) -> list[tuple[str, int, int, int]]:
    """(symbol, bytes of stack, bytes spilled, registers) of every kernel that ptxas reports."""
    found = []
    for entry in report.split("Compiling entry function")[1:]:
        symbol = re.search(r"'(\w+)'", entry)
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        if not (symbol and memory and registers):
            raise AssertionError(entry)
        spilled = int(memory[2]) + int(memory[3])
        found.append((symbol[1], int(memory[1]), spilled, int(registers[1])))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_kernels_compile_without_spills(tmp_path: Path, file: str, architecture: str) -> None:
    command = [nvcc(), "-cubin", f"-arch={architecture}", "-O3", "-Xptxas", "-v"]
    command += ["-I", str(jit.source_dir()), "-o", str(tmp_path / "kernel.cubin")]
    command += [str(jit.source_dir() / "cuda" / file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    found = resources(done.stderr)
    assert found
    for symbol, stack, spilled, registers in found:
        threads, blocks = KERNELS[kernel_of(symbol)]
        print(f"{architecture} {kernel_of(symbol)}: {registers} registers")
        assert stack == 0, symbol
        assert spilled == 0, symbol
        allocated = -(-registers // 8) * 8  # a warp gets registers in units of 256
        assert allocated * threads * blocks <= REGISTERS, symbol
    listed = {name for name in KERNELS if name.split("<")[0] in Path(done.args[-1]).read_text()}
    assert {kernel_of(symbol) for symbol, *_ in found} == listed
