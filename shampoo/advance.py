"""One step of one arena: factors, roots and search directions (algorithm.md 1.3, steps 0 to 8)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shampoo import capture, layerwise, ops
from shampoo.agreement import Attempt
from shampoo.averages import Number
from shampoo.direction import gradients, graft, precondition
from shampoo.exchange import Exchange
from shampoo.hyperparameters import Hyperparameters
from shampoo.precision import full_precision
from shampoo.refresh import refresh_roots_, refresh_roots_on_device_
from shampoo.scalars import Scalars
from shampoo.segments import FactorRows, Segment, Selection
from shampoo.stacks import Arena


def advance(
    selection: Selection, hyper: Hyperparameters, scalars: Scalars | None, exchange: Exchange
) -> None:
    """Factors, roots and search directions of one arena (steps 0 to 6), if any of it moves."""
    arena = selection.arena
    if scalars is None:
        return
    with full_precision(arena.device):
        due = due_rows(selection, hyper)
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
            own = scalars.at(segment.owners)
            graft(segment, gradients(segment, hyper, own, exchange), own)
            if not is_ahead:
                _accumulate(segment, own)
                _refresh(due, hyper, scalars)
            precondition(segment, hyper, own)
            if not arena.is_layerwise:
                exchange.deliver(arena, segment, hyper, own)


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
            own = None if scalars is None else scalars.at(segment.owners)
            attempt.run(exchange.deliver, arena, segment, hyper, own)


def due_rows(selection: Selection, hyper: Hyperparameters) -> list[FactorRows]:
    """The factors whose roots are refreshed in this step: by a parameter's own count of steps."""
    # While a step is captured, it has not been counted.
    ahead = int(capture.is_capturing())
    counts = selection.arena.counts()
    present = {counts[rank] + ahead for rank in selection.ranks}
    slots = {count: hyper.due_slot(count) for count in present}
    if len(slots) == 1:
        [slot] = slots.values()
        return [] if slot is None else selection.rows_of_slot(slot)
    if not any(slot is not None for slot in slots.values()):
        return []
    return selection.rows_by_owner(
        tuple(
            slots[count + ahead] if is_here else None
            for count, is_here in zip(counts, selection.present, strict=True)
        )
    )


def factor_correction(factors: FactorRows, scalars: Scalars) -> Number:
    """c2 of some factors, [R] where their parameters differ in how many steps they have taken."""
    if scalars.counted is None:
        return scalars.correction2
    return scalars.at(factors.owners).correction2


def _accumulate(segment: Segment, scalars: Scalars) -> None:
    """A_k <- beta2 A_k + (1 - beta2) mat_k(G) mat_k(G)^T, from the raw gradient."""
    for part in segment.parts:
        if not part.factors:
            continue
        grad = part.take(part.grad)
        for mode, factor in enumerate(part.factors):
            moved = part.take(factor)
            ops.gram_ema_(moved, grad, mode, scalars.beta2, scalars.factor_weight)
            part.put(factor, moved)


def _refresh(due: Sequence[FactorRows], hyper: Hyperparameters, scalars: Scalars) -> None:
    """X_k <- (A_k / c2 + ridge I)^(-1/p)."""
    for factors in due:
        stack = factors.stack
        root, factor, failures, rooted = (
            factors.take(each) for each in (stack.root, stack.factor, stack.failures, stack.rooted)
        )
        how: dict[str, Any] = {
            "p": hyper.root_power(stack.order),
            "correction": factor_correction(factors, scalars),
            "eps": hyper.eps,
            "relative_eps": hyper.relative_eps,
            "method": hyper.root_method,
        }
        if scalars.accepted is None:
            how |= {"pending": stack.pending, "where": factors.where}
            refresh_roots_(root, factor, failures, rooted, **how)
        else:
            refresh_roots_on_device_(root, factor, failures, rooted, scalars.accepted, **how)
        factors.put(stack.root, root)
        factors.put(stack.failures, failures)
        factors.put(stack.rooted, rooted)
        stack.mark_seen()
