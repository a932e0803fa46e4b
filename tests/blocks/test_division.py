"""How blocks are divided: evenly, and without moving those that have an owner."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from fake_world import fake_rank
from test_ownership import geometry
from torch.nn import Parameter

from shampoo import Shampoo
from shampoo.blocks.cost import CostModel
from shampoo.blocks.layout import Layout
from shampoo.blocks.ownership import Share, Team, divide
from shampoo.distributed.process_groups import ProcessGroups
from shampoo.planner.architectures import ARCHITECTURES
from shampoo.preconditioner.choice import cost_of, layout_of
from shampoo.step.block_plan import BlockPlan


def share(
    shape: Sequence[int], group: int, team: Team, limit: int = 4, frequency: int = 1
) -> Share:
    layout = layout_of(shape, geometry(limit))
    param = torch.empty(shape, device="meta")
    return Share(group, param, layout, team, frequency, partial(cost_of, layout))


def seconds(layout: Layout, frequency: int) -> list[float]:
    """What the blocks of a tensor cost, by the nominal model."""
    return CostModel().grid_seconds(layout.tiles, frequency, partial(cost_of, layout))


def loads(shares: Sequence[Share], owners: Sequence[Sequence[int]], ranks: int) -> list[float]:
    total = [0.0] * ranks
    for own, theirs in zip(shares, owners, strict=True):
        costs = seconds(own.layout, own.frequency)
        for cost, owner in zip(costs, theirs, strict=True):
            total[owner] += cost
    return total


TRIO = Team((0, 1, 2), 1)
FIRST = [share(shape, 0, TRIO) for shape in [(9, 6), (4, 4), (13, 2), (5,)]]
SECOND = [share(shape, 1, TRIO) for shape in [(7, 9), (11, 3)]]


def test_every_block_has_one_owner_in_its_team():
    owners = divide(FIRST + SECOND)
    for own, theirs in zip(FIRST + SECOND, owners, strict=True):
        assert len(theirs) == own.layout.blocks
        assert set(theirs) <= {0, 1, 2}
    assert min(loads(FIRST + SECOND, owners, 3)) > 0


def test_all_ranks_of_a_team_decide_alike():
    shapes = [(9, 6), (4, 4), (13, 2)]
    first, *others = [
        divide([share(shape, 0, Team((3, 5, 8), me)) for shape in shapes]) for me in range(3)
    ]
    assert all(other == first for other in others)


def test_an_added_group_moves_no_owner_and_fills_the_gaps():
    before = divide(FIRST)
    after = divide(FIRST + SECOND)
    assert after[: len(FIRST)] == before
    gap = loads(FIRST, before, 3)
    filled = loads(FIRST + SECOND, after, 3)
    assert max(filled) - min(filled) < max(gap) - min(gap) + max(
        cost for own in SECOND for cost in seconds(own.layout, 1)
    )
    alone = divide(SECOND)
    assert after[len(FIRST) :] != alone, "the second group ignores the load of the first"


def test_owners_that_were_decided_stay_and_count():
    all_two = [2] * FIRST[0].layout.blocks
    owners = divide(FIRST, {FIRST[0].param: (TRIO, all_two)})
    assert owners[0] == all_two
    assert 2 not in owners[1], "rank 2 has the most to do"


def test_owners_in_another_team_do_not_stay():
    kept = {FIRST[0].param: (Team((0,), 0), [0] * FIRST[0].layout.blocks)}
    assert divide(FIRST, kept) == divide(FIRST)


def test_one_rank_owns_everything_it_is_alone_with():
    alone = [share((9, 9), 0, Team((0,), 0)), share((6, 3), 0, Team((5,), 0))]
    assert divide(alone) == [[0] * own.layout.blocks for own in alone]


def test_teams_have_loads_of_their_own():
    other = [share((9, 6), 0, Team((4, 5), 0))]
    together = divide([FIRST[0], *other, *FIRST[1:]])
    assert [together[0], *together[2:]] == divide(FIRST)
    assert together[1:2] == divide(other)


def test_rarer_roots_count_less():
    """A block with frequent roots weighs as much as several whose roots are rare."""
    pair = Team((0, 1), 0)
    shares = [share((64, 64), 0, pair, 64, 1)]
    shares += [share((64, 64), 0, pair, 64, 1000) for _ in range(3)]
    owners = [theirs[0] for theirs in divide(shares)]
    assert owners[1:].count(owners[0]) == 0


@pytest.mark.parametrize("name", ["llama-7b", "vit-l16", "resnet50"])
def test_compute_on_eight_ranks_is_within_five_percent_of_even(name):
    shapes = ARCHITECTURES[name]().shapes.values()
    frequency = 50  # of the tables of the design
    with fake_rank(3, 8):
        params = [Parameter(torch.empty(shape, device="meta")) for shape in shapes]
        optimizer = Shampoo(params, precondition_frequency=frequency)
        plan = BlockPlan(
            optimizer.param_groups, {}, ProcessGroups(num_trainers_per_group=8), device="meta"
        )
    total = [0.0] * 8
    for member in plan.members:
        costs = seconds(member.layout, frequency)
        for cost, owner in zip(costs, member.owners, strict=True):
            total[owner] += cost
    assert max(total) <= 1.05 * sum(total) / 8
