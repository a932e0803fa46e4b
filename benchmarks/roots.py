"""Inverse roots by method and size: time a matrix, and error, against ``torch.linalg.eigh``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import implementations, text_of
from shampoo.certificates.checks import whitened_error
from shampoo.certificates.timing import timed
from shampoo.certificates.workloads import random_factors
from shampoo.roots import inverse_root
from shampoo.roots.minimax_table import minimax_schedule

BASE = "torch.linalg.eigh"
_FEW = 8  # matrices for what solves them one after another


def measure(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Seconds a matrix of every method, eigendecompositions on fewer matrices, and its error.

    ``torch.linalg.eigh`` is the float32 decomposition alone, before any root is made of it.
    """
    n, batch, p, relative_eps = case["size"], case["batch"], case["p"], case["relative_eps"]
    A = random_factors(batch, n, device)
    few = A[:_FEW]
    roots: dict[str, Callable[[], Tensor]] = {
        "eigh": lambda: inverse_root(few, p, relative_eps=relative_eps, method="eigh"),
        "coupled_newton": lambda: inverse_root(
            A, p, relative_eps=relative_eps, method="coupled_newton"
        ),
    }
    schedule = [c for step in minimax_schedule(p, relative_eps) for c in step]
    out, ridge = torch.empty_like(A), torch.empty(batch, dtype=torch.float64, device=device)
    found, failures = implementations("minimax_root_", device)
    for kind, (kernel, supports) in found.items():
        arguments = (out, ridge, A, p, 0.0, relative_eps, schedule)
        if supports is None or supports(*arguments):
            roots[f"minimax-{kind}"] = _chain(kernel, arguments)
        else:
            failures[kind] = "does not take these arguments"
    if device.type == "cpu":
        roots["minimax"] = lambda: inverse_root(A, p, relative_eps=relative_eps, method="minimax")
    errors, calls = {}, {BASE: lambda: torch.linalg.eigh(few)}
    counts = {BASE: len(few)}
    for name, root in roots.items():
        try:
            X = root()
            errors[name] = whitened_error(X[:2], A[:2], p, relative_eps)
            calls[name], counts[name] = root, len(X)
        except Exception as error:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            failures[name] = text_of(error)
    times = timed(calls, device, case["measure_s"], 3 if case["small"] else 5)
    seconds = {name: summary.p50 / counts[name] for name, summary in times.items()}
    return {
        "seconds_per_matrix": seconds,
        "samples": times[BASE].samples,
        "times_faster_than_eigh": {name: seconds[BASE] / s for name, s in seconds.items()},
        "relative_error": errors,
        "failures": failures,
    }


def _chain(kernel: Callable[..., None], arguments: tuple[Any, ...]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        kernel(*arguments)
        root: Tensor = arguments[0]
        return root

    return call
