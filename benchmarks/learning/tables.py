"""The tables of docs/evidence.md, from the runs that are there."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean

from benchmarks.learning import studies
from benchmarks.learning.measures import (
    final_losses,
    median_loss,
    median_reached,
    median_seconds,
    reached,
)
from benchmarks.learning.optimizers import ROWS
from benchmarks.learning.protocol import FRESH, Search
from benchmarks.learning.race import Races, fresh_runs
from benchmarks.learning.records import Record, Records
from benchmarks.tasks import TASKS

Lines = list[list[str]]  # the first is the head
STEPS_GOAL = {"language": 1 / 2, "vision": 1 / 1.5, "autoencoder": 1 / 1.5}
TIME_GOAL = 1.2  # times Muon's


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or value == float("inf") else format(value, form)


def _settings(search: Search, records: Records) -> str:
    chosen, _ = search.choice(records)
    if chosen is None:
        return "-"
    said = [f"{chosen.rate:g}{'' if search.is_bracketed(records) else ' (not bracketed)'}"]
    if chosen.weight_decay is not None:
        said.append(f"decay {chosen.weight_decay:g}")
    if chosen.warmup is not None:
        said.append(f"warm-up {chosen.warmup}")
    said += [f"{name} {value}" for name, value in chosen.arguments.items()]
    return ", ".join(said)


def _fresh(task: str, optimizer: str, records: Records) -> list[Record]:
    """All fresh seeds; none of them while one is missing."""
    runs = fresh_runs(task, optimizer, records)
    return runs if len(runs) == len(FRESH) else []


def results(task: str, records: Records) -> Lines:
    """One task: every optimizer at its best settings, five fresh seeds.

    Seconds with a "~" are of an optimizer that took part in no race: those of its own runs.
    """
    races = Races(records.folder)
    tuned = ("optimizer", "rate and what was tuned", "final loss, every seed", "median", "accuracy")
    lines = [
        [*tuned, "steps to AdamW's end, every seed", "median", "CPU s to it", "CPU s of a run"]
    ]
    base = _fresh(task, "adamw", records)
    target = median_loss(base) if base else float("-inf")
    for name, row in ROWS.items():
        runs = _fresh(task, name, records)
        if not runs:
            continue
        hits = [reached(run, target) for run in runs]
        hit = median_reached(runs, target)
        search = Search.of(task, name)
        chosen, _ = search.choice(records)
        about = "~" * (chosen is None or races.seconds(chosen) is None)
        accuracies = [run["accuracy"] for run in runs if run["accuracy"] is not None]
        lines.append(
            [
                row.title,
                _settings(search, records),
                " ".join(_number(loss, ".3f") for loss in final_losses(runs)),
                _number(median_loss(runs), ".3f"),
                f"{mean(accuracies):.1%}" if accuracies else "-",
                " ".join(_number(None if h is None else h[0], ".0f") for h in hits),
                _number(None if hit is None else hit[0], ".0f"),
                about + _number(None if hit is None else hit[1], ".1f"),
                about + _number(median_seconds(runs), ".1f"),
            ]
        )
    return lines


def goals(records: Records) -> Lines:
    """Every task: what Shampoo's defaults reach of what they are to."""
    adam = ("steps to AdamW's end / AdamW's steps", "goal", "CPU s to it / AdamW's")
    lines = [["task", *adam, "final loss - Muon's", "CPU s / Muon's", "goals met"]]
    for name, task in TASKS.items():
        adamw, muon, ours = (_fresh(name, o, records) for o in ("adamw", "muon", "shampoo"))
        if not (adamw and muon and ours):
            continue
        hit = median_reached(ours, median_loss(adamw))
        steps = hit[0] / task.steps if hit else float("inf")
        seconds = hit[1] / median_seconds(adamw) if hit else float("inf")
        below = median_loss(ours) - median_loss(muon)
        ratio = median_seconds(ours) / median_seconds(muon)
        goal = STEPS_GOAL[task.family]
        met = [steps <= goal, seconds < 1, below < 0, ratio <= TIME_GOAL]
        lines.append(
            [
                name,
                _number(steps, ".2f"),
                f"{goal:.2f}",
                _number(seconds, ".2f"),
                format(below, "+.3f"),
                format(ratio, ".2f"),
                ", ".join(f"{'yes' if is_met else 'no'}" for is_met in met),
            ]
        )
    return lines


def summary(records: Records) -> Lines:
    """What README says: medians of five fresh seeds."""
    lines = [
        ["task", "AdamW", "Muon", "Shampoo", "steps to AdamW's end", "time to it", "time / Muon's"]
    ]
    for name, task in TASKS.items():
        runs = [_fresh(name, optimizer, records) for optimizer in ("adamw", "muon", "shampoo")]
        if not all(runs):
            continue
        adamw, muon, ours = runs
        hit = median_reached(ours, median_loss(adamw))
        steps = f"{hit[0]:.0f} of {task.steps}" if hit else "-"
        part = _number(hit[1] / median_seconds(adamw) if hit else None, ".0%")
        losses = [_number(median_loss(each), ".3f") for each in runs]
        ratio = median_seconds(ours) / median_seconds(muon)
        lines.append([name, *losses, steps, part, f"{ratio:.2f}"])
    return lines


def rates(records: Records) -> Lines:
    """Every task and optimizer: the loss of the first seed by the rate, relative to the best."""
    lines = [["task", "optimizer", "best rate", *(f"x 2^{k}" for k in range(-6, 7))]]
    for task in TASKS:
        for name, row in ROWS.items():
            search = Search.of(task, name)
            losses = search.losses(records, search.seeds[:1])
            power, _ = search.best_power(records)
            if power is None:
                continue
            cells = [_number(losses.get(power + k), ".3f") for k in range(-6, 7)]
            lines.append([task, row.title, f"{search.at(power, 0).rate:g}", *cells])
    return lines


def exponents(records: Records) -> Lines:
    """Exponent and beta2 crossed: mean loss of three seeds, each at its best rate."""
    lines = [["task", "p", *(f"beta2 = {beta2:g}" for beta2 in studies.BETA2)]]
    for task in TASKS:
        for name, exponent in studies.EXPONENTS.items():
            cells = []
            for beta2 in studies.BETA2:
                search = studies.cell(task, exponent, beta2)
                runs = studies.cell_runs(search, records)
                losses = final_losses(runs)
                said = f"{mean(losses):.3f} ({runs[0]['rate']:g})" if runs else "-"
                cells.append(said)
            if set(cells) != {"-"}:
                lines.append([task, name, *cells])
    return lines


def ablations(records: Records) -> Lines:
    """One change at a time: loss minus that of the defaults, mean and every seed.

    And the steps to AdamW's end, medians, beside those of the defaults; and the CPU time.
    """
    return _changes(studies.ABLATION_TASKS, records, studies.ABLATIONS)


def autoencoder(records: Records) -> Lines:
    """The same of what was tried where Muon ends lower."""
    return _changes(("autoencoder",), records, ("tried",))


def crossed(records: Records) -> Lines:
    """The same of exponent and beta2, where they have no grid of their own."""
    return _changes(studies.CROSSED_TASKS, records, ("crossed",))


def _changes(tasks: Sequence[str], records: Records, kinds: Iterable[str]) -> Lines:
    """Changes of some kinds, of tasks that have the same ones."""
    lines = [["change", *tasks]]
    found = studies.ablations(tasks, records)
    for kind in kinds:
        for index, change in enumerate(studies.CHANGES[tasks[0]][kind], 1):
            cells = []
            for task in tasks:
                base, *varied = found.get((task, kind), [[]])
                pairs = [
                    (records.of(before), records.of(after))
                    for before, after in zip(base, varied[index - 1] if varied else (), strict=True)
                ]
                cells.append(_difference(pairs, _adamw_end(task, records)))
            if set(cells) != {"-"}:
                said = ", ".join(f"{name}={value}" for name, value in change.items())
                lines.append([f"{kind}: `{said}`", *cells])
    return lines


def _adamw_end(task: str, records: Records) -> float:
    """AdamW's final loss at its best rate, mean of the seeds that it was tuned on."""
    search = Search.of(task, "adamw")
    power, _ = search.best_power(records)
    return float("-inf") if power is None else search.losses(records, search.seeds)[power]


def _difference(pairs: Sequence[tuple[Record | None, Record | None]], target: float) -> str:
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not both:
        return "-"
    if any(b["diverged"] for _, b in both):
        return "diverged"
    differences = [b["loss"] - a["loss"] for a, b in both]
    seconds = mean(b["seconds"] for _, b in both) / mean(a["seconds"] for a, _ in both)
    each = " ".join(f"{difference:+.3f}" for difference in differences)
    hits = [median_reached(runs, target) for runs in zip(*both, strict=True)]
    before, after = (_number(None if hit is None else hit[0], ".0f") for hit in hits)
    return (
        f"**{mean(differences):+.3f}** ({each}), {after} steps for {before}, time x {seconds:.2f}"
    )


def transfer(records: Records) -> Lines:
    """The best rate by width, with muP's rates and without."""
    lines = [["rates", *(f"width {width}" for width in studies.WIDTHS)]]
    for name, has_transfer in (("the same at every width", False), ("muP", True)):
        cells = []
        for width in studies.WIDTHS:
            search = studies.transfer(width, has_transfer)
            power, _ = search.best_power(records)
            if power is None:
                cells.append("-")
                continue
            loss = search.losses(records, search.seeds)[power]
            cells.append(f"{search.at(power, 0).rate:g}: {loss:.3f}")
        lines.append([name, *cells])
    return lines


TABLES: dict[str, Callable[[Records], Lines]] = {
    "summary": summary,
    "goals": goals,
    **{f"results-{t}": (lambda records, t=t: results(t, records)) for t in TASKS},
    "rates": rates,
    "exponents": exponents,
    "ablations": ablations,
    "autoencoder": autoencoder,
    "crossed": crossed,
    "transfer": transfer,
}


def markdown(lines: Lines) -> str:
    """A table as GitHub reads it."""
    head, *rows = lines
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))


def fill(document: Path, records: Records) -> str:
    """The document with every table between its marks made anew: ``<!-- table NAME -->``."""
    out, lines = [], iter(document.read_text(encoding="utf-8").splitlines())
    for line in lines:
        out.append(line)
        if line.startswith("<!-- table "):
            name = line.split()[2]
            out += ["", markdown(TABLES[name](records)), ""]
            out.append(next(later for later in lines if later == "<!-- end -->"))
    return "\n".join(out) + "\n"
