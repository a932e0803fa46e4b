"""What tasks on images in memory share: their batches, and how a classifier is judged."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.tasks.base import Batch


def epochs(inputs: Tensor, targets: Tensor, size: int, seed: int) -> Iterator[Batch]:
    """Batches of ``size``, every epoch in another order; what does not fill one is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for picked in torch.randperm(len(inputs), generator=generator).split(size):
            if len(picked) == size:
                yield inputs[picked], targets[picked]


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy, in nats."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


def judge_classifier(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    logits = torch.cat([model(part) for part in images.split(500)])
    is_right = logits.argmax(1) == labels
    return functional.cross_entropy(logits, labels).item(), is_right.double().mean().item()
