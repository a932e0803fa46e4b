"""Line charts as SVG, in the colors of the page they stand on, light or dark."""

import html
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 520, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 508, 10, 192
_MOST = 500  # points of a line: what a screen can show of it
_COLORS = 8


@dataclass(frozen=True)
class Line:
    """A line, and the band that it runs in, if it has one.

    Attributes:
        name: for the legend.
        color: its number among the colors of the page, which begin again after the last.
        points: ``step, value``, ascending.
        low: the lower edge of the band.
        high: the upper edge.
    """

    name: str
    color: int
    points: Points
    low: Points = ()
    high: Points = ()


class _Axis:
    """From values to places, evenly or by logarithms."""

    def __init__(self, values: Sequence[float], begin: float, end: float, is_log: bool) -> None:
        self._begin, self._end, self._is_log = begin, end, is_log
        low, high = min(values), max(values)
        if is_log:
            low, high = math.log10(low), math.log10(high)
            if high - low < 0.3:
                low, high = low - 0.15, high + 0.15
        else:
            low = min(low, 0.0) if low < 0.5 * high else low
            if high - low < 1e-12 * max(1.0, abs(high)):
                low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
        self._low, self._high = low, high

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self._is_log else value
        return self._begin + (at - self._low) / (self._high - self._low) * (self._end - self._begin)

    def ticks(self) -> list[float]:
        """Round values on it, a handful."""
        if not self._is_log:
            span = self._high - self._low
            size = 10.0 ** math.floor(math.log10(span / 4))
            size *= next(factor for factor in (1, 2, 5, 10) if span / (size * factor) <= 5)
            first = math.ceil(self._low / size - 1e-9)
            last = math.floor(self._high / size + 1e-9)
            return [index * size for index in range(first, last + 1)]
        first, last = math.floor(self._low), math.ceil(self._high)
        stride = max(1, round((last - first) / 5))
        factors = (1, 2, 5) if self._high - self._low < 2 else (1,)
        every = [f * 10.0**power for power in range(first, last + 1, stride) for f in factors]
        return [tick for tick in every if self._low - 1e-9 <= math.log10(tick) <= self._high + 1e-9]


def chart(title: str, note: str, lines: Sequence[Line], is_log: bool) -> str:
    """A figure with a title, a line of explanation, the plot and a legend.

    Args:
        is_log: whether values are shown by logarithms; those that are not positive are left out.
    """
    if is_log:
        lines = [_positive(line) for line in lines]
    lines = [line for line in lines if line.points]
    values = [v for each in lines for side in (each.points, each.low, each.high) for _, v in side]
    head = f"<figcaption><b>{html.escape(title)}</b><span>{html.escape(note)}</span></figcaption>"
    if not values:
        return f"<figure>{head}<p>Nothing was logged.</p></figure>"
    x = _Axis([step for line in lines for step, _ in line.points], _LEFT, _RIGHT, False)
    y = _Axis(values, _BOTTOM, _TOP, is_log)
    body = [*_grid(x, y)]
    for line in lines:
        body += _drawn(line, x, y)
    legend = "".join(f'<li class="{_class(line)}">{html.escape(line.name)}</li>' for line in lines)
    data = {
        "x": [_LEFT, _RIGHT, *(float(edge) for edge in (x._low, x._high))],
        "lines": [{"name": line.name, "points": _thinned(line.points)} for line in lines],
    }
    return (
        f'<figure>{head}<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
        f' aria-label="{html.escape(title)}">{"".join(body)}'
        f'<line class="cursor" y1="{_TOP}" y2="{_BOTTOM}"/></svg>'
        f"<ul>{legend}</ul><output></output>"
        f'<script type="application/json">{_safe(json.dumps(data))}</script></figure>'
    )


def _safe(text: str) -> str:
    """JSON that ends no element it stands in."""
    return text.replace("<", "\\u003c")


def _positive(line: Line) -> Line:
    sides = (line.points, line.low, line.high)
    kept = ([(step, value) for step, value in side if value > 0] for side in sides)
    return Line(line.name, line.color, *kept)


def _class(line: Line) -> str:
    return f"c{line.color % _COLORS}"


def _grid(x: _Axis, y: _Axis) -> Iterator[str]:
    for tick in y.ticks():
        at = y(tick)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text class="y" x="{_LEFT - 6}" y="{at + 3.5:.1f}">{_label(tick)}</text>'
    for tick in x.ticks():
        yield f'<text class="x" x="{x(tick):.1f}" y="{_BOTTOM + 17}">{_label(tick)}</text>'
    yield f'<line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{_BOTTOM}" y2="{_BOTTOM}"/>'


def _label(value: float) -> str:
    """A number in few characters."""
    size = abs(value)
    if size != 0 and not 1e-3 <= size < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.6g}"


def _drawn(line: Line, x: _Axis, y: _Axis) -> Iterator[str]:
    """The band and the line, or a dot where there is one point."""
    color = _class(line)
    if line.low and line.high:
        edge = [*_thinned(line.high), *reversed(_thinned(line.low))]
        yield f'<polygon class="band {color}" points="{_places(edge, x, y)}"/>'
    points = _thinned(line.points)
    if len(points) == 1:
        step, value = points[0]
        yield f'<circle class="{color}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>'
    else:
        yield f'<polyline class="{color}" points="{_places(points, x, y)}"/>'


def _places(points: Points, x: _Axis, y: _Axis) -> str:
    return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)


def _thinned(points: Points) -> list[tuple[float, float]]:
    """As many points as can be seen: of each run its least and its largest, no peak less."""
    if len(points) <= _MOST:
        return list(points)
    length = -(-2 * len(points) // _MOST)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), length):
        run = points[start : start + length]
        ends = {min(run, key=lambda point: point[1]), max(run, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept
