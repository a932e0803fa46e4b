"""Trains every optimizer on every task, each at its best settings, and writes what came out.

    python -m benchmarks.learning                                    # goes on where it was stopped
    python -m benchmarks.learning --tasks cpython-64 --optimizers adamw shampoo
    python -m benchmarks.learning --report                           # tables and plots alone
    python -m benchmarks.learning --quick --out FOLDER               # digits, in some minutes

Runs lie in benchmarks/results/learning, a JSON line each; what is there is not run again. Tables go
into docs/evidence.md and README.md, plots into docs/figures. One thread a run, two runs at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import data
from benchmarks.learning import plots, race, studies, tables
from benchmarks.learning.optimizers import ROWS, why_absent
from benchmarks.learning.pool import Missing, execute
from benchmarks.learning.protocol import FRESH, Search
from benchmarks.learning.records import RESULTS, Records
from benchmarks.learning.trial import Trial
from benchmarks.tasks import TASKS

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "docs" / "evidence.md", ROOT / "README.md")  # with tables from runs
STUDIES = ("main", "ablations", "transfer", "exponents", "further")
QUICK = ("adamw", "muon", "shampoo")


def _searches(searches: Sequence[Search], fresh: Sequence[int] = FRESH) -> Missing:
    return lambda records: studies.missing_of_searches(searches, records, fresh)


def plans(
    chosen: Sequence[str], tasks: Sequence[str] | None, optimizers: Sequence[str]
) -> dict[str, Missing]:
    """What each study still lacks, by its name."""

    def picked(names: Sequence[str]) -> list[str]:
        return [name for name in names if tasks is None or name in tasks]

    def rows(names: Sequence[str]) -> list[str]:
        return [name for name in names if name in optimizers]

    def cells(records: Records) -> list[Trial]:
        return studies.missing_of_cells(studies.cells(picked(studies.EXPONENT_TASKS)), records)

    def ablations(records: Records) -> list[Trial]:
        return studies.missing_of_ablations(picked(tuple(studies.CHANGES)), records)

    table_tasks = picked(studies.TABLE_TASKS) if tasks is None else list(tasks)
    further_tasks = picked(studies.FURTHER_TASKS) if tasks is None else list(tasks)
    widths = [
        studies.transfer(width, has_transfer)
        for width in studies.WIDTHS
        for has_transfer in (False, True)
    ]
    found: dict[str, Missing] = {
        "main": _searches(studies.table(table_tasks, rows(studies.MAIN))),
        "exponents": cells,
        "transfer": _searches(widths, fresh=()),
        "ablations": ablations,
        "further": _searches(studies.table(further_tasks, rows(studies.FURTHER))),
    }
    return {name: found[name] for name in chosen}


def main() -> None:
    """Runs what is missing, then reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--study", nargs="+", choices=STUDIES, metavar="STUDY")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument(
        "--optimizers", nargs="+", choices=ROWS, metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--budget", type=float, default=3 * 3600, help="seconds of runs (3 h)")
    parser.add_argument("--workers", type=int, default=2, help="runs at once (2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the runs")
    parser.add_argument("--quick", action="store_true", help="digits and three optimizers alone")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    console = Console()
    if options.quick and options.out == RESULTS:
        parser.error("--quick needs --out FOLDER: the published runs are not its own.")
    absent = {name: why for name in options.optimizers or ROWS if (why := why_absent(name))}
    for why in absent.values():
        console.print(why)
    present = [name for name in options.optimizers or ROWS if name not in absent]
    # Who names tasks or optimizers asks for their rows of the table, unless a study is named too.
    named = options.tasks is not None or options.optimizers is not None
    chosen = options.study or (("main", "further") if named else STUDIES)
    records = Records(options.out)
    if options.quick:
        searches = studies.table(("digits",), [name for name in QUICK if name in present])
        planned = {"quick": _searches(searches)}
    else:
        planned = plans(chosen, options.tasks, present)
    if not options.report:
        wanted = {t.task for missing in planned.values() for t in missing(records)}
        for task in sorted(wanted):  # before anything has been trained
            if source := TASKS[task].source:
                data.files(source)
                if others := records.data_of(task) - {data.fingerprint(source)}:
                    parser.error(
                        f"{options.out} holds runs of {task} on other data ({', '.join(others)}"
                        f" and not {data.fingerprint(source)}). Name another folder: --out FOLDER."
                    )

        def missing(found: Records) -> list[Trial]:
            return [trial for plan in planned.values() for trial in plan(found)]

        done = execute(missing, records, console, workers=options.workers, seconds=options.budget)
        if done:
            race.execute(records, console)
        console.print("everything is there" if done else "the time is over: run it again to go on")
    report(records, console, is_published=options.out == RESULTS)


def report(records: Records, console: Console, is_published: bool) -> None:
    """Prints the tables that say most; where these are the published runs, writes the document."""
    for name, build in tables.TABLES.items():
        head, *rows = build(records)
        if not rows or name == "rates":
            continue
        shown = Table(title=name)
        for column in head:
            shown.add_column(column)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    if is_published:
        for document in DOCUMENTS:
            document.write_text(tables.fill(document, records), encoding="utf-8")
        made = plots.draw(records)
    else:
        made = plots.draw(records, records.folder)
    console.print(f"{len(records)} runs; plots: {', '.join(path.name for path in made)}")


if __name__ == "__main__":
    main()
