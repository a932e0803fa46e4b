"""Cases of the ops that work on stacks of blocks and factors."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shampoo.certificates.cases.case import SIZES, Arguments, Case, dtype_name, strided
from shampoo.kernels.reference import minimax
from shampoo.roots.minimax_table import minimax_schedule

FLAT = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)
_BLOCKS = 3

# Shapes of a block: ragged sizes, of which one may be long, and every order.
SHAPES = [(size,) for size in SIZES] + [(5, 7), (65, 130), (257, 33), (33, 5, 40), (2, 3, 4, 5)]

# Those of one call: every layout of memory, every size of tiles, orders that end at other modes.
_TOGETHER = [(63,), (65, 128), (3, 257), (33, 5, 40), (128, 64), (2, 3, 4, 5), (64, 128)]


def symmetric(batch: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[batch, n, n]: random, bitwise symmetric, positive semi-definite."""
    square = torch.randn(batch, n, n, dtype=dtype) / n**0.5
    product: Tensor = square @ square.mT
    return (product + product.mT).div(2)


def spread(batch: int, n: int, decades: float = 6.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """[batch, n, n]: bitwise symmetric, with log-spaced eigenvalues and random eigenvectors."""
    Q = torch.linalg.qr(torch.randn(batch, n, n, dtype=torch.float64)).Q
    A: Tensor = Q * torch.logspace(0, -decades, n, dtype=torch.float64) @ Q.mT
    return (A + A.mT).div(2).to(dtype)


def _gram(shape: tuple[int, ...], flat: torch.dtype, data: torch.dtype, kind: str) -> list[Case]:
    """One case a mode, and those with a diagonal factor."""
    cases = []
    for k, full in itertools.product(range(len(shape)), (True, False)):
        if not full and (data != flat or kind != "contiguous"):
            continue

        def arguments(k: int = k, full: bool = full) -> Arguments:
            return _gram_arguments([(shape, k, full)], flat, data, kind)

        words = f"mode {k} of {[*shape]} {dtype_name(data)}" + (", diagonal" if not full else "")
        cases.append(_gram_case(words, arguments, flat, data, kind))
    return cases


def _gram_case(
    words: str, make: Callable[[], Arguments], flat: torch.dtype, data: torch.dtype, kind: str
) -> Case:
    return Case(
        "gram_ema_",
        flat,
        words + (f", {kind}" if kind != "contiguous" else ""),
        make,
        symmetric=("factors",),
        stacked=("factors", "grads"),
        on_cpu=data == flat,
    )


def _gram_arguments(
    stacks: Sequence[tuple[tuple[int, ...], int, bool]],
    flat: torch.dtype,
    data: torch.dtype,
    kind: str,
) -> Arguments:
    """Of every stack the shape of a block, the mode, and whether its factor is full."""
    factors, grads = [], []
    for shape, k, full in stacks:
        grads.append(strided(torch.randn(_BLOCKS, *shape).to(data), kind))
        factor = symmetric(_BLOCKS, shape[k], flat)
        factors.append(factor if full else factor.diagonal(dim1=1, dim2=2).clone())
    modes = [k for _, k, _ in stacks]
    return {"factors": factors, "grads": grads, "modes": modes, "beta": 0.9, "weight": 0.2}


def _grams_together(flat: torch.dtype, data: torch.dtype, has_diagonals: bool) -> Case:
    """Every mode of stacks of many sizes and orders."""
    stacks = [(shape, k, True) for shape in _TOGETHER for k in range(len(shape))]
    if has_diagonals:
        stacks[1:1] = [(_TOGETHER[1], 0, False), (_TOGETHER[-2], 2, False)]
    words = f"{len(stacks)} stacks together {dtype_name(data)}"
    words += ", two diagonal" if has_diagonals else ""

    def arguments() -> Arguments:
        return _gram_arguments(stacks, flat, data, "contiguous")

    return _gram_case(words, arguments, flat, data, "contiguous")


def _precondition(
    shapes: Sequence[tuple[int, ...]],
    flat: torch.dtype,
    data: torch.dtype,
    kind: str = "contiguous",
    diagonal: int | None = None,
) -> Case:
    """A stack for each shape of a block; ``diagonal``: which of all of their modes is one."""

    def arguments() -> Arguments:
        grads = [strided(torch.randn(_BLOCKS, *shape).to(data), kind) for shape in shapes]
        roots = [symmetric(_BLOCKS, n, flat) for shape in shapes for n in shape]
        if diagonal is not None:
            roots[diagonal] = roots[diagonal].diagonal(dim1=1, dim2=2).clone()
        return {
            "outs": [torch.zeros(_BLOCKS, *shape, dtype=flat) for shape in shapes],
            "norms": [torch.zeros(_BLOCKS, dtype=flat) for _ in shapes],
            "grads": grads,
            "roots": roots,
        }

    words = f"{[*shapes[0]]}" if len(shapes) == 1 else f"{len(shapes)} stacks together"
    words += f" {dtype_name(data)}" + (f", {kind}" if kind != "contiguous" else "")
    return Case(
        "precondition_",
        flat,
        words + (f", mode {diagonal} diagonal" if diagonal is not None else ""),
        arguments,
        overwritten=("outs", "norms"),
        stacked=("outs", "norms", "grads", "roots"),
        on_cpu=data == flat,
    )


def _eigh(n: int, flat: torch.dtype) -> Case:
    def arguments() -> Arguments:
        stack = spread(_BLOCKS, n, 4.0, flat)
        return {"values": torch.zeros_like(stack[:, 0]), "vectors": stack.clone(), "stack": stack}

    every = ("values", "vectors", "stack")
    return Case("eigh_", flat, f"n={n}", arguments, every[:2], stacked=every)


def root_arguments(A: Tensor, p: int, relative_eps: float) -> Arguments:
    """Arguments of an inverse root by iteration."""
    return {
        "root": torch.zeros_like(A),
        "ridge": torch.zeros(len(A), dtype=torch.float64),
        "factor": A,
        "p": p,
        "eps": 0.0,
        "relative_eps": relative_eps,
        "schedule": [c for step in minimax_schedule(p, relative_eps) for c in step],
    }


def _root(op: str, n: int, p: int, relative_eps: float, flat: torch.dtype) -> Case:
    def arguments() -> Arguments:
        return root_arguments(spread(_BLOCKS, n, dtype=flat), p, relative_eps)

    return Case(
        op,
        flat,
        f"n={n}, p={p}, relative_eps={relative_eps:g}",
        arguments,
        overwritten=("root", "ridge"),
        symmetric=("root",),
        stacked=("root", "ridge", "factor"),
    )


def spoiled_roots(n: int, p: int) -> Arguments:
    """Roots of six matrices: three right, and three that must be refused."""
    given = root_arguments(spread(6, n, 5.0), p, 1e-6)
    minimax.minimax_root_(*given.values())
    root = given["root"]
    root[0, 0, n // 2] = torch.nan
    root[1] *= 1.3
    root[2, n - 1, n - 1] *= -1.0
    rest = {name: given[name] for name in ("root", "factor", "ridge")}
    return {"ok": torch.zeros(6, dtype=torch.bool), **rest, "p": float(p)}


def _check(n: int, p: int) -> Case:
    return Case(
        "check_roots_",
        torch.float32,
        f"n={n}, p={p}, three of six to be refused",
        lambda: spoiled_roots(n, p),
        overwritten=("ok",),
        stacked=("ok", "root", "factor", "ridge"),
    )


def stack_cases() -> dict[str, list[Case]]:
    """Those of the ops that work on stacks."""
    gram, precondition = [], []
    for flat, shape in itertools.product(FLAT, SHAPES):
        gram += _gram(shape, flat, flat, "contiguous")
        for diagonal in (None, 0) if len(shape) < 4 else (None, 0, 3):
            precondition.append(_precondition([shape], flat, flat, diagonal=diagonal))
    single = torch.float32
    for data, shape in itertools.product(HALF, [(63,), (65, 130), (257, 33), (33, 5, 40)]):
        gram += _gram(shape, single, data, "contiguous")
        precondition.append(_precondition([shape], single, data))
    for kind in ("transposed", "sliced"):
        gram += _gram((65, 130), single, single, kind)
        precondition.append(_precondition([(65, 130)], single, single, kind))
        precondition.append(_precondition([(64, 128), (3, 257), (128, 64)], single, single, kind))
    for flat in FLAT:
        gram += [_grams_together(flat, flat, has_diagonals) for has_diagonals in (False, True)]
        precondition += [_precondition(_TOGETHER, flat, flat, diagonal=at) for at in (None, 2)]
    for data in HALF:
        gram.append(_grams_together(single, data, has_diagonals=False))
        precondition.append(_precondition(_TOGETHER, single, data))
    sizes = sorted({*SIZES, 17, 128})
    schedules = [(4, 1e-6), (2, 1e-4), (6, 1e-6)]
    roots = [(n, *(4, 1e-6), flat) for flat, n in itertools.product(FLAT, sizes)] + [
        (65, *schedule, single) for schedule in schedules[1:]
    ]
    return {
        "gram_ema_": gram,
        "precondition_": precondition,
        "eigh_": [_eigh(n, flat) for flat, n in itertools.product(FLAT, (1, 3, 63, 127))],
        "minimax_root_": [_root("minimax_root_", *each) for each in roots],
        "minimax_small_root_": [
            _root("minimax_small_root_", *each)
            for each in roots
            if each[0] <= 128 and each[3] == single
        ],
        "check_roots_": [_check(n, p) for n in (3, 65, 257) for p in (4, 2)],
    }
