"""What a step was like, measured where it was taken: sums and maxima, a row for every arena.

Nothing here waits for a device, and nothing communicates: rows are computed beside the state that
they are of, and leave in one small :class:`~shampoo.ops.transit.Letter`, read when somebody asks.
What the numbers become is in :mod:`shampoo.metrics`.
"""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shampoo.blocks.declared import FAILURES
from shampoo.blocks.segments import Part, Segment
from shampoo.blocks.stacks import Arena, FactorStack
from shampoo.distributed.distributor import StepInputs
from shampoo.dtensor import is_dtensor
from shampoo.hyperparameters import Hyperparameters
from shampoo.ops.transit import Letter, is_near
from shampoo.preconditioner.base import of_blocks
from shampoo.roots.findings import FINDINGS
from shampoo.scalars import Scalars
from shampoo.step.block_plan import BlockPlan
from shampoo.step.directions import average_correction

# The columns of a row: what is added up, over arenas and over ranks, and that of which the largest
# counts. Of elements their number and the squares of three kinds, of blocks and of factors how many
# there are and what holds of them; ages are in steps, spreads the logarithms of the largest
# eigenvalue over the ridge.
_ELEMENTS = ("elements", "gradient", "weight", "update")
_BLOCKS = ("preconditioned", "log_scale")
_FACTORS = ("roots", "age", "failed", "spreads", "log_spread")
_COUNTS = ("blocks", "factors")
_EXTREMES = ("oldest", "failed_in_a_row", "error", "widest", "narrowest")
_STEP = "step"
SUMS = (*_ELEMENTS, *_BLOCKS, *_FACTORS, *_COUNTS)
COLUMNS = (*SUMS, *_EXTREMES, _STEP, "bytes")

# Elements whose squares a CPU adds up in float32, one after another: of ten times as many the sum
# would be wrong by 1e-4.
_RUN = 1 << 20


@dataclass
class _Measured:
    """A step that is being measured."""

    there: list[int]  # the members with a gradient on this rank
    before: Sequence[Tensor]  # their weights
    blocks: dict[int, tuple[int, Tensor]] = field(default_factory=dict)  # by arena


@dataclass
class _Record:
    """The rows of one device: all columns but the last."""

    arenas: list[int]  # of the plan, by row
    table: Tensor  # [rows, columns - 1] float64, on the device
    letter: Letter  # the same on its way


class Recorder:
    """Measures every n-th step of an optimizer.

    Args:
        every: n, by the count of steps of the oldest parameter, which is alike on all ranks.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._plan: weakref.ref[BlockPlan] | None = None  # which must not outlive its successor
        self._measured: _Measured | None = None
        self._copies: dict[int, Tensor] = {}  # of weights on a CPU, by member
        self._records: dict[torch.device, _Record] = {}
        # Of the plan: for every arena its group, bytes and what a block of it counts among all
        # ranks; what an element of every parameter counts there.
        self._groups: list[int] = []
        self._bytes: list[int] = []
        self._block_shares: list[float] = []
        self._element_shares: list[float] = []

    def open(self, plan: BlockPlan, inputs: StepInputs) -> None:
        """Looks at weights before anything moves, in a step that is measured."""
        if self._plan is None or plan is not self._plan():
            self._follow(plan)
        if plan.step % self.every != 0:
            return
        there = [i for i, grad in enumerate(inputs.grads) if grad is not None and grad.numel() > 0]
        weights = [inputs.params[member] for member in there]
        # To be compared with what they become: an update is what has moved a weight, with decay,
        # momentum and rounding, and whichever rank its direction came from.
        self._measured = _Measured(there, self._copy(there, weights))

    def _copy(self, members: Sequence[int], weights: Sequence[Tensor]) -> list[Tensor]:
        """Copies of weights. Those on a CPU stay: fresh pages would cost as much as the copy."""
        copies = []
        for member, weight in zip(members, weights, strict=True):
            copy = self._copies.get(member)
            if copy is None:
                copy = torch.empty_like(weight)
                if is_near(copy.device):
                    self._copies[member] = copy
            copies.append(copy)
        if copies:
            torch._foreach_copy_(copies, list(weights))
        return copies

    def _follow(self, plan: BlockPlan) -> None:
        """Asks the refreshes of a plan to leave what they find."""
        self.close()
        self._plan, self._records, self._copies = weakref.ref(plan), {}, {}
        ranks = plan.stepping_ranks.size
        self._groups = [arena.group for arena in plan.arenas]
        self._block_shares = [arena.team.size / ranks for arena in plan.arenas]
        self._element_shares = [1.0 / _copies(param, ranks) for param in plan.planned]
        for arena in plan.arenas:
            # Not where a graph would go on writing there once it is gone.
            for stack in () if arena.is_capturable else arena.refreshed_stacks():
                stack.found = torch.full(
                    (FINDINGS, stack.count), math.nan, dtype=torch.float64, device=arena.device
                )

    def close(self) -> None:
        """Lets go of the plan: its refreshes look no longer."""
        plan = None if self._plan is None else self._plan()
        for arena in () if plan is None else plan.arenas:
            for stack in arena.refreshed_stacks():
                stack.found = None
        self._plan = None

    def look(
        self, index: int, segments: Sequence[Segment], hyper: Hyperparameters, scalars: Scalars
    ) -> None:
        """Looks at the directions of an arena, whose scales LARS and LAMB will overwrite.

        Args:
            index: of the arena in the plan.
            segments: of its blocks that have a gradient.
        """
        if self._measured is not None and segments:  # this rank may own no block of it
            sums = torch.stack([_directions(each, hyper, scalars) for each in segments]).sum(dim=0)
            count = sum(len(segment.scale) for segment in segments)
            self._measured.blocks[index] = count, sums

    def finish(self, inputs: StepInputs, accepted: Tensor | None) -> None:
        """Sends what the step was like, once weights have moved.

        Args:
            accepted: 0-d bool, whether the step is taken: if not, the record before it stays. None
                where the host knows that it is.
        """
        plan = None if self._plan is None else self._plan()
        if plan is None or self._measured is None:
            return
        self._bytes = list(map(_bytes_of, plan.arenas))
        for device in dict.fromkeys(arena.device for arena in plan.arenas):
            arenas = [i for i, arena in enumerate(plan.arenas) if arena.device == device]
            table = self._table(plan, arenas, inputs)
            if accepted is not None:
                known = self._records.get(device)
                before = torch.full_like(table, math.nan) if known is None else known.table
                table = torch.where(accepted, table, before)
            self._records[device] = _Record(arenas, table, Letter(table))

    def drop(self) -> None:
        """Lets go of the step, whether it was finished or has failed."""
        self._measured = None

    def _table(self, plan: BlockPlan, indices: list[int], inputs: StepInputs) -> Tensor:
        """The rows of the arenas of one device, [rows, columns - 1] float64."""
        assert self._measured is not None
        arenas = [plan.arenas[index] for index in indices]
        device = arenas[0].device
        looks = [self._measured.blocks.get(index) for index in indices]
        nothing = torch.zeros(len(_BLOCKS), dtype=torch.float64, device=device)
        blocks = torch.stack([nothing if each is None else each[1] for each in looks])
        factors = torch.stack([_factors(each, inputs.hyper[each.group]) for each in arenas])
        known = [
            [
                0 if look is None else look[0],
                sum(stack.count for stack in arena.refreshed_stacks()),
                plan.step,
            ]
            for look, arena in zip(looks, arenas, strict=True)
        ]
        counts = torch.tensor(known, dtype=torch.float64, device="cpu")
        counts = counts.to(device, non_blocking=True)
        sums, extremes = factors[:, : len(_FACTORS)], factors[:, len(_FACTORS) :]
        elements = self._elements(arenas, inputs)
        return torch.cat((elements, blocks, sums, counts[:, :2], extremes, counts[:, 2:]), dim=1)

    def _elements(self, arenas: Sequence[Arena], inputs: StepInputs) -> Tensor:
        """Squares of all gradients, weights and updates, added up by arena, [rows, 4] float64."""
        assert self._measured is not None
        row_of = {member: row for row, arena in enumerate(arenas) for member in arena.first}
        pairs = zip(self._measured.there, self._measured.before, strict=True)
        members, before = [], []
        for member, weight in pairs:
            if member in row_of:
                members.append(member)
                before.append(weight)
        device = arenas[0].device
        shares = torch.zeros(len(arenas), len(members), dtype=torch.float64, device="cpu")
        for column, member in enumerate(members):
            shares[row_of[member], column] = self._element_shares[member]
        if not members:
            return torch.zeros(len(arenas), len(_ELEMENTS), dtype=torch.float64, device=device)
        numel = torch.tensor([weight.numel() for weight in before], device="cpu").double()
        on_device = torch.cat((shares, numel[None]), dim=0).to(device, non_blocking=True)
        grads: list[Tensor] = [grad for i in members if (grad := inputs.grads[i]) is not None]
        squares = [_squares(grads), _squares(before)]
        torch._foreach_sub_(before, [inputs.params[member] for member in members])
        squares.append(_squares(before))
        return on_device[:-1] @ torch.stack((on_device[-1], *squares), dim=1)

    def read(self, groups: int, is_shared: bool) -> Tensor | None:
        """The last record, waiting for its letters; None if there is none yet.

        Args:
            groups: of the optimizer.
            is_shared: whether a block counts such that the sum over all ranks has each once, though
                several teams may work out the same.

        Returns:
            [groups + 1, columns] float64 on the host, the last row that of all groups.
        """
        found = torch.zeros(groups + 1, len(COLUMNS), dtype=torch.float64, device="cpu")
        elements, sums = slice(len(_ELEMENTS)), slice(len(_ELEMENTS), len(SUMS))
        extremes = slice(len(SUMS), -1)
        found[:, extremes] = -math.inf
        is_there = False
        for record in self._records.values():
            table = record.letter.read()
            if bool(table.isnan().any()):
                continue  # what was to be the first record is of a step that was not taken
            is_there = True
            for index, row in zip(record.arenas, table, strict=True):
                share = self._block_shares[index] if is_shared else 1.0
                for line in (found[self._groups[index]], found[-1]):
                    line[elements] += row[elements]
                    line[sums] += row[sums] * share
                    line[extremes] = torch.maximum(line[extremes], row[extremes.start :])
                    line[-1] += self._bytes[index]
        return found if is_there else None


def _copies(param: Tensor, ranks: int) -> float:
    """How many ranks hold each element of a parameter, of those that step alike.

    Args:
        ranks: how many these are.
    """
    if not is_dtensor(param):
        return ranks
    mesh = param.device_mesh
    alike = [
        size
        for size, placement in zip(mesh.shape, param.placements, strict=True)
        if placement.is_replicate()
    ]
    return math.prod(alike) * ranks / mesh.size()


def _bytes_of(arena: Arena) -> int:
    """Bytes of the state of an arena, as `explain` counts them."""
    held = [*arena.moments.values(), arena.steps, *([arena.taken] if arena.is_capturable else [])]
    for stack in arena.factor_stacks:
        held += stack.state.values()
        if arena.is_staggered and stack.is_refreshed:
            held.append(stack.phase)
    return sum(tensor.nbytes for tensor in held)


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of every tensor, [n] float64."""
    pieces: list[Tensor] = []
    owners: list[int] = []
    for index, tensor in enumerate(tensors):
        is_long = tensor.numel() > _RUN and is_near(tensor.device) and tensor.is_contiguous()
        own = torch.split(tensor.view(-1), _RUN) if is_long else (tensor,)
        pieces += own
        owners += [index] * len(own)
    is_wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    # Narrow dtypes have no room for a norm, let alone a square.
    norms = torch._foreach_norm(pieces, 2, torch.float64 if is_wide else torch.float32)
    squares = torch.stack(norms).double().square()
    if len(pieces) == len(tensors):
        return squares
    return squares.new_zeros(len(tensors)).index_add_(0, torch.tensor(owners), squares)


def _directions(segment: Segment, hyper: Hyperparameters, scalars: Scalars) -> Tensor:
    """``preconditioned, log_scale`` of the active blocks of a segment, [2] float64."""
    own = scalars.at(segment.param_index)
    if own.started is False:
        return segment.scale.new_zeros(len(_BLOCKS), dtype=torch.float64)
    # A block whose direction is zero, or too long, has no scale.
    is_own = torch.cat([_are_ready(part, own) for part in segment.parts]) & (segment.scale > 0)
    scale = segment.scale.double() * average_correction(own, hyper)
    logs = torch.where(is_own, scale, 1.0).log()
    return torch.stack((is_own.sum().double(), logs.sum()))


def _are_ready(part: Part, scalars: Scalars) -> Tensor:
    """Which active blocks of a part have directions of their own, [R] bool."""
    count = part.blocks.stop - part.blocks.start
    ready = torch.ones(count, dtype=torch.bool, device=part.grad.device)
    for flags in part.flags:
        ready &= part.take(flags)
    return ready & of_blocks(scalars.started, part.statistics)


def _factors(arena: Arena, hyper: Hyperparameters) -> Tensor:
    """What holds of the factors of an arena that are refreshed, in the order of the columns."""
    stacks = arena.refreshed_stacks()
    if not stacks:
        out = torch.zeros(len(_FACTORS) + len(_EXTREMES), dtype=torch.float64, device=arena.device)
        out[len(_FACTORS) :] = -math.inf
        return out
    ready = torch.cat([stack.ready for stack in stacks])
    failures = torch.cat([_failures(stack) for stack in stacks])
    since = torch.cat([_steps_since(arena, stack, hyper) for stack in stacks])
    age = since.to(arena.device, non_blocking=True) + failures * hyper.precondition_frequency
    error, ridge, largest = torch.cat([_found(stack) for stack in stacks], dim=1)
    has_spread = ready & (ridge > 0) & (largest > 0)
    spread = torch.where(has_spread, largest / ridge, 1.0).log()
    sums = [
        ready.sum(),
        torch.where(ready, age, 0.0).sum(),
        (failures > 0).sum(),
        has_spread.sum(),
        spread.sum(),
    ]
    extremes = [
        torch.where(ready, age, -math.inf).amax(),
        failures.amax(),
        torch.where(ready & error.isfinite(), error, -math.inf).amax(),
        torch.where(has_spread, spread, -math.inf).amax(),
        torch.where(has_spread, -spread, -math.inf).amax(),
    ]
    return torch.stack([each.double() for each in (*sums, *extremes)])


def _failures(stack: FactorStack) -> Tensor:
    """Refreshes in a row that have failed, [K] float64."""
    if FAILURES in stack.state:
        return stack[FAILURES].double()
    return torch.zeros(stack.count, dtype=torch.float64, device=stack.ready.device)


def _found(stack: FactorStack) -> Tensor:
    """What refreshes have found, [n, K] float64; NaN where nothing has."""
    if stack.found is not None:
        return stack.found
    shape, device = (FINDINGS, stack.count), stack.ready.device
    return torch.full(shape, math.nan, dtype=torch.float64, device=device)


def _steps_since(arena: Arena, stack: FactorStack, hyper: Hyperparameters) -> Tensor:
    """Steps since the last refresh that was due, [K] float64 on the host: what the schedule says.

    By :meth:`Hyperparameters.due_phase`, for all rows at once.
    """
    start, frequency = hyper.start_preconditioning_step, hyper.precondition_frequency
    counts = arena.steps[stack.row_params].double()
    if start == math.inf:
        return torch.zeros_like(counts)
    if hyper.is_staggered:
        return (counts - start - stack.phase).remainder(frequency)
    multiple = counts - counts.remainder(frequency)
    multiple = torch.where(multiple >= start, multiple, 0.0)
    early = torch.tensor([0, *hyper.early_refreshes], dtype=torch.float64, device="cpu")
    last = early[torch.searchsorted(early, counts, right=True) - 1]
    return counts - torch.maximum(multiple, last)
