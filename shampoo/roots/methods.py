"""The names of the root methods, and what each can take."""

import sys

import torch
from torch import Tensor

from shampoo.errors import shown
from shampoo.roots.minimax_table import tabulated_powers

ROOT_METHODS = ("auto", "eigh", "coupled_newton", "minimax")

MOST_POWER = 1 << 20  # the root of which is 1 to float32 for any matrix, or nearly


def check_stack(A: Tensor) -> None:
    """Refuses what is not a stack of square float32 or float64 matrices."""
    if A.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"Invalid dtype {A.dtype}. Must be torch.float32 or torch.float64: convert A first."
        )
    if A.ndim != 3 or A.shape[1] != A.shape[2]:
        raise ValueError(
            f"Invalid shape {tuple(A.shape)}. Must be [B, n, n]: one matrix is A[None]."
        )


def check_damping(eps: float, relative_eps: float, method: str) -> None:
    """Refuses ridges that are negative, not finite, or both zero where a ridge is needed."""
    for name, value in (("eps", eps), ("relative_eps", relative_eps)):
        if not 0 <= value <= sys.float_info.max:
            raise ValueError(f"Invalid {name}={shown(value)}. Must be finite and >= 0.0.")
    if eps == 0 and relative_eps == 0 and method not in ("auto", "eigh"):
        raise ValueError(
            f"Invalid eps={eps}, relative_eps={relative_eps} for method={method!r}. One must be "
            "> 0.0: use method='eigh' for the pseudo-inverse."
        )


def check_method(method: str, p: float) -> None:
    """Refuses a method that does not exist, and a p that it cannot take."""
    if method not in ROOT_METHODS:
        raise ValueError(f"Invalid method={method!r}. Must be one of {', '.join(ROOT_METHODS)}.")
    if not 0 < p <= sys.float_info.max:
        raise ValueError(f"Invalid p={shown(p)}. Must be finite and > 0.")
    if method == "coupled_newton" and p > MOST_POWER:
        raise ValueError(
            f"Invalid p={shown(p)} for method='coupled_newton'. Must be <= {MOST_POWER}: use 'eigh'"
            " or 'auto'."
        )
    if method == "coupled_newton" and p != int(p):
        raise ValueError(
            f"Invalid p={p} for method='coupled_newton'. Must be an integer: use 'eigh' or 'auto'."
        )
    if method == "minimax" and p not in tabulated_powers():
        powers = ", ".join(map(str, tabulated_powers()))
        raise ValueError(
            f"Invalid p={shown(p)} for method='minimax'. Must be one of {powers}: use 'eigh' or"
            " 'auto'."
        )
