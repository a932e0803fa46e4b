"""Cases of the ops that move blocks between tensors and segments, and of magnitudes."""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shampoo.certificates.cases.case import SIZES, Arguments, Case, dtype_name, strided

FLAT = (torch.float32, torch.float64)
PARAM = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# (shape of the tensor, merged shape) and how its memory is laid out
LAYOUTS = {
    "scalar": ((), (1,), "contiguous"),
    "vector": ((257,), (257,), "contiguous"),
    "vector_sliced": ((127,), (127,), "sliced"),
    "matrix": ((63, 40), (63, 40), "contiguous"),
    "matrix_transposed": ((63, 40), (63, 40), "transposed"),
    "matrix_sliced": ((33, 40), (33, 40), "sliced"),
    "whole": ((16, 16), (16, 16), "contiguous"),
    "merged": ((6, 5, 3, 3), (6, 45), "contiguous"),
    "channels_last": ((6, 5, 3, 3), (6, 45), "channels_last"),
    "channels_last_unmerged": ((20, 17, 3, 3), (20, 17, 3, 3), "channels_last"),
    "cube": ((18, 1, 17, 19), (18, 17, 19), "contiguous"),
    "cube_transposed": ((18, 17, 19), (18, 17, 19), "transposed"),
}

Box = tuple[int, tuple[slice, ...], int]  # a tensor, where in it, and where in the segment


def make(layout: str, dtype: torch.dtype) -> Tensor:
    """A random tensor of one of :data:`LAYOUTS`."""
    shape, _, kind = LAYOUTS[layout]
    return strided(torch.randn(shape).to(dtype), kind)


def table(
    shapes: Sequence[Sequence[int]], limit: int, skip: int = 0
) -> tuple[Tensor, list[Box], int]:
    """Every tensor cut at multiples of ``limit``, all whole parts before the remainders.

    Returns the ``tiles`` of :mod:`shampoo.kernels.reference.ops`, the boxes that they stand for,
    block by block in the order of the segment, as ``(source, slices, offset)``, and the elements
    needed. ``skip`` elements in front of every tile belong to nobody.
    """
    order = max(len(dims) for dims in shapes)
    rows, boxes, offset = [], [], 0
    for source, dims in enumerate(shapes):
        pad = order - len(dims)
        choices = []
        for size in dims:
            whole, rest = divmod(size, limit)
            choices.append(
                ([(0, whole, limit)] if whole else [])
                + ([(whole * limit, 1, rest)] if rest else [])
            )
        for parts in itertools.product(*choices):
            offset += skip
            start, grid, extent = ([p[i] for p in parts] for i in range(3))
            rows.append([source, offset, *[1] * pad, *dims, *[0] * pad, *start])
            rows[-1] += [*[1] * pad, *grid, *[1] * pad, *extent]
            for cell in itertools.product(*map(range, grid)):
                lows = [s + g * e for s, g, e in zip(start, cell, extent, strict=True)]
                box = tuple(slice(a, a + e) for a, e in zip(lows, extent, strict=True))
                boxes.append((source, box, offset))
                offset += math.prod(extent)
    return torch.tensor(rows), boxes, offset + skip


def packed(runs: Sequence[tuple[int, int]]) -> Tensor:
    """Tiles of a segment that is its own source, as ``count`` blocks of ``size`` elements."""
    numel = sum(count * size for count, size in runs)
    rows, start = [], 0
    for count, size in runs:
        rows.append([0, start, numel, start, count, size])
        start += count * size
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 6)


def one_tile(arguments: Arguments, row: int, shift: int) -> tuple[Arguments, dict[str, slice]]:
    """The same call for one tile of the table alone, ``shift`` elements into a segment of its own.

    Returns:
        its arguments, and for each that is a part of one of the whole call, which part.
    """
    tiles = arguments["tiles"]
    order = (tiles.shape[1] - 2) // 4
    counts = tiles[:, 2 + 2 * order : 2 + 3 * order].prod(1).tolist()
    size = int(tiles[row, 2 + 3 * order :].prod()) * counts[row]
    offset, first = int(tiles[row, 1]), sum(counts[:row])
    mine = tiles[row : row + 1].clone()
    mine[0, 1] = shift
    parts = {}
    for name, value in arguments.items():
        if name in ("norm", "scale"):
            parts[name] = slice(first, first + counts[row])
        elif isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 1:
            parts[name] = slice(offset, offset + size)
    changed = {"tiles": mine}
    for name, part in parts.items():
        before = 0 if name in ("norm", "scale") else shift
        own = arguments[name][part]
        changed[name] = torch.cat([own.new_full((before,), 5.0), own])
    return {**arguments, **changed}, parts


def _combinations() -> Iterator[tuple[str, torch.dtype, torch.dtype, int]]:
    """Every layout with every dtype of segments, and dtypes of tensors and settings in turn."""
    dtypes = itertools.cycle(PARAM[::-1])
    for index, (flat, layout) in enumerate(itertools.product(FLAT, LAYOUTS)):
        yield layout, flat, next(dtypes), index
        if layout == "matrix":  # the most frequent one in all of them
            yield from ((layout, flat, dtype, index + 1) for dtype in PARAM)


def _gather(layout: str, flat: torch.dtype, param: torch.dtype, index: int) -> Case:
    alpha, accumulate = ((1.0, False), (0.3, False), (0.3, True))[index % 3]

    def arguments() -> Arguments:
        sources = [make(layout, param), make(layout, torch.float32)]
        tiles, _, numel = table([LAYOUTS[layout][1]] * 2, 16, skip=3)
        out = torch.randn(numel, dtype=flat)
        return {
            "out": out,
            "sources": sources,
            "tiles": tiles,
            "alpha": alpha,
            "accumulate": accumulate,
        }

    how = f"alpha={alpha}" + ", added" * accumulate
    overwritten = () if accumulate else ("out",)
    words = f"{layout} of {dtype_name(param)}, {how}"
    return Case("gather_blocks_", flat, words, arguments, overwritten)


def _moments(layout: str, flat: torch.dtype, param: torch.dtype, index: int) -> Case:
    ways = ((1.0, False, False), (-0.3, False, True), (0.3, True, False), (1.0, True, True))
    alpha, accumulate, normalized = ways[index % 4]
    kept = (True, index % 3 != 1, index % 3 != 2)  # grad, exp_avg, exp_avg_sq

    def arguments() -> Arguments:
        sources = [make(layout, param), make(layout, torch.float32)]
        tiles, boxes, numel = table([LAYOUTS[layout][1]] * 2, 16, skip=3)
        grad, average, square, direction, ahead = torch.randn(5, numel, dtype=flat).unbind()
        return {
            "grad": grad.clone() if kept[0] else None,
            "exp_avg": average.clone() if kept[1] else None,
            "exp_avg_sq": square.abs() + 0.1 if kept[2] else None,
            "direction": direction.clone(),
            "norm": torch.zeros(len(boxes), dtype=flat),
            "sources": sources,
            "tiles": tiles,
            "alpha": alpha,
            "accumulate": accumulate,
            "beta1": 0.9,
            "correction1": 0.271,
            "beta2": 0.99,
            "weight2": 0.01,
            "correction2": 0.0297,
            "eps": 1e-8,
            "normalized": normalized,
            "ahead": ahead.clone() if kept[1] and index % 2 else None,
        }

    how = f"alpha={alpha}" + ", added" * accumulate + ", normalized" * normalized
    overwritten = ("direction", "norm", "ahead") + (() if accumulate else ("grad",))
    words = f"{layout} of {dtype_name(param)}, {how}"
    return Case("graft_moments_", flat, words, arguments, overwritten)


def _update(layout: str, flat: torch.dtype, param: torch.dtype, index: int) -> Case:
    mu, nesterov = ((0.0, False), (0.9, False), (0.9, True))[index % 3]
    seed = 5 if param in (torch.bfloat16, torch.float16) and index % 2 else None

    def arguments() -> Arguments:
        tiles, boxes, numel = table([LAYOUTS[layout][1]], 16, skip=2)
        return {
            "params": [make(layout, param)],
            "momentum": torch.randn(numel, dtype=flat) if mu else None,
            "direction": torch.randn(numel, dtype=flat),
            "scale": torch.rand(len(boxes), dtype=flat) + 0.5,
            "tiles": tiles,
            "lr": 0.1,
            "weight_decay": 0.5,
            "mu": mu,
            "nesterov": nesterov,
            "seed": seed,
            "step": 3.0,
        }

    how = f"mu={mu}" + ", nesterov" * nesterov + ", rounded at random" * (seed is not None)
    return Case("update_blocks_", flat, f"{layout} of {dtype_name(param)}, {how}", arguments)


def _magnitudes(dtype: torch.dtype, worst: float) -> Case:
    def arguments() -> Arguments:
        tensors = [torch.randn(size) for size in SIZES] + [torch.randn(300, 41).mT]
        tensors += [torch.randn(70_001), torch.randn(40, 80)[:, ::2], torch.zeros(3)]
        tensors[3][-1], tensors[-3][50_000] = worst, -worst
        found = torch.zeros(len(tensors), dtype=torch.float64)
        return {"out": found, "tensors": [tensor.to(dtype) for tensor in tensors]}

    return Case("magnitudes_", dtype, f"with {worst} in it", arguments, ("out",))


def tile_cases() -> dict[str, list[Case]]:
    """Those of the ops that work on elements."""
    kinds = {"gather_blocks_": _gather, "graft_moments_": _moments, "update_blocks_": _update}
    found = {op: [kind(*each) for each in _combinations()] for op, kind in kinds.items()}
    worst = (9.0, math.nan, math.inf)
    magnitudes = [_magnitudes(dtype, value) for dtype in PARAM for value in worst]
    return {**found, "magnitudes_": magnitudes}
