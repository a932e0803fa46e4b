"""What was measured: a JSON line a run, a file a task, appended to and never rewritten."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.learning.trial import Trial, made_with

RESULTS = Path(__file__).parents[1] / "results" / "learning"
Record = dict[str, Any]


class Records:
    """Runs by the key of their trial, in memory and in a folder.

    A line that was cut off, by a run that was stopped while it wrote, is passed over.
    """

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder
        self._found: dict[str, Record] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                self._found[record["key"]] = record

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._found.values())

    def of(self, trial: Trial) -> Record | None:
        """The run of a trial, None if it has not been made, or with other defaults than today's."""
        found = self._found.get(trial.key())
        is_current = found and found["made_with"] == made_with(trial.task, trial.optimizer)
        return found if is_current else None

    def data_of(self, task: str) -> set[str]:
        """Fingerprints of the data on which the runs of a task were made."""
        return {run["data"] for run in self if run["task"] == task and run["data"] is not None}

    def missing(self, trials: Iterable[Trial]) -> list[Trial]:
        """Those that have not been run, each once."""
        return list({trial.key(): trial for trial in trials if self.of(trial) is None}.values())

    def add(self, record: Record) -> None:
        """Keeps a run, on the disk first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{record['task']}.jsonl"
        is_cut = path.exists() and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * is_cut + json.dumps(record) + "\n")
        self._found[record["key"]] = record
