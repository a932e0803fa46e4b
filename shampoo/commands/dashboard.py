"""``python -m shampoo dashboard``: one page of a run's metrics, which needs nothing beside it."""

import argparse
import html
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from shampoo.commands.chart import Line, chart
from shampoo.commands.log import Run, read_log
from shampoo.commands.page import page
from shampoo.errors import shown_bytes

_PREFIX = "shampoo"
_ALL = "all groups"


class _Chart(NamedTuple):
    """A chart of one metric, a line for each group; ``band``: between those with _min and _max."""

    metric: str
    title: str
    note: str
    is_log: bool
    band: bool = False


_SECTIONS = {
    "Steps": (
        _Chart("update_ratio", "Update / weight", "RMS of a step over that of the weights", True),
        _Chart("grad_rms", "Gradient", "RMS of the gradients", True),
        _Chart("update_rms", "Update", "RMS of what a step moves weights by", True),
        _Chart("weight_rms", "Weight", "RMS of the weights before the step", True),
    ),
    "Preconditioning": (
        _Chart("graft_scale", "Graft scale", "length of D over that of P, geometric mean", True),
        _Chart("preconditioned", "Preconditioned", "share of blocks with their own P", False),
        _Chart("eig_over_ridge", "Spectra", "largest eigenvalue / ridge, with range", True, True),
        _Chart("root_error", "Root error", "worst commutator of a root in use", True),
    ),
    "Roots": (
        _Chart("root_age", "Age of roots", "steps since they were taken, mean", False),
        _Chart("root_age_max", "Oldest root", "steps since it was taken", False),
        _Chart("root_failures", "Failures", "factors whose last refresh gave no root", False),
        _Chart("root_failures_in_a_row", "Failures in a row", "the most of a factor", False),
        _Chart("skipped_steps", "Skipped steps", "so far", False),
    ),
}
_KNOWN = {each.metric for section in _SECTIONS.values() for each in section}
_KNOWN |= {"eig_over_ridge_min", "eig_over_ridge_max", "step", "state_bytes"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("log", type=Path, help="lines of JSON: metrics() with a step, one a line")
    parser.add_argument("--out", type=Path, help="the page; default: beside the log, as .html")
    parser.add_argument("--title", help="default: the name of the log")


def run(options: argparse.Namespace) -> None:
    """Reads a log, writes the page, and prints where it is."""
    out = options.out or options.log.with_suffix(".html")
    if out.resolve() == options.log.resolve():
        raise ValueError(f"Invalid --out={str(out)!r}. Must be another file than the log.")
    found = dashboard(read_log(options.log), options.title or options.log.name)
    out.write_text(found, encoding="utf-8")
    print(out)


def dashboard(log: Run, title: str) -> str:
    """The page of a run, as HTML."""
    steps = sorted({step for points in log.values() for step, _ in points})
    subtitle = f"{len(steps):,} records, steps {steps[0]:,.6g} to {steps[-1]:,.6g}"
    parts = [f"<dl>{''.join(_tiles(log))}</dl>"]
    others = [name for name in log if _split(name)[1] not in _KNOWN]
    if others:
        drawn = [chart(name, "", [Line(name, 0, log[name])], False) for name in others]
        parts.append(_section("The run", drawn))
    for name, charts in _SECTIONS.items():
        drawn = [_drawn(log, each) for each in charts if _groups(log, each.metric)]
        if drawn:
            parts.append(_section(name, drawn))
    return page(html.escape(title), subtitle, "\n".join(parts))


def _section(title: str, figures: list[str]) -> str:
    return f"<h2>{html.escape(title)}</h2><section>{''.join(figures)}</section>"


def _split(name: str) -> tuple[str | None, str]:
    """The group and the metric that a name stands for; no group for what is not of ours."""
    if not name.startswith(f"{_PREFIX}/"):
        return None, ""
    group, _, metric = name.removeprefix(f"{_PREFIX}/").rpartition("/")
    return group or _ALL, metric


def _groups(log: Run, metric: str | None = None) -> list[str]:
    """The groups that have a metric, or any; all together first."""
    splits = [_split(name) for name in log]
    found = [group for group, each in splits if group and metric in (each, None)]
    return sorted(dict.fromkeys(found), key=lambda group: group != _ALL)


def _points(log: Run, group: str, metric: str) -> list[tuple[float, float]]:
    middle = "" if group == _ALL else f"{group}/"
    return log.get(f"{_PREFIX}/{middle}{metric}", [])


def _drawn(log: Run, each: _Chart) -> str:
    lines, groups = [], _groups(log, each.metric)
    if len(groups) == 2:
        groups = groups[1:]  # all together are that one
    colors = _groups(log)  # a group has one color on all of the page
    for group in groups:
        edges = [_points(log, group, f"{each.metric}_{edge}") for edge in ("min", "max")]
        band = edges if each.band else [[], []]
        lines.append(Line(group, colors.index(group), _points(log, group, each.metric), *band))
    return chart(each.title, each.note, lines, each.is_log)


def _tiles(log: Run) -> Iterator[str]:
    """The run in a few numbers."""

    def last(metric: str) -> float | None:
        points = _points(log, _ALL, metric)
        return points[-1][1] if points else None

    def worst(metric: str) -> float | None:
        return max((value for _, value in _points(log, _ALL, metric)), default=None)

    for name, value, is_bad in (
        ("update / weight, last", last("update_ratio"), False),
        ("skipped steps", last("skipped_steps"), bool(last("skipped_steps"))),
        ("roots that failed, most", worst("root_failures"), bool(worst("root_failures"))),
        ("root error, worst", worst("root_error"), False),
        ("oldest root, most", worst("root_age_max"), False),
    ):
        if value is not None:
            yield _tile(name, f"{value:,.3g}", is_bad)
    if (share := last("preconditioned")) is not None:
        yield _tile("blocks preconditioned", f"{share:.0%}", False)
    if (held := last("state_bytes")) is not None:
        yield _tile("state", shown_bytes(int(held)), False)


def _tile(name: str, value: str, is_bad: bool) -> str:
    mark = ' class="bad"' if is_bad else ""
    return f"<div><dt>{html.escape(name)}</dt><dd{mark}>{html.escape(value)}</dd></div>"
