"""Parameter shapes of known models, made from the definitions of their architectures.

Names and shapes are those of the usual PyTorch implementations (torchvision, Llama); no weights.
Tied tensors appear once. Sizes: ResNet-50 25,557,032, ViT-B/16 86,567,656 and ViT-L/16 304,326,632
(torchvision), GPT-2 124,439,808, Llama 3.2 1B 1,235,814,400, Llama 7B 6,738,415,616, Llama 2 70B
68,976,648,192.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


@dataclass(frozen=True)
class Architecture:
    """The named shapes of a model; ``embeddings`` are the tables looked up by an index."""

    name: str
    shapes: Shapes
    embeddings: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def resnet50() -> Architecture:
    """ResNet-50 v1.5 (arXiv 1512.03385, torchvision): 161 tensors."""
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7), **_norm("bn1", 64)}
    channels = 64
    for stage, (width, depth) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(depth):
            shapes |= _bottleneck(f"layer{stage}.{block}", channels, width, shortcut=block == 0)
            channels = 4 * width
    return Architecture("resnet50", {**shapes, "fc.weight": (1000, 2048), "fc.bias": (1000,)})


def _bottleneck(prefix: str, channels: int, width: int, *, shortcut: bool) -> Shapes:
    wide = 4 * width
    shapes = {f"{prefix}.conv1.weight": (width, channels, 1, 1), **_norm(f"{prefix}.bn1", width)}
    shapes |= {f"{prefix}.conv2.weight": (width, width, 3, 3), **_norm(f"{prefix}.bn2", width)}
    shapes |= {f"{prefix}.conv3.weight": (wide, width, 1, 1), **_norm(f"{prefix}.bn3", wide)}
    if shortcut:
        shapes[f"{prefix}.downsample.0.weight"] = (wide, channels, 1, 1)
        shapes |= _norm(f"{prefix}.downsample.1", wide)
    return shapes


def _norm(prefix: str, width: int) -> Shapes:
    return {f"{prefix}.weight": (width,), f"{prefix}.bias": (width,)}


def vit(name: str, width: int, depth: int) -> Architecture:
    """ViT with patches of 16 at 224 pixels, 1000 classes (arXiv 2010.11929, torchvision)."""
    shapes: Shapes = {
        "class_token": (1, 1, width),
        "conv_proj.weight": (width, 3, 16, 16),
        "conv_proj.bias": (width,),
        "encoder.pos_embedding": (1, 197, width),
    }
    for layer in range(depth):
        prefix = f"encoder.layers.encoder_layer_{layer}"
        shapes |= {
            **_norm(f"{prefix}.ln_1", width),
            f"{prefix}.self_attention.in_proj_weight": (3 * width, width),
            f"{prefix}.self_attention.in_proj_bias": (3 * width,),
            f"{prefix}.self_attention.out_proj.weight": (width, width),
            f"{prefix}.self_attention.out_proj.bias": (width,),
            **_norm(f"{prefix}.ln_2", width),
            f"{prefix}.mlp.0.weight": (4 * width, width),
            f"{prefix}.mlp.0.bias": (4 * width,),
            f"{prefix}.mlp.3.weight": (width, 4 * width),
            f"{prefix}.mlp.3.bias": (width,),
        }
    shapes |= _norm("encoder.ln", width)
    shapes |= {"heads.head.weight": (1000, width), "heads.head.bias": (1000,)}
    return Architecture(name, shapes, ("encoder.pos_embedding",))


def gpt2() -> Architecture:
    """GPT-2 124M: 12 layers of width 768, weights stored ``[in, out]``, output tied to ``wte``."""
    width, depth = 768, 12
    shapes: Shapes = {"wte.weight": (50257, width), "wpe.weight": (1024, width)}
    for layer in range(depth):
        prefix = f"h.{layer}"
        shapes |= {
            **_norm(f"{prefix}.ln_1", width),
            f"{prefix}.attn.c_attn.weight": (width, 3 * width),
            f"{prefix}.attn.c_attn.bias": (3 * width,),
            f"{prefix}.attn.c_proj.weight": (width, width),
            f"{prefix}.attn.c_proj.bias": (width,),
            **_norm(f"{prefix}.ln_2", width),
            f"{prefix}.mlp.c_fc.weight": (width, 4 * width),
            f"{prefix}.mlp.c_fc.bias": (4 * width,),
            f"{prefix}.mlp.c_proj.weight": (4 * width, width),
            f"{prefix}.mlp.c_proj.bias": (width,),
        }
    return Architecture("gpt2", {**shapes, **_norm("ln_f", width)}, ("wte.weight", "wpe.weight"))


def llama(
    name: str, width: int, hidden: int, depth: int, *, keys: int, vocabulary: int, tied: bool
) -> Architecture:
    """Llama: gated feed-forward of ``hidden``, keys and values of ``keys`` columns in all."""
    shapes: Shapes = {"tok_embeddings.weight": (vocabulary, width)}
    for layer in range(depth):
        prefix = f"layers.{layer}"
        shapes |= {
            f"{prefix}.attention.wq.weight": (width, width),
            f"{prefix}.attention.wk.weight": (keys, width),
            f"{prefix}.attention.wv.weight": (keys, width),
            f"{prefix}.attention.wo.weight": (width, width),
            f"{prefix}.feed_forward.w1.weight": (hidden, width),
            f"{prefix}.feed_forward.w2.weight": (width, hidden),
            f"{prefix}.feed_forward.w3.weight": (hidden, width),
            f"{prefix}.attention_norm.weight": (width,),
            f"{prefix}.ffn_norm.weight": (width,),
        }
    shapes["norm.weight"] = (width,)
    if not tied:
        shapes["output.weight"] = (vocabulary, width)
    return Architecture(name, shapes, ("tok_embeddings.weight",))


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "resnet50": resnet50,
    "vit-b16": lambda: vit("vit-b16", 768, 12),
    "vit-l16": lambda: vit("vit-l16", 1024, 24),
    "gpt2": gpt2,
    "llama-1b": lambda: llama("llama-1b", 2048, 8192, 16, keys=512, vocabulary=128256, tied=True),
    "llama-7b": lambda: llama("llama-7b", 4096, 11008, 32, keys=4096, vocabulary=32000, tied=False),
    "llama-70b": lambda: llama(
        "llama-70b", 8192, 28672, 80, keys=1024, vocabulary=32000, tied=False
    ),
}
