"""KL-Shampoo (arXiv 2509.03378v7): factors whose Kronecker product is nearest in KL divergence."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shampoo import ops
from shampoo.blocks.cost import Cost
from shampoo.blocks.declared import DIAGONAL, NONE
from shampoo.blocks.statistics import Statistics
from shampoo.hyperparameters import Hyperparameters
from shampoo.ops.limits import clip_squares_
from shampoo.preconditioner.base import of_blocks
from shampoo.preconditioner.shampoo import Shampoo
from shampoo.scalars import Scalars


class KLShampoo(Shampoo):
    """Shampoo by gradients that the roots of all other modes have whitened, and p = 2."""

    name = "kl_shampoo"
    former_exponent = "covariance"

    def power(self, hyper: Hyperparameters, order: int) -> float:
        """2, whatever the order: the Kronecker product of the factors estimates E[g g^T] itself."""
        return 2.0

    def check(self, hyper: Hyperparameters, order: int) -> None:
        """Refuses other powers, and a root that the group's method does not find."""
        if hyper.root_power(order) != self.power(hyper, order):
            raise ValueError(
                f"Invalid exponent={hyper.exponent!r},"
                f" exponent_multiplier={hyper.exponent_multiplier}. Must be"
                f' "covariance" and 1.0 with preconditioner="{self.name}", whose factors have the'
                ' power -1/2. Or choose preconditioner="shampoo".'
            )
        super().check(hyper, order)

    def cost(self, extent: Sequence[int], modes: Sequence[str]) -> Cost:
        """Every root is applied once more for each other mode, and the result written and read."""
        plain, order = super().cost(extent, modes), len(extent)
        products = tuple(replace(each, general=order) for each in plain.products)
        numbers = plain.numbers + 2 * plain.numel * order * (order > 1)
        return replace(plain, products=products, numbers=numbers)

    def accumulate(
        self,
        statistics: Sequence[Statistics],
        grads: Sequence[Tensor],
        hyper: Hyperparameters,
        scalars: Scalars,
    ) -> None:
        """``A_k <- beta2 A_k + (1 - beta2) (d_k / numel) mat_k(G~) mat_k(G~)^T``."""
        for each, grad in zip(statistics, grads, strict=True):
            self._accumulate(each, grad, hyper, scalars)

    def _accumulate(
        self, statistics: Statistics, grad: Tensor, hyper: Hyperparameters, scalars: Scalars
    ) -> None:
        roots, numel = self.roots_in_force(statistics, hyper, scalars), grad[0].numel()
        whitened, norm = torch.empty_like(grad), grad.new_empty(len(grad))
        for k, mode in enumerate(statistics.modes):
            if mode.kept != NONE:
                others = [*roots[:k], None, *roots[k + 1 :]]
                ops.precondition_([whitened], [norm], [grad], others)
                clip_squares_(whitened, norm)
                weight = scalars.factor_weight * (statistics.extent[k] / numel)
                ops.gram_ema_([mode.state["factor"]], [whitened], [k], scalars.beta2, weight)

    def roots_in_force(
        self, statistics: Statistics, hyper: Hyperparameters, scalars: Scalars
    ) -> list[Tensor | None]:
        """X_k as the step before has left them; where there is none yet, or an early one, identity.

        That of a diagonal mode is the root of its factor, and so there from the first step on.
        """
        # c2 = 1 - beta2^t, of the step before: 1 - beta2^(t - 1). It stays 1 where it is 1.
        before = 1.0 - (1.0 - scalars.correction2) / hyper.beta2
        roots = self.roots(statistics, hyper, before)
        is_early = of_blocks(scalars.step, statistics) <= whitens_after(hyper)  # or [B]
        for k, (mode, root) in enumerate(zip(statistics.modes, roots, strict=True)):
            if root is None:
                continue
            if mode.kept == DIAGONAL:
                has_seen = mode.state["factor"].amax(1, keepdim=True) > 0
                roots[k] = torch.where(has_seen, root, 1.0)
            elif is_early is True:
                roots[k] = None
            elif mode.ready is not None:
                usable = None if statistics.readiness.is_known else mode.ready
                if isinstance(is_early, Tensor):
                    usable = ~is_early if usable is None else usable & ~is_early
                if usable is not None:
                    identity = torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
                    roots[k] = torch.where(usable[:, None, None], root, identity)
        return roots


def whitens_after(hyper: Hyperparameters) -> float:
    """The step of a parameter up to which no root whitens what its factors take in.

    Roots of few gradients are mostly ridge where these had nothing: whitened by them, a gradient
    outweighs by orders of magnitude what comes later, for as many steps as a factor remembers many
    times over. So a start before the end of the first period is one of directions alone, and the
    factors are those of a start at ``precondition_frequency``.
    """
    start, frequency = hyper.start_preconditioning_step, hyper.precondition_frequency
    if start >= frequency:
        return 0
    # Staggered, the last root from within the first period is renewed at the end of the second.
    return start + 2 * frequency - 1 if hyper.is_staggered else frequency
