"""The search direction of a segment: moments, preconditioned gradient, grafted length."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo import ops
from shampoo.averages import Number
from shampoo.exchange import Exchange
from shampoo.hyperparameters import Hyperparameters
from shampoo.kernels.norms import elementwise_power
from shampoo.limits import kept_scale, summand_limit
from shampoo.scalars import Scalars
from shampoo.segments import Part, Segment

_TINY = 1e-16  # keeps the ratio of the two lengths finite where the preconditioned one is zero


class Gradients(NamedTuple):
    """``G = alpha * blocks``, with ``accumulate`` added to what the segment holds as ``grad``."""

    sources: Sequence[Tensor]
    tiles: Tensor
    alpha: Number
    accumulate: bool


def gradients(
    segment: Segment, hyper: Hyperparameters, scalars: Scalars, exchange: Exchange
) -> Gradients:
    """Where ``G = sign * gradient (+ weight_decay W)`` comes from (steps 1 and 2)."""
    plain = Gradients(*exchange.gradients(segment), scalars.sign, False)
    if hyper.coupled_decay == 0.0:
        return plain
    ops.gather_blocks_(segment.grad, *plain)
    return Gradients(*exchange.weights(segment), scalars.coupled_decay, True)


def graft(segment: Segment, source: Gradients, scalars: Scalars) -> None:
    """Moves the moments and measures the grafted D, in one pass over gradients and moments.

    Leaves a private copy of G in the segment if there are factors to move by it, and D unless it is
    known, without asking a device, that all of it will be preconditioned.
    """
    has_factors = any(part.factors for part in segment.parts)
    needs_no_direction = scalars.started is True and all(part.all_rooted for part in segment.parts)
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
    rooted = [is_known and part.is_rooted() for part in segment.parts]
    norm = torch.empty_like(segment.norm)
    has_root = torch.ones_like(norm, dtype=torch.bool)
    for part, is_rooted in zip(segment.parts, rooted, strict=True):
        filtered = part.take(part.grad if part.exp_avg is None else part.exp_avg)
        # Without a root everywhere, the grafted direction must stay where a root is missing.
        is_in_place = is_rooted and part.rows is None
        out = part.direction if is_in_place else torch.empty_like(filtered)
        ops.precondition_(out, norm[part.blocks], filtered, _roots(part, hyper, scalars))
        if not is_rooted:
            mask = has_root[part.blocks]
            for each in map(part.take, part.rooted):
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
    if not all(rooted):
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
