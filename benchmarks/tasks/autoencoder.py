"""The deep autoencoder by which second-order methods are compared since Hinton and Salakhutdinov.

784-1000-500-250-30 and back, on Fashion-MNIST, with the cross-entropy of pixels in 0 .. 1.
"""

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import data
from benchmarks.tasks.base import Batch, Split, Task
from benchmarks.tasks.images import epochs

SIZES = (784, 1000, 500, 250, 30)
BATCH = 128
JUDGED = 1000


@functools.cache
def parts() -> tuple[Tensor, dict[Split, Tensor]]:
    """Pixels ``[N, 784]`` to train on; to tune on, from the training images too; and to report."""
    train, test = data.fashion_mnist()
    pixels = train.images.flatten(1)
    return pixels[:-JUDGED], {
        "tuning": pixels[-JUDGED:],
        "report": test.images[:JUDGED].flatten(1),
    }


def model() -> nn.Sequential:
    """2,837,314 parameters; the code of 30 numbers is linear."""
    sizes, layers = (*SIZES, *SIZES[-2::-1]), []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(inputs, outputs)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Identity() if index in (3, 7) else nn.Tanh()]
    return nn.Sequential(*layers)


def loss(trained: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a pixel, in nats, mean over pixels."""
    inputs, targets = batch
    return functional.binary_cross_entropy_with_logits(trained(inputs), targets)


def batches(seed: int) -> Iterator[Batch]:
    """Images, which are their own targets."""
    return epochs(parts()[0], parts()[0], BATCH, seed)


def judge(trained: nn.Module, split: Split) -> tuple[float, None]:
    """Loss on images that were not trained on."""
    held = parts()[1][split]
    return torch.stack([loss(trained, (x, x)) for x in held.split(250)]).mean().item(), None


AUTOENCODER = Task(
    name="autoencoder",
    family="autoencoder",
    source="fashion-mnist",
    steps=150,
    warmup=15,
    weight_decay=0.0,
    every=10,
    model=model,
    batches=batches,
    loss=loss,
    judge=judge,
)
