"""Character language models: a GPT on the King James Bible, or on CPython's own sources."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import data
from benchmarks.tasks.base import Batch, Split, Task

LAYERS = 2
HEAD_SIZE = 32
CONTEXT = 64
BATCH = 16
HELD_OUT = 64  # sequences that judge a model

TEXTS: dict[str, Callable[[], data.Text]] = {
    "king-james": functools.cache(data.king_james),
    "cpython": functools.cache(data.cpython_sources),
}


class Block(nn.Module):
    """Attention and a multilayer perceptron, normalized before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_SIZE
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        for linear in (self.qkv, self.up):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for linear in (self.out, self.down):  # the sum of all layers keeps its size
            nn.init.normal_(linear.weight, std=(2 * LAYERS * linear.in_features) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, HEAD_SIZE)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Token and position embeddings, blocks, a norm, and a head of its own."""

    def __init__(self, symbols: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols, bias=False)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, length, symbols]`` of tokens ``[batch, length]``."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.position(places)
        return self.head(self.norm(self.blocks(x)))  # type: ignore[no-any-return]


def _windows(text: Tensor, starts: Tensor) -> Batch:
    places = starts[:, None] + torch.arange(CONTEXT + 1)
    picked = text[places]
    return picked[:, :-1], picked[:, 1:]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next character, in nats."""
    tokens, following = batch
    return functional.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


def _task(source: str, width: int) -> Task:
    read = TEXTS[source]

    def batches(seed: int) -> Iterator[Batch]:
        text, generator = read().train, torch.Generator().manual_seed(seed)
        while True:
            ends = len(text) - CONTEXT - 1
            yield _windows(text, torch.randint(ends, (BATCH,), generator=generator))

    def judge(model: nn.Module, split: Split) -> tuple[float, None]:
        text = read().held_out
        half = len(text) // 2
        text = text[:half] if split == "tuning" else text[half:]
        starts = torch.linspace(0, half - CONTEXT - 2, HELD_OUT).long()
        losses = [loss(model, _windows(text, part)).item() for part in starts.split(BATCH)]
        return sum(losses) / len(losses), None

    return Task(
        name=f"{source}-{width}",
        family="language",
        source=source,
        steps=250,
        warmup=25,
        weight_decay=0.1,
        every=10,
        model=lambda: GPT(read().symbols, width),
        batches=batches,
        loss=loss,
        judge=judge,
    )


CHARACTERS = tuple(_task(source, width) for width in (64, 128, 256) for source in TEXTS)
