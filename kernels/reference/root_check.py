"""Is a stack of roots fit for use? A few products with random vectors tell.

The residual of X^p A - I says nothing about a root of an ill-conditioned matrix. The commutator of
X and A follows the error of the preconditioned direction, and a quadratic form finds the errors
that commute with A, such as a negative eigenvalue.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo.kernels.reference.minimax_class import within
from shampoo.kernels.reference.norms import absmax, frobenius

VECTORS = 8
COMMUTATOR = 2e-2  # p >= 4; good roots stay below 5e-3
COMMUTATOR_LOW = 8e-2  # 2 <= p < 4; below 2 the commutator does not tell good from bad
QUADRATIC = (0.8, 1.25)
MAGNITUDE = 1.5


class Probe(NamedTuple):
    """What products with the random vectors say of every root of a stack.

    Attributes:
        commutator: [B] float64.
        form: [B] float64.
        image: [B, 8, n], of the vectors, as rows, by A' in units of its largest entry.

    """

    commutator: Tensor
    form: Tensor
    image: Tensor


def check_values(root: Tensor, factor: Tensor, ridge: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The two numbers of :func:`probe`."""
    found = probe(root, factor, ridge, p)
    return found.commutator, found.form


def probe(
    root: Tensor, factor: Tensor, ridge: Tensor, p: float, sizes: Tensor | None = None
) -> Probe:
    """Commutator and quadratic form of every root of a stack.

    Args:
        root: X, [B, n, n].
        factor: A, [B, n, n].
        ridge: What the root was taken with, [B] float64; may be zero.
        p: The power of the root.
        sizes: As in :func:`check_roots_`.

    Returns:
        ``||X A' v - A' X v|| / ||X A' v||`` and ``v^T X^(p/2) A' X^(p/2) v / v^T v`` over 8 fixed
        random vectors, with A' = A + ridge I, both [B] float64. The second is 1 for an exact root,
        and NaN unless p is an integer.

    """
    # Vectors are rows: with few of them, BLAS is four times as fast on that side of a matrix.
    v = white_vectors(factor.shape[-1], factor.dtype, factor.device).mT
    v = v.contiguous().expand(len(factor), -1, -1)
    if sizes is not None:  # a probe of padding would hide what is wrong with the matrix
        v = v * within(sizes, factor.shape[-1])[:, None, :]
    # Everything in units of the largest entries: squares must not leave the range of float32.
    size = absmax(factor) + ridge
    size = torch.where(size > 0, size, 1.0)
    reach = absmax(root)
    reach = torch.where(reach > 0, reach, 1.0)
    down, shift, across = (
        x.to(factor.dtype)[:, None, None] for x in (1 / size, ridge / size, 1 / reach)
    )

    def times_factor(w: Tensor) -> Tensor:
        return torch.baddbmm(w * shift, w * down, factor)

    def times_root(w: Tensor) -> Tensor:
        return torch.bmm(w * across, root)

    xv = times_root(v)
    image = times_factor(v)
    xav = times_root(image)
    commutator = frobenius(xav - times_factor(xv)) / frobenius(xav)
    if p != int(p):
        return Probe(commutator, torch.full_like(commutator, torch.nan), image)
    left, right = v, xv  # X^floor(p/2) v and X^ceil(p/2) v
    for _ in range((int(p) + 1) // 2 - 1):
        left, right = right, times_root(right)
    if p % 2 == 0:
        left = right
    form = (left * times_factor(right)).sum(dim=(1, 2), dtype=torch.float64)
    # In logarithms: for p = 12 the power of the unit alone may leave the range of float64.
    unit = torch.exp(torch.log(size) + p * torch.log(reach))
    form = form * unit / v.square().sum(dim=(1, 2), dtype=torch.float64)
    return Probe(commutator, form, image)


def check_roots_(
    ok: Tensor,
    root: Tensor,
    factor: Tensor,
    ridge: Tensor,
    p: float,
    sizes: Tensor | None = None,
) -> None:
    """Which roots of a stack may be used.

    A root passes if it is finite, its diagonal is positive, no entry exceeds 1.5 ridge^(-1/p), its
    commutator is at most 2e-2 (8e-2 for p < 4) and its quadratic form is in [0.8, 1.25]. A
    pseudo-inverse (ridge 0) is held to the commutator and to a diagonal that is not negative. The
    products are torch's, so the last bits of both numbers may depend on where a root lies in the
    stack: the verdict may, where a number is that close to its limit.

    Args:
        ok: [B] bool, written.
        root: X, [B, n, n], read.
        factor: A, [B, n, n] in the dtype of ``root``, read.
        ridge: What the root was taken with, [B] float64, read; may be zero.
        p: The power of the root.
        sizes: [B] int32, the side of each matrix of a size class: factors are zero beyond, and of
            roots only the size of an entry counts there. All n by default.

    """
    ok.copy_(are_fit(probe(root, factor, ridge, p, sizes), root, ridge, p, sizes))


def are_fit(
    found: Probe, root: Tensor, ridge: Tensor, p: float, sizes: Tensor | None = None
) -> Tensor:
    """The verdict of :func:`check_roots_` by what was found of the roots, [B] bool."""
    commutator, form, _ = found
    diagonal = root.diagonal(dim1=1, dim2=2)
    if sizes is not None:
        diagonal = torch.where(within(sizes, root.shape[-1]), diagonal, torch.inf)
    smallest = diagonal.amin(dim=1)
    largest = absmax(root)
    damped = ridge > 0
    ok = largest.isfinite() & torch.where(damped, smallest > 0, smallest >= 0)
    ok &= ~(damped & (largest > MAGNITUDE * ridge ** (-1 / p)))
    if p >= 2:
        limit = COMMUTATOR if p >= 4 else COMMUTATOR_LOW
        # An all-zero pseudo-inverse has no commutator to speak of.
        ok &= (commutator <= limit) | (~damped & (largest == 0))
    if p == int(p):
        ok &= ~damped | ((form >= QUADRATIC[0]) & (form <= QUADRATIC[1]))
    return ok


@functools.cache  # without a limit: a CUDA graph reads them again as long as it lives
def white_vectors(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[n, 8] white vectors, always the same, drawn without touching the global generators.

    The first of them do not depend on how many there are, so that a matrix in a size class is
    probed as it is alone.
    """
    generator = torch.Generator().manual_seed(math.isqrt(2 * 10**12))
    drawn = n + n % 2  # sixteen numbers at a time are drawn together
    white = torch.randn(drawn, VECTORS, generator=generator, dtype=torch.float64, device="cpu")
    return white[:n].to(dtype).to(device, non_blocking=True)
