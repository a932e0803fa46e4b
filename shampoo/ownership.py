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


def group_size(world_size: int, blocks: int, local_world_size: int, asked: int = -1) -> int:
    """How many consecutive ranks share one set of owners (distributed.md 6, rules 1 and 2).

    Args:
        world_size: ranks that hold copies of the parameters, >= 1.
        blocks: with factors; there should be at least four for each owner, or some owners have
            nothing to do and the AllGather pads for them.
        local_world_size: ranks of a node, whose links are the fast ones.
        asked: ``num_trainers_per_group``. -1 is the largest divisor of ``world_size`` that divides
            a node and has enough blocks; 0 and 1 are one rank; more than the world is the world.

    Raises:
        ValueError: for a size that does not divide the world, naming those that do.
    """
    if world_size < 1:
        raise ValueError(f"Invalid world_size={world_size}. Must be >= 1.")
    if local_world_size < 1:
        raise ValueError(f"Invalid local_world_size={local_world_size}. Must be >= 1.")
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    if asked == -1:
        node = min(local_world_size, world_size)
        return max(size for size in divisors if size == 1 or _fits(size, node, blocks))
    if asked < -1 or (asked <= world_size and asked > 1 and asked not in divisors):
        raise ValueError(
            f"Invalid num_trainers_per_group={asked}. Must be -1 or divide the {world_size} ranks:"
            f" one of {', '.join(map(str, divisors))}."
        )
    return min(max(asked, 1), world_size)


def _fits(size: int, node: int, blocks: int) -> bool:
    return node % size == 0 and blocks >= 4 * size


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
