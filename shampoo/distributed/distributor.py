"""How a team moves gradients to the owners of blocks and search directions back.

The step asks a distributor where gradients and weights lie, and hands it the direction of every
segment; what happens in between depends on who holds what. :class:`SingleProcess` is one rank that
owns all it holds; the others are in :mod:`shampoo.distributed.all_gather` and
:mod:`shampoo.distributed.all_to_all`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo import ops
from shampoo.blocks.declared import STREAMS
from shampoo.blocks.segments import Segment
from shampoo.blocks.stacks import Arena
from shampoo.hyperparameters import Hyperparameters
from shampoo.kernels.reference.ops import momentum_direction
from shampoo.ops.limits import scale_
from shampoo.scalars import Scalars

Blocks = tuple[Sequence[Tensor], Tensor]  # tensors, and the tiles of a segment's blocks in them


class StepInputs(NamedTuple):
    """What one step brings: this rank's part of every planned parameter, and its group's values."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    present: tuple[bool, ...]  # which parameters have a gradient
    hyper: Sequence[Hyperparameters]  # by parameter group


_NO_INPUTS = StepInputs((), (), (), ())


def decay_of_move(arena: Arena, hyper: Hyperparameters) -> float:
    """The decoupled decay of ``W <- (1 - lr weight_decay) W``, which acts where weights are moved.

    With momentum, and for LARS and LAMB, it is part of the direction instead.
    """
    in_direction = hyper.momentum > 0 or arena.is_layerwise
    return 0.0 if in_direction else hyper.decoupled_decay


def needs_weights(is_layerwise: bool, hyper: Hyperparameters) -> bool:
    """Whether the owner of a block must know its weights to find the direction."""
    in_gradient = hyper.weight_decay != 0.0 and not hyper.decoupled_weight_decay
    in_direction = hyper.momentum > 0 and hyper.decoupled_decay != 0.0
    return in_gradient or in_direction or is_layerwise


class Distributor(ABC):
    """What the step asks for, in the order in which it asks."""

    def __init__(self) -> None:
        self.inputs = _NO_INPUTS

    def open(self, inputs: StepInputs) -> None:
        """Takes a step's parameters and gradients. No communication: this may fail."""
        self.inputs = inputs

    def close(self) -> None:
        """Lets go of the gradients, which would outlive ``zero_grad()``."""
        self.inputs = _NO_INPUTS

    def fetch(self) -> None:  # noqa: B027, to do nothing is right where gradients are whole
        """Brings gradients to the owners of their blocks, where they do not have them."""

    def gradients(self, segment: Segment) -> Blocks:
        """Where the gradients of a segment lie: perhaps where its directions will be."""
        params, grads, present, _ = self.inputs
        if False not in present:
            there: Any = grads
            return list(map(there.__getitem__, segment.members)), segment.tiles
        # Where there is no gradient, something that no tile names keeps the others in their places.
        return [
            params[member] if (grad := grads[member]) is None else grad
            for member in segment.members
        ], segment.tiles

    def weights(self, segment: Segment) -> Blocks:
        """Where the weights of a segment lie: perhaps where those of the one before did."""
        return list(map(self.inputs.params.__getitem__, segment.members)), segment.tiles

    @abstractmethod
    def apply_direction(
        self, arena: Arena, segment: Segment, hyper: Hyperparameters, scalars: Scalars
    ) -> None:
        """Takes the finished ``P = scale * direction`` of a segment: steps 8 to 10."""

    def sum_(self, values: Tensor) -> None:  # noqa: B027, the sum of one rank is there
        """Adds up what the ranks of the team know, in place."""

    def send(self, status: int) -> int:
        """Sends the directions with this rank's status; returns the team's, once they are here."""
        return status

    def move(
        self, arena: Arena, members: Sequence[int], direction: Tensor, tiles: Tensor, ones: Tensor
    ) -> None:
        """W <- W - lr D for the tiles of some parameters, where D is what travelled."""
        hyper = self.inputs.hyper[arena.group]
        ops.update_blocks_(
            [self.inputs.params[member] for member in members],
            None,
            direction,
            ones.to(direction.dtype),
            tiles,
            hyper.lr,
            decay_of_move(arena, hyper),
            0.0,
            False,
        )

    def apply(self) -> None:  # noqa: B027, directions may have been applied on delivery
        """Moves the parameters by the directions that came."""


class SingleProcess(Distributor):
    """One rank owns all blocks of what it holds: directions go straight into the parameters."""

    def apply_direction(
        self, arena: Arena, segment: Segment, hyper: Hyperparameters, scalars: Scalars
    ) -> None:
        """M <- mu M + P, W <- W - lr D."""
        momentum = segment.moments.get("momentum") if hyper.momentum > 0 else None
        dtype = segment.direction.dtype if momentum is None else momentum.dtype
        scale = segment.scale.to(dtype)
        ops.update_blocks_(
            list(map(self.inputs.params.__getitem__, segment.members)),
            momentum,
            segment.direction.to(dtype),  # wider only for float64 parameters
            # A ratio of norms knows nothing of steps that are not taken.
            scalars.gate(scale) if arena.is_layerwise else scale,
            segment.tiles,
            scalars.lr,
            # LARS and LAMB have it in P. A product, since it may be a number on the device.
            scalars.decay * 0.0 if arena.is_layerwise else scalars.decay,
            scalars.momentum,
            hyper.nesterov,
            *((_seed(arena, segment), scalars.step) if hyper.stochastic_rounding else ()),
        )


def _seed(arena: Arena, segment: Segment) -> int:
    """Another one for every segment of an optimizer: the same random numbers would be drawn."""
    return (STREAMS * arena.group + arena.kind.stream) << 40 | segment.start


def search_direction(
    arena: Arena, segment: Segment, hyper: Hyperparameters, weights: Callable[[Segment], Blocks]
) -> Tensor:
    """D of steps 8 and 9, ``P <- P + weight_decay W``, ``M <- mu M + P``, for another to apply.

    In the order of roundings of ``update_blocks_``, which does the same where the owner of a block
    also moves its parameter.

    Args:
        weights: says where those of a segment lie.

    Returns:
        [numel] of the segment, in the dtype of momentum, else of the direction; state, perhaps.
    """
    momentum = segment.moments.get("momentum") if hyper.momentum > 0 else None
    direction = segment.direction.to(arena.dtype if momentum is None else momentum.dtype)
    weight = None
    if momentum is not None and hyper.decoupled_decay != 0.0 and not arena.is_layerwise:
        weight = torch.empty_like(direction)
        ops.gather_blocks_(weight, *weights(segment), 1.0, False)
    for part in segment.parts:
        blocks = part.of(direction)
        moved = part.take(blocks)
        scale_(moved, segment.scale[part.blocks])
        if momentum is not None:
            buffer = part.take(part.of(momentum))
            own = None if weight is None else part.take(part.of(weight))
            decay, mu = hyper.decoupled_decay, hyper.momentum
            found = momentum_direction(moved, buffer, own, decay, mu, hyper.nesterov)
            part.put(part.of(momentum), buffer)
            if hyper.nesterov:
                moved.copy_(found)
        part.put(blocks, moved)
    return direction if momentum is None or hyper.nesterov else momentum
