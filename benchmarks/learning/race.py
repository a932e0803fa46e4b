"""CPU seconds of whole runs, measured in turns: ten steps of one optimizer, then ten of the next.

Runs of a search are spread over hours in which the machine has other work, so that their seconds
cannot be compared. Here the optimizers of a task train side by side in one process, alone, each at
the settings that were chosen for it.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.learning import studies
from benchmarks.learning.pool import origin
from benchmarks.learning.protocol import FRESH, Search
from benchmarks.learning.records import Record, Records
from benchmarks.learning.trial import Training, Trial
from benchmarks.tasks import TASKS

CHUNK = 10  # steps in a turn: the period of the roots


class Races:
    """What was measured, by task: in a file of the folder of the runs, written whole."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "races.json"
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else "{}"
        self._found: dict[str, dict[str, Any]] = json.loads(text)

    def seconds(self, trial: Trial) -> float | None:
        """Of a whole run with these settings, None if they have not taken part in a race."""
        found = self._found.get(trial.task, {}).get("runs", {}).get(_at_report(trial).key())
        return None if found is None else float(found["seconds"])

    def add(self, trials: Sequence[Trial], seconds: Sequence[float], facts: dict[str, Any]) -> None:
        """Keeps the race of a task in the place of its last one."""
        made = {
            _at_report(trial).key(): {"optimizer": trial.optimizer, "seconds": round(each, 4)}
            for trial, each in zip(trials, seconds, strict=True)
        }
        self._found[trials[0].task] = {"runs": made, **facts}
        text = json.dumps(self._found, indent=1, sort_keys=True)
        self.path.write_text(text + "\n", encoding="utf-8")


def _at_report(trial: Trial) -> Trial:
    return replace(trial, seed=FRESH[0], split="report")


def missing(records: Records, races: Races) -> Iterator[list[Trial]]:
    """The races that have not been run with the settings of today, a task each.

    Those of the main table take part whose search has ended.
    """
    for task in TASKS:
        found = [Search.of(task, name).choice(records)[0] for name in studies.MAIN]
        trials = [_at_report(trial) for trial in found if trial is not None]
        if len(trials) > 1 and any(races.seconds(trial) is None for trial in trials):
            yield trials


def race(trials: Sequence[Trial]) -> list[float]:
    """CPU seconds of a whole run of each, on one thread of this process, evaluations aside."""
    torch.set_num_threads(1)
    runs = [Training(trial) for trial in trials]
    seconds = [0.0] * len(runs)
    for start in range(0, TASKS[trials[0].task].steps, CHUNK):
        for index, training in enumerate(runs):
            begin = time.process_time()
            for _ in range(start, min(start + CHUNK, training.task.steps)):
                training.step()
            seconds[index] += time.process_time() - begin
    return seconds


def execute(records: Records, console: Console) -> None:
    """Runs every race that is missing, one after the other: nothing else may run beside."""
    races = Races(records.folder)
    for trials in missing(records, races):
        task, names = trials[0].task, ", ".join(trial.optimizer for trial in trials)
        with console.status(f"{task}: CPU seconds of {names}, in turns"):
            races.add(trials, race(trials), origin())


def fresh_runs(task: str, optimizer: str, records: Records) -> list[Record]:
    """The runs with fresh seeds, their seconds stretched to those of the race if there was one."""
    search = Search.of(task, optimizer)
    chosen, _ = search.choice(records)
    seconds = None if chosen is None else Races(records.folder).seconds(chosen)
    runs = search.fresh_runs(records)
    return [run if seconds is None else _stretched(run, seconds) for run in runs]


def _stretched(run: Record, seconds: float) -> Record:
    if run["diverged"]:
        return run
    ratio = seconds / run["seconds"]
    curve = [[*point[:4], point[4] * ratio] for point in run["curve"]]
    return {**run, "seconds": seconds, "curve": curve}
