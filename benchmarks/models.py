"""ResNet-50 and GPT-2 in plain torch, to time a training iteration: architecture, not training.

Their parameters have the shapes, in number and order of :mod:`benchmarks.shapes`, which the tests
check. A ``scale`` divides widths, for a smoke test.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride, v1.5) and 1x1 convolutions around a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        wide = 4 * width
        self.reduce = nn.Conv2d(channels, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, wide, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(wide)
        self.shortcut: nn.Module = nn.Identity()
        if channels != wide:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.reduce(x)))
        y = functional.relu(self.norm2(self.conv(y)))
        return functional.relu(self.norm3(self.expand(y)) + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 v1.5 (arXiv 1512.03385); returns the loss of images [N, 3, H, W]."""

    def __init__(self, scale: int = 1, classes: int = 1000) -> None:
        super().__init__()
        channels = 64 // scale
        self.stem = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        blocks = []
        for stage, depth in enumerate((3, 4, 6, 3)):
            width = (64 << stage) // scale
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(Bottleneck(channels, width, stride))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.norm(self.stem(images))), 3, 2, 1)
        x = self.blocks(x).mean((2, 3))
        return functional.cross_entropy(self.head(x).float(), labels)


class Layer(nn.Module):
    """A pre-norm transformer layer with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        hidden = functional.gelu(self.widen(self.norm2(x)), approximate="tanh")
        return x + self.narrow(hidden)


class GPT2(nn.Module):
    """GPT-2 124M, output tied to the embedding; returns the loss of tokens [N, length]."""

    def __init__(self, scale: int = 1, vocabulary: int = 50257, length: int = 1024) -> None:
        super().__init__()
        width = 768 // scale
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.embed_places = nn.Embedding(length, width)
        self.layers = nn.Sequential(*[Layer(width, 12) for _ in range(12)])
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.layers(self.embed_tokens(tokens) + self.embed_places(places))
        logits = functional.linear(self.norm(x), self.embed_tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
