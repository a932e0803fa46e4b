"""What a rank would do in a step: its gradients, looked at before anything changes."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from shampoo.distributed.consensus import OK, REFUSED, SKIPPED, MustAgree, Vote, digest
from shampoo.distributed.distributor import StepInputs
from shampoo.distributed.replica_checksums import ReplicaChecksums
from shampoo.errors import NonFiniteGradientError
from shampoo.step.block_plan import BlockPlan
from shampoo.step.capture import DeviceState
from shampoo.step.distributors import DistributorsKey
from shampoo.step.gradients import largest_magnitudes, with_decay
from shampoo.step.verdict import LateVerdicts, complaint_of, unfit

_COUPLED_DECAY = operator.attrgetter("coupled_decay")

_ALL_OR_NONE = (
    "A rank that has gradients and calls no step(), on a condition of its own, makes the others use"
    " those of another batch. All ranks must leave a step out, or none."
)


@dataclass
class Preflight:
    """A step that has not been taken.

    Attributes:
        inputs: what it would take.
        key: of the distributors that it needs.
        vote: this rank's.
        complaint: why the step is to be skipped.
        error: why it is refused.
        must_agree: what must be alike on all ranks.
        checksums: of replicas, to be compared in this step.
        accepted: whether it is to change anything, 0-d bool, where only the device may know.
    """

    plan: BlockPlan
    inputs: StepInputs
    key: DistributorsKey
    vote: Vote
    complaint: str = "the gradients of another rank are not finite, or too large to square"
    error: Exception | None = None
    must_agree: Sequence[MustAgree] = ()
    checksums: Sequence[ReplicaChecksums] = ()
    accepted: Tensor | None = None

    def add_items(self, terms: Mapping[str, str], left_out: int) -> None:
        """Adds what must be alike, causes before what they lead to.

        Args:
            terms: arguments of the optimizer that belong to no group.
            left_out: how many steps this rank has left out on its own.
        """
        plan, hyper, present = self.plan, self.inputs.hyper, self.inputs.present
        # A rank that alone has loaded a checkpoint, or lost its state, is some steps off: its bias
        # corrections would be others.
        steps = plan.counts()

        def values() -> list[dict[str, str]]:
            found = []
            for index, group in enumerate(hyper):
                fields = asdict(group)
                fields.update(fields.pop("geometry"))
                words = {name: repr(value) for name, value in fields.items()}
                found.append({"name": f"group {index}", **terms, **words})
            return found

        def gradients() -> list[dict[str, str]]:
            return [
                {"name": member.name, "gradient": "a tensor" if is_there else "None"}
                for member, is_there in zip(plan.members, present, strict=True)
            ]

        def counts() -> list[dict[str, str]]:
            return [
                {"name": member.name, "steps": str(count)}
                for member, count in zip(plan.members, steps, strict=True)
            ]

        def dropped() -> list[dict[str, str]]:
            return [{"name": "zero_grad()", "calls that dropped unused gradients": str(left_out)}]

        self.must_agree = (
            MustAgree("calls", digest(repr(left_out)), dropped, _ALL_OR_NONE),
            MustAgree("parameter groups", digest(repr((terms, hyper))), values),
            MustAgree("parameters to train", plan.digest, plan.entries),
            MustAgree("parameters to train", digest(repr(present)), gradients),
            MustAgree("parameters to train", digest(repr(steps)), counts),
        )


def look(
    plan: BlockPlan,
    inputs: StepInputs,
    key: DistributorsKey,
    is_prepared: bool,
    on_device: DeviceState | None,
    late: LateVerdicts | None,
) -> Preflight:
    """Whether these gradients make a step: all finite, and small enough to square.

    Args:
        is_prepared: whether the distributors are there.
        on_device: what decides it without the host, in steps that graphs replay.
        late: what decides it without the host, where that would have to wait.

    Raises:
        ValueError: for ``stochastic_rounding`` where blocks are divided among ranks.
    """
    if not plan.stepping_ranks.is_alone and any(h.stochastic_rounding for h in inputs.hyper):
        raise ValueError(
            f"Invalid stochastic_rounding=True where {plan.stepping_ranks.size} ranks step"
            " together. Must be False: they would draw other numbers for the same weight. Or, for"
            " parameters that are not DTensors, pass num_trainers_per_group=1 and"
            " check_replicas_every=0."
        )
    there: Sequence[int] = range(len(inputs.grads))
    if False in inputs.present or inputs.params is not plan.planned:
        # An empty shard has nothing to say.
        there = [i for i, g in enumerate(inputs.grads) if g is not None and g.numel() > 0]
    if not there:
        return Preflight(plan, inputs, key, Vote(OK, False, is_prepared))
    if on_device is not None:
        accepted = on_device.accept(plan, inputs.grads, inputs.params, inputs.hyper)
        vote = Vote(OK, True, is_prepared)
        return Preflight(plan, inputs, key, vote, accepted=accepted)
    grads: Any = inputs.grads
    largest = reach = largest_magnitudes(list(map(grads.__getitem__, there)))
    if is_coupled := max(map(_COUPLED_DECAY, inputs.hyper)) > 0.0:
        coupled = [inputs.hyper[plan.members[index].group].coupled_decay for index in there]
        reach = with_decay(largest, [inputs.params[index] for index in there], coupled)
    if late is not None and all(values.nonfinite == "skip" for values in inputs.hyper):
        accepted = late.accept(inputs, there, largest, reach)
        return Preflight(plan, inputs, key, Vote(OK, True, is_prepared), accepted=accepted)
    magnitudes = reaches = largest.tolist()
    if is_coupled:
        reaches = reach.tolist()
    if all(map(operator.lt, reaches, map(plan.square_limits.__getitem__, there))):
        return Preflight(plan, inputs, key, Vote(OK, any(magnitudes), is_prepared))
    return _of_bad(plan, inputs, key, is_prepared, there, reaches)


def _of_bad(
    plan: BlockPlan,
    inputs: StepInputs,
    key: DistributorsKey,
    is_prepared: bool,
    there: Sequence[int],
    reaches: Sequence[float],
) -> Preflight:
    """The vote on gradients some of which are not fit, with the words for it."""
    bad = unfit(plan, there, reaches)
    complaint = complaint_of(bad, inputs.hyper, len(there))
    is_refused = any(inputs.hyper[member.group].nonfinite == "raise" for member in bad)
    vote = Vote(REFUSED if is_refused else SKIPPED, True, is_prepared)
    if not is_refused:
        return Preflight(plan, inputs, key, vote, complaint)
    error = NonFiniteGradientError(
        f"{complaint[0].upper()}{complaint[1:]}. Nothing was changed. Lower lr or clip gradients,"
        ' or pass nonfinite="skip" to leave such steps out.'
    )
    return Preflight(plan, inputs, key, vote, complaint, error)
