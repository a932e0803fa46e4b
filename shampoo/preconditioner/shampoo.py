"""Shampoo (arXiv 2309.06497): a Kronecker factor and its inverse root for every mode."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from shampoo import ops
from shampoo.blocks.cost import Cost, Products
from shampoo.blocks.declared import DIAGONAL, FAILURES, FULL, NONE, ModeState
from shampoo.blocks.segments import FactorRows, TakenRows
from shampoo.blocks.statistics import Statistics
from shampoo.hyperparameters import Hyperparameters
from shampoo.kernels.reference.keep_roots import is_root
from shampoo.ops import Number
from shampoo.preconditioner import diagonal_factor
from shampoo.preconditioner.base import Preconditioner, of_blocks
from shampoo.roots.methods import check_method
from shampoo.roots.refresh import PendingFlags
from shampoo.roots.size_classes import Due, Stack, classes, refresh_together_
from shampoo.scalars import Scalars

_FACTOR_NUMBERS = 3  # that move for each entry: factor read and written, root read

_STATE = (
    ModeState("factor", lambda d: (d, d), moves_every_step=True),
    ModeState("root", lambda d: (d, d), decides_ready=True),  # all zero where there is none yet
    ModeState(FAILURES, lambda d: (), torch.int32, is_lasting=False),
)


class Shampoo(Preconditioner):
    """``P = M1 x_1 X_1 ... x_o X_o`` with ``X_k = (A_k / c2 + ridge I)^(-1/p)``."""

    name = "shampoo"
    mode_state: ClassVar = {FULL: _STATE, DIAGONAL: diagonal_factor.STATE}

    def power(self, hyper: Hyperparameters, order: int) -> float:
        """p, such that factors of blocks of some order are raised to ``-1/p``."""
        return hyper.root_power(order)

    def modes(self, extent: Sequence[int], diagonal: Sequence[bool]) -> tuple[str, ...]:
        """Factors of all modes, the diagonals alone of long ones."""
        return tuple(DIAGONAL if is_diagonal else FULL for is_diagonal in diagonal)

    def check(self, hyper: Hyperparameters, order: int) -> None:
        """Refuses a root that the group's method does not find."""
        check_method(hyper.root_method, self.power(hyper, order))

    def cost(self, extent: Sequence[int], modes: Sequence[str]) -> Cost:
        """For each factor a symmetric product, a general one, and an inverse root."""
        numel = math.prod(extent)
        sides = [side for side, mode in zip(extent, modes, strict=True) if mode == FULL]
        numbers = sum(_FACTOR_NUMBERS * side * side for side in sides)
        numbers += diagonal_factor.NUMBERS * numel * modes.count(DIAGONAL)
        products = tuple(Products(side) for side in sides)
        return Cost(numel, products, numbers, tuple((side, 1) for side in sides))

    def are_ready(self, state: Mapping[str, Tensor]) -> Tensor:
        """Those that have a root."""
        return is_root(state["root"])

    def memory(self, count: int) -> object:
        """Verdicts on roots that are on their way to the host."""
        return PendingFlags(count)

    def accumulate(
        self,
        statistics: Sequence[Statistics],
        grads: Sequence[Tensor],
        hyper: Hyperparameters,
        scalars: Scalars,
    ) -> None:
        """``A_k <- beta2 A_k + (1 - beta2) mat_k(G) mat_k(G)^T``, from the raw gradient."""
        factors, sources, numbers = [], [], []
        for each, grad in zip(statistics, grads, strict=True):
            for k, mode in enumerate(each.modes):
                if mode.kept != NONE:
                    factors.append(mode.state["factor"])
                    sources.append(grad)
                    numbers.append(k)
        ops.gram_ema_(factors, sources, numbers, scalars.beta2, scalars.factor_weight)

    def together(
        self, due: Sequence[FactorRows], hyper: Hyperparameters
    ) -> Sequence[Sequence[FactorRows]]:
        """Stacks of one size class."""
        stacks = []
        for stack, where in ((rows.stack, rows.where) for rows in due):
            count, p = len(stack.phase[where]), self.power(hyper, stack.order)
            stacks.append(Stack(stack.size, count, p))
        like = due[0].stack.statistic
        found = classes(stacks, like, hyper.eps, hyper.relative_eps, hyper.root_method)
        return [[due[index] for index in members] for members in found]

    def refresh(
        self, rows: Sequence[TakenRows], hyper: Hyperparameters, scalars: Sequence[Scalars]
    ) -> None:
        """``X_k <- (A_k / c2 + ridge I)^(-1/p)``, checked."""
        refresh_together_(
            [self._due(*pair, hyper) for pair in zip(rows, scalars, strict=True)],
            p=self.power(hyper, rows[0].stack.order),
            eps=hyper.eps,
            relative_eps=hyper.relative_eps,
            method=hyper.root_method,
            accepted=scalars[0].accepted,
        )

    def _due(self, rows: TakenRows, scalars: Scalars, hyper: Hyperparameters) -> Due:
        state, memory = rows.state, rows.stack.memory
        assert isinstance(memory, PendingFlags)
        return Due(
            state["root"],
            state["factor"],
            state[FAILURES],
            rows.ready,
            scalars.correction2,
            # What a graph replays, the host does not follow: it hears of no flags, and repairs
            # nothing.
            None if hyper.geometry.capturable else memory,
            rows.where,
            rows.found,
        )

    def apply(
        self,
        outs: Sequence[Tensor],
        norms: Sequence[Tensor],
        statistics: Sequence[Statistics],
        filtered: Sequence[Tensor],
        hyper: Hyperparameters,
        scalars: Scalars,
    ) -> None:
        """``P = M1 x_1 X_1 ... x_o X_o``."""
        roots: list[Tensor | None] = []
        for each in statistics:
            roots += self.roots(each, hyper, scalars.correction2)
        ops.precondition_(outs, norms, filtered, roots)

    def roots(
        self, statistics: Statistics, hyper: Hyperparameters, correction: Number
    ) -> list[Tensor | None]:
        """X_k of every mode: [B, d_k, d_k], [B, d_k] of a diagonal one, None where none is kept.

        Args:
            correction: ``c2`` of the segment, for diagonal modes, whose roots are made afresh.
        """
        roots: list[Tensor | None] = []
        for mode in statistics.modes:
            root = None
            if mode.kept == FULL:
                root = mode.state["root"]
            elif mode.kept == DIAGONAL:
                root = diagonal_factor.diagonal_root(
                    mode.state["factor"],
                    -1.0 / self.power(hyper, len(statistics.modes)),
                    of_blocks(correction, statistics),
                    hyper.eps,
                    hyper.relative_eps,
                )
            roots.append(root)
        return roots
