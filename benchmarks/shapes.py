"""What the benchmarks step: parameter shapes of real models and of slices of them.

A model is a list of :class:`Parameter` rows. Whole models are those of
``shampoo.planner.architectures``.
"""

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from shampoo.planner.architectures import ARCHITECTURES

Shape = tuple[int, ...]


class Parameter(NamedTuple):
    """``copies`` tensors of one shape; ``embedding`` if its rows are looked up by an index."""

    shape: Shape
    copies: int = 1
    embedding: bool = False


class Model(NamedTuple):
    """A named list of parameters, and the block size (``max_preconditioner_dim``) to time it at."""

    name: str
    parameters: tuple[Parameter, ...]
    block: int = 1024

    @property
    def shapes(self) -> list[Shape]:
        """Every tensor's shape, multiplicity written out."""
        return [row.shape for row in self.parameters for _ in range(row.copies)]

    @property
    def embeddings(self) -> list[bool]:
        """For every tensor of ``shapes``, whether it is an embedding."""
        return [row.embedding for row in self.parameters for _ in range(row.copies)]

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(row.copies * math.prod(row.shape) for row in self.parameters)


def real(name: str) -> Model:
    """One of the package's architectures, tensors of one shape gathered into a row."""
    architecture = ARCHITECTURES[name]()
    rows = Counter(
        (shape, tensor in architecture.embeddings) for tensor, shape in architecture.shapes.items()
    )
    return Model(
        name,
        tuple(Parameter(shape, copies, table) for (shape, table), copies in rows.items()),
    )


def transformer_512() -> Model:
    """The matrices of three transformer layers of width 512; blocks of 256."""
    rows = (Parameter((512, 512), 12), Parameter((2048, 512), 3), Parameter((512, 2048), 3))
    return Model("transformer-512", rows, block=256)


def mlp() -> Model:
    """MLP 784-256-256-10 with biases; blocks of 256."""
    rows = (
        *(Parameter((256, 784)), Parameter((256, 256)), Parameter((10, 256))),
        *(Parameter((256,), 2), Parameter((10,))),
    )
    return Model("mlp", rows, block=256)


def vit_b16_layer() -> Model:
    """One of the twelve layers of ViT-B/16: a slice of a real model that two CPU cores can time."""
    width, hidden = 768, 3072
    rows = (
        *(Parameter((3 * width, width)), Parameter((3 * width,))),
        *(Parameter((width, width)), Parameter((hidden, width)), Parameter((width, hidden))),
        *(Parameter((hidden,)), Parameter((width,), 6)),  # two biases and two layer norms
    )
    return Model("vit-b16-layer", rows)


MODELS: dict[str, Callable[[], Model]] = {
    "transformer-512": transformer_512,
    "mlp": mlp,
    "vit-b16-layer": vit_b16_layer,
    **{name: partial(real, name) for name in ("resnet50", "vit-b16", "gpt2", "llama-1b")},
}


def shrunk(model: Model, factor: int = 16) -> Model:
    """One tensor a row, every size and the block divided by ``factor``: for a smoke test."""
    rows = tuple(
        row._replace(shape=tuple(max(1, size // factor) for size in row.shape), copies=1)
        for row in model.parameters
    )
    return Model(model.name, rows, max(1, model.block // factor))
