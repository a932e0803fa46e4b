"""Is a size class faster than its stacks, one after another? What is timed to know.

The chain of launches is timed, with all that a class adds to it: zeros, copies in, copies out. What
follows in a refresh, diagonal matrices and the root check, is the same few launches for any stack:
a class spares those too, so that one that wins here wins there. Stacks are of four sides, from that
of the class down to a quarter, and as many matrices in all as a class ever holds: with fewer, their
launches would outweigh the work even more, and padding would win by more. The power is 4: others
take some products more or less, together as alone.

Verdicts are kept by the side of a class, as those of a kernel are by size: a refresh pads smaller
stacks up to a side at which ``minimax_class_root_`` is chosen.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shampoo.ops.registry import OPS, Run, Supports, has_kernel
from shampoo.roots.size_classes import padded, rows_of

CLASS_ROOT = "minimax_class_root_"

Kernel = tuple[Run, Supports | None]


def rivals() -> list[Kernel]:
    """The kernels that take a stack by itself, in the order in which they are preferred."""
    op = OPS["minimax_root_"]
    kinds = ["cuda"] if has_kernel("cuda_minimax_small_root_", "CUDA") else []
    return [op.load(kind) for kind in (*kinds, "triton")]


def class_calls(
    run: Run, arguments: Sequence[Any], alone: Sequence[Kernel]
) -> dict[str, Callable[[], None]]:
    """A class, and its stacks one after another, from the same memory to the same memory.

    Args:
        run: a kernel of ``minimax_class_root_``.
        arguments: of a call of it, whose matrices stand in order of their sizes.
        alone: kernels of ``minimax_root_``, of which the first that takes a stack is run; the
            reference, if none does.

    Returns:
        ``"kernel"`` and ``"reference"``, as a timing names them.
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

    def one_by_one() -> None:
        for root, stack, part in zip(roots, stacks, rows, strict=True):
            given = root, ridge[part], stack, *how
            _first_that_takes(alone, given)(*given)

    return {"kernel": together, "reference": one_by_one}


def _first_that_takes(kernels: Sequence[Kernel], given: Sequence[Any]) -> Run:
    takes = (run for run, supports in kernels if supports is None or supports(*given))
    return next(takes, OPS["minimax_root_"].reference)
