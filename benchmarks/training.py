"""A whole training iteration, forward, backward and step, with AdamW and with Shampoo."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.contest import Groups
from benchmarks.models import GPT2, ResNet50
from shampoo.certificates.timing import Clock, interleaved, quantiles

MODELS = ("resnet50", "gpt2")
CONTESTANTS = ("adamw-fused", "shampoo")
WARMUP = 3  # iterations


def build(name: str, batch: int, small: bool, device: torch.device) -> tuple[nn.Module, Any]:
    """A model and one batch of random inputs and targets for it."""
    generator = torch.Generator(device).manual_seed(0)
    if name == "resnet50":
        size, classes = (32, 10) if small else (224, 1000)
        model = ResNet50(8 if small else 1, classes).to(memory_format=torch.channels_last)
        images = torch.randn(batch, 3, size, size, generator=generator, device=device)
        labels = torch.randint(classes, (batch,), generator=generator, device=device)
        return model.to(device), (images.to(memory_format=torch.channels_last), labels)
    words, length = (128, 16) if small else (50257, 1024)
    net = GPT2(16 if small else 1, words, length).to(device)
    tokens = torch.randint(words, (batch, length + 1), generator=generator, device=device)
    return net, (tokens[:, :-1], tokens[:, 1:])


def groups_of(model: nn.Module) -> Groups:
    """Embeddings in a group of their own, left to the grafted method."""
    named = list(model.named_parameters())
    groups: Groups = [
        {"params": [p for name, p in named if not name.startswith("embed")]},
        {"params": [p for name, p in named if name.startswith("embed")], "precondition": False},
    ]
    return [group for group in groups if group["params"]]


def iteration(
    name: str, optimizer: str, batch: int, refresh: int, small: bool, device: torch.device
) -> Callable[[], None]:
    """One call is one iteration in bf16 autocast (ResNet-50 in channels_last).

    The optimizer is past its first period, in which it refreshes roots more often than later.
    """
    torch.manual_seed(0)
    model, inputs = build(name, batch, small, device)
    stepper = peers.factory(optimizer, 64 if small else 1024, refresh)(groups_of(model))

    def backward() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss: Tensor = model(*inputs)
        loss.backward()

    def run() -> None:
        backward()
        stepper.step()
        stepper.zero_grad()

    backward()
    for _ in range(refresh):
        stepper.step()
    stepper.zero_grad()
    return run


def _times(case: dict[str, Any], batch: int, device: torch.device) -> dict[str, list[float]] | None:
    """Seconds of every measured iteration; None if the batch does not fit into memory."""
    name, refresh, small = case["model"], case["refresh"], case["small"]
    try:
        runs = {
            contestant: iteration(name, contestant, batch, refresh, small, device)
            for contestant in CONTESTANTS
        }
        clock = Clock(device)
        interleaved(runs, clock, rounds=WARMUP)
        return interleaved(runs, clock, rounds=refresh, first_round=WARMUP)
    except torch.cuda.OutOfMemoryError:
        return None  # and what was allocated goes with this frame


def measure(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Seconds of an iteration over one whole period, so that a root step is in the mean.

    Where a batch does not fit into memory half of it is tried, as far as an eighth.
    """
    batch = int(case["batch"])
    while (times := _times(case, batch, device)) is None:
        batch //= 2
        if batch < max(1, case["batch"] // 8):
            raise torch.cuda.OutOfMemoryError(f"not even a batch of {2 * batch}")
        torch.cuda.empty_cache()
    summaries = {contestant: quantiles(seconds) for contestant, seconds in times.items()}
    base = summaries["adamw-fused"]
    return {
        "batch": batch,
        "seconds": {contestant: found._asdict() for contestant, found in summaries.items()},
        "mean_over_adamw": {c: found.mean / base.mean for c, found in summaries.items()},
        "median_over_adamw": {c: found.p50 / base.p50 for c, found in summaries.items()},
    }
