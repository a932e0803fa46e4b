"""Inverse p-th roots by eigendecomposition in float64: exact, general and slow."""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo import ops
from shampoo.kernels.reference.diagonal import NEGLIGIBLE
from shampoo.kernels.reference.norms import elementwise_power, schatten4


def eigh_root_(
    root: Tensor, ridge: Tensor, factor: Tensor, p: float, eps: float, relative_eps: float
) -> None:
    """``root = (A + ridge I)^(-1/p)`` with ``ridge = max(eps, relative_eps * ||A||_S4)``.

    Eigenvalues below -0.2 ridge have no place in a factor: the whole spectrum is then shifted up to
    zero, and the shift is part of the ridge that was used. What rounding leaves above that bound
    stays, so that it does not blur the small eigenvalues. Without any ridge the root is that of the
    pseudo-inverse: eigenvalues up to n * machine epsilon * lambda_max become 0. A matrix that is
    not finite, or that LAPACK gives up on, comes out as NaN and leaves the others alone.

    Args:
        root: [B, n, n], written; bitwise symmetric.
        ridge: [B] float64, written.
        factor: [B, n, n], symmetric, read only.
        p: The root, any real number > 0.
        eps: Absolute ridge.
        relative_eps: Relative ridge.

    """
    finite = factor.isfinite().all(dim=2).all(dim=1)
    stack = torch.where(finite[:, None, None], factor, 0.0).double()
    vectors = torch.empty_like(stack)
    values = stack.new_empty(stack.shape[:2])
    ops.eigh_(values, vectors, stack)
    torch.clamp(relative_eps * schatten4(values), min=eps, out=ridge)
    if eps == 0 and relative_eps == 0:
        cutoff = factor.shape[-1] * torch.finfo(factor.dtype).eps * values.amax(dim=1)
        powers = torch.where(values > cutoff[:, None], elementwise_power(values, -1 / p), 0.0)
    else:
        smallest = values.amin(dim=1)
        ridge.sub_(torch.where(smallest < -NEGLIGIBLE * ridge, smallest, 0.0))
        powers = elementwise_power(values + ridge[:, None], -1 / p)
    powers.masked_fill_(~finite[:, None], torch.nan)
    # V P V^T as a product with its own transpose: half the work, and bits that no batch changes.
    vectors.mul_(powers.sqrt_()[:, None, :])
    product = torch.zeros_like(stack)
    ops.gram_ema_([product], [vectors], [0], 0.0, 1.0)
    root.copy_(torch.add(product, product.mT).mul_(0.5))
