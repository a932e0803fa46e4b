"""Costs of blocks and who owns them: bounds, brute force, and the same answer everywhere."""

import itertools
import json
import math
import random
from functools import partial

import pytest

from shampoo.blocks.cost import CostModel
from shampoo.blocks.layout import Geometry
from shampoo.blocks.ownership import assign_owners
from shampoo.preconditioner import KINDS
from shampoo.preconditioner.choice import cost_of, layout_of

PRODUCTS = CostModel(accumulate=((1, 1.0),), apply=((1, 1.0),), root=((1, 100.0),), byte=0.0)


def geometry(limit, **changes):
    values = {
        "max_preconditioner_dim": limit,
        "merge_dims": "none",
        "precondition_1d": False,
        "precondition": True,
        "large_dim_method": "blocking",
        "preconditioner_dtype": "float32",
        "grafting": "adam",
        "refresh_schedule": "together",
        "capturable": False,
        "preconditioner": "shampoo",
    }
    return Geometry(**(values | changes))


def work(extent, kind="shampoo", diagonal=()):
    """The cost of a block whose modes are as they are, but for diagonal ones."""
    flags = [mode in diagonal for mode in range(len(extent))]
    return KINDS[kind].cost(extent, KINDS[kind].modes(extent, flags))


def greedy(costs, loads):
    """The rule, said slowly: no heap, no sort."""
    loads, owners = list(loads), {}
    while len(owners) < len(costs):
        dearest = max((i for i in range(len(costs)) if i not in owners), key=lambda i: costs[i])
        rank = loads.index(min(loads))
        owners[dearest] = rank
        loads[rank] += costs[dearest]
    return [owners[index] for index in range(len(costs))], loads


@pytest.mark.parametrize("seed", range(20))
def test_owners_are_those_of_the_rule_said_slowly(seed):
    draw = random.Random(seed)
    ranks = draw.randint(1, 6)
    loads = [float(draw.randint(0, 3)) for _ in range(ranks)]  # with ties
    costs = [float(draw.randint(0, 6)) for _ in range(draw.randint(0, 30))]
    expected, expected_loads = greedy(costs, loads)
    assert assign_owners(costs, ranks, loads) == expected
    assert loads == expected_loads


@pytest.mark.parametrize("seed", range(10))
def test_worst_load_is_within_the_bound_of_the_optimum(seed):
    draw = random.Random(seed)
    ranks, costs = draw.randint(2, 3), [draw.random() for _ in range(draw.randint(1, 8))]
    best = min(
        max(sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(ranks))
        for owners in itertools.product(range(ranks), repeat=len(costs))
    )
    loads = [0.0] * ranks
    assign_owners(costs, ranks, loads)
    assert best - 1e-12 <= max(loads) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-12  # Graham 1969


def test_loads_are_what_was_given():
    draw = random.Random(0)
    costs = [draw.random() for _ in range(500)]
    loads = [0.0] * 7
    owners = assign_owners(costs, 7, loads)
    for rank in range(7):
        given = math.fsum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank)
        assert loads[rank] == pytest.approx(given, rel=1e-12)


def test_later_groups_move_no_earlier_owner():
    loads = [0.0, 0.0]
    assert assign_owners([4.0, 1.0], 2, loads) == [0, 1]
    assert assign_owners([1.0, 2.0], 2, loads) == [1, 1]
    assert loads == [4.0, 4.0]


def test_equal_blocks_go_round():
    loads = [0.0] * 3
    assert assign_owners([1.0] * 7, 3, loads) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("costs", "ranks", "loads", "words"),
    [
        ([1.0], 0, [], "Invalid ranks=0. Must be >= 1."),
        ([1.0], -3, [], "Invalid ranks=-3"),
        ([1.0], 2, [0.0], "loads of length 1. Must have ranks=2"),
        ([1.0, -1.0], 1, [0.0], "Invalid cost -1.0 of block 1"),
        ([math.nan], 1, [0.0], "Invalid cost nan of block 0"),
        ([math.inf], 1, [0.0], "Invalid cost inf"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(costs, ranks, loads, words):
    before = list(loads)
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        assign_owners(costs, ranks, loads)
    assert loads == before


@pytest.mark.parametrize(("m", "n", "f"), [(8, 8, 1), (7, 12, 50)])
def test_a_matrix_costs_what_the_design_says(m, n, f):
    seconds = PRODUCTS.block_seconds(work((m, n)), f)
    assert seconds == 3 * m * n * (m + n) + 100 * (m**3 + n**3) / f
    assert PRODUCTS.refresh_seconds(work((m, n))) == 100 * (m**3 + n**3)


def test_only_full_modes_multiply():
    extent, numel = (3, 4, 5), 3 * 4 * 5
    assert PRODUCTS.ordinary_seconds(work(extent)) == 3 * numel * (3 + 4 + 5)
    half = work(extent, diagonal=(1,))
    assert PRODUCTS.ordinary_seconds(half) == 3 * numel * (3 + 5)
    assert PRODUCTS.refresh_seconds(half) == 100 * (27 + 125)
    for kind in ("grafted", "adagrad"):
        assert PRODUCTS.block_seconds(work(extent, kind), 1) == 0


def test_kl_shampoo_applies_every_root_once_more_for_each_other_mode():
    extent, numel = (3, 4, 5), 3 * 4 * 5
    cost = work(extent, "kl_shampoo", diagonal=(1,))
    # N d for the factor, 2 N d for the direction and for the whitening of each other mode.
    assert PRODUCTS.ordinary_seconds(cost) == numel * (1 + 2 * 3) * (3 + 5)
    assert PRODUCTS.refresh_seconds(cost) == 100 * (27 + 125)
    # Whitened by nothing: the gradient as it is.
    assert work((7,), "kl_shampoo") == work((7,))


def test_every_block_moves_bytes():
    streams = CostModel(
        accumulate=((1, 0.0),), apply=((1, 0.0),), root=((1, 0.0),), byte=1.0, machine=""
    )
    # gradient, packed gradient, direction, two moments twice; factor twice and root
    extent = (3, 5)
    assert streams.ordinary_seconds(work(extent, "grafted")) == 4 * 7 * 15
    assert streams.ordinary_seconds(work(extent)) == 4 * (7 * 15 + 3 * 34)
    thin = work(extent, diagonal=(0, 1))
    assert streams.ordinary_seconds(thin) == 4 * (7 * 15 + 2 * 3 * 15)
    # Each of two whitened blocks is written and read.
    whitened = 4 * (7 * 15 + 3 * 34 + 2 * 2 * 15)
    assert streams.ordinary_seconds(work(extent, "kl_shampoo")) == whitened


def test_curves_are_linear_between_their_points():
    model = CostModel(
        accumulate=((1, 0.0),), apply=((1, 0.0),), root=((10, 3.0), (20, 1.0)), byte=0.0
    )
    for side, unit in ((5, 3.0), (10, 3.0), (15, 2.0), (20, 1.0), (99, 1.0)):
        assert model.root_seconds(side) == side**3 * unit


def test_costs_of_a_tensor_come_in_the_order_of_its_blocks():
    layout = layout_of((7, 10), geometry(4))
    sides = [(m, n) for m in (4, 3) for n in (4, 4, 2)]
    expected = [PRODUCTS.block_seconds(work(side), 3) for side in sides]
    assert PRODUCTS.grid_seconds(layout.tiles, 3, partial(cost_of, layout)) == expected


def test_a_model_survives_its_file(tmp_path):
    model = CostModel(root=((64, 1e-9), (512, 0.1 + 0.2)), byte=1e-11, machine="here")
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"machine": {"threads": 2}, "cost_model": model.to_json()}))
    assert CostModel.load(path) == model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"byte": -1.0}, "Invalid byte=-1.0. Must be a finite number >= 0.0"),
        ({"byte": "fast"}, "Invalid byte='fast'"),
        ({"root": []}, "Invalid root="),
        ({"root": [8, 1.0]}, "Must be pairs"),
        ({"root": [[8.5, 1.0]]}, "Must be pairs"),
        ({"root": 1.0}, "Must be pairs"),
        ({"root": [[8, 1.0], [4, 1.0]]}, "ascending"),
        ({"root": [[8, math.nan]]}, "it has NaN, which is not a number"),
        ({"root": [[True, 1.0]]}, "Must be pairs"),
        ({"root": [[1, 10**400]]}, "it has an integer of 401 digits. Must be < 2"),
        ({"root": [[side, 1e-9] for side in range(1, 1002)]}, "and at most 1000"),
        ({"apply": [[1, 1e308]]}, r"Invalid apply at side 1=1e\+308. Must be .* <= 1000000.0"),
        ({"machine": "\x1b[2J"}, r"Invalid machine='\\x1b\[2J'. Must be at most 200 characters"),
        ({"machine": ["a"]}, r"Invalid machine=\['a'\]"),
        ({"machine": "a" * 201}, "Invalid machine='aaa"),
        ({"speed": 3}, "holds no cost_model with just accumulate, apply"),
    ],
)
def test_bad_models_are_named(tmp_path, changes, words):
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"cost_model": CostModel().to_json() | changes}))
    with pytest.raises(ValueError, match=words):
        CostModel.load(path)


def test_a_file_that_is_no_model_is_named(tmp_path):
    path = tmp_path / "model.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"model\.json': it is not JSON"):
        CostModel.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"it is \[\]. Must be an object"):
        CostModel.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds no cost_model"):
        CostModel.load(path)
