"""Checkpoints across worlds and layouts, to the bit: fault rows 12 and 13 of docs/faults.md."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import resharded_runs as runs
import torch
from ranks import Ranks

FORMS = ("nested", "flat", "consolidated")
SOURCES = {"replicated on 2": (2, "replicated"), "sharded on 2": (2, "fsdp")}
TARGETS = [
    *((1, "replicated"), (2, "replicated"), (4, "replicated"), (4, "groups")),
    *((2, "fsdp"), (3, "fsdp")),
]


class Saved(NamedTuple):
    """All forms of a checkpoint in a folder.

    Staggered roots fall into slots that depend on the number of ranks and are saved: what goes on
    from a checkpoint ends like a run on the ranks that saved it which nothing interrupts.
    """

    world: int
    layout: str
    folder: Path
    straight: str
    ends: list[str]  # of the runs that saved and went on


@pytest.fixture(scope="module", params=SOURCES)
def saved(
    request: pytest.FixtureRequest, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    world, layout = SOURCES[request.param]
    straight, *_ = ranks.returns(runs.straight, world, layout)
    return Saved(
        world, layout, folder, straight, ranks.returns(runs.save_all_forms, world, folder, layout)
    )


def test_saving_disturbs_nothing(saved):
    assert saved.ends == [saved.straight] * saved.world


@pytest.mark.parametrize(("world", "layout"), TARGETS)
def test_every_form_resumes_to_the_bit_anywhere(ranks, saved, world, layout):
    found = ranks.returns(runs.resume_all_forms, world, saved.folder, layout, FORMS)
    assert found == [dict.fromkeys(FORMS, saved.straight)] * world


def test_every_rank_resumes_from_its_own_file(ranks, saved):
    found = ranks.returns(runs.resume_all_forms, saved.world, saved.folder, saved.layout, ["own"])
    assert found == [{"own": saved.straight}] * saved.world


def test_a_consolidated_state_is_that_of_all_owners(ranks, saved):
    [keys] = ranks.returns(runs.keys_of_the_state, 1)
    own = [torch.load(saved.folder / f"rank{rank}.pt")["optimizer"]["state"] for rank in (0, 1)]
    whole = torch.load(saved.folder / "consolidated.pt")["optimizer"]["state"]
    assert {index: sorted(entries) for index, entries in whole.items()} == keys
    for index, entries in whole.items():
        assert set(own[0][index]) & set(own[1][index]) == {"step"}
        expected = own[0][index] | own[1][index]
        for key, value in entries.items():
            assert torch.equal(value, expected[key])
            assert value.dtype == expected[key].dtype
            # a view would be saved with all it is a view of
            assert saved.world == 1 or value.untyped_storage().nbytes() == value.nbytes


def test_one_group_of_several_is_consolidated(ranks):
    own, after, refused = zip(*ranks.returns(runs.consolidated_in_groups, 4), strict=True)
    assert set(refused) == {"Invalid to=4. Must be one of the ranks (0, 1, 2, 3)."}
    [keys] = ranks.returns(runs.keys_of_the_state, 1)
    for rank in range(3):
        assert after[rank].keys() == own[rank].keys()
        assert all(after[rank][index].keys() == own[rank][index].keys() for index in own[rank])
    assert {index: sorted(entries) for index, entries in after[3].items()} == keys
    for index, entries in after[3].items():
        expected = own[2][index] | own[3][index]
        assert all(torch.equal(value, expected[key]) for key, value in entries.items())


def test_nothing_that_persists_communicates(ranks, saved):
    found = ranks.returns(runs.persist_on_the_last_rank_alone, saved.world, saved.layout)
    assert found == [saved.straight] * saved.world


def test_owners_of_blocks_that_joined_late_survive_copies_and_loads(ranks):
    for found in ranks.returns(runs.copies_after_unfreezing, 2):
        assert len(set(found)) == 1


def test_a_pickle_lives_on_the_ranks_it_came_from(ranks):
    pickles = ranks.returns(runs.pickled_on_two, 2)
    [refused] = ranks.run(runs.unpickled, 1, pickles[0])
    assert type(refused).__name__ == "IncompleteCheckpointError"
    assert "the ranks that divide the blocks are not those" in str(refused)


def test_one_rank_of_two_is_refused_where_blocks_are_missing(ranks, saved):
    file = saved.folder / "rank0.pt"
    theirs = torch.load(saved.folder / "rank1.pt")["optimizer"]["state"]
    blocks = {(index, key.split(".")[0]) for index, keys in theirs.items() for key in keys}
    missing = len(blocks - {(index, "step") for index in theirs})
    [alone] = ranks.returns(runs.refuse, 1, file)
    assert alone.startswith("IncompleteCheckpointError: ")
    total = 3 * 3 + 3 + 2 + 2 + 2 + 1 + 2 + 2
    assert f"{missing} of {total} blocks missing (first: 0.weight block" in alone
    assert "saved by rank 0 of 2. Use torch.distributed.checkpoint, or call" in alone
    zero, one = ranks.returns(runs.refuse, 2, file)
    assert zero == ""
    assert one == alone


def test_parameters_of_missing_blocks_start_anew_where_that_is_asked_for(ranks, saved):
    [(alone, digest)] = ranks.returns(runs.restart_missing, 1, saved.folder / "rank0.pt")
    anew = {index for index, steps in alone.items() if steps <= 1}
    # Some have no gradient in the step after the load, and so took none.
    assert {alone[index] for index in anew} == {0, 1}
    assert {alone[index] for index in alone.keys() - anew} <= {runs.SAVED, runs.SAVED + 1}
    assert alone.keys() - anew
    for steps, ended in ranks.returns(runs.restart_missing, 2, saved.folder / "rank0.pt"):
        assert steps == alone
        assert ended == digest


def test_ranks_that_loaded_files_of_different_steps_do_not_step(ranks):
    for refused in ranks.run(runs.step_apart, 2):
        assert type(refused).__name__ == "PlanMismatchError"
        assert re.search(r"rank 1 has 0.weight with steps=4, rank 0 has .*=5", str(refused))
