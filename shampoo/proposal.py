"""What a rank would do in a step: its gradients, looked at before anything changes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torch import Tensor
from torch.distributed.tensor import DTensor

from shampoo.agreement import OK, REFUSED, SKIPPED, Topic, digest
from shampoo.errors import NonFiniteGradientError
from shampoo.exchange import Round
from shampoo.gradients import can_square, check_dense, largest_magnitudes
from shampoo.regions import local_tensor
from shampoo.step_plan import Member, Plan

Result = TypeVar("Result")


@dataclass
class Proposal:
    """A step that has not been taken.

    Attributes:
        status: OK, SKIPPED or REFUSED.
        is_nonzero: whether any gradient here is not all zero.
        complaint: why the step is to be skipped.
        error: why it is refused.
    """

    plan: Plan
    round: Round
    status: int
    is_nonzero: bool
    complaint: str = "the gradients of another rank are not finite, or too large to square"
    error: Exception | None = None

    def topics(self) -> tuple[Topic, Topic, Topic]:
        """What must be alike on all ranks: the plan, which gradients are there, all values."""

        def gradients() -> list[dict[str, str]]:
            return [
                {"name": member.name, "gradient": "a tensor" if is_there else "None"}
                for member, is_there in zip(self.plan.members, self.round.present, strict=True)
            ]

        def values() -> list[dict[str, str]]:
            return [
                {
                    "name": f"group {index}",
                    **{name: repr(value) for name, value in asdict(hyper).items()},
                }
                for index, hyper in enumerate(self.round.hyper)
            ]

        return (
            Topic(self.plan.digest, self.plan.entries),
            Topic(digest(repr(self.round.present)), gradients),
            Topic(digest(repr(self.round.hyper)), values),
        )


class Attempt:
    """Runs this rank's part of a step; while others wait for it, an exception must wait too."""

    def __init__(self, is_shared: bool) -> None:
        self._is_shared = is_shared
        self.error: Exception | None = None

    def run(self, work: Callable[..., Result], *arguments: Any) -> Result | None:
        """What ``work`` returns, nothing once something has failed."""
        if self.error is not None:
            return None
        try:
            return work(*arguments)
        except Exception as error:
            if not self._is_shared:
                raise
            self.error = error
            return None


def local_gradients(members: Sequence[Member], params: Sequence[Tensor]) -> list[Tensor | None]:
    """This rank's part of every gradient.

    Raises:
        RuntimeError: for a gradient that is sparse, or placed unlike its parameter.
    """
    grads = [param.grad for param in params]
    for member, param, grad in zip(members, params, grads, strict=True):
        if grad is None:
            continue
        if isinstance(param, DTensor) and getattr(grad, "placements", None) != param.placements:
            raise RuntimeError(
                f"The gradient of {member.name} has placements"
                f" {getattr(grad, 'placements', None)}, the parameter {param.placements}."
                " Redistribute it before step()."
            )
        check_dense(local_tensor(grad), member.name)
    return [None if grad is None else local_tensor(grad) for grad in grads]


def propose(plan: Plan, step: Round) -> Proposal:
    """Whether these gradients make a step: all finite, and small enough to square."""
    present = [
        (member, grad)
        for member, grad in zip(plan.members, step.grads, strict=True)
        if grad is not None and grad.numel() > 0  # an empty shard has nothing to say
    ]
    magnitudes = largest_magnitudes([grad for _, grad in present]) if present else []
    bad = [
        member
        for (member, _), magnitude in zip(present, magnitudes, strict=True)
        if not can_square(magnitude, member.layout.numel, plan.geometry(member).dtype)
    ]
    if not bad:
        return Proposal(plan, step, OK, any(magnitudes))
    complaint = (
        f"the gradient of {bad[0].name} is not finite, or too large to square"
        f" ({len(bad)} of {len(present)} gradients are)"
    )
    if not any(step.hyper[member.group].nonfinite == "raise" for member in bad):
        return Proposal(plan, step, SKIPPED, True, complaint)
    error = NonFiniteGradientError(
        f"{complaint[0].upper()}{complaint[1:]}. Nothing was changed. Lower lr or clip gradients,"
        ' or pass nonfinite="skip" to leave such steps out.'
    )
    return Proposal(plan, step, REFUSED, True, complaint, error)
