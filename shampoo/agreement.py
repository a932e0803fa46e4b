"""All ranks that hold the same parameters take a step together, or none does.

One small all-reduce before anything is changed carries each rank's word on its gradients, a digest
of its plan and a digest of what its step is about to do (distributed.md 2.2, 3.3). A rank that
cannot go on says so there, and the others stop with it instead of waiting for it.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from shampoo.errors import (
    NonFiniteGradientError,
    PlanMismatchError,
    ShampooDistributedError,
    ShampooError,
)

# What a rank says of its step; the largest word counts.
OK, SKIPPED, REFUSED, FAILED = range(4)

Entry = Mapping[str, str]  # what a rank says of one parameter or group, by the name of it


def digest(content: str) -> int:
    """62 bits of a text, the same in every process."""
    hashed = hashlib.blake2b(content.encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") >> 2


@dataclass(frozen=True)
class Topic:
    """Something that must be alike on all ranks, in short and, where they differ, in words."""

    digest: int
    entries: Callable[[], Sequence[Entry]]


TOPICS = 3  # of a step: its plan, which gradients are there, the values of hyper-parameters


class Agreement:
    """The ranks that must step alike.

    Args:
        group: their process group.
        device: on which it communicates.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device

    def settle(
        self,
        status: int,
        is_nonzero: bool,
        topics: Sequence[Topic],
        error: Exception | None,
    ) -> tuple[int, bool]:
        """Agrees on whether to step.

        Args:
            status: this rank's word.
            is_nonzero: whether it has a gradient that is not all zero.
            topics: what must be alike on all ranks, as many on each; may be empty where ``error``
                is given.
            error: why the status is FAILED or REFUSED.

        Returns:
            The status that counts, OK or SKIPPED, and whether any rank has a nonzero gradient.

        Raises:
            NonFiniteGradientError: if a rank refuses its gradients.
            ShampooDistributedError: if a rank has failed.
            PlanMismatchError: if the ranks do not agree on a topic.
            In every case, on all ranks.
        """
        digests = [topic.digest for topic in topics] or [0] * TOPICS
        # Of a digest and its negative, the largest are each other's negatives iff all are equal.
        signed = [value for number in digests for value in (number, -number)]
        status, nonzero, *agreed = self._max([status, int(is_nonzero), *signed])
        if status >= REFUSED:
            self.fail(error)
        for topic, high, low in zip(topics, agreed[::2], agreed[1::2], strict=True):
            if high != -low:
                self._name_difference(topic.entries())
        return status, bool(nonzero)

    def confirm(self, word: int) -> int:
        """The largest word of all ranks."""
        return self._max([word])[0]

    def fail(self, error: Exception | None) -> NoReturn:
        """Raises on all ranks alike, naming the first rank that has an error."""
        reason = None if error is None else (type(error).__name__, str(error))
        reasons: list[tuple[str, str] | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(reasons, reason, group=self._group)
        if error is not None and all(other == reason for other in reasons):
            raise error  # all ranks were asked for the same impossible thing: say it in its words
        ranks = dist.get_process_group_ranks(self._group)
        rank, (kind, message) = next(
            (rank, other) for rank, other in zip(ranks, reasons, strict=True) if other is not None
        )
        error_type: type[ShampooError] = ShampooDistributedError
        if kind == NonFiniteGradientError.__name__:
            error_type = NonFiniteGradientError
        raise error_type(
            f"rank {rank}: {kind}: {message} No rank has changed a parameter in this step."
        ) from error

    def _max(self, values: Sequence[int]) -> list[int]:
        tensor = torch.tensor(values, dtype=torch.int64, device=self._device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        agreed: list[int] = tensor.tolist()
        return agreed

    def _name_difference(self, entries: Sequence[Entry]) -> NoReturn:
        """Raises with the first entry in which a rank differs from the first rank."""
        everyone: list[Sequence[Entry]] = [()] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, entries, group=self._group)
        ranks = dist.get_process_group_ranks(self._group)
        for rank, theirs in zip(ranks, everyone, strict=True):
            if len(theirs) != len(everyone[0]):
                raise PlanMismatchError(
                    f"rank {rank} has {len(theirs)} parameters to train, rank {ranks[0]} has"
                    f" {len(everyone[0])}. Give all ranks the same model and parameter groups."
                )
            for own, other in zip(everyone[0], theirs, strict=True):
                if own != other:
                    key = next(key for key in own if own[key] != other.get(key))
                    raise PlanMismatchError(
                        f"rank {rank} has {other['name']} with {key}={other[key]},"
                        f" rank {ranks[0]} has {own['name']} with {key}={own[key]}."
                        " All ranks must train the same parameters, in the same order, with the"
                        " same hyper-parameters. No rank has changed anything in this step."
                    )
        raise AssertionError("digests differ but entries do not")
