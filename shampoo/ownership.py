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
