"""Which new roots take the place of the former ones, and what is remembered of the others."""

from __future__ import annotations

import torch
from torch import Tensor

PASSED, REPAIRED, FAILED, LEFT = range(4)  # outcome of a matrix in one refresh


def is_root(root: Tensor) -> Tensor:
    """Which matrices of a stack are roots, [B] bool: all zero means that there is none yet.

    Every root has a positive entry on its diagonal; the root of a pseudo-inverse may have zeros.
    """
    return root.diagonal(dim1=1, dim2=2).amax(dim=1) > 0


def keep_roots_(
    root: Tensor,
    outcome: Tensor,
    failures: Tensor,
    ready: Tensor,
    candidate: Tensor,
    ok: Tensor,
    accepted: Tensor | None = None,
) -> None:
    """Takes the candidates that passed their check as roots; the others leave theirs, and count.

    Args:
        root: [B, n, n], written where a candidate passed.
        outcome: [B] uint8, written: ``PASSED``, ``FAILED``, or ``LEFT`` if nothing is accepted.
        failures: [B] int32, in and out: how often in a row a candidate did not pass.
        ready: [B] bool, written: whether there is a root by now.
        candidate: [B, n, n] in the dtype of ``root``, read.
        ok: [B] bool, read: which candidates passed.
        accepted: 0-d bool, read: if False, all roots and counts stay; None stands for True.

    """
    kept = ok if accepted is None else ok & accepted
    if root.device.type == "cpu" and kept.all():  # a plain copy is several times as fast
        root.copy_(candidate)
    else:
        root.copy_(torch.where(kept[:, None, None], candidate, root))
    verdict = torch.where(ok, PASSED, FAILED)
    counted = torch.where(ok, 0, failures + 1)
    if accepted is not None:
        verdict = torch.where(accepted, verdict, LEFT)
        counted = torch.where(accepted, counted, failures)
    outcome.copy_(verdict)
    failures.copy_(counted)
    ready.copy_(is_root(root))
