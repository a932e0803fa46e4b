"""What is run: the main table, the ablations, the transfer across widths; each a list of searches.

A study says, of the runs that are there, which are missing; tables and plots read the same lists.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.learning.optimizers import ROWS
from benchmarks.learning.protocol import SEEDS, Search
from benchmarks.learning.records import Record, Records
from benchmarks.learning.trial import Trial

MAIN = ("adamw", "sgd", "muon", "shampoo", "kl_shampoo")
FURTHER = tuple(name for name in ROWS if name not in (*MAIN, "shampoo-transfer"))
TABLE_TASKS = (
    "digits",
    "fashion-cnn",
    "fashion-resnet8",
    "fashion-vit",
    "autoencoder",
    "king-james-64",
    "cpython-64",
    "king-james-128",
    "cpython-128",
)
# Not on all tasks: everything together is to end within three hours.
FURTHER_TASKS = ("king-james-64", "fashion-cnn")
EXPONENT_TASKS = (
    "digits",
    "king-james-64",
    "fashion-cnn",
    "cpython-64",
    "fashion-vit",
    "fashion-resnet8",
)
# Where the 80 runs of a grid with rates of its own take too long: width 128 has the texts of width
# 64, a run of the autoencoder takes 20 s.
CROSSED_TASKS = ("king-james-128", "cpython-128", "autoencoder")

Arguments = dict[str, Any]
CELL_SEEDS = (0, 1, 7)  # none of those that are reported as fresh

EXPONENTS: Mapping[str, Any] = {"2 o": "paper", "2, o": 2, "1.5": 1.5, "1": 1}
BETA2 = (0.9, 0.95, 0.99, 0.999)

# One change at a time from the defaults, at the rate that was found for these.
ABLATIONS: Mapping[str, Sequence[Arguments]] = {
    "frequency": [{"precondition_frequency": f} for f in (1, 2, 5, 20, 50)],
    "f (1 - beta2)": [
        {"precondition_frequency": f, "betas": (0.9, b)}
        for f, b in ((1, 0.9), (5, 0.9), (5, 0.98), (20, 0.98), (50, 0.99), (50, 0.999))
    ],
    "start": [{"start_preconditioning_step": start} for start in (3, -1, 30)],
    "betas[0]": [{"betas": (b, 0.95)} for b in (0.8, 0.95)],
    "block": [{"max_preconditioner_dim": size} for size in (64, 128, 512, 1024)],
    "relative_eps": [{"relative_eps": eps} for eps in (1e-2, 1e-3, 1e-4, 1e-5, 1e-7)],
    "grafting": [{"grafting": name} for name in ("rmsprop", "adagrad", "sgd", "none")],
    "vectors": [{"precondition_1d": True}],
    "embeddings": [{"embeddings": True}],
    "root": [
        {"root_method": "eigh"},
        {"root_method": "eigh", "preconditioner_dtype": "float64"},
        {"bfloat16_roots": True},
    ],
    "average": [{"nesterov_average": False}],
    "defaults of before": [
        {
            "exponent": "paper",
            "betas": (0.9, 0.999),
            "start_preconditioning_step": -1,
            "max_preconditioner_dim": 1024,
            "nesterov_average": False,
        }
    ],
    "schedule of refreshes": [{"refresh_schedule": "staggered"}],
}
# Where Muon ends lower: what was tried for it, and how long a run takes there.
LOST: Sequence[Arguments] = [
    {"exponent": "paper"},
    {"relative_eps": 1e-5},
    {"relative_eps": 1e-4},
    {"relative_eps": 1e-4, "betas": (0.9, 0.9)},
    {"relative_eps": 1e-4, "start_preconditioning_step": -1},
    {"relative_eps": 1e-4, "max_preconditioner_dim": 1024},
    {"precondition_frequency": 5},
    {"max_preconditioner_dim": 128},
    {"max_preconditioner_dim": 64},
]
# Exponent and beta2, at the rate of the defaults: these, and what loses on all tasks with a grid of
# their own, are left out.
CROSSED: Sequence[Arguments] = [
    {"exponent": exponent, "betas": (0.9, beta2)}
    for exponent in ("paper", 2, 1.5)
    for beta2 in (0.9, 0.95, 0.99)
    if (exponent, beta2) != (2, 0.95)
]
ABLATION_TASKS = ("king-james-64", "fashion-cnn")
CHANGES: Mapping[str, Mapping[str, Sequence[Arguments]]] = {
    **dict.fromkeys(ABLATION_TASKS, ABLATIONS),
    **{task: {"crossed": CROSSED} for task in CROSSED_TASKS},
    "autoencoder": {"tried": LOST, "crossed": CROSSED},
}

WIDTHS = (64, 128, 256)
TRANSFER_TEXT = "cpython"


def table(tasks: Sequence[str], optimizers: Sequence[str]) -> list[Search]:
    """The searches of the main table."""
    return [Search.of(task, optimizer) for task in tasks for optimizer in optimizers]


def cell(task: str, exponent: Any, beta2: float) -> Search:
    """The search of one exponent and one beta2: a rate near that of the defaults, three seeds."""
    arguments = {"exponent": exponent, "betas": (0.9, beta2)}
    base = Trial(task, "shampoo", ROWS["shampoo"].rate, SEEDS[0], arguments=arguments)
    return Search(base, seeds=SEEDS[:1], variations=False, coarse=(-1, 0, 1), stride=1)


def cells(tasks: Sequence[str]) -> list[Search]:
    """Exponent and beta2 crossed."""
    return [cell(t, p, b) for t in tasks for p in EXPONENTS.values() for b in BETA2]


def transfer(width: int, has_transfer: bool) -> Search:
    """The search for the best rate at a width, with muP's rates and without."""
    optimizer = "shampoo-transfer" if has_transfer else "shampoo"
    base = Trial(f"{TRANSFER_TEXT}-{width}", optimizer, ROWS[optimizer].rate, SEEDS[0])
    return Search(base, variations=False)


def missing_of_searches(
    searches: Sequence[Search], records: Records, fresh: Sequence[int]
) -> list[Trial]:
    """What searches need next, in their order."""
    return [trial for search in searches for trial in search.missing(records, fresh)]


def missing_of_cells(searches: Sequence[Search], records: Records) -> list[Trial]:
    """The same for cells, whose seeds are not fresh: all judge on what is tuned on."""
    found: list[Trial] = []
    for search in searches:
        chosen, needed = search.choice(records)
        found += needed or (records.missing(_seeds(chosen)) if chosen else [])
    return found


def cell_runs(search: Search, records: Records) -> list[Record]:
    """The runs of a cell at its best rate, one a seed, as far as they are there."""
    chosen, _ = search.choice(records)
    runs = [] if chosen is None else [records.of(trial) for trial in _seeds(chosen)]
    return [run for run in runs if run is not None]


def ablations(tasks: Sequence[str], records: Records) -> dict[tuple[str, str], list[list[Trial]]]:
    """Of every task and kind of change: a list of trials, one a seed, for each change.

    The first list is that of the defaults. A task whose rate is not yet known has none.
    """
    found = {}
    for task in tasks:
        power, _ = Search.of(task, "shampoo").best_power(records)
        if power is None:
            continue
        best = Search.of(task, "shampoo").at(power, SEEDS[0])
        for name, changes in CHANGES[task].items():
            varied = [best, *(replace(best, arguments=change) for change in changes)]
            found[task, name] = [_seeds(trial) for trial in varied]
    return found


def missing_of_ablations(tasks: Sequence[str], records: Records) -> list[Trial]:
    """What ablations need next."""
    wanted = [t for rows in ablations(tasks, records).values() for seeds in rows for t in seeds]
    return records.missing(wanted)


def _seeds(trial: Trial) -> list[Trial]:
    return [replace(trial, seed=seed) for seed in CELL_SEEDS]
