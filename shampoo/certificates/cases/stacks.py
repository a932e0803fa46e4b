"""Cases of the ops that work on stacks of blocks and factors."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo.certificates.cases.case import SIZES, Arguments, Case, dtype_name, strided
from shampoo.kernels.reference import minimax
from shampoo.roots.minimax_table import minimax_schedule

FLAT = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)
FULL, DIAGONAL, NONE = "full", "diagonal", "none"  # how a mode of a block is kept
_BLOCKS = 3
_ROUNDINGS = 8  # sums of some 250 terms in another order, on a processor whose own is a lucky one
_SMALL_ROOT = 128  # columns of what the fused chain takes

# Shapes of a block: ragged sizes, of which one may be long, and every order.
SHAPES = [(size,) for size in SIZES] + [(5, 7), (65, 130), (257, 33), (33, 5, 40), (2, 3, 4, 5)]

# Those of one call: every layout of memory, every size of tiles, orders that end at other modes.
_TOGETHER = [(63,), (65, 128), (3, 257), (33, 5, 40), (128, 64), (2, 3, 4, 5), (64, 128)]


def symmetric(batch: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[batch, n, n]: random, bitwise symmetric, positive semi-definite."""
    square = torch.randn(batch, n, n, dtype=dtype) / n**0.5
    product: Tensor = square @ square.mT
    return (product + product.mT).div(2)


def _mirrored(batch: int, n: int, dtype: torch.dtype) -> Tensor:
    """[batch, n, n]: random, bitwise symmetric, and nothing more, which takes no product."""
    square = torch.randn(batch, n, n, dtype=dtype)
    return (square + square.mT).div(2)


def _variances(batch: int, n: int, dtype: torch.dtype) -> Tensor:
    """[batch, n]: what may stand on a diagonal, random, not negative."""
    return torch.rand(batch, n, dtype=dtype).mul(2)


def spread(batch: int, n: int, decades: float = 6.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """[batch, n, n]: bitwise symmetric, with log-spaced eigenvalues and random eigenvectors."""
    Q = torch.linalg.qr(torch.randn(batch, n, n, dtype=torch.float64)).Q
    A: Tensor = Q * torch.logspace(0, -decades, n, dtype=torch.float64) @ Q.mT
    return (A + A.mT).div(2).to(dtype)


def gram(
    shape: tuple[int, ...],
    k: int,
    full: bool,
    flat: torch.dtype,
    data: torch.dtype | None = None,
    kind: str = "contiguous",
    blocks: int = _BLOCKS,
) -> Case:
    """A factor of mode ``k``, or its diagonal, from gradients in ``data``, by default ``flat``."""
    data = flat if data is None else data
    words = f"mode {k} of {[*shape]} {dtype_name(data)}" + (", diagonal" if not full else "")
    return _grams_of([(shape, k, full)], words, flat, data, kind, blocks)


def _grams(shape: tuple[int, ...], flat: torch.dtype, data: torch.dtype, kind: str) -> list[Case]:
    """One case a mode, and those with a diagonal factor."""
    ways = (True, False) if data == flat and kind == "contiguous" else (True,)
    both = itertools.product(range(len(shape)), ways)
    return [gram(shape, k, full, flat, data, kind) for k, full in both]


def _grams_together(flat: torch.dtype, data: torch.dtype, has_diagonals: bool) -> Case:
    """Every mode of stacks of many sizes and orders."""
    stacks = [(shape, k, True) for shape in _TOGETHER for k in range(len(shape))]
    if has_diagonals:
        stacks[1:1] = [(_TOGETHER[1], 0, False), (_TOGETHER[-2], 2, False)]
    words = f"{len(stacks)} stacks together {dtype_name(data)}"
    return _grams_of(stacks, words + (", two diagonal" if has_diagonals else ""), flat, data)


def _grams_of(
    stacks: Sequence[tuple[tuple[int, ...], int, bool]],
    words: str,
    flat: torch.dtype,
    data: torch.dtype,
    kind: str = "contiguous",
    blocks: int = _BLOCKS,
) -> Case:
    """Of every stack the shape of a block, the mode, and whether its factor is full."""

    def arguments() -> Arguments:
        factors, grads = [], []
        for shape, k, full in stacks:
            grads.append(strided(torch.randn(blocks, *shape).to(data), kind))
            made = _mirrored if full else _variances
            factors.append(made(blocks, shape[k], flat))
        modes = [k for _, k, _ in stacks]
        return {"factors": factors, "grads": grads, "modes": modes, "beta": 0.9, "weight": 0.2}

    return Case(
        "gram_ema_",
        flat,
        words + (f", {kind}" if kind != "contiguous" else ""),
        arguments,
        symmetric=("factors",),
        stacked=("factors", "grads"),
        on_cpu=data == flat,
        roundings=_ROUNDINGS,
    )


def precondition(
    shape: tuple[int, ...],
    kept: Sequence[str],
    flat: torch.dtype,
    data: torch.dtype | None = None,
    kind: str = "contiguous",
    blocks: int = _BLOCKS,
) -> Case:
    """The direction of blocks of whose modes a matrix is ``kept``, a diagonal, or nothing."""
    data = flat if data is None else data
    return _directions_of([(shape, kept)], f"{[*shape]}", flat, data, kind, blocks)


def _directions_together(
    shapes: Sequence[tuple[int, ...]],
    flat: torch.dtype,
    data: torch.dtype,
    kind: str = "contiguous",
    diagonal: int | None = None,
) -> Case:
    """A stack for each shape of a block; ``diagonal``: which of all of their modes is one."""
    kept = [DIAGONAL if k == diagonal else FULL for k in range(sum(map(len, shapes)))]
    ends = list(itertools.accumulate(map(len, shapes)))
    stacks = [
        (shape, kept[end - len(shape) : end]) for shape, end in zip(shapes, ends, strict=True)
    ]
    return _directions_of(stacks, f"{len(shapes)} stacks together", flat, data, kind)


def _directions_of(
    stacks: Sequence[tuple[tuple[int, ...], Sequence[str]]],
    words: str,
    flat: torch.dtype,
    data: torch.dtype,
    kind: str = "contiguous",
    blocks: int = _BLOCKS,
) -> Case:
    """Of every stack the shape of a block, and how its modes are kept."""
    sides = [(n, how) for shape, kept in stacks for n, how in zip(shape, kept, strict=True)]

    def root(n: int, how: str) -> Tensor | None:
        made = {FULL: symmetric, DIAGONAL: _variances}
        return made[how](blocks, n, flat) if how in made else None

    def arguments() -> Arguments:
        grads = [strided(torch.randn(blocks, *shape).to(data), kind) for shape, _ in stacks]
        return {
            "outs": [torch.zeros(blocks, *shape, dtype=flat) for shape, _ in stacks],
            "norms": [torch.zeros(blocks, dtype=flat) for _ in stacks],
            "grads": grads,
            "roots": [root(n, how) for n, how in sides],
        }

    words += f" {dtype_name(data)}" + (f", {kind}" if kind != "contiguous" else "")
    for how, said in ((DIAGONAL, "diagonal"), (NONE, "without a factor")):
        words += "".join(f", mode {k} {said}" for k, (_, each) in enumerate(sides) if each == how)
    return Case(
        "precondition_",
        flat,
        words,
        arguments,
        overwritten=("outs", "norms"),
        stacked=("outs", "norms", "grads", "roots"),
        on_cpu=data == flat,
        roundings=_ROUNDINGS,
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


def _root(
    op: str, n: int, p: int, relative_eps: float, flat: torch.dtype, blocks: int = _BLOCKS
) -> Case:
    def arguments() -> Arguments:
        return root_arguments(spread(blocks, n, dtype=flat), p, relative_eps)

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
    return {"ok": torch.zeros(6, dtype=torch.bool), **rest, "p": float(p), "sizes": None}


def _diagonals(n: int, p: float, relative_eps: float, flat: torch.dtype) -> Case:
    """Among roots that stay: of diagonal matrices, and of those not finite on it or beside it."""

    def arguments() -> Arguments:
        factor = (torch.rand(8, n, dtype=flat) + 0.5).diag_embed()
        factor[1, 0, 0] = 0.0 if relative_eps == 0 else -0.25  # below what any ridge is
        factor[2] = 0.0
        factor[3] *= 1e-30
        if n > 1:
            factor[4] = symmetric(1, n, flat)[0]
            factor[5, n - 1, 0] = factor[5, 0, n - 1] = torch.finfo(flat).tiny / 4
            factor[6, n // 2, n - 1] = torch.inf
        factor[7, n - 1, n - 1] = torch.nan
        ridge = torch.rand(8, dtype=torch.float64)
        given = {"root": symmetric(8, n, flat), "ridge": ridge, "factor": factor}
        return {**given, "p": p, "eps": 1e-3 * relative_eps, "relative_eps": relative_eps}

    return Case(
        "diagonal_root_",
        flat,
        f"n={n}, p={p:g}, relative_eps={relative_eps:g}",
        arguments,
        symmetric=("root",) if n > 1 else (),
        stacked=("root", "ridge", "factor"),
    )


def _keep(n: int, accepted: bool | None, flat: torch.dtype) -> Case:
    """Candidates of which some passed, over roots of which some are not there yet."""

    def arguments() -> Arguments:
        root, candidate = symmetric(6, n, flat), symmetric(6, n, flat)
        root[::3] = 0.0
        candidate[1:3] = torch.nan
        candidate[5] = 0.0
        return {
            "root": root,
            "outcome": torch.zeros(6, dtype=torch.uint8),
            "failures": torch.arange(6, dtype=torch.int32),
            "ready": torch.zeros(6, dtype=torch.bool),
            "candidate": candidate,
            "ok": torch.tensor([True, False, False, False, True, True]),
            "accepted": None if accepted is None else torch.tensor(accepted),
        }

    return Case(
        "keep_roots_",
        flat,
        f"n={n}" + (f", accepted={accepted}" if accepted is not None else ""),
        arguments,
        overwritten=("outcome", "ready"),
        symmetric=("root",),
        stacked=("root", "outcome", "failures", "ready", "candidate", "ok"),
    )


def _check(n: int, p: int) -> Case:
    return Case(
        "check_roots_",
        torch.float32,
        f"n={n}, p={p}, three of six to be refused",
        lambda: spoiled_roots(n, p),
        overwritten=("ok",),
        stacked=("ok", "root", "factor", "ridge"),
    )


def _class_sizes(n: int) -> list[int]:
    """The sides of a class of side n: its own, and some down to 1."""
    return [n, *sorted({max(1, n * part // 8) for part in (6, 4, 2, 0)}, reverse=True)]


def _in_class(given: list[Arguments], n: int) -> Arguments:
    """Calls on one matrix each, of several sides, as one on their size class."""
    joined: Arguments = {}
    for name, value in given[0].items():
        stacks = [each[name] for each in given]
        if not isinstance(value, Tensor):
            joined[name] = value
        elif value.dim() < 3:
            joined[name] = torch.cat(stacks)
        else:
            joined[name] = value.new_zeros(len(given), n, n)
            for into, matrix in zip(joined[name], stacks, strict=True):
                into[: matrix.shape[1], : matrix.shape[1]] = matrix[0]
    return joined


def _class_root(n: int, p: int, relative_eps: float, flat: torch.dtype) -> Case:
    def arguments() -> Arguments:
        sizes = _class_sizes(n)
        each = [root_arguments(spread(1, side, dtype=flat), p, relative_eps) for side in sizes]
        joined = _in_class(each, n)
        matrices = {name: joined.pop(name) for name in ("root", "ridge", "factor")}
        return {**matrices, "sizes": torch.tensor(sizes, dtype=torch.int32), **joined}

    return Case(
        "minimax_class_root_",
        flat,
        f"n={n} and below, p={p}, relative_eps={relative_eps:g}",
        arguments,
        overwritten=("ridge",),
        symmetric=("root",),
        stacked=("root", "ridge", "factor", "sizes"),
    )


def _class_check(n: int, p: int) -> Case:
    def arguments() -> Arguments:
        sizes = [n, n // 2]
        stacks = [spoiled_roots(side, p) for side in sizes]
        rows = [
            {name: value[row : row + 1] if isinstance(value, Tensor) else value
             for name, value in each.items()}
            for each in stacks
            for row in range(6)
        ]  # fmt: skip
        sides = torch.tensor(sizes, dtype=torch.int32).repeat_interleave(6)
        return {**_in_class(rows, n), "sizes": sides}

    return Case(
        "check_roots_",
        torch.float32,
        f"n={n} and n={n // 2}, p={p}, half of them to be refused",
        arguments,
        overwritten=("ok",),
        stacked=("ok", "root", "factor", "ridge", "sizes"),
    )


def root_cases(n: int, flat: torch.dtype, blocks: int) -> list[Case]:
    """Roots of one size, by every op that takes it, and their check."""
    every = [_root("minimax_root_", n, 4, 1e-6, flat, blocks)]
    if flat == torch.float32:
        every += [_diagonals(n, 4.0, 1e-6, flat), _check(n, 4), _class_root(n, 4, 1e-6, flat)]
        if n <= _SMALL_ROOT:
            every.append(_root("minimax_small_root_", n, 4, 1e-6, flat, blocks))
    return [*every, _keep(n, True, flat)]


def stack_cases() -> dict[str, list[Case]]:
    """Those of the ops that work on stacks."""
    grams, directions = [], []
    for flat, shape in itertools.product(FLAT, SHAPES):
        grams += _grams(shape, flat, flat, "contiguous")
        for diagonal in (None, 0) if len(shape) < 4 else (None, 0, 3):
            kept = [DIAGONAL if k == diagonal else FULL for k in range(len(shape))]
            directions.append(precondition(shape, kept, flat))
    single = torch.float32
    for data, shape in itertools.product(HALF, [(63,), (65, 130), (257, 33), (33, 5, 40)]):
        grams += _grams(shape, single, data, "contiguous")
        directions.append(precondition(shape, [FULL] * len(shape), single, data))
    several = [(64, 128), (3, 257), (128, 64)]
    for kind in ("transposed", "sliced"):
        grams += _grams((65, 130), single, single, kind)
        directions.append(precondition((65, 130), [FULL] * 2, single, single, kind))
        directions.append(_directions_together(several, single, single, kind))
    for flat in FLAT:
        grams += [_grams_together(flat, flat, has_diagonals) for has_diagonals in (False, True)]
        directions += [_directions_together(_TOGETHER, flat, flat, diagonal=at) for at in (None, 2)]
    for data in HALF:
        grams.append(_grams_together(single, data, has_diagonals=False))
        directions.append(_directions_together(_TOGETHER, single, data))
    sizes = sorted({*SIZES, 17, 128})
    schedules = [(4, 1e-6), (2, 1e-4), (6, 1e-6)]
    roots = [(n, *(4, 1e-6), flat) for flat, n in itertools.product(FLAT, sizes)] + [
        (65, *schedule, single) for schedule in schedules[1:]
    ]
    return {
        "gram_ema_": grams,
        "precondition_": directions,
        "eigh_": [_eigh(n, flat) for flat, n in itertools.product(FLAT, (1, 3, 63, 127))],
        "minimax_root_": [_root("minimax_root_", *each) for each in roots],
        "minimax_small_root_": [
            _root("minimax_small_root_", *each)
            for each in roots
            if each[0] <= _SMALL_ROOT and each[3] == single
        ],
        "minimax_class_root_": [_class_root(*each) for each in roots],
        "diagonal_root_": [
            _diagonals(n, *how, single)
            for n in sizes
            for how in ((4.0, 1e-6), (2.5, 1e-2), (1.0, 0.0))
        ],
        "keep_roots_": [
            _keep(n, accepted, flat)
            for n, accepted, flat in itertools.product(sizes, (None, True, False), FLAT)
        ],
        "check_roots_": [
            *(_check(n, p) for n in (3, 65, 257) for p in (4, 2)),
            *(_class_check(n, p) for n in (65, 257) for p in (4, 2)),
        ],
    }
