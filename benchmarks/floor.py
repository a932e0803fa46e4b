"""The least time a step can take on a machine: its bytes and products over the measured rates.

What is counted, for an ordinary step with the package's defaults (Adam grafting, no momentum):

- *bytes*: every tensor that lives across steps, once for each read and once for each write it
  needs. Gradient read; weight, EMA, second moment and both factors of each mode read and written;
  roots read. Nothing between them is counted: a perfect implementation keeps it in cache.
- *products*: the factor update as the symmetric product it is, ``N sum d_k`` FLOPs for a block of N
  elements with modes d_k, and the apply, ``2 N sum d_k`` (algorithm of the step: two products a
  mode). ``full`` counts the factor update as a general product, ``2 N sum d_k``, which is what a
  library without a batched symmetric product has to do.

``floor = bytes / bandwidth + FLOPs / rate``: products and streams are added, since on a CPU both
occupy the same cores. ``overlapped`` is the larger of the two, the bound if they hid each other
entirely. The rates are the best the machine showed. Bandwidth: a copy far larger than any cache, or
an in-place scaling of as much, which on a CPU is the faster since it does not read what it will
overwrite. Products: fp32, both batched at the block sizes and one large one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from shampoo.blocks.blocking import cut, merge_dims
from shampoo.certificates.timing import Clock

Shape = tuple[int, ...]
FLOAT32 = 4  # bytes


class Work(NamedTuple):
    """Work of one ordinary step: bytes moved, FLOPs of the factor updates (symmetric) and apply."""

    bytes: int
    factor_flops: int
    apply_flops: int

    @property
    def flops(self) -> int:
        """FLOPs with symmetric factor updates."""
        return self.factor_flops + self.apply_flops

    @property
    def full_flops(self) -> int:
        """FLOPs with factor updates as general products."""
        return 2 * self.factor_flops + self.apply_flops


class Rates(NamedTuple):
    """Measured rates of a machine: bytes a second (read plus written) and FLOPs a second.

    ``copy`` is the bandwidth of a copy alone, ``bandwidth`` the best of copy and in-place scaling.
    """

    copy: float
    bandwidth: float
    flops: float


class Floor(NamedTuple):
    """Bounds in seconds: ``floor``, ``full`` (general products) and ``overlapped``."""

    floor: float
    full: float
    overlapped: float


def blocks(shape: Shape, block: int) -> Iterator[tuple[Shape, int]]:
    """The block shapes a tensor is cut into, each with its number of blocks."""
    merged = merge_dims(shape, block, "matrix")
    return ((tile.extent, tile.blocks) for tile in cut(merged, [block] * len(merged)))


def is_preconditioned(shape: Shape) -> bool:
    """Whether a tensor has factors under ``precondition_1d=False``."""
    return sum(size > 1 for size in shape) > 1


def ordinary_step(shapes: Sequence[Shape], block: int, grafted_only: Sequence[Shape] = ()) -> Work:
    """Work of an fp32 step over ``shapes``, and over ``grafted_only``, which have no factors."""
    numel = _numel(shapes) + _numel(grafted_only)
    factor_numel = weighted = 0
    for extent, count in _factored_blocks(shapes, block):
        factor_numel += count * sum(size * size for size in extent)
        weighted += count * math.prod(extent) * sum(extent)
    # gradient 1, weight 2, EMA 2, second moment 2; factor 2, root 1
    return Work(FLOAT32 * (7 * numel + 3 * factor_numel), weighted, 2 * weighted)


def state_bytes(shapes: Sequence[Shape], block: int, grafted_only: Sequence[Shape] = ()) -> int:
    """fp32 state with Adam grafting: two moments an element, ``2 sum d_k^2`` numbers a block."""
    moments = 2 * (_numel(shapes) + _numel(grafted_only))
    factors_and_roots = sum(
        2 * count * sum(size * size for size in extent)
        for extent, count in _factored_blocks(shapes, block)
    )
    return FLOAT32 * (moments + factors_and_roots)


def _numel(shapes: Sequence[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _factored_blocks(shapes: Sequence[Shape], block: int) -> Iterator[tuple[Shape, int]]:
    for shape in shapes:
        if is_preconditioned(shape):
            yield from blocks(shape, block)


def floor(work: Work, rates: Rates) -> Floor:
    """The bounds of the module's docstring, in seconds."""
    stream = work.bytes / rates.bandwidth
    products = work.flops / rates.flops
    return Floor(stream + products, stream + work.full_flops / rates.flops, max(stream, products))


def measure_rates(device: torch.device, sizes: Sequence[int], repeats: int = 9) -> Rates:
    """Best bandwidth and best fp32 product rate of the machine.

    Args:
        device: Where to measure.
        sizes: Block sizes whose batched square product is tried beside one large product.
        repeats: Runs of each measurement; the fastest counts.
    """
    clock, is_gpu = Clock(device), device.type == "cuda"

    def best_seconds(call: Callable[[], object]) -> float:
        return min(clock.time(call) for _ in range(repeats))

    source = torch.ones((256 if is_gpu else 64) << 20, device=device)
    target = torch.empty_like(source)
    traffic = 2 * FLOAT32 * source.numel()
    copy = traffic / best_seconds(lambda: target.copy_(source))
    scaling = traffic / best_seconds(lambda: target.mul_(0.5))
    large = 8192 if is_gpu else 2048
    rate = 0.0
    for size in sorted({*sizes, large}):
        batch = max(1, (large // size) ** 2 // (1 if is_gpu else 4))
        left = torch.randn(batch, size, size, device=device)
        product = partial(torch.bmm, left, torch.randn_like(left), out=torch.empty_like(left))
        rate = max(rate, 2 * batch * size**3 / best_seconds(product))
    return Rates(copy, max(copy, scaling), rate)
