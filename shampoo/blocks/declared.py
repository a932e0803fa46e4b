"""What a kind of preconditioner says of itself: all that storage, checkpoints and plans need.

A kind is one file of :mod:`shampoo.preconditioner`, which lies above this package. What it keeps is
data: one tensor a mode of a block, one number an element. Whoever allocates, publishes, saves,
gathers or counts reads these declarations, and knows no kind by name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shampoo.blocks.cost import Cost

# The name of a count that ``max_root_failures`` bounds, where a kind keeps one for a mode:
# refreshes in a row that have failed.
FAILURES = "failures"

# What is kept for one mode of a block.
FULL, DIAGONAL, NONE = "full", "diagonal", "none"


@dataclass(frozen=True)
class ModeState:
    """One tensor a mode: ``[K, *shape(d)]`` in a stack, published as ``block{k}.{name}{m}``.

    Of the tensors of a mode, the first is the statistic to which a ridge is added: ``[d, d]``, if
    the mode is refreshed.

    Attributes:
        name: lower-case letters and underscores.
        shape: of the tensor of one factor, by the side d of its mode.
        dtype: None for ``preconditioner_dtype``. Integers are counts, without sides.
        moves_every_step: whether ``accumulate`` writes it; if not, ``refresh`` does.
        decides_ready: whether ``are_ready`` looks at it. A mode with such a tensor is refreshed:
            it has a flag and a phase.
        is_lasting: whether a block cannot go on without it; if it can, it may begin at zero.
    """

    name: str
    shape: Callable[[int], tuple[int, ...]]
    dtype: torch.dtype | None = None
    moves_every_step: bool = False
    decides_ready: bool = False
    is_lasting: bool = True

    @property
    def is_count(self) -> bool:
        """Whether it is a whole number."""
        return self.dtype is not None and not self.dtype.is_floating_point


@dataclass(frozen=True)
class BlockState:
    """One number an element, in ``preconditioner_dtype``, published as ``block{k}.{name}``.

    ``accumulate`` writes it. Without it a block cannot go on.
    """

    name: str


class Kind:
    """A kind of preconditioner, as far as it is data. Stateless, one object for each kind.

    Attributes:
        name: by which a parameter group chooses it, if it has a direction of its own.
        mode_state: what is kept for a mode, by how it is kept (``FULL``, ``DIAGONAL``).
        block_state: what is kept for a block.
        preconditions: whether it has a direction of its own; if not, blocks follow their graft.
        borrows: whether the second moment beside it is that of the group's ``grafting``; if not, it
            is moved by ``betas[1]`` and ``eps``, and nothing is rescaled.
        stream: of random numbers; other for kinds that may move blocks of one group.
        former_exponent: the ``exponent`` that a group of it was trained with when that had no name
            and nothing else was asked for.
    """

    name: ClassVar[str]
    mode_state: ClassVar[Mapping[str, tuple[ModeState, ...]]] = {}
    block_state: ClassVar[tuple[BlockState, ...]] = ()
    preconditions: ClassVar[bool] = True
    borrows: ClassVar[bool] = True
    stream: ClassVar[int] = 0
    former_exponent: ClassVar[str] = "paper"

    def modes(self, extent: Sequence[int], diagonal: Sequence[bool]) -> tuple[str, ...]:
        """What is kept for every mode of a block.

        Args:
            extent: [o], the sides of the block.
            diagonal: [o], for which of them a matrix would take too much memory.

        Returns:
            [o], ``FULL``, ``DIAGONAL`` or ``NONE``.
        """
        return (NONE,) * len(extent)

    def cost(self, extent: Sequence[int], modes: Sequence[str]) -> Cost:
        """The work of an ordinary step and of a refresh, for the owner of a block.

        Args:
            extent: [o], the sides of the block.
            modes: [o], as :meth:`modes` gives them.
        """
        return Cost(math.prod(extent))

    def are_ready(self, state: Mapping[str, Tensor]) -> Tensor:
        """Which of K factors have been refreshed, [K] bool: by their state, by name."""
        raise NotImplementedError(f"{self.name} declares nothing that decides it")

    def memory(self, count: int) -> object:
        """What is remembered of K factors between refreshes and no checkpoint holds, on the host.

        Made with their state, since a step that communicates asks for no memory.
        """
        return None

    def mode_numbers(self, extent: Sequence[int], diagonal: Sequence[bool]) -> int:
        """Numbers in ``preconditioner_dtype`` that the modes of a block hold; as in `modes`."""
        return sum(
            math.prod(state.shape(side))
            for side, mode in zip(extent, self.modes(extent, diagonal), strict=True)
            for state in self.mode_state.get(mode, ())
            if state.dtype is None
        )


STREAMS = 3  # how many streams of random numbers a group has

MODE_STATE: dict[str, ModeState] = {}  # by name, of all kinds
BLOCK_STATE: dict[str, BlockState] = {}
_choices: dict[str, None] = {}


def declare(kind: Kind) -> None:
    """Makes a kind known: its name, and the names of what it keeps.

    Raises:
        ValueError: if another kind keeps something else by one of the names. Checkpoints know state
            by its name alone.
    """
    for state in (state for states in kind.mode_state.values() for state in states):
        known = MODE_STATE.setdefault(state.name, state)
        if (known.dtype, known.is_lasting) != (state.dtype, state.is_lasting):
            raise ValueError(
                f"Invalid name={state.name!r} of state of the kind {kind.name!r}. Must be another:"
                " a kind keeps something of another dtype, or lasting differently, by it."
            )
    BLOCK_STATE.update({state.name: state for state in kind.block_state})
    if kind.preconditions:
        _choices[kind.name] = None


def choices() -> tuple[str, ...]:
    """The names that a parameter group may choose among."""
    return tuple(_choices)
