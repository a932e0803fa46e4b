"""In which steps of a period roots are refreshed when they are staggered (distributed.md 5.1)."""

from collections.abc import Sequence
from itertools import zip_longest


def aligned_phases(costs: Sequence[Sequence[int]], period: int) -> list[int]:
    """The phase of the dearest root of every rank, of the second dearest, and so on.

    A step waits for the rank with the longest roots, so all ranks refresh their j-th dearest in
    the same step. The period is cut by the dearest j-th root of any rank: no step costs more than
    the mean of these and the dearest of all. Neighbours share a phase, so that a step refreshes
    roots of one size, in one batch.

    Args:
        costs: of the roots of each rank, in whole units, dearest first.
        period: steps, ``precondition_frequency``.

    Returns:
        Phases in ``range(period)``, ascending, as many as the rank with the most roots has.
    """
    slowest = [max(column) for column in zip_longest(*costs, fillvalue=0)]
    total, phases, done = sum(slowest), [], 0
    for cost in slowest:
        phases.append(done * period // total)
        done += cost
    return phases
