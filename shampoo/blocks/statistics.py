"""What a kind of preconditioner has of some blocks of one shape: its own state, mode by mode."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shampoo.blocks.declared import NONE
from shampoo.blocks.rows import Copies
from shampoo.blocks.stacks import FactorStack
from shampoo.ops.transit import Letter, is_near


@dataclass
class Readiness:
    """What is known of some blocks for good: that all of their modes have been refreshed.

    A step never takes that back, so the answer yes is final. When the host hears it changes no
    number: until then directions are masked where no mask is needed.
    """

    is_known: bool = False
    asked: Letter | None = None  # the answer to the last question, on its way

    def ask(self, flags: Sequence[Tensor]) -> bool:
        """Whether all modes are ready, as far as the host knows: it waits for no device.

        Args:
            flags: of every mode that is refreshed, [B] bool.
        """
        if self.is_known:
            return True
        if all(is_near(each.device) for each in flags):
            self.is_known = all(bool(each.all()) for each in flags)
            return self.is_known
        if self.asked is not None and self.asked.has_arrived():
            self.is_known, self.asked = bool(self.asked.read()), None
        if not self.is_known and self.asked is None:
            self.asked = Letter(torch.stack([each.all() for each in flags]).all())
        return self.is_known


@dataclass(frozen=True)
class Mode:
    """One mode of B blocks.

    Attributes:
        kept: how it is kept: ``FULL``, ``DIAGONAL`` or ``NONE``.
        state: by name, [B, *shape(d)], as the kind declares it for modes that are so kept.
        ready: [B] bool, whether each has been refreshed; None where there is nothing to refresh.
        moved: the names in ``state`` that move in every step.
    """

    kept: str = NONE
    state: dict[str, Tensor] = field(default_factory=dict)
    ready: Tensor | None = None
    moved: tuple[str, ...] = ()

    @classmethod
    def of(cls, factors: tuple[FactorStack, int] | None, row: int, count: int) -> "Mode":
        """The mode of ``count`` blocks from ``row`` of their stack on, as views.

        Args:
            factors: of the mode: where the stack keeps it, and in which row of that it begins.
        """
        if factors is None:
            return cls()
        stack, first = factors
        rows = slice(first + row, first + row + count)
        return cls(
            stack.mode,
            {name: tensor[rows] for name, tensor in stack.state.items()},
            stack.ready[rows] if stack.is_refreshed else None,
            tuple(state.name for state in stack.declared if state.moves_every_step),
        )

    def narrowed(self, run: slice) -> "Mode":
        """That of a run of the blocks, as views."""
        state = {name: tensor[run] for name, tensor in self.state.items()}
        return Mode(self.kept, state, None if self.ready is None else self.ready[run], self.moved)


@dataclass(frozen=True)
class Statistics:
    """What a kind keeps of B blocks of shape d_1 .. d_o: it reads and writes this, in place.

    Attributes:
        extent: d_1 .. d_o.
        modes: [o].
        block_state: by name, [B, d_1 .. d_o], as the kind declares it.
        blocks: where numbers of these blocks lie among those of all active blocks of a segment.
        readiness: of all blocks that these are some of.
    """

    extent: tuple[int, ...]
    modes: tuple[Mode, ...]
    block_state: dict[str, Tensor]
    blocks: slice
    readiness: Readiness

    def narrowed(self, run: slice, first: int) -> "Statistics":
        """Those of a run of the blocks, as views.

        Args:
            first: how many active blocks the segment has before these.
        """
        return Statistics(
            self.extent,
            tuple(mode.narrowed(run) for mode in self.modes),
            {name: tensor[run] for name, tensor in self.block_state.items()},
            slice(first, first + run.stop - run.start),
            self.readiness,
        )

    def copied(self, rows: Tensor) -> "Statistics":
        """Those of some of the blocks, [R], copied as far as they are asked for."""
        modes = tuple(
            Mode(
                mode.kept,
                Copies(mode.state, rows),
                None if mode.ready is None else mode.ready.index_select(0, rows),
                mode.moved,
            )
            for mode in self.modes
        )
        block_state = Copies(self.block_state, rows)
        return Statistics(self.extent, modes, block_state, self.blocks, self.readiness)

    def put_back(self) -> None:
        """Puts back what moves in every step, of copies."""
        for mode in self.modes:
            _put_back(mode.state, mode.moved)
        _put_back(self.block_state, tuple(self.block_state))


def _put_back(state: dict[str, Tensor], names: Iterable[str]) -> None:
    assert isinstance(state, Copies)
    state.put_back(names)
