"""Cases of the sizes that a plan holds, beside the ragged ones that every device is asked for."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from shampoo.certificates.cases import stacks
from shampoo.certificates.cases.case import SIZES, Case
from shampoo.certificates.cases.stacks import DIAGONAL, FULL, NONE
from shampoo.ops import OPS

# Multiplications that the cases of a plan may take together, in float64 and without their repeats.
# That is about a second on two cores, and ten seconds of the host beside a GPU: what would take
# more is not asked for, the small first.
BUDGET = {"cpu": 3e9, "cuda": 2e11}
_ROOT = 10  # an eigendecomposition, and the products of a kernel, in matrix products
# Roots given; one of each side; and what is no product at all.
_PRODUCTS = {
    "check_roots_": 100.0,
    "minimax_class_root_": 20.0,
    "diagonal_root_": 0.1,
    "keep_roots_": 0.1,
}
_SMALL = 1 << 16  # elements of a block, of which there are several in a case
_ROUNDINGS = 32  # sums over a thousand terms in another order
_LONGEST = 4096  # side at which kernels are timed: there, the next size below says enough
_MOST_SIZES = 8  # at which kernels are timed for a plan, the largest


class Shape(NamedTuple):
    """The blocks of one shape in a plan.

    Attributes:
        extent: ``(d_1, ..., d_o)``.
        kept: For every mode, whether a matrix is kept (``"full"``), a diagonal, or nothing.
        dtype: Of factors and directions, such as ``"float32"``.
    """

    extent: tuple[int, ...]
    kept: tuple[str, ...]
    dtype: str

    @property
    def words(self) -> str:
        """In one word, as certificates name it: ``"768x50257d:float32"``."""
        marks = {FULL: "", DIAGONAL: "d", NONE: "n"}
        sides = zip(self.extent, self.kept, strict=True)
        return "x".join(f"{side}{marks[kept]}" for side, kept in sides) + f":{self.dtype}"


def lacking(shapes: Collection[Shape], device: str) -> tuple[Shape, ...]:
    """The shapes that the ragged sizes do not stand for, in order.

    On a CPU those with a side beyond the largest of them: its kernels are not chosen by size. On a
    GPU all, since they are also timed.

    Args:
        shapes: of a plan.
        device: its type.
    """
    if device not in BUDGET:
        return ()
    least = SIZES[-1] if device == "cpu" else 0
    return tuple(
        sorted(
            shape
            for shape in set(shapes)
            if max(shape.extent, default=0) > least and any(kept != NONE for kept in shape.kept)
        )
    )


def sizes_of(shapes: Collection[Shape]) -> list[int]:
    """The sides at which kernels are timed for a plan, beside those of the grid."""
    sides = {
        side
        for shape in shapes
        for side, how in zip(shape.extent, shape.kept, strict=True)
        if how == FULL and side <= _LONGEST
    }
    return sorted(sides)[-_MOST_SIZES:]


def shape_cases(shapes: Sequence[Shape], device: str) -> dict[str, list[Case]]:
    """By op the cases of some shapes, as many as are affordable.

    Args:
        shapes: of a plan, of which small ones are preferred.
        device: where kernels run, a type.
    """
    found: list[tuple[float, Case]] = []
    roots: set[tuple[int, str]] = set()
    for extent, kept, dtype in shapes:
        flat, numel = getattr(torch, dtype), math.prod(extent)
        blocks = _blocks(numel)
        for mode, (side, how) in enumerate(zip(extent, kept, strict=True)):
            if how != NONE:
                case = stacks.gram(extent, mode, how == FULL, flat, blocks=blocks)
                found.append((blocks * numel * (side if how == FULL else 1), case))
            if how == FULL:
                roots.add((side, dtype))
        wide = sum(side for side, how in zip(extent, kept, strict=True) if how == FULL)
        case = stacks.precondition(extent, kept, flat, blocks=blocks)
        found.append((blocks * numel * max(1, wide), case))
    for side, dtype in roots:
        blocks = _blocks(side**2)
        cases = stacks.root_cases(side, getattr(torch, dtype), blocks)
        for case in cases:
            products = _PRODUCTS.get(case.op, _ROOT * blocks)
            found.append((products * side**3, case))
    chosen: dict[str, list[Case]] = {}
    spent = 0.0
    for cost, case in sorted(found, key=lambda each: (each[0], each[1].name)):
        if OPS[case.op].kinds(device) and spent + cost <= BUDGET[device]:
            chosen.setdefault(case.op, []).append(replace(case, roundings=_ROUNDINGS))
            spent += cost
    return chosen


def _blocks(numel: int) -> int:
    """How many a case has: of large ones one, since the others would be more of the same."""
    return 3 if numel <= _SMALL else 1
