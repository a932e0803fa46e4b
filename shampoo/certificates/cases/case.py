"""What one case is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIZES = (1, 3, 63, 65, 127, 257)  # about the tiles of the kernels, which end elsewhere

Arguments = dict[str, Any]
"""The arguments of a call by name, in the order of the schema, on the CPU."""


@dataclass(frozen=True)
class Case:
    """One call of an op that every kernel of it must do right.

    Attributes:
        op: Its name.
        dtype: Of the subject of the op, by which a kernel is licensed.
        words: What is special: sizes, other dtypes, memory.
        make: Makes the arguments, from random numbers that it draws from torch's generator.
        overwritten: The arguments of which nothing that was there before is read: they are filled
            with NaN first.
        symmetric: The arguments that must come out bitwise symmetric.
        stacked: The arguments whose first dimension counts blocks; of tiles, see
            :func:`shampoo.certificates.cases.tiles.one_tile`.
        on_cpu: Whether kernels for the CPU take it.
        roundings: How many roundings of the largest value a kernel may be off in any case: long
            sums in another order are, where the reference happens to be near.
    """

    op: str
    dtype: torch.dtype
    words: str
    make: Callable[[], Arguments]
    overwritten: tuple[str, ...] = ()
    symmetric: tuple[str, ...] = ()
    stacked: tuple[str, ...] = ()
    on_cpu: bool = True
    roundings: int = 1

    @property
    def name(self) -> str:
        """The op, the dtype and what is special, in one line."""
        return f"{self.op} {dtype_name(self.dtype)}, {self.words}"

    def arguments(self) -> Arguments:
        """Arguments that nobody else holds; the same in every process."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            # Not torch.manual_seed, which tells every kind of accelerator, with a stack trace each.
            torch.default_generator.manual_seed(0)
            return self.make()


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"``."""
    return str(dtype).removeprefix("torch.")


def strided(values: Tensor, kind: str) -> Tensor:
    """The same values in other memory: transposed, every second element, channels last."""
    if kind == "transposed":
        return values.mT.contiguous().mT
    if kind == "sliced":
        wide = torch.full((*values.shape[:-1], 2 * values.shape[-1]), 7.0, dtype=values.dtype)
        wide[..., ::2] = values
        return wide[..., ::2]
    if kind == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    return values
