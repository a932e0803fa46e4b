"""Inverse p-th roots that no solver finds: of diagonal matrices, and of those not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo.kernels.reference.norms import absmax, elementwise_power, schatten4

NEGLIGIBLE = 0.2  # of the ridge: the slack that the minimax schedules have for negative eigenvalues


def diagonal_root_(
    root: Tensor, ridge: Tensor, factor: Tensor, p: float, eps: float, relative_eps: float
) -> None:
    """Overwrites the roots of those matrices of a stack that are exactly diagonal, or not finite.

    A diagonal matrix has the root ``(diagonal + ridge)^(-1/p)``, with the conventions of
    ``eigh_root_``; a zero matrix without a ridge has the root I. A matrix that is not finite has
    NaN in all of its root, whatever a solver has made of it; its ridge stays.

    Args:
        root: [B, n, n], written where a matrix is of either kind.
        ridge: [B] float64, written where one is diagonal.
        factor: [B, n, n], read.
        p: The root, any real number > 0.
        eps: Absolute ridge.
        relative_eps: Relative ridge.

    """
    count, n, _ = factor.shape
    values = factor.diagonal(dim1=1, dim2=2).double()  # [B, n]
    largest = torch.zeros_like(ridge)
    if n > 1:
        # Without its last entry, a matrix is n - 1 rows of one diagonal entry and n others.
        rest = factor.reshape(count, n * n)[:, :-1].view(count, n - 1, n + 1)[:, :, 1:]
        largest = absmax(rest)
    finite = largest.isfinite() & values.isfinite().all(dim=1)
    diagonal = finite & (largest == 0)
    reads = factor.device.type == "cpu"  # where looking first, if there is any, waits for nothing
    if not (reads and finite.all()):
        root.masked_fill_(~finite[:, None, None], torch.nan)
    if reads and not diagonal.any():
        return
    own = torch.clamp(relative_eps * schatten4(values), min=eps)
    if eps == 0 and relative_eps == 0:
        cutoff = n * torch.finfo(factor.dtype).eps * values.amax(dim=1)
        powers = torch.where(values > cutoff[:, None], elementwise_power(values, -1 / p), 0.0)
    else:
        smallest = values.amin(dim=1)
        own = own - torch.where(smallest < -NEGLIGIBLE * own, smallest, 0.0)
        damped = torch.where(own[:, None] > 0, values + own[:, None], 1.0)
        powers = elementwise_power(damped, -1 / p)
    ridge.copy_(torch.where(diagonal, own, ridge))
    root.masked_fill_(diagonal[:, None, None], 0)
    roots = root.diagonal(dim1=1, dim2=2)
    roots.copy_(torch.where(diagonal[:, None], powers.to(root.dtype), roots))
