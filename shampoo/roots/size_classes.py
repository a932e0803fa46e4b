"""Size classes: due stacks of several sides, padded by zeros and refreshed as one.

A root takes as many launches whatever there is of it, and on a GPU small stacks take little else.
So stacks whose roots are taken alike go together where that was measured to be faster: each matrix
lies in the upper left corner of one of side N, the largest of them. Zeros beside a matrix change
nothing of it: its Schatten-4 norm stays, so its ridge does, and the iteration keeps the blocks of
``A + 0`` apart. The root check is told the sizes, and probes the matrix alone.

Where this pays at a side, the op ``minimax_class_root_`` has a kernel that is chosen there
(:mod:`shampoo.certificates.class_timing`). That kernel takes all matrices of the side, also those
that happen to be alone: its roots depend on the matrix only, so that their bits follow neither what
else is due nor how blocks are divided among ranks. At other sides, and on a CPU at all, a stack is
refreshed by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo.ops import REFERENCE, Number, kernel_at
from shampoo.ops.transit import Letter
from shampoo.roots.refresh import PendingFlags, Where, refresh_roots_
from shampoo.roots.solver import choose_method

# Matrices of a class, and their elements, padding included. They bound what is copied, and are what
# was timed: a stack of as many keeps a GPU busy by itself, and padding it would be work.
_MATRICES, _ELEMENTS = 512, 1 << 24


class Stack(NamedTuple):
    """Matrices of one side that are due.

    Attributes:
        side: n.
        matrices: K.
        p: The power of the root.
    """

    side: int
    matrices: int
    p: float


class Due(NamedTuple):
    """A stack that is refreshed, with others or alone: see :func:`refresh_roots_`."""

    root: Tensor
    factor: Tensor
    failures: Tensor
    ready: Tensor
    correction: Number
    pending: PendingFlags | None
    where: Where
    found: Tensor | None


def classes(
    stacks: Sequence[Stack], like: Tensor, eps: float, relative_eps: float, method: str
) -> list[list[int]]:
    """Which stacks go together: every one is in one class, most in a class of their own.

    From the largest side down, a class takes the next stack of its power as long as it is allowed
    to be so large. Since a part of a class that is small enough is small enough, no other way to
    divide them makes fewer classes. What is too large for any is left alone.

    Args:
        stacks: Of one device, dtype and ridge.
        like: A tensor of theirs, for the device and the dtype.
        eps: Absolute ridge.
        relative_eps: Relative ridge.
        method: As in ``inverse_root``.

    Returns:
        Indices of stacks, by class.
    """
    found: list[list[int]] = []
    filling: dict[float, tuple[list[int], int]] = {}  # by power the last class, and its matrices
    for index in sorted(range(len(stacks)), key=lambda each: (-stacks[each].side, each)):
        side, count, p = stacks[index]
        if not is_padded(like, side, p, eps, relative_eps, method):
            found.append([index])
            continue
        members, total = filling.get(p, ([], 0))
        if members and total + count <= most_matrices(stacks[members[0]].side):
            members.append(index)
            filling[p] = members, total + count
        else:
            found.append([index])
            filling[p] = found[-1], count
    return found


def most_matrices(side: int) -> int:
    """How many matrices a class of a side holds at most."""
    return min(_MATRICES, _ELEMENTS // side**2)


def is_padded(
    like: Tensor, side: int, p: float, eps: float, relative_eps: float, method: str
) -> bool:
    """Whether matrices of a side are taken by the op of classes: see the top of the module."""
    is_iterated = choose_method(like, p, eps, relative_eps, method) == "minimax"
    return is_iterated and kernel_at("minimax_class_root_", like, side) != REFERENCE


def refresh_together_(
    due: Sequence[Due],
    *,
    p: float,
    eps: float,
    relative_eps: float,
    method: str,
    accepted: Tensor | None = None,
) -> None:
    """:func:`refresh_roots_` of some stacks, which are one class if they are several."""
    how: dict[str, Any] = {"p": p, "eps": eps, "relative_eps": relative_eps, "method": method}
    if len(due) == 1:
        [alone] = due
        count, n, _ = alone.factor.shape
        if is_padded(alone.factor, n, **how):  # by nothing, as there is no larger one
            how["sizes"] = torch.full((count,), n, dtype=torch.int32, device=alone.factor.device)
        refresh_roots_(
            *alone[:4],
            **how,
            correction=alone.correction,
            accepted=accepted,
            pending=alone.pending,
            where=alone.where,
            found=alone.found,
        )
        return
    side = max(each.root.shape[1] for each in due)
    rows = list(rows_of([len(each.root) for each in due]))
    root, factor, sizes = padded([(each.root, each.factor) for each in due], side)
    failures = torch.cat([each.failures for each in due])
    ready = torch.cat([each.ready for each in due])
    watched = [each.found for each in due if each.found is not None]
    found = torch.cat(watched, dim=1) if watched else None
    refresh_roots_(
        *(root, factor, failures, ready),
        **how,
        correction=_correction(due),
        accepted=accepted,
        pending=_JoinedFlags.of(due, rows),
        found=found,
        sizes=sizes,
    )
    for each, part in zip(due, rows, strict=True):
        n = each.root.shape[1]
        each.root.copy_(root[part, :n, :n])
        if each.found is not None and found is not None:
            each.found.copy_(found[:, part])
    for into, joined in (("failures", failures), ("ready", ready)):
        torch._foreach_copy_([getattr(each, into) for each in due], [joined[part] for part in rows])


def rows_of(counts: Sequence[int]) -> Iterator[slice]:
    """Where stacks of some lengths lie, one after another."""
    end = 0
    for count in counts:
        end += count
        yield slice(end - count, end)


def padded(stacks: Sequence[Sequence[Tensor]], side: int) -> tuple[Tensor, ...]:
    """Stacks one after another, with zeros beside each matrix.

    Args:
        stacks: For every stack the same number of tensors, each [K, n, n] with its own K and n.
        side: N, at least every n.

    Returns:
        As many tensors, [B, N, N], and the sizes, [B] int32.
    """
    counts, first = [len(each[0]) for each in stacks], stacks[0][0]
    joined = first.new_zeros(len(stacks[0]), sum(counts), side, side)
    sizes = torch.empty(sum(counts), dtype=torch.int32, device=first.device)
    for each, part in zip(stacks, rows_of(counts), strict=True):
        n = each[0].shape[1]
        sizes[part].fill_(n)
        for into, tensor in zip(joined, each, strict=True):
            into[part, :n, :n].copy_(tensor)
    return (*joined, sizes)


def _correction(due: Sequence[Due]) -> Number:
    """The correction of all, or of each matrix, [B], where they differ."""
    own = [each.correction for each in due]
    differing = [each for each in own if isinstance(each, Tensor) and each.dim() > 0]
    return torch.cat(differing) if differing else own[0]


class _JoinedFlags:
    """The outcomes of a class, in one letter of which every stack reads its part."""

    def __init__(self, members: Sequence[tuple[PendingFlags, Where, slice]]) -> None:
        self._members = members

    @classmethod
    def of(cls, due: Sequence[Due], rows: Sequence[slice]) -> _JoinedFlags | None:
        """Those of some stacks; None where these have none, which is so of all or of none."""
        parts = zip(due, rows, strict=True)
        members = [(each.pending, each.where, part) for each, part in parts if each.pending]
        return cls(members) if members else None

    def send(self, where: Where, outcome: Tensor) -> None:
        letter = Letter(outcome)
        for pending, rows, part in self._members:
            pending.expect(rows, letter, part)

    def receive(self, where: Where) -> Tensor:
        return torch.cat([pending.receive(rows) for pending, rows, _ in self._members])
