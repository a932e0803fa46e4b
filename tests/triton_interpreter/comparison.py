"""How the results of a kernel are judged: by PyTorch's own error, in float64."""

from torch import Tensor

from shampoo.certificates.cases.case import SIZES, strided
from shampoo.certificates.cases.stacks import symmetric

__all__ = ["SIZES", "assert_as_good", "error", "strided", "symmetric"]


def error(actual: Tensor, truth: Tensor) -> float:
    assert not actual.isnan().any(), "memory that should have been written is NaN"
    return (actual.double() - truth).abs().max().item()


def assert_as_good(actual: Tensor, torchs: Tensor, truth: Tensor, slack: float = 2**-23) -> None:
    """At most twice as wrong as PyTorch, give or take a rounding of the largest value."""
    assert error(actual, truth) <= 2 * error(torchs, truth) + slack * truth.abs().max().item()
