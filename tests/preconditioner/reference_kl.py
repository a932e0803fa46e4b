"""KL-Shampoo in float64, one block at a time: what differs from the reference of Shampoo.

Written from the paper's algorithm (2509.03378v7). Before the factor A_k moves, G is multiplied by
``X_j = A_j^(-1/2)`` along all other modes j, as the step before has left them; not by roots from
before the first step that is a multiple of the frequency, unless the start comes later than that.
"""

import math
from typing import Any

import torch
from reference_shampoo import BlockState, ReferenceShampoo, inverse_root, mode_product, unfold
from torch import Tensor


class ReferenceKLShampoo(ReferenceShampoo):
    """The optimizer, on float64 copies of ``params``."""

    def __init__(self, params: list[Tensor], **hyper: Any) -> None:
        assert hyper.pop("preconditioner") == "kl_shampoo"
        super().__init__(params, **hyper)

    def exponent(self, order: int) -> float:
        return -1 / 2

    def _update_factors(
        self, G: Tensor, block: BlockState, beta2: float, c2: float, t: int
    ) -> None:
        h = self.hyper
        earlier = 1 - beta2 ** (t - 1) if h["bias_correction"] and beta2 < 1 else 1.0
        is_early = self.start < h["precondition_frequency"] and t <= h["precondition_frequency"]
        in_force = [
            self._root_in_force(A, None if is_early else X, earlier)
            for A, X in zip(block.factors, block.roots, strict=True)
        ]
        for k, A in enumerate(block.factors):
            whitened = G
            for j, X in enumerate(in_force):
                if j != k:
                    whitened = mode_product(whitened, X, j)
            rows = unfold(whitened, k) * math.sqrt(len(A) / G.numel())
            C = rows @ rows.T if A.ndim == 2 else (rows**2).sum(1)
            block.factors[k] = A + C if beta2 == 1 else beta2 * A + (1 - beta2) * C
        if self.is_due(t):
            for k, A in enumerate(block.factors):
                if A.ndim == 2:
                    block.roots[k] = inverse_root(A / c2, -1 / 2, h["eps"], h["relative_eps"])
            block.has_root = True
        if all(A.ndim == 1 for A in block.factors):
            block.has_root = True

    def _root_in_force(self, A: Tensor, X: Tensor | None, c2: float) -> Tensor:
        if A.ndim == 2:
            return torch.eye(len(A), dtype=A.dtype) if X is None else X
        if (A == 0).all():  # of a step before the first
            return torch.eye(len(A), dtype=A.dtype)
        a = A / c2
        ridge = max(self.hyper["eps"], self.hyper["relative_eps"] * (a**4).sum().item() ** 0.25)
        return torch.diag((a + ridge) ** (-1 / 2))
