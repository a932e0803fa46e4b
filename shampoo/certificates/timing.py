"""Fair timing of variants: interleaved in one run, equally cold, reported as quantiles.

A *variant* is one competitor for the same work. In each round every variant runs once, and the
order rotates by one from round to round, so drift of clocks and neighbours falls on all alike.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch


class Quantiles(NamedTuple):
    """Summary of samples in seconds. ``mean`` counts the outliers that ``p50`` hides."""

    p20: float
    p50: float
    p80: float
    mean: float
    samples: int


def quantiles(samples: Sequence[float]) -> Quantiles:
    """20, 50 and 80 % quantiles, linear between order statistics, and the mean."""
    if not samples:
        raise ValueError("No samples to summarise. Measure at least one round.")
    ordered = torch.tensor(sorted(samples), dtype=torch.float64)
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.quantile(ordered, levels).tolist()
    return Quantiles(p20, p50, p80, ordered.mean().item(), len(samples))


class Clock:
    """Times one call on one device: CUDA events on a GPU, ``perf_counter`` on a CPU.

    On a GPU the L2 cache is overwritten and the queue drained before each call, so the call pays
    for its launches and its reads of memory, as it does after a backward pass.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(4 * max(l2, 1), dtype=torch.int8, device=device)
            self._start = torch.Event("cuda", enable_timing=True)
            self._end = torch.Event("cuda", enable_timing=True)

    def time(self, call: Callable[[], object]) -> float:
        """Seconds that ``call`` takes."""
        if self._flush is None:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        self._flush.zero_()
        torch.cuda.synchronize(self.device)
        self._start.record()
        call()
        self._end.record()
        torch.cuda.synchronize(self.device)
        return float(self._start.elapsed_time(self._end)) * 1e-3


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    clock: Clock,
    *,
    rounds: int,
    first_round: int = 0,
    before_round: Callable[[], object] = lambda: None,
    before_call: Callable[[str], object] = lambda name: None,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Runs every variant once a round.

    Args:
        variants: What to time, by name.
        clock: The clock of their device.
        rounds: Number of rounds.
        first_round: Index of the first round: continues the rotation of an earlier call.
        before_round: Untimed, before each round.
        before_call: Untimed, before each call, with the variant's name: the same work for all, so
            that caches are equally cold.
        after_round: Untimed, after each round.

    Returns:
        For each variant, the seconds of every round in order.
    """
    names = list(variants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(first_round, first_round + rounds):
        before_round()
        first = index % len(names)
        for name in names[first:] + names[:first]:
            before_call(name)
            samples[name].append(clock.time(variants[name]))
        after_round()
    return samples


_MOST = 200  # rounds of a small call


def timed(
    calls: Mapping[str, Callable[[], object]], device: torch.device, seconds: float, least: int
) -> dict[str, Quantiles]:
    """Quantiles of calls that take turns, ``least`` rounds and on until ``seconds`` are over."""
    if not calls:
        return {}
    clock = Clock(device)
    warm = interleaved(calls, clock, rounds=2)
    round_s = max(1e-9, sum(samples[-1] for samples in warm.values()))
    rounds = max(least, min(_MOST, int(seconds / round_s)))
    times = interleaved(calls, clock, rounds=rounds, first_round=2)
    return {name: quantiles(samples) for name, samples in times.items()}
