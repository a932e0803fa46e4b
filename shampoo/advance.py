"""One step of one arena: factors, roots and search directions (algorithm.md 1.3, steps 0 to 8)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shampoo import capture, layerwise, ops
from shampoo.agreement import Attempt
from shampoo.direction import gradients, graft, precondition
from shampoo.exchange import Exchange
from shampoo.hyperparameters import Hyperparameters
from shampoo.precision import full_precision
from shampoo.refresh import refresh_roots_, refresh_roots_on_device_
from shampoo.scalars import Scalars
from shampoo.segments import FactorRange, Segment, Selection
from shampoo.stacks import Arena


def advance(
    selection: Selection, hyper: Hyperparameters, scalars: Scalars, exchange: Exchange
) -> None:
    """Factors, roots and search directions of one arena (steps 0 to 6)."""
    arena = selection.arena
    with full_precision(arena.device):
        # While a step is captured, it has not been counted.
        slot = hyper.due_slot(arena.step + int(capture.is_capturing()))
        due = [] if slot is None else selection.factors.get(slot, [])
        # Roots see the factors of all blocks, so these move first. Segments share a workspace: if
        # there are several, their gradients are gathered again. If there is one, moments move
        # before the roots are refreshed, which do not depend on each other.
        is_ahead = bool(due) and len(selection.segments) > 1
        if is_ahead:
            for segment in selection.segments:
                ops.gather_blocks_(segment.grad, *gradients(segment, hyper, scalars, exchange))
                _accumulate(segment, scalars)
            _refresh(due, hyper, scalars)
        for segment in selection.segments:
            graft(segment, gradients(segment, hyper, scalars, exchange), scalars)
            if not is_ahead:
                _accumulate(segment, scalars)
                _refresh(due, hyper, scalars)
            precondition(segment, hyper, scalars)
            if not arena.is_layerwise:
                exchange.deliver(arena, segment, hyper, scalars)


def rescale(
    arena: Arena,
    segments: Sequence[Segment],
    squares: Tensor,
    hyper: Hyperparameters,
    scalars: Scalars | None,
    exchange: Exchange,
    attempt: Attempt,
) -> None:
    """LARS and LAMB: P <- P |W| / |P| over whole parameters, whose blocks others may own.

    A rank that has failed still adds its zeros to the sum.

    Args:
        squares: [2, blocks] float64, overwritten.
    """
    with full_precision(arena.device):
        squares.zero_()
        attempt.run(layerwise.measure, squares, segments, exchange, hyper.decoupled_decay)
        exchange.sum_(squares)
        attempt.run(layerwise.rescale, squares, arena, segments)
        for segment in segments:
            attempt.run(exchange.deliver, arena, segment, hyper, scalars)


def _accumulate(segment: Segment, scalars: Scalars) -> None:
    """A_k <- beta2 A_k + (1 - beta2) mat_k(G) mat_k(G)^T, from the raw gradient."""
    for part in segment.parts:
        for mode, factor in enumerate(part.factors):
            ops.gram_ema_(factor, part.grad, mode, scalars.beta2, scalars.factor_weight)


def _refresh(due: Sequence[FactorRange], hyper: Hyperparameters, scalars: Scalars) -> None:
    """X_k <- (A_k / c2 + ridge I)^(-1/p)."""
    for factors in due:
        stack, rows = factors.stack, slice(factors.start, factors.stop)
        state = stack.root[rows], stack.factor[rows], stack.failures[rows], stack.rooted[rows]
        how: dict[str, Any] = {
            "p": hyper.root_power(stack.order),
            "correction": scalars.correction2,
            "eps": hyper.eps,
            "relative_eps": hyper.relative_eps,
            "method": hyper.root_method,
        }
        if scalars.accepted is None:
            refresh_roots_(*state, **how, pending=factors.pending)
        else:
            refresh_roots_on_device_(*state, scalars.accepted, **how)
