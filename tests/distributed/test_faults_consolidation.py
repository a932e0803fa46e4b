"""Row 2 of the fault table, ``docs/faults.md``, where one rank gathers the state of all."""

import copy
from typing import Any

import pytest
import torch
from fault_runs import LAYOUTS, TIMEOUT, Run, broken, said_by, wait_for_all
from ranks import Ranks

from shampoo.state import gathering as consolidation

RECEIVER, SENDER = 1, 0
POINTS = {  # who fails, where, and after how many calls of it
    "the plan": (SENDER, "shampoo.state.persistent:Persistent._current_plan", 0),
    "what to send": (SENDER, "shampoo.state.gathering:_outgoing", 0),
    "room for a message": (SENDER, "shampoo.state.gathering:_buffer", 0),
    "the first message": (SENDER, "shampoo.state.gathering:_pack", 0),
    "a later message": (SENDER, "shampoo.state.gathering:_pack", 2),
    "the plan of the receiver": (RECEIVER, "shampoo.state.persistent:Persistent._current_plan", 0),
    "room for a message to come": (RECEIVER, "shampoo.state.gathering:_buffer", 0),
    "room for the whole": (RECEIVER, "shampoo.state.gathering:_room", 0),
    "the first message that comes": (RECEIVER, "shampoo.state.gathering:_unpack", 0),
    "a later message that comes": (RECEIVER, "shampoo.state.gathering:_unpack", 2),
}


def _fail_to_consolidate(rank: int, layout: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:  # these processes have other tests to run
        patch.setattr(consolidation, "_BATCH", 512)  # several messages from each rank
        run = Run(layout)
        run.step(1, 2)
        found = {}
        own = copy.deepcopy(run.opt.state_dict()["state"])
        for point, (who, target, after) in POINTS.items():
            with broken(target, rank == who, after):
                said = said_by(lambda: run.opt.consolidate_state_dict(to=RECEIVER))
            wait_for_all(point)  # the rank that failed lingers until the others have raised
            found[point] = said, is_same(run.opt.state_dict()["state"], own)
        run.opt.consolidate_state_dict(to=RECEIVER)
        whole = copy.deepcopy(run.opt.state_dict()["state"])
        run.step(3)
        return found, own, whole, run.weights()


def is_same(first: dict[int, Any], second: dict[int, Any]) -> bool:
    """Whether two states hold the same tensors under the same names."""
    names = [{i: sorted(entries) for i, entries in state.items()} for state in (first, second)]
    return names[0] == names[1] and all(
        torch.equal(value, second[index][key])
        for index, entries in first.items()
        for key, value in entries.items()
    )


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_2_a_rank_fails_in_a_consolidation(ranks: Ranks, layout: str) -> None:
    answers = ranks.run(_fail_to_consolidate, LAYOUTS[layout].world, layout, timeout=TIMEOUT)
    merged = {
        index: {key: value for _, own, _, _ in answers for key, value in own[index].items()}
        for index in answers[0][1]
    }
    for rank, (found, own, whole, weights) in enumerate(answers):
        for point, (who, _, _) in POINTS.items():
            (error, words), is_untouched = found[point]
            assert error == "ShampooDistributedError", (point, error, words)
            assert words.startswith(f"rank {who}: MemoryError: no memory for shampoo."), point
            assert is_untouched, point
        assert is_same(whole, merged if rank == RECEIVER else own)
        assert weights == answers[0][3]
