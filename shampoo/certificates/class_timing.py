"""Is a size class faster than its stacks, one after another? What is timed to know.

The chain of launches is timed, with all that a class adds to it: zeros, copies in, copies out. What
follows in a refresh, diagonal matrices and the root check, is the same few launches for any stack:
a class spares those too, so that one that wins here wins there. Stacks are of four sides, from that
of the class down to a quarter, and as many matrices in all as a class ever holds: with fewer, their
launches would outweigh the work even more, and padding would win by more. The power is 4: others
take some products more or less, together as alone. What it is compared with is the fastest way to
take them alone by kernels that passed. A stack without company at such a side is not timed: it goes
by the op of classes for the sake of its bits, whatever that costs.

Verdicts are kept by the side of a class, as those of a kernel are by size: a refresh pads smaller
stacks up to a side at which ``minimax_class_root_`` is chosen.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shampoo.ops.registry import OPS, Run, Supports
from shampoo.roots.size_classes import padded, rows_of

CLASS_ROOT, ROOT = "minimax_class_root_", "minimax_root_"

Kernel = tuple[Run, Supports | None]


def rivals(kinds: Sequence[str]) -> list[list[Kernel]]:
    """Ways to take stacks by themselves, each by the first of some kernels that takes a stack.

    Args:
        kinds: of the kernels of ``minimax_root_`` that passed. Where none takes a stack, and in a
            way of its own, the reference does.
    """
    kernels = [OPS[ROOT].load(kind) for kind in sorted(kinds)]  # small ones by CUDA C++ first
    return [kernels[at:] for at in range(len(kernels) + 1)]


def class_calls(
    run: Run, arguments: Sequence[Any], alone: Sequence[Sequence[Kernel]]
) -> dict[str, Callable[[], None]]:
    """A class, and its stacks one after another, from the same memory to the same memory.

    Args:
        run: a kernel of ``minimax_class_root_``.
        arguments: of a call of it, whose matrices stand in order of their sizes.
        alone: see :func:`rivals`.

    Returns:
        ``"kernel"``, and every way to do without by its ordinal.
    """
    _, ridge, factor, sizes, *how = arguments
    sides, counts = (each.tolist() for each in torch.unique_consecutive(sizes, return_counts=True))
    rows = list(rows_of(counts))
    stacks = [factor[part, :n, :n].contiguous() for part, n in zip(rows, sides, strict=True)]
    roots = [torch.zeros_like(stack) for stack in stacks]

    def together() -> None:
        before, joined, own = padded(list(zip(roots, stacks, strict=True)), factor.shape[1])
        candidate = torch.zeros_like(before)
        run(candidate, ridge, joined, own, *how)
        for root, part, n in zip(roots, rows, sides, strict=True):
            root.copy_(candidate[part, :n, :n])

    def one_by_one(kernels: Sequence[Kernel]) -> None:
        for root, stack, part in zip(roots, stacks, rows, strict=True):
            given = root, ridge[part], stack, *how
            _first_that_takes(kernels, given)(*given)

    ways = {str(at): functools.partial(one_by_one, kernels) for at, kernels in enumerate(alone)}
    return {"kernel": together, **ways}


def _first_that_takes(kernels: Sequence[Kernel], given: Sequence[Any]) -> Run:
    takes = (run for run, supports in kernels if supports is None or supports(*given))
    return next(takes, OPS[ROOT].reference)
