"""Exact roots, error measures and limits that the tests of the roots share. Float64 throughout."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

METHODS = ("eigh", "coupled_newton", "minimax", "auto")
EPS = (1e-4, 1e-6, 1e-7)
PAIRS = ("f0", "f1", "f2", "f3")

# p from: (direction, root) limits at each of EPS
_LIMITS = {
    4: ((1e-3, 6e-4, 2e-3), (1e-3, 2e-3, 1e-2)),
    2: ((1e-3, 1.5e-3, 6e-3), (1e-3, 4e-3, 2e-2)),
    1: ((4e-3, 1e-2, 3e-2), (5e-3, 1.5e-1, 1.5)),
}


def limits(p: int, relative_eps: float) -> tuple[float, float]:
    direction, root = _LIMITS[4 if p >= 4 else 2 if p >= 2 else 1]
    return direction[EPS.index(relative_eps)], root[EPS.index(relative_eps)]


@functools.cache
def _arrays() -> dict[str, Tensor]:
    with np.load(Path(__file__).parent / "data" / "factors.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}


def fixture(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L, R and the gradients now and ten steps later."""
    arrays = _arrays()
    L, R, now, later = (arrays[f"{name}_{key}"] for key in ("L", "R", "G", "G10"))
    return L, R, now, later


class Exact:
    """(A + ridge I)^(-1/p) of one stored matrix, from its float64 eigendecomposition."""

    def __init__(self, A: Tensor) -> None:
        self.values, self.vectors = torch.linalg.eigh(A.double())
        self.norm = float((self.values**4).sum() ** 0.25)

    def damped(self, ridge: float) -> Tensor:
        return (self.values + ridge).clamp(min=0.2 * ridge)

    def root(self, p: float, ridge: float) -> Tensor:
        return self.vectors * self.damped(ridge) ** (-1 / p) @ self.vectors.mT

    def error(self, X: Tensor, p: float, ridge: float) -> float:
        """Spectral norm of A_r^(1/2p) X A_r^(1/2p) - I."""
        half = self.damped(ridge) ** (0.5 / p)
        E = self.vectors.mT @ X.double() @ self.vectors * half * half[:, None]
        return float(torch.linalg.matrix_norm(E - torch.eye(len(E), dtype=E.dtype), ord=2))


@functools.cache
def exact(name: str, side: int) -> Exact:
    return Exact(fixture(name)[side])


def direction_error(XL: Tensor, XR: Tensor, name: str, p: float, relative_eps: float) -> float:
    left, right = exact(name, 0), exact(name, 1)
    EL = left.root(p, relative_eps * left.norm)
    ER = right.root(p, relative_eps * right.norm)
    worst = 0.0
    for G in fixture(name)[2:]:
        wanted = EL @ G.double() @ ER
        got = XL.double() @ G.double() @ XR.double()
        worst = max(worst, float((got - wanted).norm() / wanted.norm()))
    return worst


def float32_eigh(A: Tensor, p: float, relative_eps: float) -> Tensor:
    """The textbook root: eigendecomposition in float32."""
    values, vectors = torch.linalg.eigh(A)
    ridge = relative_eps * (values**4).sum() ** 0.25
    values = values - values.min().clamp(max=0) + ridge
    return vectors * values ** (-1 / p) @ vectors.mT


def spd(spectrum: Tensor, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A bitwise symmetric matrix with (nearly) these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    noise = torch.randn(n, n, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(noise).Q
    A = Q * spectrum.double() @ Q.mT
    return ((A + A.mT) / 2).to(dtype)


def stack(count: int, n: int, decades: float = 6.0) -> Tensor:
    """[count, n, n] float32 with log-spaced spectra."""
    return torch.stack([spd(torch.logspace(0, -decades, n), seed) for seed in range(count)])
