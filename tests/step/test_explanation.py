"""What an optimizer says it does is what it does: rows against real state, plans and ranks."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from grouped_models import GPT, build, fit
from layouts import MODELS
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from shampoo import Shampoo, plan
from shampoo.step.explanation import Explanation, TensorRow

SMALL: dict[str, Any] = {"max_preconditioner_dim": 12, "precondition_frequency": 3}


def held(opt: Shampoo) -> list[int]:
    """Bytes of the real state of every parameter."""
    return [
        sum(value.nbytes for value in opt.state.get(param, {}).values())
        for group in opt.param_groups
        for param in group["params"]
    ]


def rows_of(explanation: Explanation) -> dict[str, TensorRow]:
    return {row.name: row for row in explanation.tensors}


CASES: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "betas": (0.0, 0.9)},
    {"refresh_schedule": "staggered", "precondition_1d": True},
    {"preconditioner": "kl_shampoo", "preconditioner_dtype": torch.float64},
    {"grafting": "none", "large_dim_method": "adagrad"},
    {"grafting": "sgd", "large_dim_method": "diagonal", "merge_dims": "none"},
    {"capturable": True},
    {"precondition": False},
]


@pytest.mark.filterwarnings("ignore:shampoo")
@pytest.mark.parametrize("hyper", CASES, ids=str)
def test_bytes_are_those_held_and_planned(hyper: dict[str, Any]):
    torch.manual_seed(0)
    model = MODELS["convolutions"]()
    opt = Shampoo(model.named_parameters(), **{**SMALL, **hyper})
    before = opt.explain()
    assert not opt.state
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    opt.step()
    after = opt.explain()
    assert after == before
    assert [row.state_bytes for row in before.tensors] == held(opt)
    assert before.state_bytes == sum(held(opt))
    assert before.bytes_by_rank == {0: sum(held(opt))}
    report = plan(model, 1, **{**SMALL, **hyper})
    # The plan knows nothing of the second count that a captured step keeps.
    counts = 8 * len(before.tensors) * hyper.get("capturable", False)
    assert report.state_bytes == (before.state_bytes - counts,)
    assert (report.blocks, report.numel) == (before.blocks, before.numel)
    for row, param in zip(before.tensors, model.parameters(), strict=True):
        factors = {key for key in opt.state[param] if ".factor" in key}
        assert bool(factors) == (row.power is not None)
        assert row.blocks == math.prod(row.grid) == len({k.split(".")[0] for k in opt.state[param]
                                                         if k.startswith("block")})  # fmt: skip
        slots = {int(v) for key, v in opt.state[param].items() if ".slot" in key}
        if hyper.get("refresh_schedule") == "staggered":
            assert set(row.phases) == slots


def test_rows_say_what_is_done_and_why():
    model = build()
    model.h[0].up.weight.requires_grad_(False)
    opt = Shampoo(model, lr=0.02, weight_decay=0.1, max_preconditioner_dim=20)
    rows = rows_of(opt.explain())
    table = rows["wte.weight"]
    assert (table.group_name, table.kind, table.grafting) == ("heads", "grafted", "adam")
    assert table.reason == "precondition=False"
    assert table.rule == "adam: precondition=False"
    assert (table.power, table.frequency, table.start) == (None, None, math.inf)
    vector = rows["h.0.up.bias"]
    assert (vector.group_name, vector.reason, vector.merged) == ("vectors", "a vector", (64,))
    matrix = rows["h.1.down.weight"]
    assert (matrix.shape, matrix.merged, matrix.grid) == ((16, 64), (16, 64), (1, 4))
    assert matrix.sides == ((16,), (20, 4))
    assert (matrix.kind, matrix.power, matrix.frequency, matrix.start) == ("shampoo", 2.0, 10, 1.0)
    assert (matrix.early, table.early, vector.early) == ((1, 2, 4, 8), (), ())
    assert (matrix.owners, matrix.phases, matrix.reason) == ((0, 0, 0, 0), (0,), "")
    frozen = rows["h.0.up.weight"]
    assert (frozen.kind, frozen.reason, frozen.state_bytes) == ("none", "frozen", 0)
    assert frozen.rule == "not moved: frozen"
    text = str(opt.explain())
    for part in (
        "h.1.down.weight",
        "1 x 4 of 16 x 20|4",
        "shampoo, adam graft",
        "every 10, first at 1, 2, 4, 8",
        "adam: a vector",
        f"state on rank 0: {opt.explain().state_bytes:,} bytes",
    ):
        assert part in text
    [heads] = [line for line in text.splitlines() if line.startswith("heads ")]
    assert heads.split() == ["heads", "1", "592", "0.02", "0.1"]
    assert [group.name for group in opt.explain().groups] == [
        *("heads", "positional", "vectors", "matrices")
    ]
    assert dataclasses.asdict(matrix)["grid"] == (1, 4)


def test_rows_of_other_rules():
    params = [Parameter(torch.zeros(shape)) for shape in ((4, 40), (3, 4, 5), (0, 3), (), (1, 7))]
    opt = Shampoo(params, large_dim_method="adagrad", max_preconditioner_dim=24)
    long, cube, empty, scalar, vector = opt.explain().tensors
    assert (long.kind, long.reason, long.grafting) == ("adagrad", "too long a side", "none")
    assert long.rule == "adagrad: too long a side"
    assert (cube.merged, cube.power, cube.grid) == ((3, 20), 2.0, (1, 1))
    assert (empty.kind, empty.reason, empty.blocks) == ("none", "no elements", 0)
    assert (scalar.merged, scalar.reason, vector.reason) == ((1,), "a vector", "a vector")
    assert long.name == "parameter 0 of group 0, shape (4, 40)"
    assert long.group_name == "0"
    opt = Shampoo(params[:1], large_dim_method="diagonal", max_preconditioner_dim=24)
    [row] = opt.explain().tensors
    assert row.diagonal == (False, True)
    assert row.rule == "shampoo, adam graft, diagonal in 1"
    opt = Shampoo(params[:2], preconditioner="kl_shampoo", grafting="none", merge_dims="none")
    assert [row.power for row in opt.explain().tensors] == [2.0, 2.0]
    assert opt.explain().tensors[1].rule == "kl_shampoo, no graft"
    opt = Shampoo(params[1:2], merge_dims="none", exponent="paper")
    [row] = opt.explain().tensors
    assert row.power == 6.0


@pytest.mark.parametrize(
    ("hyper", "expected"),
    [
        ({}, "every 10, first at 1, 2, 4, 8"),
        ({"precondition_frequency": 2}, "every 2, from 1"),
        ({"precondition_frequency": 100}, "every 100, first at 1, 2, 4, 8, ..."),
        ({"start_preconditioning_step": 4}, "every 10, first at 4, 8"),
        ({"start_preconditioning_step": 5}, "every 10, from 5"),
        ({"start_preconditioning_step": -1}, "every 10, from 10"),
        ({"start_preconditioning_step": 75}, "every 10, from 75"),
        ({"start_preconditioning_step": math.inf}, "never"),
        ({"refresh_schedule": "staggered"}, "every 10, phases 0, 5, from 1"),
        ({"large_dim_method": "diagonal", "max_preconditioner_dim": 2}, "-"),
    ],
    ids=str,
)
def test_when_roots_are_refreshed_is_said(hyper, expected):
    [row] = Shampoo([Parameter(torch.zeros(4, 4))], betas=(0.9, 0.999), **hyper).explain().tensors
    assert row.refresh == expected


def test_a_model_on_meta_is_explained_alike():
    with torch.device("meta"):
        model = GPT()
    assert Shampoo(model, **SMALL).explain() == Shampoo(build(), **SMALL).explain()


def test_what_stands_in_groups_and_state_counts():
    model = build()
    opt = Shampoo(model, **SMALL)
    fit(model, opt, 2)
    opt.param_groups[3]["lr"] = 0.5
    opt.param_groups[3]["precondition_frequency"] = 7
    opt.param_groups[3].pop("name")
    explained = opt.explain()
    assert explained.groups[3].lr == 0.5
    assert explained.groups[3].name == "3"
    assert rows_of(explained)["h.0.up.weight"].frequency == 7
    model.h[0].up.weight.requires_grad_(False)  # it has state, and is trained if it has a gradient
    assert rows_of(opt.explain())["h.0.up.weight"].kind == "shampoo"
    assert [row.state_bytes for row in opt.explain().tensors] == held(opt)
    copied = copy.deepcopy(opt)  # which has state, and no plan yet
    assert copied.explain() == opt.explain()


def test_nothing_changes_by_asking():
    asked, other = build(), build()
    hyper: dict[str, Any] = {**SMALL, "refresh_schedule": "staggered", "lr": 0.01}
    opt, twin = Shampoo(asked, **hyper), Shampoo(other, **hyper)
    for _ in range(3):
        groups = copy.deepcopy(opt.param_groups)
        opt.explain()
        assert [group["extra"] for group in opt.param_groups] == [g["extra"] for g in groups]
        fit(asked, opt, 2)
        fit(other, twin, 2)
    for one, two in zip(asked.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in twin.param_groups]


def shared(rank: int, how: str, hyper: dict[str, Any]) -> tuple[Explanation, Explanation, int, int]:
    """A job: what each rank says before and after a step, and the bytes and blocks it holds."""
    torch.manual_seed(0)
    model: nn.Module = GPT(width=20)
    if how == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    params = [(name.removeprefix("module."), p) for name, p in model.named_parameters()]
    opt = Shampoo(params, **SMALL, **hyper)
    asks = rank == 1 or how == "fsdp2"  # nobody has to answer
    before = opt.explain() if asks else None
    model(torch.arange(16).reshape(2, 8)).square().mean().backward()
    opt.step()
    after = opt.explain()
    blocks = {(name, key.split(".")[0]) for name, p in params for key in opt.state[p] if "." in key}
    return before or after, after, sum(held(opt)), len(blocks)


@pytest.mark.parametrize("hyper", [{}, {"refresh_schedule": "staggered"}], ids=str)
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_ranks_say_alike_what_each_of_them_holds(ranks: Ranks, how: str, hyper: dict[str, Any]):
    answers = ranks.returns(shared, 2, how, hyper)
    shapes = {
        name: p.shape for name, p in GPT(width=20).named_parameters()
    }  # in no groups, as there
    report = plan(shapes, 2, layout=how, **SMALL, **hyper)
    for rank, (before, after, real, blocks) in enumerate(answers):
        assert before == after
        assert (after.rank, after.state_bytes) == (rank, real)
        assert after.bytes_by_rank == {0: answers[0][2], 1: answers[1][2]}
        assert tuple(after.bytes_by_rank.values()) == report.state_bytes
        owned = [owner for row in after.tensors for owner in row.owners]
        assert owned.count(rank) == blocks
        assert "state on 2 ranks" in str(after)
    assert [row.owners for row in answers[0][1].tensors] == [
        row.owners for row in answers[1][1].tensors
    ]


def early(rank: int) -> list[tuple[int, ...]]:
    """A job: one rank asks before the last group is there, when there is little to divide."""
    opt = Shampoo([Parameter(torch.zeros(4, 4))], **SMALL)
    if rank == 0:
        opt.explain()
    opt.add_param_group({"params": [Parameter(torch.zeros(48, 48)) for _ in range(3)]})
    for group in opt.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    opt.step()
    return [row.owners for row in opt.explain().tensors]


def test_a_rank_that_asks_too_early_decides_nothing(ranks: Ranks):
    first, second = ranks.returns(early, 2)
    assert first == second
    assert {owner for owners in first for owner in owners} == {0, 1}
