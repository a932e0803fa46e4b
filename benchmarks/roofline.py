"""What a device can do, measured: bandwidth of a copy, matmul rate of every dtype.

A kernel's roofline is the larger of its bytes over the bandwidth and its FLOPs over the rate of the
tensor-core type it uses, as often as it multiplies in split precision. Products of symmetric
results count half. On a CPU products are plain float32.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from shampoo.certificates.timing import Clock

MATMULS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}


def measure(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Best of several runs: ``copy_bytes_per_s`` (read plus written), ``flops_per_s`` by dtype."""
    clock, is_gpu, small = Clock(device), device.type == "cuda", case["small"]
    repeats = 3 if small else 9

    def best(call: Callable[[], object]) -> float:
        call()
        return min(clock.time(call) for _ in range(repeats))

    elements = (1 << 22) if small else (1 << 28 if is_gpu else 1 << 26)
    source = torch.ones(elements, device=device)
    copy = 8 * elements / best(partial(torch.empty_like(source).copy_, source))
    size = 256 if small else (8192 if is_gpu else 1024)
    rates = {}
    for name, (dtype, tf32) in MATMULS.items():
        if not is_gpu and name != "float32":
            continue  # what the kernels for the CPU multiply in
        left = torch.randn(size, size, device=device).to(dtype)
        product = partial(torch.mm, left, left.T.contiguous(), out=torch.empty_like(left))
        rates[name] = 2 * size**3 / best(_allowing(product) if tf32 else product)
    return {"copy_bytes_per_s": copy, "flops_per_s": rates}


def _allowing(product: Callable[[], object]) -> Callable[[], object]:
    matmul: Any = torch.backends.cuda.matmul

    def call() -> object:
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32"
        try:
            return product()
        finally:
            matmul.fp32_precision = before

    return call


def annotated(row: dict[str, Any], rates: Mapping[str, Any]) -> dict[str, Any]:
    """A kernel's row with its roofline, and the part of it that every call reaches, if known."""
    if "seconds" not in row or "copy_bytes_per_s" not in rates:
        return row
    known = rates["flops_per_s"]
    split = row["unit"] in known
    products = row["flops"] * (row["passes"] if split else 1)
    rate = known[row["unit"] if split else "float32"]
    bound = max(row["bytes"] / rates["copy_bytes_per_s"], products / rate)
    reached = {name: bound / times["p50"] for name, times in row["seconds"].items()}
    return {**row, "roofline_s": bound, "of_roofline": reached}
