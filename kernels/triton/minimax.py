"""Inverse p-th roots by the iteration of :mod:`shampoo.kernels.reference.minimax`, on tensor cores.

Replaces a chain of float32 ``torch.bmm``; loses to it where a few small matrices leave the GPU
empty. Every launch is known before the first one (:mod:`shampoo.kernels.triton.minimax_program`):
nothing is read back, so a CUDA graph can hold a refresh. A captured refresh must have run once
before, which brings its coefficients to the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo.kernels.reference.minimax import steps_of
from shampoo.kernels.triton.minimax_program import ROOT as FINAL
from shampoo.kernels.triton.minimax_program import (
    SQUARED,
    MinimaxProgram,
    minimax_program,
    split_scale,
)
from shampoo.kernels.triton.split_fp16 import absmax_, measure_, normalize_, start_
from shampoo.kernels.triton.symmetric_gemm import (
    ROOT,
    SPLIT,
    SQUARE,
    LaunchConfig,
    launch_config,
    padded,
    symmetric_gemm_,
    tile_count,
)


def supports(
    root: Tensor,
    ridge: Tensor,
    factor: Tensor,
    p: int,
    eps: float,
    relative_eps: float,
    schedule: Sequence[float],
) -> bool:
    """Whether :func:`minimax_root_` takes these: float32 with unit column strides, not empty."""
    return (
        root.dtype == factor.dtype == torch.float32
        and factor.numel() > 0
        and root.stride(2) == factor.stride(2) == 1
    )


def minimax_root_(
    root: Tensor,
    ridge: Tensor,
    factor: Tensor,
    p: int,
    eps: float,
    relative_eps: float,
    schedule: Sequence[float],
    *,
    sizes: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> None:
    """``root = (A + ridge I)^(-1/p)`` with ``ridge = max(eps, relative_eps * ||A||_S4)``.

    Accuracy: the "standard" level of the project's reference on roots, between textbook float32
    iterations and the CPU path. Bitwise symmetric; a matrix does not depend on its neighbours.

    Args:
        root: [B, n, n] float32, written.
        ridge: [B] float64, written.
        factor: [B, n, n] float32, symmetric, read only.
        p: The root, an integer.
        eps: Absolute ridge.
        relative_eps: Relative ridge; the schedule must reach down to it.
        schedule: c0, c1, c2, b, d of every step, one after another.
        sizes: [B] int32: the real size of each matrix of a class of sizes. What is beyond is not
            read, and not written to the root. All n by default.
        config: The tiles; by the table of :func:`launch_config` by default.
    """
    batch, n, _ = factor.shape
    device = factor.device
    config = launch_config(n, device) if config is None else config
    program = minimax_program(p, steps_of(schedule), relative_eps)
    constants, table = _tables(program, eps, relative_eps, device)
    mixed = sizes
    if sizes is None:
        sizes = torch.full((batch,), n, dtype=torch.int32, device=device)
    size = padded(n, config.block)
    scale = split_scale(SQUARED)

    absmax = torch.zeros(batch, dtype=torch.int32, device=device)
    square = factor.new_empty(batch, size, size)
    squares = ridge.new_empty(batch, tile_count(size, config.block))
    norms = ridge.new_empty(batch, 4)
    buffers = [
        torch.empty(batch, 2, size, size, dtype=torch.float16, device=device)
        for _ in range(max(3, program.buffers))
    ]
    first, first_scale = program.matrix
    started, start_scale = program.start
    S = next(buffers[k] for k in range(3) if k not in (first, started))

    absmax_(absmax, factor, mixed)
    normalize_(S, factor, absmax, sizes, scale)
    symmetric_gemm_(
        square,
        S,
        S,
        S,
        table[0],
        sizes,
        squares,
        kind=SQUARE,
        products=3,
        doubled=False,
        promote=64,
        add_left=False,
        add_right=False,
        add_addend=False,
        config=config,
    )
    measure_(norms, ridge, squares, absmax, constants, p)
    start_(
        buffers[first],
        buffers[started],
        S,
        square,
        norms,
        constants,
        scale=scale,
        first_scale=first_scale,
        start_scale=start_scale,
    )
    for k, step in enumerate(program.products, 1):
        final = step.out == FINAL
        symmetric_gemm_(
            root if final else buffers[step.out],
            buffers[step.left],
            buffers[step.right],
            buffers[step.addend],
            table[k],
            sizes,
            norms,
            kind=ROOT if final else SPLIT,
            products=step.products,
            doubled=step.doubled,
            promote=step.promote,
            add_left=step.coefficients[1] != 0.0,
            add_right=step.coefficients[2] != 0.0,
            add_addend=step.coefficients[4] != 0.0,
            config=config,
        )


@functools.cache  # without a limit: a CUDA graph reads them again as long as it lives
def _tables(
    program: MinimaxProgram, eps: float, relative_eps: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Constants of step 0, and the coefficients of S^2 and of every product, on the device."""
    constants = torch.tensor([eps, relative_eps, *program.first], dtype=torch.float64)
    scale = split_scale(SQUARED)
    rows = [(1.0 / scale**2, 0.0, 0.0, 0.0, 0.0), *(step.coefficients for step in program.products)]
    table = torch.tensor(rows, dtype=torch.float32)
    return constants.to(device), table.to(device)
