"""What a block costs its owner: the seconds of a step, from its work and a machine's constants.

Work is what a kind of preconditioner says (:class:`Cost`). For Shampoo, a block of N elements with
sides d_k costs, by algorithm.md 7.1,

- *accumulate*: ``N d_k`` FLOPs for each mode, half of a general product: factors are symmetric;
- *apply*: ``2 N d_k`` FLOPs for each mode;
- *root*: work proportional to ``d_k^3`` for each mode, once in ``precondition_frequency`` steps;
- *bytes*: its gradient, direction and moments, its factors and roots, read and written.

A mode that keeps only the diagonal of its factor moves bytes alone, and so does a block without
factors. Everything is integer and float arithmetic in a fixed order, so equal models give equal
costs, to the bit, on every rank: ownership is decided from them.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shampoo.blocks.blocking import Tile
from shampoo.errors import shown
from shampoo.inputs import check_object, is_integer, is_number, read_json

# Seconds a unit of work by the side of the factor: (side, seconds), sides ascending. Linear in
# between, constant outside.
Curve = tuple[tuple[int, float], ...]

_FLOP = 1 / 150e12  # seconds of a FLOP in the nominal model

# Numbers that move for each element of a block: gradient read and gathered, direction written,
# gradient average and second moment read and written. The moments are counted whether or not the
# group keeps them: betas may change while training, and owners must not change with them.
_ELEMENT_NUMBERS = 7
_NUMBER_BYTES = 4

DEFAULT_FREQUENCY = 10  # of refreshes: the default of precondition_frequency

# Between 10 and 17 every bound gives the same blocks, on the nominal accelerator and on a CPU,
# nominal or measured: benchmarks/NOTES.md.
_ROOTS_TO_ELEMENTWISE = 12
_LONGEST_SIDE = 1 << 16  # of a machine whose roots cost nothing

# Of a model that is read. With these no cost of a block is beyond a float.
_MOST_SECONDS = 1e6
_MOST_SIDE = 1 << 53
_MOST_POINTS = 1000
_MOST_WORDS = 200


@dataclass(frozen=True)
class Products:
    """Products of a block of N elements with matrices of one of its sides, in an ordinary step.

    Attributes:
        side: d, of the mode.
        symmetric: how many are symmetric, of ``N d`` FLOPs: what statistics take.
        general: how many are not, of ``2 N d`` FLOPs: what applying a matrix takes.
    """

    side: int
    symmetric: int = 1
    general: int = 1


@dataclass(frozen=True)
class Cost:
    """The work that a block gives its owner.

    Attributes:
        numel: N, elements of the block.
        products: of an ordinary step, a mode.
        numbers: that an ordinary step reads or writes beside the gradient, the direction and both
            moments, which move for any block.
        refreshed: the sides that a refresh renews, each with how many inverse roots of that side,
            their bytes among them, it takes as long as.
    """

    numel: int
    products: tuple[Products, ...] = ()
    numbers: int = 0
    refreshed: tuple[tuple[int, int], ...] = ()


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
        ValueError: for a constant that is negative or above 1e6, an empty, unsorted or endless
            curve, or words that cannot be printed.
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
                    f"Invalid {name}={shown(curve)}. Must be pairs (side, seconds) with sides >= 1"
                    f" and <= {_MOST_SIDE}, ascending, at least one and at most {_MOST_POINTS}."
                )
            for side, seconds in curve:
                _check_seconds(f"{name} at side {side}", seconds)
        _check_seconds("byte", self.byte)
        words = self.machine
        if not isinstance(words, str) or len(words) > _MOST_WORDS or not words.isprintable():
            raise ValueError(
                f"Invalid machine={shown(words)}. Must be at most {_MOST_WORDS} characters that"
                " can be printed."
            )

    def ordinary_seconds(self, cost: Cost) -> float:
        """Seconds of a step that refreshes nothing, for the owner of a block."""
        seconds = 0.0
        for products in cost.products:
            unit = products.symmetric * _at(self.accumulate, products.side)
            unit += 2 * products.general * _at(self.apply, products.side)
            seconds += cost.numel * products.side * unit
        numbers = _ELEMENT_NUMBERS * cost.numel + cost.numbers
        return seconds + numbers * _NUMBER_BYTES * self.byte

    def refresh_seconds(self, cost: Cost) -> float:
        """Seconds to refresh all modes of a block once."""
        seconds = 0.0
        for side, roots in cost.refreshed:
            seconds += self.root_seconds(side, roots)
        return seconds

    def root_seconds(self, side: int, roots: int = 1) -> float:
        """Seconds of some inverse roots of one side."""
        return side**3 * roots * _at(self.root, side)

    def block_seconds(self, cost: Cost, frequency: int) -> float:
        """Seconds a step, refreshes spread over the ``frequency`` steps of their period."""
        return self.ordinary_seconds(cost) + self.refresh_seconds(cost) / frequency

    def grid_seconds(
        self, tiles: Sequence[Tile], frequency: int, cost_of: Callable[[tuple[int, ...]], Cost]
    ) -> list[float]:
        """``block_seconds`` of every block of a tensor, in row-major order of its grid.

        Args:
            tiles: of the tensor.
            cost_of: the work of a block, by its sides.
        """
        costs = [0.0] * sum(tile.blocks for tile in tiles)
        for tile in tiles:
            seconds = self.block_seconds(cost_of(tile.extent), frequency)
            for index in tile.block_indices():
                costs[index] = seconds
        return costs

    @classmethod
    def load(cls, path: str | Path) -> "CostModel":
        """Reads the ``cost_model`` of a JSON file, as ``python -m benchmarks.calibrate`` writes it.

        Raises:
            ValueError: if there is none, saying what is wrong with the file.
        """
        names = {field.name for field in fields(cls)}
        try:
            model = check_object(read_json(path), "it").get("cost_model")
            if not isinstance(model, dict) or set(model) != names:
                raise ValueError(f"it holds no cost_model with just {', '.join(sorted(names))}.")
        except ValueError as error:
            raise ValueError(
                f"Invalid {shown(str(path))}: {error} Must be written by"
                " python -m benchmarks.calibrate."
            ) from error
        return cls(**{name: _curve(value) for name, value in model.items()})

    def affordable_side(self) -> int:
        """The largest power of two that a block may have as its sides for ``"auto"``.

        Roots of two such sides, refreshed every 10 steps, take a step at most 12 times as long as
        an elementwise optimizer needs for the block, which moves its numbers through memory and no
        more. Products are left out: they grow with the side as roots do, so that the ratio of the
        two says nothing about a side.
        """
        side = 1
        while side < _LONGEST_SIDE:
            numel = (2 * side) ** 2
            roots = self.root_seconds(2 * side, roots=2) / DEFAULT_FREQUENCY
            if roots > _ROOTS_TO_ELEMENTWISE * self.ordinary_seconds(Cost(numel)):
                break
            side *= 2
        return side

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON-like values."""
        return asdict(self)


def _curve(value: Any) -> Any:
    """Lists of pairs as the tuples they were before JSON; everything else as it is."""
    if not isinstance(value, list):
        return value
    return tuple(tuple(point) if isinstance(point, list) else point for point in value)


def _is_curve(value: Any) -> bool:
    if not isinstance(value, tuple) or not 1 <= len(value) <= _MOST_POINTS:
        return False
    if not all(isinstance(point, tuple) and len(point) == 2 for point in value):
        return False
    sides = [side for side, _ in value]
    if not all(is_integer(side, 1, _MOST_SIDE) for side in sides):
        return False
    return sides == sorted(set(sides))


def _check_seconds(name: str, seconds: Any) -> None:
    if not is_number(seconds, 0.0, _MOST_SECONDS):
        raise ValueError(
            f"Invalid {name}={shown(seconds)}. Must be a finite number >= 0.0 and"
            f" <= {_MOST_SECONDS}."
        )


def _at(curve: Curve, side: int) -> float:
    """The curve at a side. No logarithms, whose last bit differs between C libraries."""
    if side <= curve[0][0]:
        return curve[0][1]
    for (left, low), (right, high) in itertools.pairwise(curve):
        if side <= right:
            return low + (high - low) * ((side - left) / (right - left))
    return curve[-1][1]


ACCELERATOR = CostModel()

# What python -m benchmarks.calibrate measures on two cores of a server, in round numbers.
_CPU_FLOP = 1 / 200e9
CPU = CostModel(
    accumulate=((1, _CPU_FLOP),),
    apply=((1, _CPU_FLOP),),
    root=((1, 30 * _CPU_FLOP),),
    byte=1 / 32e9,
    machine="nominal CPU: 200 GFLOP/s, 32 GB/s, root = 30 d^3 FLOPs",
)


@functools.cache
def default_side(device_type: str) -> int:
    """What ``max_preconditioner_dim="auto"`` is on a device: arithmetic, alike on all ranks.

    Args:
        device_type: ``"cpu"``; every other, ``"meta"`` too, counts as the nominal accelerator.
    """
    return (CPU if device_type == "cpu" else ACCELERATOR).affordable_side()
