"""What a rank would do in a step: its gradients, looked at before anything changes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from shampoo.distributed.consensus import OK, REFUSED, SKIPPED, MustAgree, Vote, digest
from shampoo.distributed.distributor import StepInputs
from shampoo.distributed.replica_checksums import ReplicaChecksums
from shampoo.errors import NonFiniteGradientError
from shampoo.step.block_plan import BlockPlan
from shampoo.step.capture import DeviceState
from shampoo.step.distributors import DistributorsKey
from shampoo.step.gradients import largest_magnitudes, with_decay


@dataclass
class Preflight:
    """A step that has not been taken.

    Attributes:
        purpose: the buffers that it needs.
        verdict: this rank's.
        complaint: why the step is to be skipped.
        error: why it is refused.
        topics: what must be alike on all ranks.
        copies: checksums to be compared in this step.
        accepted: whether it is to change anything, 0-d bool, where only the device may know.
    """

    plan: BlockPlan
    round: StepInputs
    purpose: DistributorsKey
    vote: Vote
    complaint: str = "the gradients of another rank are not finite, or too large to square"
    error: Exception | None = None
    must_agree: Sequence[MustAgree] = ()
    copies: Sequence[ReplicaChecksums] = ()
    accepted: Tensor | None = None

    def add_items(self, terms: Mapping[str, str]) -> None:
        """Adds what must be alike, causes before what they lead to.

        Args:
            terms: arguments of the optimizer that belong to no group.
        """
        plan, hyper, present = self.plan, self.round.hyper, self.round.present
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

        self.must_agree = (
            MustAgree("parameter groups", digest(repr((terms, hyper))), values),
            MustAgree("parameters to train", plan.digest, plan.entries),
            MustAgree("parameters to train", digest(repr(present)), gradients),
            MustAgree("parameters to train", digest(repr(steps)), counts),
        )


def propose(
    plan: BlockPlan,
    step: StepInputs,
    purpose: DistributorsKey,
    is_prepared: bool,
    on_device: DeviceState | None,
) -> Preflight:
    """Whether these gradients make a step: all finite, and small enough to square.

    Args:
        is_prepared: whether the buffers for ``purpose`` are there.
        on_device: what decides it without the host, where it must not wait.

    Raises:
        ValueError: for ``stochastic_rounding`` where blocks are divided among ranks.
    """
    if not plan.stepping_ranks.is_alone and any(hyper.stochastic_rounding for hyper in step.hyper):
        raise ValueError(
            f"Invalid stochastic_rounding=True where {plan.stepping_ranks.size} ranks step"
            " together. Must be False: they would draw other numbers for the same weight. Or, for"
            " parameters that are not DTensors, pass num_trainers_per_group=1 and"
            " check_replicas_every=0."
        )
    present = [
        (member, grad, param, limit)
        for member, grad, param, limit in zip(
            plan.members, step.grads, step.params, plan.square_limits, strict=True
        )
        if grad is not None and grad.numel() > 0  # an empty shard has nothing to say
    ]
    if not present:
        return Preflight(plan, step, purpose, Vote(OK, False, is_prepared))
    if on_device is not None:
        accepted = on_device.accept(plan, step.grads, step.params, step.hyper)
        vote = Vote(OK, True, is_prepared)
        return Preflight(plan, step, purpose, vote, accepted=accepted)
    decays = [step.hyper[member.group].coupled_decay for member, *_ in present]
    largest = largest_magnitudes([grad for _, grad, _, _ in present])
    reach = with_decay(largest, [param for _, _, param, _ in present], decays)
    magnitudes, reaches = torch.stack((largest, reach)).tolist()
    bad = [
        (member, decay)
        for (member, _, _, limit), decay, most in zip(present, decays, reaches, strict=True)
        if not most < limit
    ]
    if not bad:
        return Preflight(plan, step, purpose, Vote(OK, any(magnitudes), is_prepared))
    first, decay = bad[0]
    added = f", with the weight_decay={decay} that is added to it," if decay != 0.0 else ""
    complaint = (
        f"the gradient of {first.name}{added} is not finite, or too large to square"
        f" ({len(bad)} of {len(present)} gradients are)"
    )
    is_refused = any(step.hyper[member.group].nonfinite == "raise" for member, _ in bad)
    vote = Vote(REFUSED if is_refused else SKIPPED, True, is_prepared)
    if not is_refused:
        return Preflight(plan, step, purpose, vote, complaint)
    error = NonFiniteGradientError(
        f"{complaint[0].upper()}{complaint[1:]}. Nothing was changed. Lower lr or clip gradients,"
        ' or pass nonfinite="skip" to leave such steps out.'
    )
    return Preflight(plan, step, purpose, vote, complaint, error)
