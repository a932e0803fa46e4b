"""Factors, roots and search directions of segments (algorithm.md 1.3, steps 1 to 7)."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo import ops
from shampoo.blocks.segments import ActiveBlocks, FactorRows, Part, Segment
from shampoo.distributed.distributor import Distributor
from shampoo.hyperparameters import Hyperparameters
from shampoo.kernels.reference.norms import elementwise_power
from shampoo.ops import Number
from shampoo.ops.limits import kept_scale, summand_limit
from shampoo.roots.refresh import refresh_roots_, refresh_roots_on_device_
from shampoo.scalars import Scalars


def refresh_ahead(
    segments: Sequence[Segment],
    due: Sequence[FactorRows],
    hyper: Hyperparameters,
    scalars: Scalars,
    distributor: Distributor,
) -> bool:
    """Moves all factors, and refreshes roots, before any direction; False if that can wait.

    Roots see the factors of all blocks. Segments share a workspace: if there are several, their
    gradients are gathered again afterwards. If there is one, moments move before the roots are
    refreshed, which do not depend on each other.
    """
    if not due or len(segments) == 1:
        return False
    for segment in segments:
        ops.gather_blocks_(segment.grad, *gradients(segment, hyper, scalars, distributor))
        accumulate(segment, scalars)
    refresh(due, hyper, scalars)
    return True


def due_rows(
    active: ActiveBlocks,
    hyper: Hyperparameters,
    counts: Sequence[int],
    distinct: Collection[int],
    is_capturing: bool,
) -> list[FactorRows]:
    """The factors whose roots are refreshed in this step: by a parameter's own count of steps.

    Args:
        counts: [members] of the arena, this step included.
        distinct: the counts of those that have a gradient.
        is_capturing: then it has not been counted.
    """
    if len(distinct) == 1:
        phase = hyper.due_phase(next(iter(distinct)) + is_capturing)
        return [] if phase is None else active.rows_of_phase(phase)
    phases = {count: hyper.due_phase(count + is_capturing) for count in distinct}
    if set(phases.values()) == {None}:
        return []
    return active.rows_by_owner(
        tuple(
            phases[count] if is_here else None
            for count, is_here in zip(counts, active.present, strict=True)
        )
    )


def factor_correction(factors: FactorRows, scalars: Scalars) -> Number:
    """c2 of some factors, [R] where their parameters differ in how many steps they have taken."""
    if scalars.counted is None:
        return scalars.correction2
    return scalars.at(factors.owners).correction2


def accumulate(segment: Segment, scalars: Scalars) -> None:
    """A_k <- beta2 A_k + (1 - beta2) mat_k(G) mat_k(G)^T, from the raw gradient."""
    for part in segment.parts:
        if not part.factors:
            continue
        grad = part.take(part.grad)
        for mode, factor in enumerate(part.factors):
            moved = part.take(factor)
            ops.gram_ema_(moved, grad, mode, scalars.beta2, scalars.factor_weight)
            part.put(factor, moved)


def refresh(due: Sequence[FactorRows], hyper: Hyperparameters, scalars: Scalars) -> None:
    """X_k <- (A_k / c2 + ridge I)^(-1/p)."""
    for factors in due:
        stack = factors.stack
        root, factor, failures, ready = (
            factors.take(each) for each in (stack.root, stack.factor, stack.failures, stack.ready)
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
            refresh_roots_(root, factor, failures, ready, **how)
        else:
            refresh_roots_on_device_(root, factor, failures, ready, scalars.accepted, **how)
        factors.put(stack.root, root)
        factors.put(stack.failures, failures)
        factors.put(stack.ready, ready)
        stack.mark_seen()


_TINY = 1e-16  # keeps the ratio of the two lengths finite where the preconditioned one is zero


class Gradients(NamedTuple):
    """``G = alpha * blocks``, with ``accumulate`` added to what the segment holds as ``grad``."""

    sources: Sequence[Tensor]
    tiles: Tensor
    alpha: Number
    accumulate: bool


def gradients(
    segment: Segment, hyper: Hyperparameters, scalars: Scalars, distributor: Distributor
) -> Gradients:
    """Where ``G = sign * gradient (+ weight_decay W)`` comes from (steps 1 and 2)."""
    plain = Gradients(*distributor.gradients(segment), scalars.sign, False)
    if hyper.coupled_decay == 0.0:
        return plain
    ops.gather_blocks_(segment.grad, *plain)
    return Gradients(*distributor.weights(segment), scalars.coupled_decay, True)


def graft(segment: Segment, source: Gradients, scalars: Scalars) -> None:
    """Moves the moments and measures the grafted D, in one pass over gradients and moments.

    Leaves a private copy of G in the segment if there are factors to move by it, and D unless it is
    known, without asking a device, that all of it will be preconditioned.
    """
    has_factors = any(part.factors for part in segment.parts)
    needs_no_direction = scalars.started is True and all(part.all_ready for part in segment.parts)
    moment = scalars.moment
    ops.graft_moments_(
        segment.grad if has_factors or source.accumulate else None,
        segment.moments.get("exp_avg"),
        segment.moments.get("exp_avg_sq"),
        None if needs_no_direction else segment.direction,
        segment.norm,
        *source,
        scalars.beta1,
        scalars.correction1,
        moment.beta,
        moment.weight,
        moment.correction,
        # Where nothing was ever seen, 0 / eps must be 0 even for an eps that float32 cannot hold.
        max(moment.eps, torch.finfo(segment.grad.dtype).tiny),
        moment.normalized,
    )


def precondition(segment: Segment, hyper: Hyperparameters, scalars: Scalars) -> None:
    """Leaves ``P`` in the segment, as ``scale[b] * direction``.

    Steps 5 and 6 of algorithm.md 1.3: ``P = D`` before ``start_preconditioning_step`` and for a
    block without a root, else ``P = M x_1 X_1 ... x_o X_o`` with the norm of D. A block whose P its
    dtype cannot hold gets the scale 0, and so takes no step; its statistics have moved.
    """
    if scalars.started is False:
        segment.scale.copy_(segment.norm <= summand_limit(segment.norm.dtype))
        return
    # The host does not know whether a step that is replayed has started, or has its roots.
    is_known = scalars.started is True
    ready = [is_known and part.is_ready() for part in segment.parts]
    norm = torch.empty_like(segment.norm)
    has_root = torch.ones_like(norm, dtype=torch.bool)
    for part, is_ready in zip(segment.parts, ready, strict=True):
        filtered = part.take(part.grad if part.exp_avg is None else part.exp_avg)
        # Without a root everywhere, the grafted direction must stay where a root is missing.
        is_in_place = is_ready and part.rows is None
        out = part.direction if is_in_place else torch.empty_like(filtered)
        ops.precondition_(out, norm[part.blocks], filtered, _roots(part, hyper, scalars))
        if not is_ready:
            mask = has_root[part.blocks]
            for each in map(part.take, part.ready):
                mask &= each
            mask &= _of(scalars.started, part)
            shape = (-1, *[1] * len(part.factors))
            out = torch.where(mask.view(shape), out, part.take(part.direction))
            if part.rows is None:
                part.direction.copy_(out)
        part.put(part.direction, out)
    # The bias correction of the gradient average is a factor of the direction: it joins the scale.
    correction = scalars.correction1
    if hyper.geometry.grafting == "none":
        scale = torch.ones_like(norm).mul_(1.0 / correction)
    else:
        divisor = correction.to(norm.dtype) if isinstance(correction, Tensor) else correction
        scale = segment.norm / (norm / divisor + _TINY) / divisor
    if not all(ready):
        scale = torch.where(has_root, scale, 1.0)
        norm = torch.where(has_root, norm, segment.norm)
    segment.scale.copy_(kept_scale(scale, norm))


def _roots(part: Part, hyper: Hyperparameters, scalars: Scalars) -> list[Tensor]:
    exponent = -1.0 / hyper.root_power(len(part.factors))
    correction = _of(scalars.correction2, part)
    return [
        _diagonal_root(part.take(factor), exponent, hyper, correction)
        if root is None
        else part.take(root)
        for factor, root in zip(part.factors, part.roots, strict=True)
    ]


def _of(number: Number, part: Part) -> Number:
    """A number of a segment as it concerns a part: each of its blocks may have its own."""
    return number[part.blocks] if isinstance(number, Tensor) and number.dim() else number


def _diagonal_root(
    factor: Tensor, exponent: float, hyper: Hyperparameters, correction: Number
) -> Tensor:
    """``(a / c2 + ridge)^(-1/p)`` of a diagonal factor ``[B, d]``, by the ridge of full factors."""
    if isinstance(correction, Tensor):
        correction = correction.to(factor.dtype).view(-1, 1)
    diagonal = factor / correction
    largest = diagonal.amax(1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)  # keeps the fourth powers in range
    squares, fourth_powers = (diagonal / unit).square(), torch.zeros_like(unit)
    # Not torch's sum, whose order depends on the batch and on the number of threads.
    ops.gram_ema_(fourth_powers, squares[:, None], 0, 0.0, 1.0)
    norm = unit * fourth_powers.sqrt().sqrt()
    ridge = (hyper.relative_eps * norm).clamp_min(hyper.eps)
    damped = diagonal + ridge
    return torch.where(damped > 0, elementwise_power(damped, exponent), 0.0)
