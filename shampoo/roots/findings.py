"""What is found of roots as they are taken. For who records it: no step depends on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shampoo.kernels.reference.root_check import Probe
from shampoo.ops.transit import is_near

FINDINGS = 3  # error, ridge, largest eigenvalue
# Of a stack whose eigenvalues a CPU looks for: beyond it of as many, evenly spread, as fill it. All
# would take as long as all else that metrics take of a step.
_CPU_BYTES = 4 << 20
_CONVERGED = 1e-5  # of the squares in a second direction: below it rounding would speak


def findings(probe: Probe, factor: Tensor, ridge: Tensor) -> Tensor:
    """``error, ridge, largest eigenvalue`` of every root of a stack, [3, B] float64.

    The eigenvalue is NaN where it was not looked for, in most of a large stack on a CPU. The error
    is the commutator of the root check, ``||X A' v - A' X v|| / ||X A' v||``.

    Args:
        probe: of the roots.
        factor: A, [B, n, n].
        ridge: what they were taken with, [B] float64.
    """
    stride = 1
    if is_near(factor.device):
        held = factor.numel() * factor.element_size()
        stride = min(len(factor), -(-held // _CPU_BYTES))
    largest = torch.full_like(probe.commutator, math.nan)
    largest[::stride] = largest_eigenvalue(factor[::stride], probe.image[::stride])
    return torch.stack((probe.commutator, ridge, largest))


def largest_eigenvalue(factor: Tensor, start: Tensor) -> Tensor:
    """What two steps of Lanczos find of it from every start, from below; the largest, [B] float64.

    A few per cent too small where eigenvalues fall off at the top, 15 % where they fall slowly, and
    up to half of it where a ridge above all eigenvalues leaves the starts as random as they were.

    Args:
        factor: [B, n, n], symmetric and positive semi-definite; read by two thin products.
        start: [B, m, n], m row vectors for each, better than random ones: images of the factor.
    """
    # No entry of such a matrix is larger than the largest of its diagonal.
    size = factor.diagonal(dim1=1, dim2=2).amax(dim=1).double()
    unit = torch.where(size > 0, size, 1.0)
    down = (1.0 / unit).to(factor.dtype)[:, None, None]
    first = torch.bmm(start * down, factor)
    second = torch.bmm(first * down, factor)

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=2, dtype=torch.float64)

    squares, mixed = inner(start, start), inner(start, first)
    images, last = inner(first, first), inner(first, second)
    squares = torch.where(squares > 0, squares, 1.0)
    alpha = mixed / squares
    beta2 = images / squares - alpha.square()
    has_second = beta2 * squares > _CONVERGED * images
    divisor = torch.where(has_second, beta2 * squares, 1.0)
    other = (last - 2.0 * alpha * images + alpha.square() * mixed) / divisor
    # The larger eigenvalue of [[alpha, beta], [beta, other]].
    half = (alpha - other) / 2.0
    larger = (alpha + other) / 2.0 + (half.square() + beta2.clamp(min=0.0)).sqrt()
    return torch.where(has_second, larger, alpha).amax(dim=1) * unit
