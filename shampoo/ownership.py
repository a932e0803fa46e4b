"""Which rank owns which block: greedy longest processing time (distributed.md 2.1)."""

import heapq
import math
from collections.abc import Sequence


def assign_owners(costs: Sequence[float], ranks: int, loads: list[float]) -> list[int]:
    """Gives every block to the rank with the least work so far, the dearest block first.

    Ties between blocks go by their index, ties between ranks by theirs, so that all ranks decide
    alike without a word. Called for one parameter group after the other with the same ``loads``,
    it places later groups on top of earlier ones, whose owners stay.

    Args:
        costs: [B], of the blocks, in any unit.
        ranks: how many may own blocks, >= 1.
        loads: [ranks], in and out: what each rank has been given.

    Returns:
        [B], the owner of every block. No rank is given more than ``mean + (1 - 1/ranks) * dearest``
        when ``loads`` was equal before.

    Raises:
        ValueError: for ``ranks < 1``, a load list of another length, or a cost that is negative or
            not finite; ``loads`` is as before.
    """
    if ranks < 1:
        raise ValueError(f"Invalid ranks={ranks}. Must be >= 1.")
    if len(loads) != ranks:
        raise ValueError(f"Invalid loads of length {len(loads)}. Must have ranks={ranks} entries.")
    for index, cost in enumerate(costs):
        if not 0.0 <= cost < math.inf:
            raise ValueError(f"Invalid cost {cost} of block {index}. Must be finite and >= 0.0.")
    owners = [0] * len(costs)
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    for index in sorted(range(len(costs)), key=lambda entry: -costs[entry]):
        load, rank = heap[0]
        owners[index] = rank
        heapq.heapreplace(heap, (load + costs[index], rank))
    for load, rank in heap:
        loads[rank] = load
    return owners


def aligned_slots(costs: Sequence[float], owners: Sequence[int], period: int) -> list[int]:
    """In which step of a period each block refreshes its roots, alike on all ranks.

    Every rank starts its dearest block in the same step, then the next: a step waits for the rank
    with the longest root, so dear blocks should meet dear ones (distributed.md 5.1).

    Args:
        costs: [B], seconds of each block's roots; blocks with 0 have none and share slot 0.
        owners: [B], from :func:`assign_owners`.
        period: ``precondition_frequency``, >= 1.

    Returns:
        [B], each in ``range(period)``.

    Raises:
        ValueError: for ``period < 1``.
    """
    if period < 1:
        raise ValueError(f"Invalid period={period}. Must be >= 1.")
    owned: dict[int, list[int]] = {}
    for index in sorted(range(len(costs)), key=lambda entry: -costs[entry]):
        if costs[index] > 0.0:
            owned.setdefault(owners[index], []).append(index)
    used = min(period, max(map(len, owned.values()), default=1))
    slots = [0] * len(costs)
    for blocks in owned.values():
        for position, index in enumerate(blocks):
            slots[index] = position % used * period // used
    return slots
