"""Models whose parameters play all roles, and their groups, for tests of what tells them apart."""

from typing import Any

import torch
from torch import Tensor, nn

import shampoo

WITHOUT = {"embeddings", "heads", "positional"}  # preconditioning


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention(self.norm(x)).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.down(self.up(x).relu())


class GPT(nn.Module):
    """Names as in GPT-2, with a head that is tied to the embedding or not."""

    def __init__(self, tied: bool = True, width: int = 16, vocabulary: int = 37, depth: int = 2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(8, width)
        self.h = nn.ModuleList(Layer(width) for _ in range(depth))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.h:
            x = layer(x)
        return self.lm_head(x)


class ViT(nn.Module):
    """Parameters of its own, as in torchvision and timm, and torch's attention."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, width))
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.encoder = nn.TransformerEncoderLayer(width, 2, 4 * width)
        self.head = nn.Linear(width, classes)


class Adapted(nn.Module):
    """A frozen layer and an adapter of low rank."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.lora_A, self.lora_B = (nn.Linear(*sides, bias=False) for sides in ((width, 2), (2, 8)))


def named(model: nn.Module, **overrides: Any) -> dict[str, list[str]]:
    """Names by group; checks on the way that every parameter is there once, with its name."""
    found = shampoo.groups(model, **overrides)
    pairs = [pair for group in found for pair in group["params"]]
    params = [param for _, param in pairs]
    assert len(params) == len(set(params))
    assert set(params) == set(model.parameters())
    assert all(group["precondition"] == (group["name"] not in WITHOUT) for group in found)
    assert all(group["params"] for group in found)
    return {group["name"]: [name for name, _ in group["params"]] for group in found}


def group_of(model: nn.Module, **overrides: Any) -> dict[str, str]:
    return {name: group for group, names in named(model, **overrides).items() for name in names}


def fit(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4
) -> dict[tuple[int, str], Tensor]:
    """The parameters after some steps, by what ``assert_same_bits`` compares."""
    for seed in range(steps):
        tokens = torch.randint(37, (4, 8), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()
    return {(0, name): param.detach().clone() for name, param in model.named_parameters()}


def build(tied: bool = True) -> GPT:
    torch.manual_seed(0)
    return GPT(tied)


HYPER: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "precondition_frequency": 2}
