"""Rows 1 to 9 of the fault table, ``docs/faults.md``: no rank hangs, and none goes on alone."""

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_runs import LAYOUTS, TIMEOUT, Run, broken, said_by, wait_for_all
from ranks import DiedError, Ranks
from torch.distributed.tensor import DTensor

# Row 1


def _raise_and_exit(rank: int, folder: str) -> Any:
    run = Run("ddp")
    run.step(1)
    before = run.weights()
    with broken("shampoo.roots.refresh:solve_", rank == 1):
        run.feed(2)
        error, _ = said_by(run.opt.step)
    if rank == 1:
        Path(folder, "one").write_text(f"{error} {before == run.weights()}")
        os._exit(3)
    return f"{error} {before == run.weights()}"


def test_1_a_rank_raises_and_exits(ranks: Ranks, tmp_path: Path) -> None:
    zero, one = ranks.run(_raise_and_exit, 2, str(tmp_path), timeout=TIMEOUT)
    assert isinstance(one, DiedError)
    assert zero == "ShampooDistributedError True"
    assert (tmp_path / "one").read_text() == zero


def _vanish(rank: int) -> Any:
    run = Run("ddp")
    run.step(1)
    before = run.weights()
    run.feed(2)
    if rank == 1:
        import shampoo.roots.refresh

        shampoo.roots.refresh.solve_ = lambda *_: os._exit(3)
    try:
        run.opt.step()
    except RuntimeError as error:  # torch's own: there is nobody left to agree with
        return type(error).__name__, before == run.weights()
    return "nothing", before == run.weights()


def test_1_a_rank_vanishes_inside_a_step(ranks: Ranks) -> None:
    zero, one = ranks.run(_vanish, 2, timeout=TIMEOUT)
    assert isinstance(one, DiedError)
    error, is_untouched = zero
    assert error != "nothing"
    assert is_untouched


# Row 2: wherever a rank fails, all raise in that step, and can go on after it.

BEFORE = {  # anything has changed
    "looking at gradients": "shampoo.agreement:look",
    "the digest": "shampoo.step.preflight:digest",
}
REDUNDANT = (  # teams that work out the same; of the last, since there are few plain blocks
    "groups of 2 in 4",
    "tensor parallel, ddp 2x2",
    "tensor parallel, fsdp2 2x2",
    "fsdp2 and plain",
)
POINTS = {
    **BEFORE,
    "gathering, for the wire or where gradients are": "shampoo.ops:gather_blocks_"
    " shampoo.ops:graft_moments_",
    "choosing blocks": "shampoo.step.block_plan:BlockPlan.select",
    "a root": "shampoo.roots.refresh:solve_",
    "a direction": "shampoo.optimizer:precondition",
    "delivery": "shampoo.distributed.all_gather:search_direction"
    " shampoo.distributed.all_to_all:search_direction",
}


def _fail_everywhere(rank: int, layout: str, points: dict[str, str], hyper: Any) -> Any:
    found = {}
    for point, targets in points.items():
        run = Run(layout, **hyper)
        run.step(1)
        before, saved = run.parts(), copy.deepcopy(run.opt.state_dict())
        run.feed(2)
        first, *more = targets.split()
        with broken(first, rank == 1), broken(more[0] if more else first, rank == 1):
            said = said_by(run.opt.step)
        wait_for_all(point)  # the rank that failed lingers until the others have raised
        is_same = before == run.parts()
        run.feed(3)
        after = said_by(run.opt.step)
        if after[0] != "nothing":
            run.opt.load_state_dict(saved)
            run.opt.step()
        run.step(4)
        found[point] = said, is_same, after, run.weights()
    return found


def check_failures(answers: list[Any], points: dict[str, str], layout: str) -> None:
    for answer in answers:
        assert isinstance(answer, dict), answer
    for point in points:
        for (error, words), is_same, after, weights in (answer[point] for answer in answers):
            assert error == "ShampooDistributedError", (point, error)
            assert words.startswith("rank 1: MemoryError: no memory for shampoo."), (point, words)
            assert is_same, point
            assert weights == answers[0][point][3], point
            # Where every block has one owner, the step that failed can be caught, and training goes
            # on. Groups that work out the same have come apart.
            if layout in REDUNDANT and point not in BEFORE:
                assert after[0] == "ShampooDistributedError", point
                assert "Load the last checkpoint" in after[1], point
            else:
                assert after[0] == "nothing", (point, after)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_2_a_rank_raises_and_lingers(ranks: Ranks, layout: str) -> None:
    world = LAYOUTS[layout].world
    answers = ranks.run(_fail_everywhere, world, layout, POINTS, {}, timeout=TIMEOUT)
    check_failures(answers, POINTS, layout)


LAYERWISE = {
    "norms": "shampoo.step.layerwise:measure",
    "ratios": "shampoo.step.layerwise:rescale",
    "gathering, for the wire or for the norms": "shampoo.ops:gather_blocks_",
}


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_2_a_rank_fails_between_the_two_halves_of_lamb(ranks: Ranks, layout: str) -> None:
    arguments = layout, LAYERWISE, {"grafting": "lamb"}
    answers = ranks.run(_fail_everywhere, LAYOUTS[layout].world, *arguments, timeout=TIMEOUT)
    check_failures(answers, LAYERWISE, layout)


def _fail_to_prepare(rank: int, layout: str) -> Any:
    run = Run(layout)
    run.feed(1)
    with broken("shampoo.agreement:Distributors", rank == 1):
        said = said_by(run.opt.step)
    wait_for_all("prepared")
    run.step(1, 2)
    # Weights travel from now on: other buffers, again.
    run.opt.param_groups[0]["weight_decay"] = 0.1
    run.opt.param_groups[0]["momentum"] = 0.9
    run.feed(3)
    with broken("shampoo.agreement:Distributors", rank == 1):
        again = said_by(run.opt.step)
    wait_for_all("prepared again")
    run.step(3, 4)
    return said, again, run.weights()


@pytest.mark.parametrize("layout", ["ddp, overlap", "fsdp2", "groups of 2 in 4"])
def test_2_a_rank_has_no_memory_for_its_buffers(ranks: Ranks, layout: str) -> None:
    answers = ranks.run(_fail_to_prepare, LAYOUTS[layout].world, layout, timeout=TIMEOUT)
    for said, again, weights in answers:
        for error, words in (said, again):
            assert error == "ShampooDistributedError"
            assert words.startswith("rank 1: MemoryError")
        assert weights == answers[0][2]


def _fail_midway(rank: int, after: int) -> Any:
    run = Run("ddp, overlap")
    run.step(1)
    before = run.weights()
    run.feed(2)
    with broken("shampoo.distributed.all_gather:search_direction", rank == 1, after=after):
        said = said_by(run.opt.step)
    wait_for_all("midway")
    is_same = before == run.weights()
    run.step(3, 4)
    return said[0], is_same, run.weights()


def test_2_a_rank_fails_when_parts_have_been_sent(ranks: Ranks) -> None:
    answers = ranks.run(_fail_midway, 2, 2, timeout=TIMEOUT)
    assert [answer[:2] for answer in answers] == [("ShampooDistributedError", True)] * 2
    assert answers[0][2] == answers[1][2]


def _fail_to_apply(rank: int, layout: str) -> Any:
    run = Run(layout)
    run.step(1)
    saved = copy.deepcopy(run.opt.state_dict())
    run.feed(2)
    targets = (
        "shampoo.distributed.all_gather:AllGatherDistributor.apply",
        "shampoo.distributed.all_to_all:AllToAllDistributor.apply",
    )
    with broken(targets[0], rank == 1), broken(targets[1], rank == 1):
        silent = said_by(run.opt.step)
    run.feed(3)
    said = said_by(run.opt.step)
    again = said_by(run.opt.step)
    run.opt.load_state_dict(saved)
    return silent, said, again, said_by(run.opt.step)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_2_a_rank_that_fails_while_it_moves_weights_stops_all_at_the_next_step(
    ranks: Ranks, layout: str
) -> None:
    for silent, (error, words), again, after in ranks.run(
        _fail_to_apply, LAYOUTS[layout].world, layout, timeout=TIMEOUT
    ):
        assert silent == after == ("nothing", "")
        assert error == "ShampooDistributedError"
        assert words.startswith("rank 1:")
        assert "It has moved its parameters only in part: no memory" in words
        assert "Load the last checkpoint" in words
        assert again == (error, words)


# Rows 4 and 5


def _meet_nan(rank: int, layout: str, where: list[int], policy: str) -> Any:
    run = Run(layout, nonfinite=policy, momentum=0.9)
    run.step(1, 2)
    before = run.held()
    run.feed(3)
    if rank in where:
        grad = run.params[1].grad
        shard = grad.to_local() if isinstance(grad, DTensor) else grad
        shard[0, 0] = float("nan")
    error, _ = said_by(run.opt.step)
    is_same = before == run.held()
    skipped = run.opt.skipped_steps
    steps = {int(value) for (_, key), value in run.state().items() if key == "step"}
    run.step(3)
    return error, is_same, skipped, steps, run.weights()


def check_nan(answers: list[Any], policy: str) -> None:
    error = "NonFiniteGradientError" if policy == "raise" else "nothing"
    for answer in answers:
        assert answer[:4] == (error, True, policy == "skip", {2})
        assert answer[4] == answers[0][4]


@pytest.mark.parametrize("policy", ["skip", "raise"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_4_nan_on_all_ranks(ranks: Ranks, layout: str, policy: str) -> None:
    world = LAYOUTS[layout].world
    check_nan(ranks.run(_meet_nan, world, layout, list(range(world)), policy), policy)


@pytest.mark.parametrize("policy", ["skip", "raise"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_5_nan_on_one_rank(ranks: Ranks, layout: str, policy: str) -> None:
    world = LAYOUTS[layout].world
    check_nan(ranks.run(_meet_nan, world, layout, [world - 1], policy), policy)


# Row 6


def _lose_a_root(rank: int, layout: str, owners: list[int]) -> Any:
    run = Run(layout)
    run.step(1, 2)
    state = run.state()
    member, factor = next(key for key in sorted(state) if key[1].endswith("factor0"))
    name = factor.replace("factor", "root")
    root = state[member, name].clone()
    if rank in owners:
        state[member, factor][0, 0] = float("nan")  # defective memory, for one
    run.step(3, 4, 5, 6)
    state = run.state()
    counts = {key: int(v.max()) for key, v in state.items() if key[1].startswith("failures", 7)}
    failures = {key: count for key, count in counts.items() if count}
    expected = {(member, factor.replace("factor", "failures")): 2}  # refreshes of steps 4 and 6
    is_kept = torch.equal(root, state[member, name])
    return failures == (expected if rank in owners else {}), is_kept, run.weights()


@pytest.mark.parametrize(
    ("layout", "owners"), [("ddp", [1]), ("fsdp2", [1]), ("groups of 2 in 4", [1, 3])]
)
def test_6_a_root_fails(ranks: Ranks, layout: str, owners: list[int]) -> None:
    answers = ranks.returns(_lose_a_root, LAYOUTS[layout].world, layout, owners)
    for rank, (is_counted, is_kept, weights) in enumerate(answers):
        assert is_counted
        assert is_kept == (rank in owners)
        assert weights == answers[0][2]


def _lose_a_root_for_good(rank: int, layout: str, owners: list[int]) -> Any:
    run = Run(layout, max_root_failures=2)
    run.step(1, 2)
    state = run.state()
    member, factor = next(key for key in sorted(state) if key[1].endswith("factor0"))
    if rank in owners:
        state[member, factor][0, 0] = float("nan")
    run.step(3, 4, 5, 6, 7)  # two refreshes fail: as many as may
    run.step(8)
    before = run.parts()
    run.feed(9)
    return *said_by(run.opt.step), before == run.parts(), run.weights()


@pytest.mark.parametrize(
    ("layout", "owners"), [("ddp", [1]), ("fsdp2", [1]), ("groups of 2 in 4", [1, 3])]
)
def test_6_too_many_failures_in_a_row_stop_all(
    ranks: Ranks, layout: str, owners: list[int]
) -> None:
    answers = ranks.returns(_lose_a_root_for_good, LAYOUTS[layout].world, layout, owners)
    for error, words, is_same, weights in answers:
        assert error == "RootFailureError"
        assert "factor0 of " in words
        assert "3 refreshes in a row, more than max_root_failures=2" in words
        assert is_same
        assert weights == answers[0][3]


# Rows 7, 8 and 9


def _differ(rank: int, cases: dict[str, Any]) -> Any:
    found = {}
    for name, hyper in cases.items():
        run = Run("ddp", **(hyper if rank == 1 else {}))
        run.feed(1)
        before = run.parts()
        found[name] = said_by(run.opt.step), before == run.parts()
    return found


HYPER = {
    "max_preconditioner_dim": 16,
    "precondition_frequency": 1,
    "start_preconditioning_step": 5,
    "lr": 0.2,
    "weight_decay": 0.1,
    "betas": (0.8, 0.99),
    "grafting": "sgd",
    "root_method": "eigh",
    "communication_dtype": torch.bfloat16,
    "overlap": True,
    "check_replicas_every": 7,
}


def test_8_hyperparameters_differ(ranks: Ranks) -> None:
    cases = {name: {name: value} for name, value in HYPER.items()}
    answers = ranks.run(_differ, 2, cases, timeout=TIMEOUT)
    for answer in answers:
        assert answer == answers[0]
        for name, ((error, words), is_same) in answer.items():
            assert error == "PlanMismatchError", name
            assert words.startswith("rank 1 has "), words
            assert {"betas": "beta1"}.get(name, name) + "=" in words
            assert is_same


def _differ_in_number(rank: int, what: str) -> Any:
    run = Run("ddp")
    if rank == 1 and what == "parameter groups":
        run.opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(8, 8))]})
    if rank == 1 and what == "parameters to train":
        run.params[-1].requires_grad_(False)
    run.feed(1)
    if rank == 1:
        run.params[-1].grad = None
    return said_by(run.opt.step)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("parameter groups", "rank 1 has 2 parameter groups, rank 0 has 1"),
        ("parameters to train", "rank 1 has 4 parameters to train, rank 0 has 5"),
    ],
)
def test_8_ranks_train_more_or_less(ranks: Ranks, what: str, words: str) -> None:
    for answer in ranks.run(_differ_in_number, 2, what, timeout=TIMEOUT):
        assert answer[0] == "PlanMismatchError"
        assert words in answer[1]


def _differ_in_steps(rank: int) -> Any:
    run = Run("ddp")
    run.step(1)
    saved = copy.deepcopy(run.opt.state_dict())
    run.step(2, 3)
    if rank == 1:
        run.opt.load_state_dict(saved)
    before = run.held()
    run.feed(4)
    return said_by(run.opt.step), before == run.held()


def test_8_one_rank_has_loaded_a_checkpoint(ranks: Ranks) -> None:
    for (error, words), is_same in ranks.run(_differ_in_steps, 2, timeout=TIMEOUT):
        assert error == "PlanMismatchError"
        assert re.search(r"rank 1 has .* with steps=1, rank 0 has .* with steps=3", words)
        assert is_same


def _differ_in_order(rank: int, layout: str) -> Any:
    run = Run(layout, shapes=((8, 8), (8, 12), (12, 8), (8, 8)))
    names = ["a", "b", "c", "d"]
    if rank == 1:
        names[0], names[3] = "d", "a"
    run.opt.param_groups[0]["param_names"] = names
    if rank == 1:
        params = run.opt.param_groups[0]["params"]
        params[0], params[3] = params[3], params[0]
    run.feed(1)
    return said_by(run.opt.step)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "groups of 2 in 4"])
def test_7_parameters_are_in_another_order(ranks: Ranks, layout: str) -> None:
    answers = ranks.run(_differ_in_order, LAYOUTS[layout].world, layout, timeout=TIMEOUT)
    for error, words in answers:
        assert error == "PlanMismatchError"
        assert "rank 1 has d with name=d, rank 0 has a with name=a" in words


def _lack(rank: int, layout: str) -> Any:
    run = Run(layout)
    run.step(1)
    before = run.held()
    run.feed(2)
    if rank == 1:
        run.params[2].grad = None
    said = said_by(run.opt.step)
    is_same = before == run.held()
    run.feed(2)
    run.params[2].grad = None  # on all ranks, as for an expert that no token has met
    run.opt.step()
    return said, is_same, run.weights()


@pytest.mark.parametrize(
    "layout", ["ddp", "fsdp2", "groups of 2 in 4", "tensor parallel, fsdp2 2x2"]
)
def test_9_a_gradient_is_none_on_one_rank(ranks: Ranks, layout: str) -> None:
    answers = ranks.run(_lack, LAYOUTS[layout].world, layout, timeout=TIMEOUT)
    for (error, words), is_same, weights in answers:
        assert error == "PlanMismatchError"
        assert "rank 1 has parameter 2 of group 0, shape (9, 13) with gradient=None" in words
        assert is_same
        assert weights == answers[0][2]
