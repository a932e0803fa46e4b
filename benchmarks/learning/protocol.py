"""How an optimizer's settings for a task are found, and what is then run with fresh seeds.

Everything is a function of the runs that are there: asked what is missing, it answers with trials,
and with none once the search has ended. So a search that was stopped goes on where it was.

1. The learning rate, one seed: at factors of 8 over 3.6 decades, more at the ends while the best is
   at one; then at factors of 2 until the best has both neighbours.
2. A second seed for the best rate and its neighbours, until the best mean of two has both.
3. At that rate one change at a time: weight decay times 3 and 1/3, twice the warm-up, and what the
   optimizer's row names. The best one is kept if it is better on the mean of the two seeds, and is
   then tried at half and twice the rate. Ours do without: they are judged at their defaults but for
   the rate.
4. Five fresh seeds, judged on data that the search has not seen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from benchmarks.learning.optimizers import ROWS
from benchmarks.learning.records import Record, Records
from benchmarks.learning.trial import Trial
from benchmarks.tasks import TASKS

SEEDS = (0, 1)
FRESH = (2, 3, 4, 5, 6)
COARSE = (-6, -3, 0, 3, 6)  # powers of two, of the rate of an optimizer's row
WIDEST = 15  # beyond which the search for a bracket gives up


@dataclass(frozen=True)
class Search:
    """The settings of one optimizer for one task, as far as runs have found them.

    Attributes:
        base: the trial that all others differ from, with the rate of the optimizer's row.
        seeds: that it is tuned on.
        variations: whether stage 3 takes place.
        coarse: powers of two at which stage 1 begins, ascending.
        stride: between further ones at the ends.
    """

    base: Trial
    seeds: Sequence[int] = SEEDS
    variations: bool = True
    coarse: Sequence[int] = COARSE
    stride: int = 3

    @classmethod
    def of(cls, task: str, optimizer: str, **more: Any) -> "Search":
        """The search of the main table."""
        row = ROWS[optimizer]
        more.setdefault("variations", row.variations is not None)
        return cls(Trial(task, optimizer, row.rate, SEEDS[0]), **more)

    def at(self, power: int, seed: int) -> Trial:
        """The trial at the rate ``base.rate * 2 ** power``."""
        return replace(self.base, rate=_rounded(self.base.rate * 2.0**power), seed=seed)

    def losses(self, records: Records, seeds: Sequence[int]) -> dict[int, float]:
        """Mean final loss over seeds, by the power of the rate, where all of them have run."""
        found = {}
        for power in range(-WIDEST, WIDEST + 1):
            runs = [records.of(self.at(power, seed)) for seed in seeds]
            if all(runs):
                found[power] = mean(_loss(run) for run in runs if run)
        return found

    def best_power(self, records: Records) -> tuple[int | None, list[Trial]]:
        """The best rate, None if trials are missing; and these."""
        first = self.seeds[:1]
        if needed := records.missing(self.at(power, first[0]) for power in self.coarse):
            return None, needed
        while True:
            losses = self.losses(records, first)
            best = min(losses, key=lambda power: losses[power])
            is_bracketed = min(losses) < best < max(losses)
            step = 1 if is_bracketed else self.stride
            around = [best + s for s in (-step, step) if abs(best + s) <= WIDEST]
            if not math.isfinite(losses[best]):
                return None, []  # it has not learned at any rate
            if needed := records.missing(self.at(power, first[0]) for power in around):
                return None, needed
            if is_bracketed or len(around) < 2:
                break
        tried = _neighbours(best)
        while True:
            needed = records.missing(self.at(p, seed) for p in tried for seed in self.seeds)
            if needed:
                return None, needed
            losses = self.losses(records, self.seeds)
            best = min(tried, key=lambda power: losses[power])
            if tried >= _neighbours(best) or len(tried) > 6:
                return best, []
            tried |= _neighbours(best)

    def is_bracketed(self, records: Records) -> bool:
        """Whether the best rate lies between two that were tried and are worse."""
        power, _ = self.best_power(records)
        losses = self.losses(records, self.seeds)
        return power is not None and {power - 1, power + 1} <= losses.keys()

    def varied(self, power: int) -> list[Trial]:
        """One change at a time, at a rate, with the first seed."""
        task, row = TASKS[self.base.task], ROWS[self.base.optimizer]
        best = self.at(power, self.seeds[0])
        decay = task.weight_decay or 1e-3
        found = [replace(best, weight_decay=_rounded(decay * factor)) for factor in (3, 1 / 3)]
        found.append(replace(best, warmup=2 * task.warmup))
        found += [replace(best, arguments=change) for change in row.variations or ()]
        return found

    def choice(self, records: Records) -> tuple[Trial | None, list[Trial]]:
        """The best settings, or None and the trials that are missing to know them."""
        power, needed = self.best_power(records)
        if power is None or not self.variations:
            return (None if power is None else self.at(power, self.seeds[0])), needed
        kept = self.at(power, self.seeds[0])
        varied = self.varied(power)
        better, needed = self._better(kept, varied, records)
        if needed or better == kept:
            return (None if needed else kept), needed
        around = [replace(better, rate=self.at(power + s, 0).rate) for s in (-1, 1)]
        kept, needed = self._better(better, around, records)
        return (None if needed else kept), needed

    def _better(
        self, kept: Trial, others: Sequence[Trial], records: Records
    ) -> tuple[Trial, list[Trial]]:
        """The best of others with the first seed if all seeds agree, else what was kept."""
        if needed := records.missing(others):
            return kept, needed
        promising = min(others, key=lambda trial: _loss(records.of(trial)))
        if _loss(records.of(promising)) >= _loss(records.of(kept)):
            return kept, []
        both = [[replace(trial, seed=seed) for seed in self.seeds] for trial in (kept, promising)]
        if needed := records.missing(trial for trials in both for trial in trials):
            return kept, needed
        before, after = (mean(_loss(records.of(t)) for t in trials) for trials in both)
        return (promising if after < before else kept), []

    def missing(self, records: Records, fresh: Sequence[int] = FRESH) -> list[Trial]:
        """What is to be run next; none once the settings and their fresh runs are there."""
        chosen, needed = self.choice(records)
        return needed if chosen is None else records.missing(reported(chosen, fresh))

    def fresh_runs(self, records: Records, fresh: Sequence[int] = FRESH) -> list[Record]:
        """The runs with fresh seeds at the settings that were chosen, as far as they are there."""
        chosen, _ = self.choice(records)
        found = [] if chosen is None else [records.of(t) for t in reported(chosen, fresh)]
        return [run for run in found if run is not None]


def reported(chosen: Trial, seeds: Sequence[int] = FRESH) -> list[Trial]:
    """The trials of a table's row."""
    return [replace(chosen, seed=seed, split="report") for seed in seeds]


def _neighbours(power: int) -> set[int]:
    """A power and those beside it, as far as rates are tried at all."""
    return {power + s for s in (-1, 0, 1) if abs(power + s) <= WIDEST}


def _loss(record: Record | None) -> float:
    assert record is not None
    return math.inf if record["diverged"] else float(record["loss"])


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
