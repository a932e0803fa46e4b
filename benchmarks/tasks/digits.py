"""scikit-learn's digits, 8 x 8 pixels, and a CNN: a run takes a second or two."""

import functools
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.data import Images
from benchmarks.tasks.base import Batch, Split, Task
from benchmarks.tasks.images import classification_loss, epochs, judge_classifier


@functools.cache
def parts() -> tuple[Images, dict[Split, Images]]:
    """1000 images to train on, 297 to tune on, 500 to report on, shuffled once."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, tune, test = (Images(images[i], labels[i]) for i in order.split([1000, 297, 500]))
    return train, {"tuning": tune, "report": test}


def model() -> nn.Sequential:
    """Three convolutions with group norm, then a linear classifier: 26,090 parameters."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU()]
        if inputs > 1:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 64, 10))


def batches(seed: int) -> Iterator[Batch]:
    """Batches of 100."""
    return epochs(*parts()[0], 100, seed)


def judge(trained: nn.Module, split: Split) -> tuple[float, float]:
    """Loss and accuracy on images that were not trained on."""
    return judge_classifier(trained, *parts()[1][split])


DIGITS = Task(
    name="digits",
    family="vision",
    source=None,
    steps=100,
    warmup=5,
    weight_decay=0.01,
    every=4,
    model=model,
    batches=batches,
    loss=classification_loss,
    judge=judge,
)
