"""One interleaved run of optimizers on the parameters of one model, and what came out of it."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import floor
from benchmarks.shapes import Model
from shampoo.certificates.timing import Clock, interleaved, quantiles

Groups = list[dict[str, Any]]
Factory = Callable[[Groups], torch.optim.Optimizer]

BASE = {"cpu": "adamw-foreach", "cuda": "adamw-fused"}  # what ratios are taken to


def adamw(implementation: str) -> Factory:
    """torch's AdamW, ``foreach`` or ``fused``."""

    def build(groups: Groups) -> torch.optim.Optimizer:
        known = [{"params": group["params"]} for group in groups]
        if implementation == "fused":
            return torch.optim.AdamW(known, fused=True)
        return torch.optim.AdamW(known, foreach=True)

    return build


BASELINES: dict[str, Factory] = {
    "adamw-foreach": adamw("foreach"),
    "adamw-fused": adamw("fused"),
}


def betas(refresh: int) -> tuple[float, float]:
    """The default ones, or a beta2 under which no root outlives what its factor remembers."""
    return 0.9, max(0.95, 1.0 - 0.5 / refresh)


class Plan(NamedTuple):
    """How long to measure, and what.

    ``refresh``: steps from root step to root step. ``grafted_embeddings``: embeddings get a group
    without factors. Periods of ``refresh`` steps are measured until ``seconds`` have passed, but at
    least ``periods``, after ``warmup`` of them.
    """

    device: torch.device
    refresh: int
    grafted_embeddings: bool
    seconds: float
    periods: int
    warmup: int = 1


class Contestant:
    """An optimizer with parameters and gradients of its own, equal to the other contestants'."""

    def __init__(self, model: Model, factory: Factory, plan: Plan) -> None:
        generator = torch.Generator(plan.device).manual_seed(0)
        self.params = [
            torch.randn(shape, generator=generator, device=plan.device).mul_(0.02)
            for shape in model.shapes
        ]
        self.grads = [torch.zeros_like(param) for param in self.params]
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        grafted = [plan.grafted_embeddings and is_table for is_table in model.embeddings]
        groups: Groups = [{"params": []}, {"params": [], "precondition": False}]
        for param, is_grafted in zip(self.params, grafted, strict=True):
            groups[is_grafted]["params"].append(param)
        self.optimizer = factory([group for group in groups if group["params"]])

    def receive(self, gradients: list[Tensor]) -> None:
        """Copies the round's gradients into this contestant's own."""
        torch._foreach_copy_(self.grads, gradients)
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad  # some optimizers clear it

    def state_bytes(self) -> int:
        """Bytes of the distinct storages in ``optimizer.state``; shared views count once."""
        return _bytes_of(_tensors_under(self.optimizer.state) - self._own())

    def held_bytes(self) -> int:
        """Bytes of every storage the optimizer refers to, its workspaces with them."""
        return _bytes_of(_tensors_under(self.optimizer) - self._own())

    def _own(self) -> set[tuple[int, int]]:
        return {_storage(tensor) for tensor in [*self.params, *self.grads]}


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _tensors_under(root: object) -> set[tuple[int, int]]:
    """Storages (address, bytes) of the tensors that can be reached from an object."""

    def walk() -> Iterator[Tensor]:
        seen, pending = set(), [root]
        while pending:
            item = pending.pop()
            if id(item) in seen or isinstance(item, (type, ModuleType, FunctionType)):
                continue
            seen.add(id(item))
            if isinstance(item, Tensor):
                yield item
            else:
                pending += gc.get_referents(item)

    return {_storage(tensor) for tensor in walk()}


def _bytes_of(storages: set[tuple[int, int]]) -> int:
    return sum(size for _, size in storages)


def bytes_needed(model: Model, block: int) -> int:
    """Rough memory of a contest: parameters, gradients, states, and one step's temporaries."""
    contestants = 1 + len(BASELINES)
    arrays = 2 * contestants + 1 + 2 * len(BASELINES) + 3
    return floor.FLOAT32 * arrays * model.numel + 2 * floor.state_bytes(model.shapes, block)


def run(
    model: Model,
    factories: Mapping[str, Factory],
    plan: Plan,
    after_round: Callable[[str, float], object] = lambda phase, part: None,
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, Contestant]]:
    """Lets the contestants step in turn.

    Warm-up holds compilation and the first roots; it is returned apart from the measured
    periods. Each round has a new random gradient, the same for all.

    Args:
        model: Whose parameters to step.
        factories: The optimizers, by name.
        plan: Device, period and length of the run.
        after_round: Called with the phase and the finished part of it, 0 to 1.

    Returns:
        Seconds of every round of warm-up, of the measured periods, and the contestants.
    """
    contestants = {name: Contestant(model, build, plan) for name, build in factories.items()}
    gradients = [torch.empty(shape, device=plan.device) for shape in model.shapes]
    generator = torch.Generator(plan.device).manual_seed(1)
    clock = Clock(plan.device)
    done = 0

    def new_gradients() -> None:
        for gradient in gradients:
            gradient.normal_(generator=generator)

    def period(advanced: Callable[[int], object], rounds: int) -> dict[str, list[float]]:
        nonlocal done

        def count_round() -> None:
            nonlocal done
            done += 1
            advanced(done)

        return interleaved(
            {name: contestant.optimizer.step for name, contestant in contestants.items()},
            clock,
            rounds=rounds,
            first_round=done,
            before_round=new_gradients,
            before_call=lambda name: contestants[name].receive(gradients),
            after_round=count_round,
        )

    before = plan.warmup * plan.refresh
    first = period(lambda count: after_round("warm-up", count / before), before)
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    start = time.perf_counter()

    def finished(count: int) -> float:
        by_time = (time.perf_counter() - start) / max(plan.seconds, 1e-9)
        return min(by_time, (count - before) / plan.refresh / plan.periods)

    def advance(count: int) -> None:
        after_round("measuring", min(1.0, finished(count)))

    while finished(done) < 1.0:
        times = period(advance, plan.refresh)
        for name, seconds in times.items():
            measured[name] += seconds
    return first, measured, contestants


def row(
    model: Model, block: int, factory: Factory, plan: Plan, rates: floor.Rates, **hooks: Any
) -> dict[str, Any]:
    """Runs Shampoo (``factory``) against the baselines and sums up: all times in seconds.

    ``ordinary`` and ``root`` steps are told apart by their place in the period, t % refresh == 0.
    """
    factories = {"shampoo": factory, **BASELINES}
    first, measured, contestants = run(model, factories, plan, **hooks)
    times, refresh = measured["shampoo"], plan.refresh
    ordinary = quantiles([s for index, s in enumerate(times) if (index + 1) % refresh])
    root = quantiles(times[refresh - 1 :: refresh])
    amortised = quantiles(times).mean
    baselines = {name: quantiles(measured[name]) for name in BASELINES}
    base = baselines[BASE[plan.device.type]]

    grafted = [plan.grafted_embeddings and is_table for is_table in model.embeddings]
    pairs = list(zip(model.shapes, grafted, strict=True))
    kept = [shape for shape, is_grafted in pairs if not is_grafted]
    apart = [shape for shape, is_grafted in pairs if is_grafted]
    work = floor.ordinary_step(kept, block, apart)
    bounds = floor.floor(work, rates)._asdict()
    mine = contestants["shampoo"]
    return {
        "model": model.name,
        "parameters": model.numel,
        "block": block,
        "refresh": refresh,
        "grafted_embeddings": plan.grafted_embeddings,
        "ordinary_s": ordinary._asdict(),
        "root_s": root._asdict(),
        "amortised_s": amortised,
        "first_step_s": first["shampoo"][0],
        "first_root_step_s": first["shampoo"][-1],
        "baselines_s": {name: found._asdict() for name, found in baselines.items()},
        "base": BASE[plan.device.type],
        "ordinary_over_base": ordinary.p50 / base.p50,
        "root_over_base": root.p50 / base.p50,
        "amortised_over_base": amortised / base.mean,
        "state_bytes_per_parameter": mine.state_bytes() / model.numel,
        "held_bytes_per_parameter": mine.held_bytes() / model.numel,
        "formula_bytes_per_parameter": floor.state_bytes(kept, block, apart) / model.numel,
        "work": {**work._asdict(), "flops": work.flops, "full_flops": work.full_flops},
        "rates": rates._asdict(),
        "floor_s": bounds,
        "ordinary_over_floor": {name: ordinary.p50 / s for name, s in bounds.items()},
    }
