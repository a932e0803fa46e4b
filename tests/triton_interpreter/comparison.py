"""How the results of a kernel are judged: by PyTorch's own error, in float64."""

import torch
from torch import Tensor

SIZES = (1, 3, 63, 65, 127, 257)


def error(actual: Tensor, truth: Tensor) -> float:
    assert not actual.isnan().any(), "memory that should have been written is NaN"
    return (actual.double() - truth).abs().max().item()


def assert_as_good(actual: Tensor, torchs: Tensor, truth: Tensor, slack: float = 2**-23) -> None:
    """At most twice as wrong as PyTorch, give or take a rounding of the largest value."""
    assert error(actual, truth) <= 2 * error(torchs, truth) + slack * truth.abs().max().item()


def symmetric(batch: int, n: int) -> Tensor:
    """[batch, n, n] float32: random, bitwise symmetric, positive semi-definite."""
    square = torch.randn(batch, n, n) / n**0.5
    product = square @ square.mT
    return (product + product.mT) / 2


def strided(values: Tensor, kind: str) -> Tensor:
    """The same values in other memory."""
    if kind == "transposed":
        return values.mT.contiguous().mT
    if kind == "sliced":
        wide = torch.full((*values.shape[:-1], 2 * values.shape[-1]), 7.0, dtype=values.dtype)
        wide[..., ::2] = values
        return wide[..., ::2]
    return values
