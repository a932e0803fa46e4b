"""Every Triton kernel ahead of time, as its launcher launches it, for three architectures."""

import importlib
import os
import re
import subprocess

import pytest
import torch

from shampoo.roots.minimax_table import minimax_schedule

triton = pytest.importorskip("triton", reason="triton is not installed: nothing is compiled")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here"
    ),
]

# sm: the tensor core instruction, and the shared memory that a block may have
ARCHES = {80: ("mma.sync", 163), 90: ("wgmma.mma_async", 227), 100: ("tcgen05.mma", 227)}
MODULES = (
    *("diagonal", "gram", "keep_roots", "precondition", "root_check", "split_fp16"),
    "symmetric_gemm",
)
TENSOR_CORES = {
    "symmetric_gemm_kernel",
    "gram_ema_kernel",
    "apply_root_kernel",
    "panel_kernel",
}
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Recorder:
    """Stands for a kernel: keeps what it would have been specialised to."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        assert all(extent > 0 for extent in grid)
        return self.launch

    def launch(self, *arguments, num_warps, num_stages=3, **constants):
        signature, attributes = {}, {}
        names = self.kernel.arg_names
        for place, (name, value) in enumerate(zip(names, arguments, strict=False)):
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                anywhere = self.kernel.params[place].do_not_specialize_on_alignment
                divisible = value.data_ptr() % 16 == 0 and not anywhere
            elif isinstance(value, float):
                signature[name], divisible = "fp32", False
            elif value == 1:  # as Triton does
                constants[name], divisible = 1, False
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
                divisible = value % 16 == 0
            if divisible:
                attributes[(place,)] = (("tt.divisibility", 16),)
        assert {*signature, *constants} == {*names}
        key = (self.kernel.__name__, tuple(signature.items()), tuple(constants.items()))
        options = (("num_warps", num_warps), ("num_stages", num_stages))
        self.launches[(*key, tuple(attributes.items()), options)] = self.kernel


def launch_everything():
    """The launchers at the sizes and dtypes between which their tables choose."""
    kernels = {name: importlib.import_module(f"shampoo.kernels.triton.{name}") for name in MODULES}
    minimax = importlib.import_module("shampoo.kernels.triton.minimax")
    schedule = [c for step in minimax_schedule(4, 1e-6) for c in step]
    for n in (64, 1024):
        matrix, ridge = torch.empty(2, n, n), torch.empty(2).double()
        minimax.minimax_root_(matrix.clone(), ridge, matrix, 4, 1e-12, 1e-6, schedule)
        given = matrix.clone(), ridge, matrix, 4.0
        kernels["diagonal"].diagonal_root_(*given, 1e-12, 1e-6)
        kernels["diagonal"].diagonal_root_(*given, 0.0, 0.0)
    ok = torch.empty(2, dtype=torch.bool)
    counts = torch.empty(2, dtype=torch.uint8), torch.empty(2, dtype=torch.int32), ok.clone()
    for dtype in (torch.float32, torch.float64):
        root, candidate = torch.empty(2, 2, 64, 64, dtype=dtype)
        for accepted in (None, torch.tensor(True)):
            kernels["keep_roots"].keep_roots_(root, *counts, candidate, ok, accepted)
    live = torch.tensor([0.99, 0.01], dtype=torch.float64).unbind()
    kernels["root_check"].check_roots_(ok, matrix, matrix.clone(), ridge, 4.0)
    of_class = importlib.import_module("shampoo.kernels.triton.minimax_class")
    sizes = torch.empty(2, dtype=torch.int32)
    for n in (64, 1024):
        matrix = torch.empty(2, n, n)
        how = sizes, 4, 1e-12, 1e-6, schedule
        of_class.minimax_class_root_(matrix.clone(), ridge, matrix, *how)
    kernels["root_check"].check_roots_(ok, matrix, matrix.clone(), ridge, 4.0, sizes)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((2, 32, 32), (2, 64, 64), (2, 1024, 1024), (2, 8, 512, 16)):
            grad = torch.empty(shape, dtype=dtype)
            factors = [torch.empty(2, size, size) for size in shape[1:]]
            for mode, factor in enumerate(factors):
                kernels["gram"].gram_ema_([factor], [grad], [mode], 0.99, 0.01)
                if factor.shape[1] >= 64:  # registers are scarce
                    kernels["gram"].gram_ema_([factor], [grad], [mode], *live)
            out, norm = torch.empty(shape), torch.empty(2)
            kernels["precondition"].precondition_([out], [norm], [grad], factors)


def test_numbers_on_the_device_may_lie_anywhere(monkeypatch):
    """At any multiple of 8 bytes: a kernel more could be compiled while a graph is captured."""
    gram, launches = importlib.import_module("shampoo.kernels.triton.gram"), {}
    monkeypatch.setattr(gram, "gram_ema_kernel", Recorder(gram.gram_ema_kernel, launches))
    numbers = torch.empty(3, dtype=torch.float64).unbind()
    for beta, weight in (numbers[:2], numbers[1:], numbers[::2]):
        gram.gram_ema_([torch.empty(2, 32, 32)], [torch.empty(2, 32, 8)], [0], beta, weight)
    assert len(launches) == 1


@pytest.mark.parametrize("arch", ARCHES)
def test_kernels_use_tensor_cores_and_fit(arch, monkeypatch, tmp_path):
    instruction, limit = ARCHES[arch]
    launches = {}
    for name in MODULES:
        module = importlib.import_module(f"shampoo.kernels.triton.{name}")
        if hasattr(module, "capability"):
            monkeypatch.setattr(module, "capability", lambda device: arch)
        for key, value in list(vars(module).items()):
            if key.endswith("_kernel") and isinstance(value, triton.JITFunction):
                monkeypatch.setattr(module, key, Recorder(value, launches))
    launch_everything()
    seen, problems = set(), []
    for (name, signature, constants, attributes, options), kernel in launches.items():
        types = dict.fromkeys(kernel.arg_names, "constexpr") | dict(signature)
        source = ASTSource(
            fn=kernel,
            signature={key: types[key] for key in kernel.arg_names},
            constexprs={(kernel.arg_names.index(key),): value for key, value in constants},
            attrs={place: [list(pair) for pair in pairs] for place, pairs in attributes},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))
        path = tmp_path / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [tool, "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        registers, stack, local = (
            int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK", "LOCAL")
        )
        shared = compiled.metadata.shared
        row = (arch, name, dict(constants), dict(options), registers, shared, stack)
        print(*row)
        seen.add(name)
        if stack or local or shared > limit * 1024:
            problems.append(row)
        # Tiles of fewer than 64 rows are too small for the instructions of a warp group.
        small = min(dict(constants).get(key, 64) for key in ("BLOCK", "ROWS")) < 64
        wanted = "mma.sync" if small else instruction
        products, ptx = dict(constants).get("PRODUCTS", 3), compiled.asm["ptx"]
        if name in TENSOR_CORES and products and wanted not in ptx:
            problems.append(("no " + wanted, *row))
        # Numbers of the device: two conversions, then float32 as with those of the host.
        in_double = 2 if dict(constants).get("ON_DEVICE") else 0
        if "ON_DEVICE" in dict(constants) and len(re.findall(r"\.f64\s", ptx)) != in_double:
            problems.append(("float64", *row))
    assert seen == {
        key
        for name in MODULES
        for key in vars(importlib.import_module(f"shampoo.kernels.triton.{name}"))
        if key.endswith("_kernel")
    }
    assert not problems
