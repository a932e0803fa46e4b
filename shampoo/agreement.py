"""A step before it is taken: whether all ranks that must step alike can take it, and with what."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo import certificates
from shampoo.blocks.ownership import Team
from shampoo.certificates.cases.shapes import Shape
from shampoo.certificates.shared import Offers
from shampoo.distributed.consensus import FAILED, OK, SKIPPED, DeferredError, Vote, digest
from shampoo.distributed.distributor import StepInputs
from shampoo.distributed.replica_checksums import check_checksums, checksums_of
from shampoo.distributed.shard_regions import local_tensor
from shampoo.errors import ShampooDistributedError
from shampoo.hyperparameters import Hyperparameters
from shampoo.state.persistent import Persistent
from shampoo.step import capture
from shampoo.step.agreed_step import AgreedStep
from shampoo.step.block_plan import BlockPlan
from shampoo.step.distributors import Distributors, DistributorsKey, join_groups
from shampoo.step.gradients import are_ordinary, check_gradients
from shampoo.step.measurement import Recorder
from shampoo.step.preflight import Preflight, look


class Agreeing(Persistent):
    """The part of an optimizer that decides whether a step is taken. No weight moves here."""

    _recorder: Recorder | None = None  # on the class: a copy, or what is unpickled, has none

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch. Gradients that no step has seen count: all ranks must drop them, or none."""
        params = self._all_params()
        self._left_out.drop(params)
        super().zero_grad(set_to_none)
        self._left_out.see(params)

    def _begin(self, params: Sequence[Tensor]) -> AgreedStep | None:
        """A step that all ranks that must step alike can take, ready to be taken."""
        capture.check_health(self)
        self._left_out.see(params)
        self._consolidated = None
        if self._late is not None:  # what is due, and the numbers of this step, depend on it
            self._settle_late()
        self._was_skipped = False
        before = dict(self.state), self._plan, self._on_device, self._late
        self._taken = None
        try:
            preflight = self._agree(params)
        except Exception:
            self._take_back(*before)
            raise
        finally:
            self._taken = None
        if preflight is None:
            return None
        assert self._distributors is not None
        ranks, consensus = preflight.plan.stepping_ranks, None
        if not ranks.is_alone:
            device = preflight.plan.arenas[0].device
            consensus = self._process_groups.consensus(ranks, device)
        return AgreedStep(
            preflight.plan,
            preflight.inputs,
            preflight.accepted,
            self._distributors,
            self._on_device,
            None if self._late is None else self._late.gate,
            consensus,
            self._ridges,
            self._recorder,
        )

    def _agree(self, params: Sequence[Tensor]) -> Preflight | None:
        """What to do in this step, if all ranks that must step alike can do it."""
        ranks = self._process_groups.stepping_ranks(params)
        preflight, deferred = None, DeferredError(is_shared=not ranks.is_alone)
        with deferred:
            preflight = self._preflight(ranks)
        vote = Vote(FAILED, False, False) if preflight is None else preflight.vote
        error = deferred.error if preflight is None else preflight.error
        if not ranks.is_alone:
            consensus = self._process_groups.consensus(ranks, params[0].device)
            must_agree = () if preflight is None else preflight.must_agree
            vote = consensus.settle(vote, must_agree, error)
            if preflight is not None and preflight.checksums:
                check_checksums(preflight.checksums, self._process_groups, consensus)
        elif error is not None:
            raise error
        assert preflight is not None
        if vote.status == SKIPPED:
            self._count_skipped(preflight.complaint)
        # The step that torch.distributed.checkpoint makes to fill an empty state is inert.
        is_step = vote.is_nonzero or preflight.plan.step > 0
        if not is_step or vote.status != OK or True not in preflight.inputs.present:
            return None
        if not vote.is_prepared:
            self._prepare(preflight)
        return preflight

    def _preflight(self, ranks: Team) -> Preflight:
        """Looks at this rank's part of the parameters and gradients; makes the plan, if need be."""
        if self._damage:
            raise ShampooDistributedError(f"{self._damage} Load the last checkpoint.")
        hyper, plan, groups = self._reader.read(self.param_groups), self._plan, self._process_groups
        geometries = [values.geometry for values in hyper]
        is_current = plan is not None and plan.is_current(self.param_groups, geometries, groups)
        if not is_current:
            check_gradients(self.param_groups)  # before there is a plan for them
        plan = self._current_plan(is_current)
        plan.check(hyper, self._reader.revision)
        params, grads = plan.planned, [param.grad for param in plan.planned]
        present = tuple([grad is not None for grad in grads])
        if not are_ordinary(grads, present, plan.forms):
            check_gradients(self.param_groups)
            params = [local_tensor(param) for param in params]
            grads = [None if grad is None else local_tensor(grad) for grad in grads]
        key, is_prepared = self._distributors_key(plan, hyper)
        inputs = StepInputs(params, grads, present, hyper)
        preflight = look(plan, inputs, key, is_prepared, self._on_device, self._late)
        if not ranks.is_alone:
            preflight.add_items(groups.terms(), self._left_out.count)
            period = groups.check_replicas_every
            if period and plan.step % period == 0:
                names = [member.name for member in plan.members]
                preflight.checksums = checksums_of(names, plan.planned, groups.replicas())
        return preflight

    def _distributors_key(
        self, plan: BlockPlan, hyper: Sequence[Hyperparameters]
    ) -> tuple[DistributorsKey, bool]:
        """What a step needs of distributors, and whether they are there."""
        held, revision = self._distributors, self._reader.revision
        if held is not None and held.is_for(plan, self._process_groups.world(), revision):
            return held.key, True
        key = DistributorsKey.of(plan, hyper, self._process_groups)
        if held is None or held.key != key:
            return key, False
        held.revision = revision
        return key, True

    def _prepare(self, preflight: Preflight) -> None:
        """Makes process groups and buffers; all ranks do in the step in which one needs them.

        Kernels are examined here too, on what the plan holds, if nobody has, and ranks agree on
        those that they share.
        """
        plan, groups = preflight.plan, self._process_groups
        join_groups(plan, groups)
        deferred = DeferredError(is_shared=not plan.stepping_ranks.is_alone)
        self._distributors = None  # its buffers are free before new ones are asked for
        offers: Offers = {}
        with deferred:
            shapes = _shapes_of(plan)
            certificates.prepare(shapes)
            offers = certificates.offers(shapes, plan.is_redundant)
            self._distributors = Distributors(preflight.key, plan.planned, groups)
        if not plan.stepping_ranks.is_alone:
            consensus = groups.consensus(plan.stepping_ranks, plan.arenas[0].device)
            if not consensus.check(deferred, digest(repr(offers))):
                certificates.agree(consensus.share(offers))


def _shapes_of(plan: BlockPlan) -> dict[torch.device, set[Shape]]:
    """What blocks a plan has, by device: of all owners, so that ranks ask for the same."""
    found: dict[torch.device, set[Shape]] = {arena.device: set() for arena in plan.arenas}
    for arena in itertools.chain.from_iterable(plan.all_arenas):
        dtype = str(arena.dtype).removeprefix("torch.")
        found[arena.device].update(
            Shape(stack.extent, stack.modes, dtype) for stack in arena.stacks
        )
    return found
