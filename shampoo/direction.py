"""The search direction of a segment: moments, preconditioned gradient, grafted length."""

import torch
from torch import Tensor

from shampoo import ops
from shampoo.averages import Number
from shampoo.hyperparameters import Hyperparameters
from shampoo.kernels.norms import elementwise_power
from shampoo.scalars import Scalars
from shampoo.segments import Part, Segment

_TINY = 1e-16  # keeps the ratio of the two lengths finite where the preconditioned one is zero


def direct(segment: Segment, hyper: Hyperparameters, scalars: Scalars) -> None:
    """Moves the moments and leaves ``P`` in the segment, as ``scale[b] * direction``.

    Steps 5 and 6 of algorithm.md 1.3: ``P = D`` before ``start_preconditioning_step`` and for a
    block without a root, else ``P = M x_1 X_1 ... x_o X_o`` with the norm of D.
    """
    # The host does not know whether a step that is replayed has started, or has its roots.
    is_known = isinstance(scalars.started, bool)
    is_started = bool(scalars.started) if is_known else True
    is_rooted = [is_known and is_started and part.is_rooted() for part in segment.parts]
    moment = scalars.moment
    ops.graft_moments_(
        segment.moments.get("exp_avg"),
        segment.moments.get("exp_avg_sq"),
        None if all(is_rooted) else segment.direction,
        segment.norm,
        segment.grad,
        segment.runs,
        scalars.beta1,
        scalars.correction1,
        moment.beta,
        moment.weight,
        moment.correction,
        # Where nothing was ever seen, 0 / eps must be 0 even for an eps that float32 cannot hold.
        max(moment.eps, torch.finfo(segment.grad.dtype).tiny),
        moment.normalized,
    )
    segment.scale.fill_(1.0)
    if is_started:
        for part, rooted in zip(segment.parts, is_rooted, strict=True):
            _precondition(part, hyper, scalars, rooted)


def _precondition(part: Part, hyper: Hyperparameters, scalars: Scalars, is_rooted: bool) -> None:
    exponent = -1.0 / hyper.root_power(len(part.factors))
    roots = [
        _diagonal_root(factor, exponent, hyper, scalars.correction2) if root is None else root
        for factor, root in zip(part.factors, part.roots, strict=True)
    ]
    # Without a root everywhere, the grafted direction must stay where a root is missing.
    out = part.direction if is_rooted else torch.empty_like(part.direction)
    norm = torch.empty_like(part.norm)
    filtered = part.grad if part.exp_avg is None else part.exp_avg
    ops.precondition_(out, norm, filtered, roots)
    # The bias correction of the gradient average is a factor of the direction: it joins the scale.
    correction = scalars.correction1
    if hyper.geometry.grafting == "none":
        scale = torch.ones_like(norm).mul_(1.0 / correction)
    else:
        scale = part.norm / (norm / correction + _TINY) / correction
    if is_rooted:
        part.scale.copy_(scale)
        return
    has_root = torch.ones_like(scale, dtype=torch.bool)
    for mask in (*part.rooted, scalars.started):
        has_root &= mask
    part.scale.copy_(torch.where(has_root, scale, 1.0))
    shape = (-1, *[1] * len(part.factors))
    part.direction.copy_(torch.where(has_root.view(shape), out, part.direction))


def _diagonal_root(
    factor: Tensor, exponent: float, hyper: Hyperparameters, correction: Number
) -> Tensor:
    """``(a / c2 + ridge)^(-1/p)`` of a diagonal factor ``[B, d]``, by the ridge of full factors."""
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
