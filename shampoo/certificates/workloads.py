"""Arguments of the size that training has, to time an op with: kernels differ little in others."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo.certificates.cases.stacks import root_arguments
from shampoo.kernels.reference import minimax
from shampoo.ops import backends
from shampoo.ops.registry import Op
from shampoo.roots.size_classes import padded

P, RELATIVE_EPS = 4, 1e-6

# (columns, blocks) of stacks, and elements, at which a certificate times.
_STACKS = {
    "cpu": ((64, 8), (256, 2)),
    "cuda": ((64, 512), (128, 512), (256, 256), (512, 64), (1024, 16)),
}
_STACKED = 1 << 24  # elements of a stack of which there is no more to say
_ELEMENTS = {
    "cpu": ((1 << 14, 8), (1 << 20, 8)),
    "cuda": ((1 << 16, 8), (1 << 20, 8), (1 << 24, 8)),
}


def random_factors(batch: int, n: int, device: torch.device) -> Tensor:
    """[B, n, n] float32: a few random matrices with log-spaced spectra over six decades."""
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(min(batch, 2), n, n, generator=generator, device=device)
    Q = torch.linalg.qr(noise.double()).Q
    A: Tensor = Q * torch.logspace(0, -6, n, dtype=torch.float64, device=device) @ Q.mT
    A = (0.5 * (A + A.mT)).float()
    return A.repeat(-(-batch // len(A)), 1, 1)[:batch].contiguous()


def _gram(batch: int, n: int, device: torch.device) -> list[Any]:
    grad = torch.randn(batch, n, n, device=device)
    return [[random_factors(batch, n, device)], [grad], [0], 0.9, 0.1]


def _precondition(batch: int, n: int, device: torch.device) -> list[Any]:
    grad, root = torch.randn(batch, n, n, device=device), random_factors(batch, n, device)
    norm = torch.empty(batch, device=device)
    return [[torch.empty_like(grad)], [norm], [grad], [root, root.clone()]]


def _eigh(batch: int, n: int, device: torch.device) -> list[Any]:
    stack = random_factors(batch, n, device)
    return [stack.new_empty(batch, n), torch.empty_like(stack), stack]


def _root(batch: int, n: int, device: torch.device) -> list[Any]:
    return [*root_arguments(random_factors(batch, n, device), P, RELATIVE_EPS).values()]


def _class_root(batch: int, n: int, device: torch.device) -> list[Any]:
    """Of four sides, from n down to a quarter of it, as many matrices each."""
    count = -(-batch // 4)
    stacks = [random_factors(count, max(1, n * part // 4), device) for part in (4, 3, 2, 1)]
    factor, sizes = padded([[stack] for stack in stacks], n)
    root, ridge, factor, *rest = root_arguments(factor, P, RELATIVE_EPS).values()
    return [root, ridge.to(device), factor, sizes, *rest]


def _root_check(batch: int, n: int, device: torch.device) -> list[Any]:
    arguments = _root(batch, n, device)
    minimax.minimax_root_(*arguments)
    root, ridge, factor = arguments[:3]
    root[:: max(2, batch // 2)] *= 1.3  # some that must be flagged
    return [torch.empty(batch, dtype=torch.bool, device=device), root, factor, ridge, float(P)]


def _diagonal(batch: int, n: int, device: torch.device) -> list[Any]:
    factor = random_factors(batch, n, device)  # none of them is, as in most refreshes
    ridge = torch.ones(batch, dtype=torch.float64, device=device)
    return [factor.clone(), ridge, factor, float(P), 0.0, RELATIVE_EPS]


def _keep(batch: int, n: int, device: torch.device) -> list[Any]:
    root = random_factors(batch, n, device)
    outcome, failures, ready, ok = (
        torch.ones(batch, dtype=dtype, device=device)
        for dtype in (torch.uint8, torch.int32, torch.bool, torch.bool)
    )
    accepted = torch.ones((), dtype=torch.bool, device=device)
    return [root, outcome, failures, ready, root.clone(), ok, accepted]


def blocks(batch: int, numel: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Square tensors of ``numel`` elements together, and the tiles that cut them into blocks."""
    count = min(batch, 8)
    side = max(1, int((numel / count) ** 0.5))
    cut = min(1024, side)
    grid = side // cut
    rows = [
        [i, i * (grid * cut) ** 2, side, side, 0, 0, grid, grid, cut, cut] for i in range(count)
    ]
    return [torch.randn(side, side, device=device) for _ in range(count)], torch.tensor(rows)


def _covered(tiles: Tensor) -> int:
    return int((tiles[:, 6] * tiles[:, 7] * tiles[:, 8] * tiles[:, 9]).sum())


def _gather(batch: int, numel: int, device: torch.device) -> list[Any]:
    sources, tiles = blocks(batch, numel, device)
    return [torch.empty(_covered(tiles), device=device), sources, tiles, 1.0, False]


def _magnitudes(batch: int, numel: int, device: torch.device) -> list[Any]:
    tensors = [*torch.randn(numel, device=device).chunk(8 * batch)]  # as many as a model has
    return [torch.empty(len(tensors), dtype=torch.float64, device=device), tensors]


def _moments(batch: int, numel: int, device: torch.device) -> list[Any]:
    sources, tiles = blocks(batch, numel, device)
    total, count = _covered(tiles), int((tiles[:, 6] * tiles[:, 7]).sum())
    grad, exp_avg, direction, ahead = (torch.randn(total, device=device) for _ in range(4))
    moments = [grad, exp_avg, torch.rand(total, device=device), direction]
    scalars = (0.9, 0.1, 0.999, 1e-3, 1e-3, 1e-8, False, ahead)
    return [*moments, torch.empty(count, device=device), sources, tiles, 1.0, False, *scalars]


def _scale(batch: int, numel: int, device: torch.device) -> list[Any]:
    scale, norm, length = torch.rand(3, numel, device=device).unbind()
    return [scale, norm, length, None, 0.9, True, 1e30]


def _update(batch: int, numel: int, device: torch.device) -> list[Any]:
    params, tiles = blocks(batch, numel, device)
    direction = torch.randn(_covered(tiles), device=device)
    scale = torch.rand(int((tiles[:, 6] * tiles[:, 7]).sum()), device=device)
    return [params, None, direction, scale, tiles, 1e-3, 0.1, 0.0, False]


WORKLOADS: dict[str, Callable[[int, int, torch.device], list[Any]]] = {
    "gram_ema_": _gram,
    "precondition_": _precondition,
    "eigh_": _eigh,
    "minimax_root_": _root,
    "minimax_small_root_": _root,
    "minimax_class_root_": _class_root,
    "diagonal_root_": _diagonal,
    "check_roots_": _root_check,
    "keep_roots_": _keep,
    "gather_blocks_": _gather,
    "magnitudes_": _magnitudes,
    "graft_moments_": _moments,
    "graft_scale_": _scale,
    "update_blocks_": _update,
}
"""By op what makes float32 arguments: of ``(blocks, columns or elements, device)``."""


def in_dtype(arguments: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """Arguments with what is float32 in another dtype."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(each) for each in value]
        is_single = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(dtype) if is_single else value

    return [one(value) for value in arguments]


def grid(op: Op, device: torch.device) -> Sequence[tuple[int, int]]:
    """The ``(columns or elements, blocks)`` at which an op is timed on a device."""
    sizes = _ELEMENTS if op.is_elementwise else _STACKS
    return sizes["cuda" if device.type == "cuda" else "cpu"]


def shape_grid(op: Op, device: torch.device, sizes: Sequence[int]) -> Sequence[tuple[int, int]]:
    """The same for the sides of a plan's blocks, without those that stand in the grid.

    Nothing for an op that works on elements, of which a plan has any number.
    """
    if op.is_elementwise:
        return ()
    there = {size for size, _ in grid(op, device)}
    most = [(size, _STACKED // size**2) for size in sizes if size not in there]
    return [(size, max(1, min(512, batch))) for size, batch in most]


def size_of(op: Op, arguments: Sequence[Any]) -> int:
    """The size of a call, by which its kernel is chosen."""
    places = op.places_of(op.subject)
    return backends.size_of(op, next(arguments[at] for at in places if arguments[at] is not None))
