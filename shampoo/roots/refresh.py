"""New roots for the optimizer's factors: each is probed, and what fails climbs a ladder.

A factor whose root does not pass keeps its previous root, is retried with ten times the ridge, then
with a float64 eigendecomposition. On the CPU all of this happens within one refresh. On a GPU the
device decides which roots are kept, and the host does not wait to hear of it: flags travel to it
while training goes on, and the next refresh repairs what they name. A refresh that a graph replays
has no host: there the previous root stays. Nor does the host know whether the step is taken at all:
in one that is not, nothing changes.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor

from shampoo import ops
from shampoo.kernels.reference.keep_roots import FAILED, LEFT, PASSED, REPAIRED, is_root
from shampoo.ops import Number
from shampoo.ops.precision import full_precision
from shampoo.ops.transit import Letter, is_near
from shampoo.roots.root_check import passes_root_check, passes_with_findings
from shampoo.roots.solver import chunks, solve_

logger = logging.getLogger(__name__)

_EIGH = 2  # the last rung; rung 1 is the larger ridge
_RIDGE_GROWTH = 10.0


Where = slice | Tensor  # rows of a stack; a tensor, [R] int64, is on the host


class Flags(Protocol):
    """What remembers outcomes between refreshes, of the rows of a stack or of several."""

    def send(self, where: Where, outcome: Tensor) -> None:
        """Sends the outcomes of some rows, [R] uint8, to the host."""

    def receive(self, where: Where) -> Tensor:
        """The rung on which each of some rows must be retried, [R] on the host."""


class PendingFlags:
    """Outcomes of one stack's refreshes on their way to the host. Not part of any checkpoint.

    Args:
        count: K, matrices of the stack.
    """

    def __init__(self, count: int) -> None:
        self._rung = torch.zeros(count, dtype=torch.int64, device="cpu")
        self._sent: list[tuple[Where, Letter, slice]] = []

    def send(self, where: Where, outcome: Tensor) -> None:
        """Sends the outcomes of some rows, [R] uint8, to the host."""
        self.expect(where, Letter(outcome), slice(None))

    def expect(self, where: Where, letter: Letter, part: slice) -> None:
        """Says that a part of a letter holds the outcomes of some rows."""
        self._sent.append((where, letter, part))

    def receive(self, where: Where) -> Tensor:
        """The rung on which each of some rows must be retried, [R] on the host."""
        waiting: list[tuple[Where, Letter, slice]] = []
        for rows, letter, part in self._sent:
            if not letter.has_arrived():
                waiting.append((rows, letter, part))
                continue
            outcome = letter.read()[part]
            _warn(int((outcome == FAILED).sum()), len(outcome))
            rung = self._rung[rows]
            climbed = (rung + (outcome == FAILED).long()).clamp(min=1, max=_EIGH)
            heard = torch.where(outcome == PASSED, 0, climbed)
            self._rung[rows] = torch.where(outcome == LEFT, rung, heard)
        self._sent = waiting
        return self._rung[where]


@torch.no_grad()
def refresh_roots_(
    root: Tensor,
    factor: Tensor,
    failures: Tensor,
    ready: Tensor,
    *,
    p: float,
    correction: Number,
    eps: float,
    relative_eps: float,
    method: str,
    accepted: Tensor | None = None,
    pending: Flags | None = None,
    where: Where = slice(None),
    found: Tensor | None = None,
    sizes: Tensor | None = None,
) -> None:
    """``root = (factor / correction + ridge I)^(-1/p)``, where that gives a root fit for use.

    Never raises for a bad matrix: it keeps its previous root and is counted.

    Args:
        root: [K, n, n], in and out; all zero where there is none yet.
        factor: [K, n, n], read only.
        failures: [K] int32, in and out: consecutive refreshes that failed.
        ready: [K] bool, in and out: whether there is a root.
        p: The root, > 0.
        correction: Divides the factor; the bias correction of its average. [K] if they differ.
        eps: Absolute ridge.
        relative_eps: Relative ridge.
        method: As in ``inverse_root``.
        accepted: 0-d bool: if False, nothing changes; None where the host knows that it is True.
        pending: What remembers this stack's flags between refreshes, where the host does not look
            at them; without one a failing matrix is not retried there.
        where: Which rows of that stack these are.
        found: [3, K] float64, in and out: what is found of every root that is kept
            (:mod:`shampoo.roots.findings`); None where nobody asks.
        sizes: [K] int32: the side of each matrix of a size class, beyond which factors are zero and
            roots mean nothing (:mod:`shampoo.roots.size_classes`). All n by default.
    """
    if factor.numel() == 0:
        return
    # Who may not read whether the step is taken reads nothing else of it.
    count, reads = len(factor), accepted is None and is_near(factor.device)
    outcome = torch.empty(count, dtype=torch.uint8, device=factor.device)
    for rows in chunks(factor):
        how = p, _of(correction, rows), eps, relative_eps, method
        only = None if sizes is None else sizes[rows]
        candidate, ok, seen = _attempt(factor[rows], *how, finds=found is not None, sizes=only)
        if found is not None:
            kept = ok if accepted is None else ok & accepted
            found[:, rows] = torch.where(kept, seen, found[:, rows])
        remembered = outcome[rows], failures[rows], ready[rows]
        ops.keep_roots_(root[rows], *remembered, candidate, ok, accepted)

    def retry(which: Tensor, rung: int) -> None:
        """Rows that failed: ``which`` is a list of indices on the device of the stack."""
        step = next(chunks(factor)).stop
        growth = _RIDGE_GROWTH if rung < _EIGH else 1.0
        solver = method if rung < _EIGH else "eigh"
        for part in torch.split(which, step):
            ridges = eps * growth, relative_eps * growth
            how = p, _of(correction, part), *ridges, solver
            only = None if sizes is None else sizes[part]
            candidate, ok, seen = _attempt(factor[part], *how, finds=found is not None, sizes=only)
            ok &= outcome[part] == FAILED
            root[part] = torch.where(ok[:, None, None], candidate, root[part])
            outcome[part] = torch.where(ok, REPAIRED, outcome[part])
            failures[part] = torch.where(ok, 0, failures[part])
            ready[part] = torch.where(ok, is_root(candidate), ready[part])
            if found is not None:
                found[:, part] = torch.where(ok, seen, found[:, part])

    if reads:
        for rung in range(1, _EIGH + 1):
            failed = (outcome == FAILED).nonzero()[:, 0]
            if len(failed) == 0:
                break
            retry(failed, rung)
        _warn(int((outcome == FAILED).sum()), count)
    elif pending is not None:
        rungs = pending.receive(where)
        for rung in range(1, _EIGH + 1):
            flagged = (rungs == rung).nonzero()[:, 0]
            if len(flagged) > 0:
                retry(flagged.to(factor.device, non_blocking=True), rung)
        pending.send(where, outcome)


def _of(correction: Number, rows: slice | Tensor) -> Number:
    """The corrections of some matrices, if each has its own."""
    return correction[rows] if isinstance(correction, Tensor) and correction.dim() else correction


def _attempt(
    factor: Tensor,
    p: float,
    correction: Number,
    eps: float,
    relative_eps: float,
    method: str,
    finds: bool,
    sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Roots of a chunk, which of them pass the check, [B] bool, and what is found of them.

    ``finds`` says whether anybody asks for the last, [3, B] float64; else it is empty.
    """
    if isinstance(correction, Tensor):
        factor = factor / correction.to(factor.dtype).view(-1, 1, 1)
    elif correction != 1.0:
        factor = factor / correction
    # Of a size class, nobody writes what is beyond the sizes.
    root = torch.empty_like(factor) if sizes is None else torch.zeros_like(factor)
    ridge = torch.empty(len(factor), dtype=torch.float64, device=factor.device)
    solve_(root, ridge, factor, p, eps, relative_eps, method, sizes)
    with full_precision(factor.device):
        if finds:
            ok, found = passes_with_findings(root, factor, ridge, p, sizes)
        else:
            ok, found = passes_root_check(root, factor, ridge, p, sizes), ridge[:0]
    return root, ok, found


def _warn(failed: int, count: int) -> None:
    if failed:
        logger.warning(
            "%d of %d inverse roots failed the root check with every solver (factor not finite, or "
            "far from positive definite): they keep their previous root.",
            failed,
            count,
        )
