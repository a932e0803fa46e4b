"""Fashion-MNIST: a small CNN, a ResNet of eight layers, and a small vision transformer."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import data
from benchmarks.tasks.base import Batch, Split, Task
from benchmarks.tasks.images import classification_loss, epochs, judge_classifier

BATCH = 128
JUDGED = 1500  # images that judge a model


@functools.cache
def parts() -> tuple[data.Images, dict[Split, data.Images]]:
    """What is trained on; what is tuned on comes from the training images too, the rest not."""
    train, test = data.fashion_mnist()
    images, labels = ((x - 0.286) / 0.353 if x.is_floating_point() else x for x in train)
    held = data.Images(images[-JUDGED:], labels[-JUDGED:])
    report = data.Images((test.images[:JUDGED] - 0.286) / 0.353, test.labels[:JUDGED])
    return data.Images(images[:-JUDGED], labels[:-JUDGED]), {"tuning": held, "report": report}


class CNN(nn.Sequential):
    """Three convolutions with pooling, then two linear layers: 98,442 parameters."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(64 * 9, 128), nn.ReLU(), nn.Linear(128, 10)]
        super().__init__(*layers)


class Residual(nn.Module):
    """Two convolutions around which the input goes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
            if stride != 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet8(nn.Sequential):
    """A stem that halves the image, three residual blocks, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            Residual(16, 16, 1),
            Residual(16, 32, 2),
            Residual(32, 64, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


class ViT(nn.Module):
    """A vision transformer on 16 patches of 7 x 7 pixels: width 64, three layers."""

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 7, 7)
        self.pos_embedding = nn.Parameter(0.02 * torch.randn(1, 16, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        # One layer, copied, would start all layers alike.
        for module in self.encoder.modules():
            if isinstance(module, nn.MultiheadAttention):
                nn.init.xavier_uniform_(module.in_proj_weight)
                module.out_proj.reset_parameters()
            elif isinstance(module, nn.Linear):
                module.reset_parameters()
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[batch, 10]`` of images ``[batch, 1, 28, 28]``."""
        patches = self.patch(images).flatten(2).transpose(1, 2) + self.pos_embedding
        return self.classifier(self.norm(self.encoder(patches)).mean(1))  # type: ignore[no-any-return]


def _task(name: str, model: Callable[[], nn.Module]) -> Task:
    def batches(seed: int) -> Iterator[Batch]:
        return epochs(*parts()[0], BATCH, seed)

    def judge(trained: nn.Module, split: Split) -> tuple[float, float]:
        return judge_classifier(trained, *parts()[1][split])

    return Task(
        name=f"fashion-{name}",
        family="vision",
        source="fashion-mnist",
        steps=200,
        warmup=15,
        weight_decay=0.05,
        every=20,
        model=model,
        batches=batches,
        loss=classification_loss,
        judge=judge,
    )


FASHION = (_task("cnn", CNN), _task("resnet8", ResNet8), _task("vit", ViT))
