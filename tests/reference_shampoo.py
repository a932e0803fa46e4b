"""Shampoo in float64, one block at a time, in plain loops: the judge of the package.

Written from the paper's algorithm alone and sharing no code with the package. It is slow on
purpose: every line is one formula. Legend, for one block of order o:

    G   gradient, maximised or L2-decayed as asked      A_k  factor of mode k, X_k its root
    v   grafting accumulator, D_g its direction         m    first moment, Gt its corrected value
    M   momentum over directions P                      t    step number, from 1
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.95),
    "eps": 1e-12,
    "weight_decay": 0.0,
    "relative_eps": 1e-6,
    "decoupled_weight_decay": True,
    "momentum": 0.0,
    "nesterov": False,
    "nesterov_average": True,
    "max_preconditioner_dim": 256,  # of "auto", on a CPU
    "precondition_frequency": 10,
    "start_preconditioning_step": 1,
    "merge_dims": "matrix",
    "precondition_1d": False,
    "precondition": True,
    "exponent": "covariance",
    "exponent_multiplier": 1.0,
    "bias_correction": True,
    "grafting": "adam",
    "grafting_beta2": None,
    "grafting_eps": 1e-8,
    "large_dim_method": "auto",
    "maximize": False,
}


def merged_shape(shape: tuple[int, ...], rule: str, limit: int) -> tuple[int, ...]:
    """The shape after dropping ones and merging right to left while products fit `limit`."""
    sizes = [size for size in shape if size != 1]
    if not sizes:
        return (1,)
    if rule == "none":
        return tuple(sizes)
    fewest = {"full": 1, "matrix": 2}[rule]
    merged = [sizes.pop()]
    while sizes:
        size = sizes.pop()
        dims_if_merged = len(sizes) + len(merged)
        if size * merged[0] <= limit and dims_if_merged >= fewest:
            merged[0] *= size
        else:
            merged.insert(0, size)
    return tuple(merged)


def block_slices(shape: tuple[int, ...], lengths: Sequence[int]) -> list[tuple[slice, ...]]:
    """Row-major grid of chunks of the given lengths, the last one of each dimension shorter."""
    chunks = []
    for size, length in zip(shape, lengths, strict=True):
        chunks.append([slice(i, min(i + length, size)) for i in range(0, size, length)])
    return list(itertools.product(*chunks))


def block_lengths(shape: tuple[int, ...], limit: int, method: str) -> tuple[list[int], list[bool]]:
    """How long blocks are along every mode, and which modes keep a vector instead of a matrix.

    "auto" compares with AdamW, block by block: two moments, and for every mode two matrices or a
    vector, may be 10 numbers an element. The longest mode that is left, of equal ones the first, is
    cut into blocks of half, a third, ... an eighth of the length, or else keeps a vector.
    """
    lengths, whole = [limit] * len(shape), [False] * len(shape)
    if method == "diagonal":
        whole = [size > limit for size in shape]
        return [max(size, limit) for size in shape], whole

    def fits() -> bool:
        numbers = 0
        for part in block_slices(shape, lengths):
            sides = [each.stop - each.start for each in part]
            numbers += 2 * math.prod(sides)
            for side, is_whole in zip(sides, whole, strict=True):
                numbers += side if is_whole else 2 * side**2
        return numbers <= 10 * math.prod(shape)

    while method == "auto" and not fits():
        left = [k for k in range(len(shape)) if not whole[k]]
        longest = max(left, key=lambda k: (shape[k], -k))
        for part in range(2, 9):
            lengths[longest] = math.ceil(min(limit, shape[longest]) / part)
            if fits():
                return lengths, whole
        lengths[longest], whole[longest] = shape[longest], True
    return lengths, whole


def unfold(G: Tensor, mode: int) -> Tensor:
    """mat_k(G): the mode in rows, everything else in columns."""
    return G.movedim(mode, 0).reshape(G.shape[mode], -1)


def mode_product(G: Tensor, X: Tensor, mode: int) -> Tensor:
    """G x_k X."""
    return torch.tensordot(X, G, dims=([1], [mode])).movedim(0, mode)


def inverse_root(A: Tensor, exponent: float, eps: float, relative_eps: float) -> Tensor:
    """(A + ridge I)^exponent; without any ridge, the pseudo-inverse."""
    values, vectors = torch.linalg.eigh(A)
    if eps == 0 and relative_eps == 0:
        noise = len(values) * torch.finfo(A.dtype).eps * values.max()
        powers = torch.where(values > noise, values.clamp(min=1e-300) ** exponent, 0.0)
    else:
        ridge = max(eps, relative_eps * (values**4).sum().item() ** 0.25)
        powers = (values - min(values.min().item(), 0.0) + ridge) ** exponent
    return vectors @ torch.diag(powers) @ vectors.T


@dataclass
class BlockState:
    factors: list[Tensor]  # [d, d], or [d] for a diagonal mode
    roots: list[Tensor | None]
    has_root: bool
    v: Tensor
    m: Tensor


@dataclass
class ParamState:
    merged: tuple[int, ...]
    method: str  # "shampoo", "grafted" or "adagrad"
    slices: list[tuple[slice, ...]]
    blocks: list[BlockState] = field(default_factory=list)
    M: Tensor = field(default_factory=lambda: torch.zeros(()))
    t: int = 0  # steps it has taken: one without a gradient takes none


class ReferenceShampoo:
    """The optimizer. `hyper` may be changed between steps; `params` are float64 copies."""

    def __init__(self, params: list[Tensor], **hyper: Any) -> None:
        unknown = set(hyper) - set(DEFAULTS)
        assert not unknown, f"the reference does not know {unknown}"
        self.hyper = {**DEFAULTS, **hyper}
        self.params = [p.detach().to(torch.float64, copy=True).contiguous() for p in params]
        self.states = [self._initial(tuple(p.shape)) for p in self.params]

    def _initial(self, shape: tuple[int, ...]) -> ParamState:
        h, limit = self.hyper, self.hyper["max_preconditioner_dim"]
        merged = merged_shape(shape, h["merge_dims"], limit)
        is_vector = sum(size > 1 for size in shape) <= 1
        if not h["precondition"] or (is_vector and not h["precondition_1d"]):
            method = "adagrad" if h["grafting"] == "none" else "grafted"
        elif h["large_dim_method"] == "adagrad" and max(merged) > limit:
            method = "adagrad"
        else:
            method = "shampoo"
        rule = h["large_dim_method"] if method == "shampoo" else "blocking"
        lengths, whole = block_lengths(merged, limit, rule)
        state = ParamState(merged, method, block_slices(merged, lengths))
        zeros = torch.zeros(merged, dtype=torch.float64)
        state.M = torch.zeros(shape, dtype=torch.float64)
        for part in state.slices:
            block = zeros[part]
            factors = []
            for size, is_diagonal in zip(block.shape, whole, strict=True):
                factor_shape = (size,) if is_diagonal else (size, size)
                factors.append(torch.zeros(factor_shape, dtype=torch.float64))
            roots: list[Tensor | None] = [None] * len(factors)
            state.blocks.append(BlockState(factors, roots, False, block.clone(), block.clone()))
        return state

    def step(self, grads: list[Tensor | None]) -> None:
        present = [g for g in grads if g is not None]
        has_stepped = any(state.t > 0 for state in self.states)
        if not present or (not has_stepped and all((g == 0).all() for g in present)):
            return
        for W, grad, state in zip(self.params, grads, self.states, strict=True):
            if grad is not None and W.numel() > 0:
                state.t += 1
                self._update(W, grad.detach().to(torch.float64), state)

    def _update(self, W: Tensor, grad: Tensor, state: ParamState) -> None:
        h = self.hyper
        lr, decay = float(h["lr"]), float(h["weight_decay"])
        G = -grad if h["maximize"] else grad.clone()
        if not h["decoupled_weight_decay"]:
            G = G + decay * W

        G = G.reshape(state.merged)
        P = torch.zeros_like(G)
        for part, block in zip(state.slices, state.blocks, strict=True):
            P[part] = self._direction(G[part], block, state.method, state.t)
        P = P.reshape(W.shape)

        layerwise = h["grafting"] in ("lars", "lamb") and state.method != "adagrad"
        if h["decoupled_weight_decay"]:
            if h["momentum"] > 0 or layerwise:
                P = P + decay * W
            else:
                W.mul_(1 - lr * decay)
        if layerwise and W.norm() > 0 and P.norm() > 0:
            P = P * W.norm() / P.norm()
        if h["momentum"] > 0:
            state.M = h["momentum"] * state.M + P
            P = P + h["momentum"] * state.M if h["nesterov"] else state.M
        W.sub_(lr * P)

    def _direction(self, G: Tensor, block: BlockState, method: str, t: int) -> Tensor:
        h = self.hyper
        beta1, beta2 = (float(beta) for beta in h["betas"])
        c1 = 1 - beta1**t if h["bias_correction"] else 1.0
        c2 = 1 - beta2**t if h["bias_correction"] and beta2 < 1 else 1.0

        if method == "shampoo":
            self._update_factors(G, block, beta2, c2, t)
        if method == "adagrad":
            block.v = block.v + G**2 if beta2 == 1 else beta2 * block.v + (1 - beta2) * G**2
        else:
            self._update_graft(G, block)
        Gt = G
        if beta1 > 0:
            block.m = beta1 * block.m + (1 - beta1) * G
            Gt = block.m / c1
        ahead = Gt
        if beta1 > 0 and h["nesterov_average"]:
            following = 1 - beta1 ** (t + 1) if h["bias_correction"] else 1.0
            ahead = (beta1 * block.m + (1 - beta1) * G) / following

        if method == "adagrad":
            return Gt / ((block.v / c2).sqrt() + h["eps"])
        grafted = self._grafted(Gt, block, t)
        if method == "grafted" or t < self.start or not block.has_root:
            return grafted
        P = ahead
        for mode, (A, X) in enumerate(zip(block.factors, block.roots, strict=True)):
            if A.ndim == 1:
                a = A / c2
                ridge = max(h["eps"], h["relative_eps"] * (a**4).sum().item() ** 0.25)
                P = mode_product(P, torch.diag((a + ridge) ** self.exponent(G.ndim)), mode)
            else:
                assert X is not None
                P = mode_product(P, X, mode)
        if h["grafting"] == "none":
            return P
        return P * grafted.norm() / (P.norm() + 1e-16)

    @property
    def start(self) -> float:
        start = self.hyper["start_preconditioning_step"]
        return self.hyper["precondition_frequency"] if start == -1 else start

    def is_due(self, t: int) -> bool:
        """Whether roots are taken at a parameter's own step: multiples of f from the start on, and
        before the first of them the start, twice the start, four times, ..."""
        f, early = self.hyper["precondition_frequency"], [self.start]
        while 2 * early[-1] < f:
            early.append(2 * early[-1])
        return t in early or (t > self.start and t % f == 0)

    def exponent(self, order: int) -> float:
        p = self.hyper["exponent"]
        if isinstance(p, (list, tuple)):
            p = p[order - 1] if order <= len(p) else 0
        p = {"covariance": 2, "paper": 2 * order, 0: 2 * order}.get(p, p)
        return -self.hyper["exponent_multiplier"] / p

    def _update_factors(
        self, G: Tensor, block: BlockState, beta2: float, c2: float, t: int
    ) -> None:
        h = self.hyper
        for mode, A in enumerate(block.factors):
            unfolded = unfold(G, mode)
            C = unfolded @ unfolded.T if A.ndim == 2 else (unfolded**2).sum(1)
            block.factors[mode] = A + C if beta2 == 1 else beta2 * A + (1 - beta2) * C
        if self.is_due(t):
            for mode, A in enumerate(block.factors):
                if A.ndim == 2:
                    power = self.exponent(G.ndim)
                    block.roots[mode] = inverse_root(A / c2, power, h["eps"], h["relative_eps"])
            block.has_root = True
        if all(A.ndim == 1 for A in block.factors):
            block.has_root = True  # nothing to refresh: such modes are applied fresh

    def _graft_beta(self) -> float:
        if self.hyper["grafting"].startswith("adagrad"):
            return 1.0
        beta = self.hyper["grafting_beta2"]
        return float(self.hyper["betas"][1] if beta is None else beta)

    def _update_graft(self, G: Tensor, block: BlockState) -> None:
        if self.hyper["grafting"].endswith("_normalized"):
            G = G / G.norm() if G.norm() > 0 else G
        beta = self._graft_beta()
        block.v = block.v + G**2 if beta == 1 else beta * block.v + (1 - beta) * G**2

    def _grafted(self, Gt: Tensor, block: BlockState, t: int) -> Tensor:
        kind = self.hyper["grafting"].removesuffix("_normalized")
        if kind in ("none", "sgd", "lars"):
            return Gt
        v, beta = block.v, self._graft_beta()
        if kind in ("adam", "lamb") and beta < 1:
            v = v / (1 - beta**t)
        return Gt / (v.sqrt() + self.hyper["grafting_eps"])
