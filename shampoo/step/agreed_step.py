"""A step that all ranks have agreed to take: what moves in it, and how the ranks stay together."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor

from shampoo.blocks.ownership import Team
from shampoo.blocks.publication import State
from shampoo.blocks.segments import ActiveBlocks, FactorRows, Segment
from shampoo.blocks.stacks import Arena
from shampoo.distributed.consensus import OK, Consensus, DeferredError
from shampoo.distributed.distributor import Distributor, StepInputs
from shampoo.hyperparameters import Hyperparameters
from shampoo.ops.precision import full_precision
from shampoo.preconditioner import KINDS
from shampoo.preconditioner.base import Preconditioner
from shampoo.scalars import Gate, Scalars
from shampoo.step import capture, layerwise
from shampoo.step.block_plan import BlockPlan
from shampoo.step.directions import due_rows
from shampoo.step.distributors import Distributors
from shampoo.step.measurement import Recorder
from shampoo.step.ridge_watch import RidgeWatch
from shampoo.step.versions import mark_moved

logger = logging.getLogger(__name__)


class ArenaStep(NamedTuple):
    """What one arena does in one step; nothing, once something has failed."""

    arena: Arena
    kind: Preconditioner
    segments: Sequence[Segment]  # of blocks that have a gradient
    hyper: Hyperparameters
    scalars: Scalars
    due: Sequence[FactorRows]  # factors whose roots are refreshed
    distributor: Distributor


class AgreedStep:
    """One step, from the agreement to the moved parameters. A context manager.

    A rank that fails keeps its error until all hear of it: inside ``with step.deferred`` nothing is
    raised where others would wait in the next collective, which it still joins.

    Args:
        plan: of the optimizer.
        inputs: the gradients, and where parameters lie.
        accepted: whether the step is to change anything, 0-d bool, where only the device may know.
        distributors: of the plan.
        on_device: what counts the steps, where the host must not.
        gate: what makes the numbers of a step that may not be taken, where the host counts it.
        consensus: of the ranks that step alike; None for one process.
        ridges: what looks at the factors of a refresh.
        recorder: what measures steps; None where nobody has asked for it.

    Attributes:
        deferred: keeps the first error.
        damage: why this rank cannot go on after the step; empty if it can.
    """

    def __init__(
        self,
        plan: BlockPlan,
        inputs: StepInputs,
        accepted: Tensor | None,
        distributors: Distributors,
        on_device: capture.DeviceState | None,
        gate: Gate | None,
        consensus: Consensus | None,
        ridges: RidgeWatch,
        recorder: Recorder | None,
    ) -> None:
        self.plan = plan
        self.deferred = DeferredError(is_shared=consensus is not None)
        self.damage = ""
        self._inputs = inputs
        self._accepted = accepted
        self._distributors = distributors
        self._by_team: Mapping[Team, Distributor] = distributors.by_team
        self._on_device = on_device
        self._gate = gate
        self._consensus = consensus
        self._ridges = ridges
        self._steps: list[ArenaStep | None] = [None] * len(plan.arenas)
        self._precision = ExitStack()
        self._is_capturing = capture.is_capturing()
        self._recorder = None if self._is_capturing else recorder

    def __enter__(self) -> "AgreedStep":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._precision.close()
        # Also of a step that failed midway: it may have moved some of them.
        mark_moved(self.plan.planned, self._inputs)
        for distributor in self._by_team.values():
            distributor.close()
        if self._recorder is not None:
            self._recorder.drop()

    def open(self, groups: Sequence[dict[str, Any]], state: State, revision: int) -> None:
        """Counts the step, brings gradients to the owners of their blocks, chooses the blocks.

        Args:
            groups: ``optimizer.param_groups``.
            state: ``optimizer.state``.
            revision: of the hyper-parameters.
        """
        plan, inputs = self.plan, self._inputs
        if not self._is_capturing:
            plan.count_step(inputs.present)  # now: a rank that fails must not fall a step behind
        plan.present = inputs.present
        with self.deferred:
            for device in self._distributors.devices:
                self._precision.enter_context(full_precision(device))
            for distributor in self._by_team.values():
                distributor.open(inputs)
        for distributor in self._by_team.values():
            distributor.fetch()
        with self.deferred:
            if self.deferred.error is None:
                plan.follow(groups, inputs.hyper, state, revision)
                if self._is_capturing:
                    capture.check_warm(plan.has_selected(inputs.present))
                actives = plan.select(inputs.present)
                if self._on_device is not None:
                    self._on_device.keep(actives, self._distributors.squares)
                self._steps = self._gated(list(map(self._step_of, actives)))
                if self._recorder is not None:
                    self._recorder.open(plan, inputs)

    def arenas(self) -> Iterator[ArenaStep]:
        """What every arena of this rank does, in plan order."""
        for index, arena in enumerate(self.plan.arenas):
            step = self._steps[index]
            if step is not None and self.deferred.error is None:
                yield step
                if step.due and self.deferred.error is None:
                    with self.deferred:
                        self._ridges.look(
                            arena, step.due, step.hyper, step.scalars, self.plan.members
                        )
                if self._recorder is not None and self.deferred.error is None:
                    with self.deferred:
                        self._recorder.look(index, step.segments, step.hyper, step.scalars)
            if (squares := self._distributors.squares[index]) is not None:
                self._rescale(arena, step, squares, self._by_team[arena.team])

    def _step_of(self, active: ActiveBlocks) -> ArenaStep | None:
        """What an arena does, by the numbers of the step that has just been counted."""
        if not active.present_params:
            return None
        arena, counts = active.arena, active.arena.counts()
        hyper = self._inputs.hyper[arena.group]
        distinct = {counts[index] for index in active.present_params}
        if self._accepted is not None and self._on_device is not None:
            scalars = self._on_device.scalars(hyper, active, self._accepted)
        else:
            scalars = Scalars.of_counts(hyper, arena.kind, counts, distinct, arena.device)
        due = due_rows(active, hyper, counts, distinct, self._is_capturing)
        segments, distributor = active.segments, self._by_team[arena.team]
        kind = KINDS[arena.kind.name]
        return ArenaStep(arena, kind, segments, hyper, scalars, due, distributor)

    def _gated(self, steps: list[ArenaStep | None]) -> list[ArenaStep | None]:
        """The steps of all arenas, which change nothing if the device does not accept them."""
        if self._accepted is None or self._gate is None:
            return steps
        moving = [step for step in steps if step is not None]
        gated = iter(self._gate.apply([step.scalars for step in moving], self._accepted))
        return [None if step is None else step._replace(scalars=next(gated)) for step in steps]

    def _rescale(
        self, arena: Arena, step: ArenaStep | None, squares: Tensor, distributor: Distributor
    ) -> None:
        """LARS and LAMB: P <- P |W| / |P| over whole parameters, whose blocks others may own.

        A rank that has failed still adds its zeros to the sum.

        Args:
            squares: [2, blocks] float64, overwritten.
        """
        squares.zero_()
        deferred = self.deferred
        with deferred:
            if step is not None and deferred.error is None:
                decay = step.hyper.decoupled_decay
                layerwise.measure(squares, step.segments, distributor, decay)
        distributor.sum_(squares)
        with deferred:
            if step is not None and deferred.error is None:
                layerwise.rescale(squares, arena, step.segments)
                for segment in step.segments:
                    scalars = step.scalars.at(segment.param_index)
                    distributor.apply_direction(arena, segment, step.hyper, scalars)

    def finish(self) -> None:
        """Directions travel, with the status of this rank; then W <- W - lr D, or all raise.

        Raises:
            ShampooDistributedError: on all ranks, if one of them has failed.
        """
        status = self.deferred.status
        for distributor in self._by_team.values():
            status = max(status, distributor.send(status))
        consensus = self._consensus
        if consensus is not None:
            # A team that is all there is knows every status already.
            if any(team.size < self.plan.stepping_ranks.size for team in self._by_team):
                status = consensus.confirm(status)
            if status != OK:
                if self.plan.is_redundant:
                    self.damage = "A failed step has moved the statistics of some groups only."
                consensus.fail(self.deferred.error)
        applied = DeferredError(is_shared=consensus is not None)
        with applied:
            for distributor in self._by_team.values():
                distributor.apply()
        if applied.error is not None:
            # The others have gone on to the next step, and hear of it there.
            self.damage = f"It has moved its parameters only in part: {applied.error}."
            logger.error("shampoo: %s", self.damage)
        elif self._recorder is not None:
            self._recorder.finish(self._inputs, self._accepted)
