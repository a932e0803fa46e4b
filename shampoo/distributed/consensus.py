"""All ranks that hold the same parameters take a step together, or none does.

One small all-reduce before anything is changed carries what each rank says of its gradients, a
digest of its plan and a digest of what its step is about to do (distributed.md 2.2, 3.3). A rank
that cannot go on says so there, and the others stop with it instead of waiting for it.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo.distributed.group_handle import GroupHandle
from shampoo.errors import (
    BlockGridMismatchError,
    ForeignCheckpointError,
    IncompleteCheckpointError,
    NonFiniteGradientError,
    PlanMismatchError,
    ReplicaMismatchError,
    RootFailureError,
    ShampooDistributedError,
    ShampooError,
)

# What a rank says of its step; the largest status counts.
OK, SKIPPED, REFUSED, FAILED = range(4)

T = TypeVar("T")
Entry = Mapping[str, str]  # what a rank says of one parameter or group, by the name of it

# Errors that keep their type on the ranks that only hear of them.
_SHARED_ERRORS = {
    kind.__name__: kind
    for kind in (
        BlockGridMismatchError,
        ForeignCheckpointError,
        IncompleteCheckpointError,
        NonFiniteGradientError,
        ReplicaMismatchError,
        RootFailureError,
    )
}


def digest(content: str) -> int:
    """62 bits of a text, the same in every process."""
    hashed = hashlib.blake2b(content.encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") >> 2


@dataclass(frozen=True)
class MustAgree:
    """Something that must be alike on all ranks, in short and, where they differ, in words."""

    noun: str  # what the entries are of
    digest: int
    entries: Callable[[], Sequence[Entry]]
    remedy: str = (
        "All ranks must train the same parameters, in the same order, with the same"
        " hyper-parameters."
    )


# Of a step: steps left out, values of hyper-parameters, its plan, which gradients are there, steps.
ITEMS = 5


class Vote(NamedTuple):
    """On a step, by one rank or, where they have agreed, by all.

    Attributes:
        status: of the step; OK or SKIPPED once agreed.
        is_nonzero: whether there is a gradient that is not all zero (on any rank).
        is_prepared: whether the buffers that the step needs are there (on all ranks).
    """

    status: int
    is_nonzero: bool
    is_prepared: bool


class DeferredError:
    """Keeps this rank's first exception until the next collective. A context manager.

    Between two collectives everything that can raise runs in it: a rank that raised at once would
    leave the others in the next collective until the process group times out. It skips nothing: a
    later phase looks at ``error`` first, unless it does no harm on what has failed.

    Args:
        is_shared: whether others wait; if not, exceptions are raised as they come.
    """

    def __init__(self, is_shared: bool) -> None:
        self._is_shared = is_shared
        self.error: Exception | None = None

    def __enter__(self) -> "DeferredError":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not self._is_shared or not isinstance(error, Exception):
            return False
        self.error = self.error or error
        return True

    @property
    def status(self) -> int:
        """OK or FAILED."""
        return OK if self.error is None else FAILED


class Consensus:
    """The ranks that must step alike.

    Args:
        group: their process group.
        device: on which it communicates.
    """

    def __init__(self, group: GroupHandle, device: torch.device) -> None:
        self._group = group
        self._device = device

    def settle(
        self,
        vote: Vote,
        must_agree: Sequence[MustAgree],
        error: Exception | None,
    ) -> Vote:
        """Agrees on whether to step.

        Args:
            vote: this rank's; its status may be any.
            must_agree: what must be alike on all ranks, as many on each; may be empty where
                ``error`` is given.
            error: why the status is FAILED or REFUSED.

        Raises:
            NonFiniteGradientError: if a rank refuses its gradients.
            ShampooDistributedError: if a rank has failed.
            PlanMismatchError: if the ranks do not agree on one of these.
            In every case, on all ranks.
        """
        digests = [item.digest for item in must_agree] or [0] * ITEMS
        # Of a digest and its negative, the largest are each other's negatives iff all are equal.
        signed = [value for number in digests for value in (number, -number)]
        status, nonzero, unprepared, *agreed = self._max(
            [vote.status, int(vote.is_nonzero), int(not vote.is_prepared), *signed]
        )
        if status >= REFUSED:
            self.fail(error)
        for item, high, low in zip(must_agree, agreed[::2], agreed[1::2], strict=True):
            if high != -low:
                self._name_difference(item)
        return Vote(status, bool(nonzero), not unprepared)

    def confirm(self, status: int) -> int:
        """The largest status of all ranks."""
        return self._max([status])[0]

    def gather(self, values: Tensor) -> Tensor:
        """What every rank says, [ranks, ...] on the host.

        Args:
            values: [1, ...] on the host, of one shape and dtype on all ranks.
        """
        group = self._group.live()
        own = values.to(self._device)
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, own, group=group)
        return torch.cat(everyone).cpu()

    def check(self, deferred: DeferredError, number: int = 0) -> bool:
        """Raises on all ranks if one has failed; whether a number is the same on all."""
        status, high, low = self._max([deferred.status, number, -number])
        if status != OK:
            self.fail(deferred.error)
        return high == -low

    def share(self, value: T) -> list[T]:
        """What each rank gives, which can be pickled, in the order of ranks."""
        group = self._group.live()
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, value, group=group)
        return everyone

    def fail(self, error: Exception | None) -> NoReturn:
        """Raises on all ranks alike, naming the first rank that has an error."""
        reason = None if error is None else (type(error).__name__, str(error))
        group = self._group.live()
        reasons: list[tuple[str, str] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(reasons, reason, group=group)
        if error is not None and all(other == reason for other in reasons):
            raise error  # all ranks were asked for the same impossible thing: say it in its words
        ranks = dist.get_process_group_ranks(group)
        rank, (kind, message) = next(
            (rank, other) for rank, other in zip(ranks, reasons, strict=True) if other is not None
        )
        error_type: type[ShampooError] = _SHARED_ERRORS.get(kind, ShampooDistributedError)
        raise error_type(
            f"rank {rank}: {kind}: {message} No rank has changed a parameter in this step."
        ) from error

    def _max(self, values: Sequence[int]) -> list[int]:
        tensor = torch.tensor(values, dtype=torch.int64, device=self._device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group.live())
        agreed: list[int] = tensor.tolist()
        return agreed

    def _name_difference(self, item: MustAgree) -> NoReturn:
        """Raises with the first entry in which a rank differs from the first rank."""
        noun, entries = item.noun, item.entries()
        group = self._group.live()
        everyone: list[Sequence[Entry]] = [()] * dist.get_world_size(group)
        dist.all_gather_object(everyone, entries, group=group)
        ranks = dist.get_process_group_ranks(group)
        for rank, theirs in zip(ranks, everyone, strict=True):
            if len(theirs) != len(everyone[0]):
                raise PlanMismatchError(
                    f"rank {rank} has {len(theirs)} {noun}, rank {ranks[0]} has"
                    f" {len(everyone[0])}. Give all ranks the same model and parameter groups."
                )
            for own, other in zip(everyone[0], theirs, strict=True):
                if own != other:
                    keys = [*own, *(key for key in other if key not in own)]
                    key = next(key for key in keys if own.get(key) != other.get(key))
                    raise PlanMismatchError(
                        f"rank {rank} has {other['name']} with {key}={other.get(key)},"
                        f" rank {ranks[0]} has {own['name']} with {key}={own.get(key)}."
                        f" {item.remedy} No rank has changed anything in this step."
                    )
        raise AssertionError("digests differ but entries do not")
