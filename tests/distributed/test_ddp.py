"""Replicated parameters: the bits of one process on any number of ranks, and what it costs them."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import (
    CASES,
    Case,
    Collectives,
    Run,
    digest,
    digests,
    fit,
    one_step,
    state_bytes,
    train,
)
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

PLAIN = Case("transformer", {"momentum": 0.9})


def shared(size: int, **sharing: Any) -> Run:
    """Blocks divided among ``size`` ranks that all hold everything."""
    return "replicated", {"num_trainers_per_group": size, **sharing}


RUNS: dict[int, dict[str, Run]] = {
    1: {"default": ("replicated", {})},
    2: {"all": shared(2), "overlap": shared(2, overlap=True)},
    4: {"all": shared(4), "pairs": shared(2), "overlapping pairs": shared(2, overlap=True)},
}


@pytest.mark.parametrize("world", RUNS)
def test_parameters_are_those_of_one_process_to_the_bit(ranks: Ranks, alone, world):
    for found in ranks.returns(digests, world, RUNS[world], CASES):
        assert found == {(run, case): alone[case] for run in RUNS[world] for case in CASES}


WORD = 16  # elements that a status word has at most


def messages(calls: list[tuple[str, tuple[int, ...], int]]) -> list[tuple[str, tuple[int, ...]]]:
    """Collectives without the status words."""
    return [(name, team) for name, team, numel in calls if numel > WORD or name != "allreduce"]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_is_one_word_and_one_all_gather_or_one_a_bucket(ranks: Ranks, overlap):
    sharing = {"num_trainers_per_group": 2, "overlap": overlap}
    gathers = 4 if overlap else 1
    for counts, calls in ranks.returns(one_step, 2, "replicated", PLAIN, sharing):
        assert counts == {"allreduce": 1, "allgather_base": gathers}
        assert messages(calls) == [("allgather_base", (0, 1))] * gathers


def test_nothing_but_status_words_crosses_groups(ranks: Ranks):
    sharing = {"num_trainers_per_group": 2}
    for rank, answer in enumerate(ranks.returns(one_step, 4, "replicated", PLAIN, sharing)):
        counts, calls = answer
        pair = (0, 1) if rank < 2 else (2, 3)
        assert counts == {"allreduce": 2, "allgather_base": 1}
        assert messages(calls) == [("allgather_base", pair)]
        assert {team for name, team, _ in calls if name == "allreduce"} == {(0, 1, 2, 3)}


def test_by_default_the_ranks_of_a_node_divide_the_blocks(ranks: Ranks):
    node = {"LOCAL_WORLD_SIZE": "2"}
    for rank, answer in enumerate(
        ranks.run(one_step, 4, "replicated", PLAIN, {}, environment=node)
    ):
        assert messages(answer[1]) == [("allgather_base", (0, 1) if rank < 2 else (2, 3))]


def test_layerwise_norms_are_one_sum_for_matrices_and_one_for_vectors(ranks: Ranks):
    case, sharing = Case("transformer", {"grafting": "lamb"}), {"num_trainers_per_group": 2}
    for counts, _ in ranks.returns(one_step, 2, "replicated", case, sharing):
        assert counts == {"allreduce": 1 + 2, "allgather_base": 1}


STATEFUL = Case("convolutions", {"momentum": 0.9, "refresh_schedule": "staggered"}, is_sparse=False)


@pytest.mark.parametrize("layout", ["replicated", "fsdp2"])
def test_state_adds_up_to_that_of_one_process_and_only_owners_hold_it(ranks: Ranks, layout):
    [(expected, expected_storage)] = ranks.returns(state_bytes, 1, "replicated", STATEFUL, {})
    sharing = {"num_trainers_per_group": 3}
    answers = ranks.returns(state_bytes, 3, layout, STATEFUL, sharing)
    steps = {name: size for name, size in expected.items() if name[1] == "step"}
    held = [{n: size for n, size in tensors.items() if n not in steps} for tensors, _ in answers]
    for (tensors, storage), own in zip(answers, held, strict=True):
        assert own, "a rank owns nothing"
        assert {name: tensors[name] for name in steps} == steps
        assert storage == sum(tensors.values())
    assert sum(map(len, held)) == len(expected) - len(steps)
    assert {n: size for own in held for n, size in own.items()} | steps == expected
    total = sum(storage for _, storage in answers)
    assert total == expected_storage + (len(answers) - 1) * sum(steps.values())


def _rounded(rank: int, dtype: torch.dtype, sharing: dict[str, Any]) -> list[torch.Tensor]:
    model = PLAIN.build()
    for param in model.parameters():
        nn.init.zeros_(param)
    case = Case("transformer", {"lr": 1.0, "start_preconditioning_step": 4}, is_sparse=False)
    train(case, model, 1, communication_dtype=dtype, **sharing)
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_owners_too_apply_the_rounded_direction(ranks: Ranks, dtype):
    """From W = 0 with lr = 1, W is the direction that was applied."""
    exact = ranks.returns(_rounded, 1, dtype, {})[0]
    for params in ranks.returns(_rounded, 2, dtype, {"num_trainers_per_group": 2}):
        for param, direction in zip(params, exact, strict=True):
            assert torch.equal(param, direction.to(dtype).float())


def _rounded_runs(rank: int, dtype: torch.dtype) -> dict[tuple[str, str], str]:
    runs = {**RUNS[4], **{layout: (layout, {}) for layout in ("fsdp2", "hsdp", "tensor parallel")}}
    rounded = {
        name: (layout, {"communication_dtype": dtype, **sharing})
        for name, (layout, sharing) in runs.items()
    }
    return digests(rank, rounded, {"transformer": CASES["transformer"]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_directions_leave_all_layouts_equal_to_the_bit(ranks: Ranks, alone, dtype):
    found = [set(answer.values()) for answer in ranks.returns(_rounded_runs, 4, dtype)]
    [together] = set.union(*found)
    assert together != alone["transformer"], "nothing was rounded"


def _by_backward(rank: int, name: str, is_shared: bool, is_same: bool) -> tuple[str, list[float]]:
    case = Case(name)
    model = case.build()
    wrapped = DistributedDataParallel(model) if is_shared else model
    optimizer = case.optimizer(model.parameters(), num_trainers_per_group=dist.get_world_size())
    losses = fit(name, wrapped, optimizer, 0 if is_same else rank)
    return digest(model.parameters()), losses


@pytest.mark.parametrize("name", ["transformer", "convolutions"])
@pytest.mark.parametrize("world", [2, 4])
def test_training_on_equal_batches_is_training_alone(ranks: Ranks, name, world):
    [expected] = ranks.returns(_by_backward, 1, name, False, True)
    for found in ranks.returns(_by_backward, world, name, True, True):
        assert found == expected


def test_training_on_batches_of_their_own_keeps_replicas_equal_and_learns(ranks: Ranks):
    answers = ranks.returns(_by_backward, 4, "transformer", True, False)
    assert len({found for found, _ in answers}) == 1
    assert all(losses[-1] < 0.7 * losses[0] for _, losses in answers)


def _in_halves(rank: int) -> tuple[str, list[tuple[str, tuple[int, ...], int]]]:
    """Each half of the ranks trains a model of its own, on gradients of its own."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    case = [CASES["transformer"], CASES["convolutions"]][rank // 2]
    model = case.build()
    with Collectives() as seen:
        train(case, model, process_group=halves[rank // 2], num_trainers_per_group=2)
    return digest(model.parameters()), seen.calls


def test_a_process_group_keeps_to_itself(ranks: Ranks, alone):
    for rank, (found, calls) in enumerate(ranks.returns(_in_halves, 4)):
        assert found == alone[["transformer", "convolutions"][rank // 2]]
        assert {team for _, team, _ in calls} == {(0, 1) if rank < 2 else (2, 3)}
