"""How an optimizer's settings for a task are found, and what is then run with fresh seeds.

Everything is a function of the runs that are there: asked what is missing, it answers with trials,
and with none once the search has ended. So a search that was stopped goes on where it was.

1. The learning rate, one seed: at factors of 8 over 3.6 decades, more at the ends while the best is
   at one; then at factors of 2 until the best has both neighbours.
2. A second seed for the best rate and its neighbours, until the best mean of two has both.
3. At that rate one change at a time: weight decay times 3 and 1/3, twice the warm-up, and what the
   optimizer's row names. The best one is kept if it is better on the mean of the two seeds. Ours do
   without: they are judged at their defaults but for the rate.
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
        tried = {best - 1, best, best + 1}
        while True:
            needed = records.missing(self.at(p, seed) for p in tried for seed in self.seeds)
            if needed:
                return None, needed
            losses = self.losses(records, self.seeds)
            best = min(tried, key=lambda power: losses[power])
            if tried >= {best - 1, best, best + 1} or len(tried) > 6:
                return best, []
            tried |= {best - 1, best, best + 1}

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
        if needed := records.missing(varied):
            return None, needed
        promising = min(varied, key=lambda trial: _loss(records.of(trial)))
        if _loss(records.of(promising)) < _loss(records.of(kept)):
            both = [replace(promising, seed=seed) for seed in self.seeds]
            if needed := records.missing(both):
                return None, needed
            if mean(_loss(records.of(t)) for t in both) < self.losses(records, self.seeds)[power]:
                kept = promising
        return kept, []

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


def _loss(record: Record | None) -> float:
    assert record is not None
    return math.inf if record["diverged"] else float(record["loss"])


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
