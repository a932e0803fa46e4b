"""Runs trials side by side, one thread each, and keeps what comes out as it comes."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import data, machine
from benchmarks.learning.records import Records
from benchmarks.learning.trial import Trial, failed, run
from benchmarks.tasks import TASKS

Missing = Callable[[Records], list[Trial]]


def _prepare() -> None:
    torch.set_num_threads(1)


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, broken
    with ProcessPoolExecutor(workers, context, _prepare) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _outcome(future: Future[dict[str, Any]], trial: Trial) -> dict[str, Any]:
    """What a run has given; one that raised has diverged, and says why.

    A worker that was killed is not the trial's fault: that ends the grid, which goes on when it is
    called again.
    """
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise SystemExit(
            f"The process of a run was killed, for want of memory perhaps ({trial}). What has run"
            " is kept: run it again to go on, with --workers 1 if memory is short."
        ) from error
    except Exception as error:
        return failed(trial, repr(error))


def origin() -> dict[str, Any]:
    """What every record says of where it was made."""
    facts = machine.describe(torch.device("cpu"))
    return {name: facts[name] for name in ("name", "torch", "python", "commit")}


def execute(
    missing: Missing, records: Records, console: Console, *, workers: int, seconds: float
) -> bool:
    """Runs what is missing, and what then is, until nothing is.

    Args:
        missing: what to run next, by what has been run.
        records: where runs are kept.
        console: for the progress bar.
        workers: runs at once.
        seconds: after which no further run begins.

    Returns:
        Whether all is done, rather than the time over.
    """
    deadline, facts = time.monotonic() + seconds, origin()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    running: dict[Future[dict[str, Any]], Trial] = {}
    with _pool(workers) as pool, Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        shown, done = bar.add_task("runs", total=None), 0
        while True:
            under_way = {trial.key() for trial in running.values()}
            wanted = [t for t in missing(records) if t.key() not in under_way]
            bar.update(shown, total=done + len(running) + len(wanted))
            is_late = time.monotonic() > deadline
            for trial in wanted[: 0 if is_late else workers - len(running)]:
                running[pool.submit(run, trial)] = trial
            if not running:
                return not wanted
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                trial = running.pop(future)
                source = TASKS[trial.task].source
                digest = None if source is None else data.fingerprint(source)
                records.add({**_outcome(future, trial), **facts, "data": digest})
                done += 1
                bar.update(shown, completed=done, description=f"{trial.task} {trial.optimizer}")
