"""Parameter shapes of real models, with multiplicity, from the architectures' definitions.

A model is a list of :class:`Parameter` rows; tied tensors appear once. Totals are the published
ones: ResNet-50 25,557,032 and ViT-B/16 86,567,656 (torchvision), GPT-2 124,439,808, Llama 3.2 1B
1,235,814,400.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

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


def resnet50() -> Model:
    """ResNet-50 v1.5 (arXiv 1512.03385, torchvision): 161 tensors."""
    rows = [Parameter((64, 3, 7, 7)), Parameter((64,), 2)]
    channels = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        rows += _bottleneck_stage(channels, width, depth)
        channels = 4 * width
    rows += [Parameter((1000, 2048)), Parameter((1000,))]
    return Model("resnet50", tuple(rows))


def _bottleneck_stage(channels: int, width: int, depth: int) -> list[Parameter]:
    wide = 4 * width
    return [
        Parameter((width, channels, 1, 1)),
        Parameter((width, wide, 1, 1), depth - 1),
        Parameter((width, width, 3, 3), depth),
        Parameter((wide, width, 1, 1), depth),
        Parameter((wide, channels, 1, 1)),  # projection of the shortcut
        Parameter((width,), 4 * depth),  # two batch norms of this width a bottleneck
        Parameter((wide,), 2 * depth + 2),
    ]


def vit_b16() -> Model:
    """ViT-B/16 (arXiv 2010.11929, torchvision): 12 layers of width 768, 1000 classes."""
    width, hidden, depth = 768, 3072, 12
    rows = [
        Parameter((1, 1, width)),
        Parameter((width, 3, 16, 16)),
        Parameter((width,)),
        Parameter((1, 197, width), embedding=True),
        *_layer_with_biases(depth, [(3 * width, width), (width, width)], width, hidden),
        Parameter((width,), 2),
        Parameter((1000, width)),
        Parameter((1000,)),
    ]
    return Model("vit-b16", tuple(rows))


def gpt2() -> Model:
    """GPT-2 124M: 12 layers of width 768, weights stored ``[in, out]``, output tied to ``wte``."""
    width, hidden, depth = 768, 3072, 12
    rows = [
        Parameter((50257, width), embedding=True),
        Parameter((1024, width), embedding=True),
        *_layer_with_biases(depth, [(width, 3 * width), (width, width)], width, hidden),
        Parameter((width,), 2),
    ]
    return Model("gpt2", tuple(rows))


def _layer_with_biases(
    depth: int, attention: list[Shape], width: int, hidden: int
) -> list[Parameter]:
    """A pre-norm transformer layer; ``attention`` holds [qkv, out], in whichever orientation."""
    qkv, out = attention
    return [
        Parameter(qkv, depth),
        Parameter((3 * width,), depth),
        Parameter(out, depth),
        Parameter((hidden, width), depth),
        Parameter((width, hidden), depth),
        Parameter((hidden,), depth),
        Parameter((width,), 6 * depth),  # out and second feed-forward bias, two layer norms
    ]


def llama_1b() -> Model:
    """Llama 3.2 1B: 16 layers of width 2048, 8 key-value heads of 32, gated feed-forward 8192."""
    width, hidden, keys, depth = 2048, 8192, 512, 16
    rows = [
        Parameter((128256, width), embedding=True),
        Parameter((width, width), 2 * depth),
        Parameter((keys, width), 2 * depth),
        Parameter((hidden, width), 2 * depth),
        Parameter((width, hidden), depth),
        Parameter((width,), 2 * depth + 1),
    ]
    return Model("llama-1b", tuple(rows))


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
    rows = _layer_with_biases(1, [(3 * width, width), (width, width)], width, hidden)
    return Model("vit-b16-layer", tuple(rows))


MODELS: dict[str, Callable[[], Model]] = {
    "transformer-512": transformer_512,
    "mlp": mlp,
    "vit-b16-layer": vit_b16_layer,
    "resnet50": resnet50,
    "vit-b16": vit_b16,
    "gpt2": gpt2,
    "llama-1b": llama_1b,
}


def shrunk(model: Model, factor: int = 16) -> Model:
    """One tensor a row, every size and the block divided by ``factor``: for a smoke test."""
    rows = tuple(
        row._replace(shape=tuple(max(1, size // factor) for size in row.shape), copies=1)
        for row in model.parameters
    )
    return Model(model.name, rows, max(1, model.block // factor))
