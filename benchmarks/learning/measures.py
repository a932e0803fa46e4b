"""What is read off curves: steps and CPU seconds to a loss, and medians over seeds."""

from collections.abc import Sequence
from statistics import median

from benchmarks.learning.records import Record


def reached(record: Record, target: float) -> tuple[float, float] | None:
    """The step and the CPU seconds at which held-out loss first is at most ``target``.

    Between two evaluations both are interpolated along the straight line of the loss; None if it
    is never reached, or the run diverged after it.
    """
    if record["diverged"]:
        return None
    before: tuple[float, float, float] | None = None
    for step, loss, _, _, seconds in record["curve"]:
        if loss is not None and loss <= target:
            if before is None:
                return step, seconds
            at_step, at_loss, at_seconds = before
            part = (at_loss - target) / (at_loss - loss)
            return at_step + part * (step - at_step), at_seconds + part * (seconds - at_seconds)
        before = (step, loss, seconds)
    return None


def final_losses(runs: Sequence[Record]) -> list[float]:
    """Of every seed; infinite where a run diverged."""
    return [float("inf") if run["diverged"] else run["loss"] for run in runs]


def median_loss(runs: Sequence[Record]) -> float:
    """Median of the final losses."""
    return median(final_losses(runs))


def median_seconds(runs: Sequence[Record]) -> float:
    """Median CPU seconds of a whole run, evaluations aside; a diverged one never ends."""
    return median(float("inf") if run["diverged"] else run["seconds"] for run in runs)


def median_reached(runs: Sequence[Record], target: float) -> tuple[float, float] | None:
    """Medians of steps and of seconds to a loss; None unless more than half of the seeds get there.

    A seed that does not counts as infinitely late.
    """
    found = [reached(run, target) for run in runs]
    steps = median(float("inf") if hit is None else hit[0] for hit in found)
    seconds = median(float("inf") if hit is None else hit[1] for hit in found)
    return None if steps == float("inf") else (steps, seconds)
