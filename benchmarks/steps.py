"""The optimizer step on the shapes of real models, Shampoo beside its peers, at several refreshes.

All of one row step in turn in one run (:mod:`benchmarks.contest`), so ratios are within one run.
"""

from typing import Any

import torch

from benchmarks import contest, floor, peers
from benchmarks.shapes import MODELS, Model, shrunk
from shampoo.certificates.timing import quantiles

NAMES = ("gpt2", "resnet50", "vit-b16", "llama-1b")  # in order of importance
REFRESHES = (1, 10, 50)
BASE = "adamw-fused"


def model_of(case: dict[str, Any]) -> Model:
    """The shapes that a row is about."""
    model = MODELS[case["model"]]()
    return shrunk(model) if case["small"] else model


def measure(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Times of ordinary and of root steps, and of their mean over whole periods, in seconds.

    An optimizer that raises takes its row with it, which is why peers have rows of their own.
    """
    model, refresh = model_of(case), case["refresh"]
    warmup = 3 if refresh == 1 else 1  # periods
    plan = contest.Plan(device, refresh, True, case["measure_s"], case["periods"], warmup)
    factories = {name: peers.factory(name, model.block, refresh) for name in case["optimizers"]}
    _, measured, contestants = contest.run(model, factories, plan)
    for name, contestant in contestants.items():
        _require_motion(name, contestant)
    base = quantiles(measured[BASE])
    found = {}
    for name, times in measured.items():
        whole = quantiles(times)
        found[name] = {
            **parts(times, refresh),
            "mean_s": whole.mean,
            "worst_over_mean": max(times) / whole.mean,
            "mean_over_adamw": whole.mean / base.mean,
            "median_over_adamw": whole.p50 / base.p50,
            "state_bytes_per_parameter": contestants[name].state_bytes() / model.numel,
        }
        if name == "shampoo":
            found[name]["waits"] = waits(contestants[name], refresh + 1, device)
    pairs = list(zip(model.shapes, model.embeddings, strict=True))
    work = floor.ordinary_step(
        [shape for shape, apart in pairs if not apart],
        model.block,
        [shape for shape, apart in pairs if apart],
    )
    return {
        "parameters": model.numel,
        "block": model.block,
        "found": found,
        "work": {**work._asdict(), "flops": work.flops, "full_flops": work.full_flops},
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _require_motion(name: str, contestant: contest.Contestant) -> None:
    """Refuses the times of an optimizer that does nothing in a step, or nothing of use.

    Raises:
        RuntimeError: if a step leaves a parameter as it was, or not finite.
    """
    before = [param.flatten()[:64].clone() for param in contestant.params]
    contestant.receive(contestant.grads)
    contestant.optimizer.step()
    for param, old in zip(contestant.params, before, strict=True):
        new = param.flatten()[:64]
        if torch.equal(old, new) or not new.isfinite().all():
            raise RuntimeError(
                f"a step of {name} leaves a parameter of shape {tuple(param.shape)} as it was, or"
                " not finite: its times mean nothing"
            )


def waits(contestant: contest.Contestant, count: int, device: torch.device) -> str:
    """What makes one of some steps wait for a GPU, in torch's words; empty if nothing does."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(count):
            contestant.receive(contestant.grads)
            contestant.optimizer.step()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return ""


def parts(times: list[float], refresh: int) -> dict[str, Any]:
    """Quantiles of ordinary and of root steps; at refresh 1 every step is a root step."""
    root = times[refresh - 1 :: refresh]
    ordinary = [s for index, s in enumerate(times) if (index + 1) % refresh]
    return {
        "ordinary_s": quantiles(ordinary)._asdict() if ordinary else None,
        "root_s": quantiles(root)._asdict(),
    }
