"""What a block costs its owner: the seconds of a step, from geometry and a machine's constants.

A block of N elements with sides d_k costs, by algorithm.md 7.1,

- *accumulate*: ``N d_k`` FLOPs for each mode, half of a general product: factors are symmetric;
- *apply*: ``2 N d_k`` FLOPs for each mode;
- *root*: work proportional to ``d_k^3`` for each mode, once in ``precondition_frequency`` steps;
- *bytes*: its gradient, direction and moments, its factors and roots, read and written.

A mode that keeps only the diagonal of its factor moves bytes alone, and so does a block without
factors. Everything is integer and float arithmetic in a fixed order, so equal models give equal
costs, to the bit, on every rank: ownership is decided from them.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shampoo.blocks.layout import FACTORED, Layout

# Seconds a unit of work by the side of the factor: (side, seconds), sides ascending. Linear in
# between, constant outside.
Curve = tuple[tuple[int, float], ...]

_FLOP = 1 / 150e12  # seconds of a FLOP in the nominal model

# Numbers that move for each element of a block: gradient read and gathered, direction written,
# gradient average and second moment read and written. The moments are counted whether or not the
# group keeps them: betas may change while training, and owners must not change with them.
_ELEMENT_NUMBERS = 7
_FACTOR_NUMBERS = 3  # for each entry: factor read and written, root read
_DIAGONAL_NUMBERS = 3  # for each element, along a diagonal mode: squares summed, then scaled
_NUMBER_BYTES = 4


@dataclass(frozen=True)
class CostModel:
    """Constants of one machine.

    The default is nominal, not measured: an accelerator of 150 TFLOP/s and 2 TB/s on which a root
    of side d takes as long as ``100 d^3`` FLOPs. For balancing only its ratios count.

    Args:
        accumulate: seconds of a FLOP of a symmetric product, a curve over the factor's side.
        apply: seconds of a FLOP of the products that apply roots, likewise.
        root: seconds of one inverse root divided by the cube of its side, likewise.
        byte: seconds to move a byte of memory.
        machine: where the constants come from, in words.

    Raises:
        ValueError: for a constant that is negative or not finite, or an empty or unsorted curve.
    """

    accumulate: Curve = ((1, _FLOP),)
    apply: Curve = ((1, _FLOP),)
    root: Curve = ((1, 100 * _FLOP),)
    byte: float = 1 / 2e12
    machine: str = "nominal accelerator: 150 TFLOP/s, 2 TB/s, root = 100 d^3 FLOPs"

    def __post_init__(self) -> None:
        for name in ("accumulate", "apply", "root"):
            curve = getattr(self, name)
            if not _is_curve(curve):
                raise ValueError(
                    f"Invalid {name}={curve!r}. Must be pairs (side, seconds) with sides >= 1,"
                    " ascending, at least one."
                )
            for side, seconds in curve:
                _check_seconds(f"{name} at side {side}", seconds)
        _check_seconds("byte", self.byte)

    def ordinary_seconds(self, extent: Sequence[int], diagonal: Sequence[bool], rule: str) -> float:
        """Seconds of a step that refreshes no root, for the owner of a block.

        Args:
            extent: [o], the sides of the block.
            diagonal: [o], which modes keep only the factor's diagonal.
            rule: of the block's :class:`~shampoo.blocks.layout.Layout`.
        """
        numel = math.prod(extent)
        seconds, numbers = 0.0, _ELEMENT_NUMBERS * numel
        if rule == FACTORED:
            for side, is_diagonal in zip(extent, diagonal, strict=True):
                if is_diagonal:
                    numbers += _DIAGONAL_NUMBERS * numel
                    continue
                unit = _at(self.accumulate, side) + 2 * _at(self.apply, side)
                seconds += numel * side * unit
                numbers += _FACTOR_NUMBERS * side * side
        return seconds + numbers * _NUMBER_BYTES * self.byte

    def root_seconds(self, extent: Sequence[int], diagonal: Sequence[bool], rule: str) -> float:
        """Seconds to refresh all roots of a block once; arguments as in ``ordinary_seconds``."""
        if rule != FACTORED:
            return 0.0
        seconds = 0.0
        for side, is_diagonal in zip(extent, diagonal, strict=True):
            if not is_diagonal:
                seconds += side**3 * _at(self.root, side)
        return seconds

    def block_seconds(
        self, extent: Sequence[int], diagonal: Sequence[bool], rule: str, frequency: int
    ) -> float:
        """Seconds a step, the roots spread over the ``frequency`` steps of their period."""
        root = self.root_seconds(extent, diagonal, rule)
        return self.ordinary_seconds(extent, diagonal, rule) + root / frequency

    def layout_seconds(self, layout: Layout, frequency: int) -> list[float]:
        """``block_seconds`` of every block of a tensor, in row-major order of its grid."""
        costs = [0.0] * sum(tile.blocks for tile in layout.tiles)
        for tile in layout.tiles:
            cost = self.block_seconds(tile.extent, layout.diagonal, layout.rule, frequency)
            for index in tile.block_indices():
                costs[index] = cost
        return costs

    @classmethod
    def load(cls, path: str | Path) -> "CostModel":
        """Reads the ``cost_model`` of a JSON file, as ``python -m benchmarks.calibrate`` writes it.

        Raises:
            ValueError: if there is none, saying what is wrong with the file.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}. Must hold a cost_model.") from error
        model = values.get("cost_model") if isinstance(values, dict) else None
        names = {field.name for field in fields(cls)}
        if not isinstance(model, dict) or set(model) != names:
            raise ValueError(
                f"Invalid {path}: it holds no cost_model with just {', '.join(sorted(names))}."
                " Must be written by python -m benchmarks.calibrate."
            )
        return cls(**{name: _curve(value) for name, value in model.items()})

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON-like values."""
        return asdict(self)


def _curve(value: Any) -> Any:
    """Lists of pairs as the tuples they were before JSON; everything else as it is."""
    if not isinstance(value, list):
        return value
    return tuple(tuple(point) if isinstance(point, list) else point for point in value)


def _is_curve(value: Any) -> bool:
    if not isinstance(value, tuple) or not value:
        return False
    if not all(isinstance(point, tuple) and len(point) == 2 for point in value):
        return False
    sides = [side for side, _ in value]
    if not all(isinstance(side, int) and side >= 1 for side in sides):
        return False
    return sides == sorted(set(sides))


def _check_seconds(name: str, seconds: Any) -> None:
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not is_number or not 0.0 <= seconds < math.inf:
        raise ValueError(f"Invalid {name}={seconds!r}. Must be a finite number >= 0.0.")


def _at(curve: Curve, side: int) -> float:
    """The curve at a side. No logarithms, whose last bit differs between C libraries."""
    if side <= curve[0][0]:
        return curve[0][1]
    for (left, low), (right, high) in itertools.pairwise(curve):
        if side <= right:
            return low + (high - low) * ((side - left) / (right - left))
    return curve[-1][1]
