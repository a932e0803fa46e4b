"""Sharded parameters: the bits of one process in every layout, and what it costs the ranks."""

from typing import Any

import pytest
import torch
from layouts import (
    CASES,
    LAYOUTS,
    Case,
    Run,
    digest,
    digests,
    fit,
    one_step,
)
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

PLAIN = Case("transformer", {"momentum": 0.9})
LAYOUTS_OF = {2: ["fsdp2"], 3: ["fsdp2"], 4: ["fsdp2", "hsdp", "tensor parallel"]}
# Three ranks divide the input channels of the first convolution, two the columns of the block.
COLUMNS = {2: ["transformer", "layerwise"], 3: ["convolutions", "no graft"]}


@pytest.mark.parametrize("world", LAYOUTS_OF)
def test_parameters_are_those_of_one_process_to_the_bit(ranks: Ranks, alone, world):
    runs: dict[str, Run] = {layout: (layout, {}) for layout in LAYOUTS_OF[world]}
    for found in ranks.returns(digests, world, runs, CASES):
        assert found == {(run, case): alone[case] for run in runs for case in CASES}


@pytest.mark.parametrize("world", COLUMNS)
def test_shards_of_columns_and_channels_too(ranks: Ranks, alone, world):
    cases = {name: CASES[name] for name in COLUMNS[world]}
    for found in ranks.returns(digests, world, {"run": ("fsdp2 columns", {})}, cases):
        assert found == {("run", case): alone[case] for case in cases}


@pytest.mark.parametrize("layout", ["fsdp2", "hsdp"])
def test_a_step_is_one_word_and_two_all_to_alls(ranks: Ranks, layout):
    for counts, calls in ranks.returns(one_step, 4, layout, PLAIN, {}):
        assert counts == {"allreduce": 1, "alltoall_base": 2}
        assert {team for _, team, _ in calls} == {(0, 1, 2, 3)}


def test_each_mesh_class_has_its_own_two(ranks: Ranks):
    """LayerNorm is not in the tensor parallel plan: its shards lie on every other rank."""
    for rank, answer in enumerate(ranks.returns(one_step, 4, "tensor parallel", PLAIN, {})):
        counts, calls = answer
        assert counts == {"allreduce": 2, "alltoall_base": 4}
        everyone, column = (0, 1, 2, 3), (rank % 2, rank % 2 + 2)
        teams = [team for name, team, _ in calls if name == "alltoall_base"]
        assert teams == [everyone, column] * 2


def _wrapped(model: nn.Module, layout: str) -> nn.Module:
    if layout == "mixed precision":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
        return fully_shard(model, mp_policy=policy)
    return LAYOUTS[layout](model)


def _by_backward(rank: int, name: str, layout: str, is_same: bool) -> Any:
    case = Case(name)
    model = _wrapped(case.build(), layout)
    params = list(model.parameters())
    optimizer = case.optimizer(params)
    # Ranks (0, 1) and (2, 3) hold a tensor parallel model together, for one batch.
    seed = rank // 2 if layout == "tensor parallel" else rank
    losses = fit(name, model, optimizer, 0 if is_same else seed)
    shards = [param.to_local().numel() for param in params if isinstance(param, DTensor)]
    return digest(params), losses, shards


@pytest.mark.parametrize(
    ("world", "layout"), [(2, "fsdp2"), (4, "fsdp2"), (4, "hsdp")], ids=lambda value: str(value)
)
@pytest.mark.parametrize("name", ["transformer", "convolutions"])
def test_training_on_equal_batches_is_training_alone(ranks: Ranks, name, world, layout):
    [(expected, losses, _)] = ranks.returns(_by_backward, 1, name, "replicated", True)
    answers = ranks.returns(_by_backward, world, name, layout, True)
    assert [answer[:2] for answer in answers] == [(expected, losses)] * world
    if name == "convolutions":
        assert any(0 in shards for _, _, shards in answers), "no rank has an empty shard"


@pytest.mark.parametrize("layout", ["fsdp2", "hsdp", "tensor parallel", "mixed precision"])
def test_training_on_batches_of_their_own_keeps_ranks_equal_and_learns(ranks: Ranks, layout):
    answers = ranks.returns(_by_backward, 4, "even", layout, False)
    assert len({found for found, _, _ in answers}) == 1
    assert all(losses[-1] < 0.7 * losses[0] for _, losses, _ in answers)
