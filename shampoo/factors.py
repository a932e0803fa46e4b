"""Steps 0 to 2 of algorithm.md 1.3 on one segment: its gradients, factors and roots."""

from shampoo import ops
from shampoo.exchange import Exchange
from shampoo.hyperparameters import Hyperparameters
from shampoo.refresh import refresh_roots_
from shampoo.segments import FactorRange, Segment


def gather(segment: Segment, hyper: Hyperparameters, exchange: Exchange) -> None:
    """Packs a private copy of the gradients; G <- G + weight_decay W if it is coupled."""
    exchange.gradients(segment, segment.grad, -1.0 if hyper.maximize else 1.0)
    if hyper.weight_decay != 0.0 and not hyper.decoupled_weight_decay:
        exchange.weights(segment, segment.grad, hyper.weight_decay, True)


def accumulate(segment: Segment, hyper: Hyperparameters) -> None:
    """A_k <- beta2 A_k + (1 - beta2) mat_k(G) mat_k(G)^T, from the raw gradient."""
    for part in segment.parts:
        for mode, factor in enumerate(part.factors):
            ops.gram_ema_(factor, part.grad, mode, hyper.beta2, hyper.factor_weight)


def refresh(factors: FactorRange, hyper: Hyperparameters, step: int) -> None:
    """X_k <- (A_k / c2 + ridge I)^(-1/p)."""
    stack, rows = factors.stack, slice(factors.start, factors.stop)
    refresh_roots_(
        stack.root[rows],
        stack.factor[rows],
        stack.failures[rows],
        stack.rooted[rows],
        p=hyper.root_power(stack.order),
        correction=hyper.correction2(step),
        eps=hyper.eps,
        relative_eps=hyper.relative_eps,
        method=hyper.root_method,
        pending=factors.pending,
    )
