"""New roots for the optimizer's factors: each is probed, and what fails climbs a ladder.

A factor whose root does not pass keeps its previous root, is retried with ten times the ridge, then
with a float64 eigendecomposition. On the CPU all of this happens within one refresh. On a GPU the
host must not wait for the probe: flags travel to it while training goes on, and the next refresh
repairs what they name. A refresh that a graph replays has no host: there the previous root stays.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from shampoo.ops import Number
from shampoo.ops.precision import full_precision
from shampoo.roots.root_check import passes_root_check
from shampoo.roots.solver import chunks, solve_

logger = logging.getLogger(__name__)

_PASSED, _REPAIRED, _FAILED = 0, 1, 2  # outcome of a matrix in one refresh
_EIGH = 2  # the last rung; rung 1 is the larger ridge
_RIDGE_GROWTH = 10.0


Where = slice | Tensor  # rows of a stack; a tensor, [R] int64, is on the host


class PendingFlags:
    """Outcomes of one stack's refreshes on their way to the host. Not part of any checkpoint.

    Args:
        count: K, matrices of the stack.
    """

    def __init__(self, count: int) -> None:
        self._rung = torch.zeros(count, dtype=torch.int64, device="cpu")
        self._sent: list[tuple[Where, Tensor, torch.cuda.Event | None]] = []

    def send(self, where: Where, outcome: Tensor) -> None:
        """Starts the copy of the outcomes of some rows, [R] uint8, without waiting for them."""
        if outcome.device.type != "cuda" or isinstance(outcome, FakeTensor):
            self._sent.append((where, outcome.to("cpu", copy=True), None))
            return
        copy = torch.empty(outcome.shape, dtype=outcome.dtype, device="cpu", pin_memory=True)
        copy.copy_(outcome, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        self._sent.append((where, copy, arrived))

    def receive(self, where: Where) -> Tensor:
        """The rung on which each of some rows must be retried, [R] on the host."""
        waiting: list[tuple[Where, Tensor, torch.cuda.Event | None]] = []
        for rows, outcome, arrived in self._sent:
            if arrived is not None and not arrived.query():  # type: ignore[no-untyped-call]
                waiting.append((rows, outcome, arrived))
                continue
            _warn(int((outcome == _FAILED).sum()), len(outcome))
            rung = self._rung[rows]
            climbed = (rung + (outcome == _FAILED).long()).clamp(min=1, max=_EIGH)
            self._rung[rows] = torch.where(outcome == _PASSED, 0, climbed)
        self._sent = waiting
        return self._rung[where]


def is_root(root: Tensor) -> Tensor:
    """Which matrices of a stack are roots, [K] bool: all zero means that there is none yet.

    Every root has a positive entry on its diagonal; the root of a pseudo-inverse may have zeros.
    """
    return root.diagonal(dim1=1, dim2=2).amax(dim=1) > 0


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
    pending: PendingFlags | None = None,
    where: Where = slice(None),
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
        pending: On a GPU, the object that remembers this stack's flags between refreshes; without
            one a failing matrix is not retried there. Not used on the CPU.
        where: Which rows of that stack these are.
    """
    if factor.numel() == 0:
        return
    count, on_cpu = len(factor), factor.device.type == "cpu"
    outcome = torch.empty(count, dtype=torch.uint8, device=factor.device)
    for rows in chunks(factor):
        how = p, _of(correction, rows), eps, relative_eps, method
        ok = _attempt(root[rows], factor[rows], *how, reads=on_cpu)
        outcome[rows] = torch.where(ok, _PASSED, _FAILED).to(torch.uint8)

    def retry(which: Tensor, rung: int) -> None:
        """Rows that failed: ``which`` is a list of indices on the device of the stack."""
        step = next(chunks(factor)).stop
        growth = _RIDGE_GROWTH if rung < _EIGH else 1.0
        solver = method if rung < _EIGH else "eigh"
        for part in torch.split(which, step):
            candidate = root[part]
            ridges = eps * growth, relative_eps * growth
            how = p, _of(correction, part), *ridges, solver
            ok = _attempt(candidate, factor[part], *how, reads=on_cpu)
            ok &= outcome[part] == _FAILED
            root[part] = torch.where(ok[:, None, None], candidate, root[part])
            outcome[part] = torch.where(ok, _REPAIRED, outcome[part])

    if on_cpu:
        for rung in range(1, _EIGH + 1):
            failed = (outcome == _FAILED).nonzero()[:, 0]
            if len(failed) == 0:
                break
            retry(failed, rung)
        _warn(int((outcome == _FAILED).sum()), count)
    elif pending is not None:
        rungs = pending.receive(where)
        for rung in range(1, _EIGH + 1):
            flagged = (rungs == rung).nonzero()[:, 0]
            if len(flagged) > 0:
                retry(flagged.to(factor.device), rung)
        pending.send(where, outcome)

    failed = outcome == _FAILED
    failures.copy_(torch.where(failed, failures + 1, 0))
    ready.copy_(is_root(root))


@torch.no_grad()
def refresh_roots_on_device_(
    root: Tensor,
    factor: Tensor,
    failures: Tensor,
    ready: Tensor,
    accepted: Tensor,
    *,
    p: float,
    correction: Number,
    eps: float,
    relative_eps: float,
    method: str,
) -> None:
    """:func:`refresh_roots_` that reads nothing on the host, and so can be replayed from a graph.

    Args:
        accepted: 0-d bool: if False, nothing changes.

    The others are those of :func:`refresh_roots_`. ``method`` is none that waits for the device.
    """
    for rows in chunks(factor):
        candidate = root[rows].clone()
        how = p, _of(correction, rows), eps, relative_eps, method
        ok = _attempt(candidate, factor[rows], *how, reads=False)
        root[rows] = torch.where(accepted, candidate, root[rows])
        failed = torch.where(ok, 0, failures[rows] + 1)
        failures[rows] = torch.where(accepted, failed, failures[rows])
    ready.copy_(is_root(root))


def _of(correction: Number, rows: slice | Tensor) -> Number:
    """The corrections of some matrices, if each has its own."""
    return correction[rows] if isinstance(correction, Tensor) and correction.dim() else correction


def _attempt(
    root: Tensor,
    factor: Tensor,
    p: float,
    correction: Number,
    eps: float,
    relative_eps: float,
    method: str,
    reads: bool,
) -> Tensor:
    """Solves a chunk and writes the roots that pass the probe; which, [B] bool."""
    if isinstance(correction, Tensor):
        factor = factor / correction.to(factor.dtype).view(-1, 1, 1)
    elif correction != 1.0:
        factor = factor / correction
    candidate = torch.empty_like(root)
    ridge = torch.empty(len(factor), dtype=torch.float64, device=factor.device)
    solve_(candidate, ridge, factor, p, eps, relative_eps, method, reads)
    with full_precision(factor.device):
        ok = passes_root_check(candidate, factor, ridge, p)
    if reads and ok.all():  # a plain copy is several times as fast
        root.copy_(candidate)
    else:
        root.copy_(torch.where(ok[:, None, None], candidate, root))
    return ok


def _warn(failed: int, count: int) -> None:
    if failed:
        logger.warning(
            "%d of %d inverse roots failed the root check with every solver (factor not finite, or "
            "far from positive definite): they keep their previous root.",
            failed,
            count,
        )
