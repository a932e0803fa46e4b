"""Factors, roots and search directions of segments (algorithm.md 1.3, steps 1 to 6)."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo import ops
from shampoo.blocks.segments import ActiveBlocks, FactorRows, Part, Segment
from shampoo.blocks.statistics import Statistics
from shampoo.distributed.distributor import Distributor
from shampoo.hyperparameters import Hyperparameters
from shampoo.ops import Number
from shampoo.ops.limits import summand_limit
from shampoo.preconditioner.base import Preconditioner, of_blocks
from shampoo.scalars import Scalars


def refresh_ahead(
    kind: Preconditioner,
    segments: Sequence[Segment],
    due: Sequence[FactorRows],
    hyper: Hyperparameters,
    scalars: Scalars,
    distributor: Distributor,
) -> bool:
    """Moves all factors and refreshes the roots, where several segments have roots that are due.

    Every factor must have moved before a root is taken. Segments share a workspace, so that their
    gradients are gathered again afterwards.

    Returns:
        False, with nothing done, where there is one segment, or nothing due: the loop over segments
        does both then, and moments may move first.
    """
    if not due or len(segments) == 1:
        return False
    for segment in segments:
        s = scalars.at(segment.param_index)
        G = gradients(segment, hyper, s, distributor)
        ops.gather_blocks_(*G)
        accumulate(kind, segment, G.out, hyper, s)
    refresh(kind, due, hyper, scalars)
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
    return active.rows_by_param(
        tuple(
            phases[count] if is_here else None
            for count, is_here in zip(counts, active.present, strict=True)
        )
    )


def factor_correction(factors: FactorRows, scalars: Scalars) -> Number:
    """c2 of some factors, [R] where their parameters differ in how many steps they have taken."""
    if scalars.counted is None:
        return scalars.correction2
    return scalars.at(factors.param_index).correction2


def accumulate(
    kind: Preconditioner, segment: Segment, grad: Tensor, hyper: Hyperparameters, scalars: Scalars
) -> None:
    """Moves the statistics of all blocks by the raw gradient, ``[N]`` (step 3)."""
    if not kind.preconditions:
        return
    statistics, grads = [], []
    for part in segment.parts:
        blocks = part.of(grad).view_as(part.grad)
        own, rows = part.statistics, part.rows
        statistics.append(own if rows is None else own.copied(rows))
        grads.append(blocks if rows is None else blocks.index_select(0, rows))
    kind.accumulate(statistics, grads, hyper, scalars)
    for part, moved in zip(segment.parts, statistics, strict=True):
        if part.rows is not None:
            moved.put_back()


def refresh(
    kind: Preconditioner, due: Sequence[FactorRows], hyper: Hyperparameters, scalars: Scalars
) -> None:
    """Renews what is due (step 4)."""
    for together in kind.together(due, hyper) if due else ():
        own = [
            scalars if scalars.counted is None else scalars.at(rows.param_index)
            for rows in together
        ]
        taken = [rows.taken() for rows in together]
        kind.refresh(taken, hyper, own)
        for rows, renewed in zip(together, taken, strict=True):
            rows.put_back(renewed)
            rows.stack.mark_seen()


class Gradients(NamedTuple):
    """``out <- alpha * blocks``, with ``accumulate`` added to what ``out``, ``[N]``, holds."""

    out: Tensor
    sources: Sequence[Tensor]
    tiles: Tensor
    alpha: Number
    accumulate: bool


def gradients(
    segment: Segment, hyper: Hyperparameters, scalars: Scalars, distributor: Distributor
) -> Gradients:
    """Where ``G = sign * gradient (+ weight_decay W)`` comes from, and goes to (steps 1 and 2).

    Where an average that is looked ahead takes the place of gradients in the segment, G lies where
    the direction will be written over it; or, if D lies there, in memory of this step.
    """
    out = segment.grad
    if looks_ahead(hyper) and scalars.started is not False:
        out = torch.empty_like(out) if _needs_graft(segment, scalars) else segment.direction
    plain = Gradients(out, *distributor.gradients(segment), scalars.sign, False)
    if hyper.coupled_decay == 0.0:
        return plain
    ops.gather_blocks_(*plain)
    return Gradients(out, *distributor.weights(segment), scalars.coupled_decay, True)


def looks_ahead(hyper: Hyperparameters) -> bool:
    """Whether roots are applied to the average as it will be, and not as it is."""
    return hyper.nesterov_average and hyper.has_exp_avg


def _needs_graft(segment: Segment, scalars: Scalars) -> bool:
    """Whether some block may follow D, as far as is known without asking a device."""
    return scalars.started is not True or not segment.is_known_ready()


def graft(kind: Preconditioner, segment: Segment, source: Gradients, scalars: Scalars) -> None:
    """Moves the moments and measures the grafted D, in one pass over gradients and moments.

    Leaves a private copy of G where it belongs if its kind works on it, the average looked ahead in
    the segment if that is not there, and D if some block may follow it.
    """
    moment = scalars.moment
    out, *blocks = source
    ops.graft_moments_(
        out if kind.preconditions or source.accumulate else None,
        segment.moments.get("exp_avg"),
        segment.moments.get("exp_avg_sq"),
        segment.direction if _needs_graft(segment, scalars) else None,
        segment.norm,
        *blocks,
        scalars.beta1,
        scalars.correction1,
        moment.beta,
        moment.weight,
        moment.correction,
        # Where nothing was ever seen, 0 / eps must be 0 even for an eps that float32 cannot hold.
        max(moment.eps, torch.finfo(segment.grad.dtype).tiny),
        moment.normalized,
        None if out is segment.grad else segment.grad,
    )


def average_correction(scalars: Scalars, hyper: Hyperparameters) -> Number:
    """What the average that a kind is given is to be divided by."""
    return scalars.correction_ahead if looks_ahead(hyper) else scalars.correction1


def precondition(
    kind: Preconditioner, segment: Segment, hyper: Hyperparameters, scalars: Scalars
) -> None:
    """Leaves ``P`` in the segment, as ``scale[b] * direction``.

    Steps 5 and 6 of algorithm.md 1.3: ``P = D`` before ``start_preconditioning_step`` and for a
    block that is not ready, else the direction of its kind with the norm of D. A block whose P its
    dtype cannot hold gets the scale 0, and so takes no step; its statistics have moved.
    """
    most = summand_limit(segment.norm.dtype)
    if scalars.started is False:
        followed = segment.norm, None, None, 1.0, True, most, scalars.accepted
        ops.graft_scale_(segment.scale, *followed)
        return
    is_ahead, norm = looks_ahead(hyper), torch.empty_like(segment.norm)
    # The host does not know whether a step that is replayed has started, or is ready.
    ready, may_be_ready = [], scalars.started is True
    for part in segment.parts:
        ready.append(may_be_ready and (part.readiness.is_known or part.is_ready()))
    # Where some block is not, the grafted direction must stay.
    apart = segment.direction if all(ready) else torch.empty_like(segment.direction)
    outs, norms, statistics, filtered = [], [], [], []
    for part, is_ready in zip(segment.parts, ready, strict=True):
        own, source = part.statistics, part.grad  # or the average that looks ahead, in its place
        if part.exp_avg is not None and not is_ahead:
            source = part.exp_avg
        if part.rows is not None:
            own, source = own.copied(part.rows), source.index_select(0, part.rows)
            outs.append(torch.empty_like(source))
        else:
            outs.append(part.direction if is_ready else part.of(apart).view_as(part.direction))
        norms.append(norm[part.blocks])
        statistics.append(own)
        filtered.append(source)
    kind.apply(outs, norms, statistics, filtered, hyper, scalars)
    is_own: Tensor | None = None  # [R], whether a block has a direction of its own; None: all have
    if segment.active is not None or not all(ready):  # else they are where they belong
        is_own = _put_directions(segment.parts, ready, outs, statistics, norm, scalars)
    ops.graft_scale_(
        segment.scale,
        segment.norm,
        norm,
        is_own,
        average_correction(scalars, hyper),
        hyper.geometry.grafting != "none",
        most,
        scalars.accepted,
    )


def _put_directions(
    parts: Sequence[Part],
    ready: Sequence[bool],
    outs: Sequence[Tensor],
    statistics: Sequence[Statistics],
    norm: Tensor,
    scalars: Scalars,
) -> Tensor | None:
    """Puts directions where they belong: those of blocks that are ready.

    Returns:
        [R], whether a block has a direction of its own; None if all have.
    """
    is_own: Tensor | None = None
    for part, is_ready, out, own in zip(parts, ready, outs, statistics, strict=True):
        if not is_ready:
            is_own = torch.ones_like(norm, dtype=torch.bool) if is_own is None else is_own
            mask = is_own[part.blocks]
            for mode in own.modes:
                if mode.ready is not None:
                    mask &= mode.ready
            mask &= of_blocks(scalars.started, own)
            shape = (-1, *[1] * (out.dim() - 1))
            out = torch.where(mask.view(shape), out, part.take(part.direction))
            if part.rows is None:
                part.direction.copy_(out)
        if part.rows is not None:
            part.direction.index_copy_(0, part.rows, out)
    return is_own
