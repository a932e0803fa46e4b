"""Metrics of several ranks are those of one process, however the model is laid out."""

from typing import Any

import pytest
import torch
from layouts import CASES, LAYOUTS, Case, inject
from ranks import Ranks
from torch.distributed.tensor.debug import CommDebugMode

from shampoo import Shampoo

CHOSEN = {
    "transformer": Case(
        "transformer", {"momentum": 0.9}, {"precondition": False}, frozen="up.bias"
    ),
    "kl": Case("transformer", {"preconditioner": "kl_shampoo"}, {"betas": (0.0, 0.9)}),
    "layerwise": CASES["layerwise"],
}
RUNS: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    2: {
        "shared": ("replicated", {"num_trainers_per_group": 2}),
        "each for itself": ("replicated", {"num_trainers_per_group": 1}),
        "fsdp2": ("fsdp2", {}),
    },
    4: {
        "pairs": ("replicated", {"num_trainers_per_group": 2}),
        "hsdp": ("hsdp", {}),
        "tensor parallel": ("tensor parallel", {}),
    },
}
STEPS = 8


def measured(rank: int, case: Case, layout: str, sharing: dict[str, Any]) -> Any:
    """A job: metrics over all ranks and of this one, and the collectives that they took."""
    opt = _trained(case, layout, sharing)
    with CommDebugMode() as alone:
        own = opt.metrics(reduce=False)
    with CommDebugMode() as shared:
        together = opt.metrics()
    return together, own, (alone.get_total_counts(), shared.get_total_counts())


def _trained(case: Case, layout: str, sharing: dict[str, Any], steps: int = STEPS) -> Shampoo:
    model = LAYOUTS[layout](case.build())
    params = list(model.parameters())
    opt = case.optimizer(params, **sharing)
    opt.record_metrics(every=4)
    for step in range(steps):
        inject(params, step, case.is_sparse)
        opt.step()
    return opt


def expected(case: Case) -> dict[str, float]:
    return _trained(case, "replicated", {}).metrics()


@pytest.mark.parametrize("world", RUNS)
@pytest.mark.parametrize("name", CHOSEN)
def test_they_are_those_of_one_process(ranks: Ranks, world, name):
    case = CHOSEN[name]
    alone = expected(case)
    for run, (layout, sharing) in RUNS[world].items():
        answers = ranks.returns(measured, world, case, layout, sharing)
        first = answers[0][0]
        for together, own, calls in answers:
            assert together == first, run  # to the bit
            assert together.keys() == alone.keys(), run
            assert own.keys() <= alone.keys(), run
            assert calls == (0, run != "each for itself"), run
        for key, value in alone.items():
            if key.endswith("state_bytes"):
                assert first[key] <= value, key
            else:
                assert first[key] == pytest.approx(value, rel=1e-5), (run, key)


def disagreeing(rank: int, how: str) -> Any:
    """A job in which one rank has not been asked as the other has."""
    case = CHOSEN["transformer"]
    params = list(case.build().parameters())
    opt = case.optimizer(params, num_trainers_per_group=2)
    if how == "one":
        opt.record_metrics(every=2 + rank)
    elif rank == 0:
        opt.record_metrics(every=2)
    for step in range(4):
        inject(params, step)
        opt.step()
    try:
        found = opt.metrics()
    except RuntimeError as error:
        found = str(error)
    own = opt.metrics(reduce=False) if rank == 0 else None
    return found, own


def test_a_rank_that_was_not_asked_is_named_on_all(ranks: Ranks):
    for found, own in ranks.returns(disagreeing, 2, "none"):
        assert "No step has been measured on rank 1" in found
        assert own is None or own["shampoo/step"] == 4


def test_ranks_that_measured_other_steps_say_so(ranks: Ranks):
    for found, _ in ranks.returns(disagreeing, 2, "one"):
        assert "have measured steps [4, 3] last" in found


def empty(rank: int) -> Any:
    """A job: asked for before there is anything, and with a skipped step."""
    case = CHOSEN["transformer"]
    params = list(case.build().parameters())
    opt = case.optimizer(params, num_trainers_per_group=2)
    opt.record_metrics()
    before = opt.metrics()
    inject(params, 1, False)
    opt.step()
    if rank == 1:
        params[0].grad[0, 0] = torch.nan
    opt.step()
    return before, opt.metrics(), opt.last_step_skipped


def test_nothing_yet_and_a_step_that_one_rank_skips(ranks: Ranks):
    answers = ranks.returns(empty, 2)
    for before, after, is_skipped in answers:
        assert before == {}
        assert is_skipped
        assert after["shampoo/step"] == after["shampoo/skipped_steps"] == 1
    assert answers[0] == answers[1]
