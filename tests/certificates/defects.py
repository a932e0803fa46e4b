"""Kernels with one defect each, which stand in for those of the package on the CPU."""

import ctypes
import functools
import itertools
import math
import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from shampoo.ops import OPS

# Of every op: an output of which something is spoiled, as a list of tensors.
OUTPUT = {
    "gather_blocks_": "out",
    "graft_moments_": "norm",
    "graft_scale_": "scale",
    "gram_ema_": "factors",
    "precondition_": "outs",
    "eigh_": "vectors",
    "minimax_root_": "root",
    "update_blocks_": "params",
    "magnitudes_": "out",
}
_calls = itertools.count()


def output(op, arguments):
    value = arguments[OPS[op].arguments.index(OUTPUT[op])]
    return value[0] if isinstance(value, list) else value


def last_tile(op, *arguments):
    """Wrong in the last tile of a large matrix, as where an edge is computed with another mask."""
    OPS[op].reference(*arguments)
    out = output(op, arguments)
    if out.numel() > 64:
        out.as_strided((1,), (1,), out.storage_offset() + last_of(out)).mul_(1.25)


def last_of(out):
    return sum((size - 1) * stride for size, stride in zip(out.shape, out.stride(), strict=True))


def past_the_end(op, *arguments):
    OPS[op].reference(*arguments)
    out = output(op, arguments)
    end = out.storage_offset() + last_of(out) + 1
    if end * out.element_size() < out.untyped_storage().nbytes():
        out.as_strided((1,), (1,), end).fill_(7.0)


def unwritten(op, *arguments):
    out = output(op, arguments)
    place = out.as_strided((1,), (1,), out.storage_offset() + last_of(out) // 3)
    before = place.clone()
    OPS[op].reference(*arguments)
    place.copy_(before)


def asymmetric(op, *arguments):
    OPS[op].reference(*arguments)
    root = output(op, arguments)
    root.copy_(root.triu() + root.triu(1).mT)
    if root.shape[-1] > 1:
        root[:, 0, -1] = root[:, -1, 0].nextafter(torch.tensor(math.inf, dtype=root.dtype))


def batch_dependent(op, *arguments):
    OPS[op].reference(*arguments)
    out = output(op, arguments)
    if len(out) > 1:
        out.copy_(out.nextafter(torch.tensor(math.inf, dtype=out.dtype)))


def not_deterministic(op, *arguments):
    OPS[op].reference(*arguments)
    if next(_calls) % 2:
        out = output(op, arguments)
        out.copy_(out.nextafter(torch.tensor(math.inf, dtype=out.dtype)))


def wrong_in_bfloat16(op, *arguments):
    OPS[op].reference(*arguments)
    out = output(op, arguments)
    if out.dtype == torch.bfloat16:
        out.mul_(1.0625)


def wrong_when_large(op, *arguments):
    """As where a buffer of a fixed length ends: no ragged size is so large."""
    OPS[op].reference(*arguments)
    out = output(op, arguments)
    if out.shape[-1] > 280:
        out.mul_(1.0625)


def raises(op, *arguments):
    raise RuntimeError("no kernel image is available for execution on the device")


def segmentation_fault(op, *arguments):
    ctypes.string_at(0)


def illegal_instruction(op, *arguments):
    """As a library of another processor dies: by the instruction, not by a call of kill."""
    import mmap
    import platform

    machine = platform.machine()
    code = b"\x0f\x0b" if machine in ("x86_64", "AMD64") else b"\x00\x00\x00\x00"
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    ctypes.CFUNCTYPE(None)(address)()


def hangs(op, *arguments):
    time.sleep(3600.0)


def slow(op, *arguments):
    start = time.perf_counter()
    OPS[op].reference(*arguments)
    time.sleep(0.01 + time.perf_counter() - start)


DEFECTS = {
    each.__name__: each
    for each in (
        *(last_tile, past_the_end, unwritten, asymmetric, batch_dependent, not_deterministic),
        *(
            wrong_in_bfloat16,
            wrong_when_large,
            raises,
            segmentation_fault,
            illegal_instruction,
            hangs,
            slow,
        ),
    )
}


@dataclass(frozen=True)
class Faulty:
    """A kernel of an op, with a defect. It is found where this module is imported."""

    defect: str
    kind: str = "cpp"
    device: ClassVar[str] = "cpu"

    def load(self, op, overload):
        return functools.partial(DEFECTS[self.defect], op.name), None
