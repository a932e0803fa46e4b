"""``full_state_dict=True`` of torch.distributed.checkpoint, which is to hold what all ranks own."""

import copy
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import resharded_runs as runs
import torch
import torch.distributed as dist
from fault_runs import LAYOUTS, TIMEOUT, Run, broken, said_by, wait_for_all
from test_faults_consolidation import is_same
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import shampoo
from shampoo import Shampoo, checkpoint

WORLDS = [(2, "replicated"), (2, "fsdp"), (4, "groups"), (4, "fsdp")]


def options(**of: bool) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, **of)


def from_first(value: Any) -> Any:
    box = [runs.through_a_file(value) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def keys(state: dict[str, Any]) -> list[list[str]]:
    return [sorted(entries) for entries in state.values()]


def save_and_resume(rank: int, layout: str) -> tuple[dict[Any, str], list[Any]]:
    """Digests of runs that go on from a full state, and the names in those that were saved."""
    model, optimizer = runs.build(layout)
    runs.train(model, optimizer, range(runs.SAVED))
    weights = [runs.whole(param).clone() for param in model.parameters()]
    names, flat = [], None
    for offload, flatten in itertools.product((False, True), repeat=2):
        how = options(cpu_offload=offload, flatten_optimizer_state_dict=flatten)
        state = get_optimizer_state_dict(model, optimizer, options=how)
        if offload and rank > 0:
            assert not state  # torch's own word on it
        elif flatten:
            flat = state if flat is None else flat
            names.append(sum(name.startswith("state.") for name in state))
        else:
            names.append(keys(state["state"]))
    saved = from_first(get_optimizer_state_dict(model, optimizer, options=options()))
    runs.train(model, optimizer, range(runs.SAVED, runs.STEPS))
    found = {"straight": runs.digest(model)}
    for offload, broadcast in [*itertools.product((False, True), repeat=2), (None, None)]:
        # Momentum comes with the hyper-parameters of the file, and so must its buffers.
        hyper = {} if broadcast is None else {"momentum": 0.0}
        model, optimizer = runs.build(layout, seed=1, **hyper)
        with torch.no_grad():
            for param, value in zip(model.parameters(), weights, strict=True):
                param.copy_(runs.placed(value, param))
        if broadcast is None:  # a whole flat state is taken by every rank as it is
            state, how = from_first(flat), StateDictOptions(flatten_optimizer_state_dict=True)
        else:
            how = options(cpu_offload=offload, broadcast_from_rank0=broadcast)
            state = copy.deepcopy(saved) if rank == 0 or not broadcast else {}
        set_optimizer_state_dict(model, optimizer, state, options=how)
        runs.train(model, optimizer, range(runs.SAVED, runs.STEPS))
        found[offload, broadcast] = runs.digest(model)
    return found, names


@pytest.mark.parametrize(("world", "layout"), WORLDS)
def test_a_full_state_holds_everything_and_resumes_to_the_bit(ranks, world, layout):
    [alone] = ranks.returns(runs.keys_of_the_state, 1)
    count = sum(map(len, alone.values()))
    for rank, (found, names) in enumerate(ranks.returns(save_and_resume, world, layout)):
        assert set(found.values()) == {found["straight"]}, found
        whole = list(alone.values())
        assert names == [whole, count] * (2 if rank == 0 else 1)


def layouts_in_full(rank: int, layout: str) -> tuple[bool, bool]:
    """Whether a full state is that which is consolidated, and an average in it is whole."""
    run = Run(layout)
    model = nn.ParameterList(run.params)
    run.step(1, 2)
    for param in run.params:
        run.opt.state[param]["ema"] = 2 * param.detach()
    full = get_optimizer_state_dict(model, run.opt, options=options())["state"]
    averages = [entries.pop("ema") for entries in full.values()]
    is_average = all(
        torch.equal(average, 2 * runs.whole(param))
        for average, param in zip(averages, run.params, strict=True)
    )
    run.opt.consolidate_state_dict(to=0)
    whole = from_first(
        [
            {key: value for key, value in entries.items() if key != "ema"}
            for entries in run.opt.state_dict()["state"].values()
        ]
    )
    is_whole = is_same(dict(enumerate(full.values())), dict(enumerate(whole)))
    return is_whole and len(full) == len(run.params), is_average


@pytest.mark.parametrize("layout", ["fsdp2 and plain", "tensor parallel, ddp 2x2"])
def test_teams_that_hold_copies_or_parts_are_whole(ranks, layout):
    world = LAYOUTS[layout].world
    assert ranks.returns(layouts_in_full, world, layout) == [(True, True)] * world


def fail_to_gather(rank: int, target: str) -> tuple[tuple[str, str], int]:
    """What is said where the second rank fails, and how much there is at the next try."""
    model, optimizer = runs.build("replicated")
    runs.train(model, optimizer, range(2))
    with broken(target, rank == 1):
        said = said_by(lambda: get_optimizer_state_dict(model, optimizer, options=options()))
    wait_for_all(target)
    state = get_optimizer_state_dict(model, optimizer, options=options())["state"]
    return said, sum(map(len, state.values()))


@pytest.mark.parametrize("point", ["_outgoing", "_room", "_buffer", "_pack", "_unpack"])
def test_a_rank_fails_while_all_gather(ranks, point):
    [alone] = ranks.returns(runs.keys_of_the_state, 1)
    target = f"shampoo.state.gathering:{point}"
    for (error, words), count in ranks.run(fail_to_gather, 2, target, timeout=TIMEOUT):
        assert error == "ShampooDistributedError"
        assert words.startswith(f"rank 1: MemoryError: no memory for {target}")
        assert count == sum(map(len, alone.values()))


def load_a_part(rank: int, layout: str) -> list[tuple[str, str, bool]]:
    """What each way to load says to the state of one rank's blocks, and whether all stays."""
    model, optimizer = runs.build(layout)
    runs.train(model, optimizer, range(runs.SAVED))
    part = from_first(get_optimizer_state_dict(model, optimizer))
    model, optimizer = runs.build(layout, seed=1)
    runs.train(model, optimizer, range(3))
    before = copy.deepcopy(optimizer.state_dict())
    found = []
    for how in (
        options(broadcast_from_rank0=True),
        options(broadcast_from_rank0=True, cpu_offload=True),
        options(),
        StateDictOptions(),
    ):
        is_brought = rank == 0 or not how.broadcast_from_rank0
        error, words = "", ""
        try:
            state = copy.deepcopy(part) if is_brought else {}
            if rank > 0 or how.full_state_dict:  # the first rank's own file is whole for it
                set_optimizer_state_dict(model, optimizer, state, options=how)
        except Exception as refused:
            error, words = type(refused).__name__, str(refused)
        after = optimizer.state_dict()
        is_untouched = after["param_groups"] == before["param_groups"]
        is_untouched = is_untouched and is_same(after["state"], before["state"])
        found.append((error, words, is_untouched))
        dist.barrier()
    return found


@pytest.mark.parametrize("layout", ["replicated", "fsdp"])
def test_one_ranks_blocks_are_refused_however_they_are_loaded(ranks, layout):
    for rank, found in enumerate(ranks.returns(load_a_part, 2, layout)):
        *full, sharded = found
        for error, words, is_untouched in full if rank == 0 else [*full, sharded]:
            assert error == "IncompleteCheckpointError"
            assert "blocks missing (first: 0.weight block" in words
            assert is_untouched


def own_nothing(rank: int, kind: str) -> list[bool]:
    """One block and more ranks: whether each way leads back to the same state."""

    def build() -> tuple[nn.Module, Shampoo]:
        torch.manual_seed(0)
        model: nn.Module = nn.Linear(4, 3, bias=False)
        model = fully_shard(model) if kind == "fsdp" else DistributedDataParallel(model)
        return model, Shampoo(model.parameters(), precondition_frequency=1)

    model, optimizer = build()
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    state = get_optimizer_state_dict(model, optimizer, options=options())
    found = []
    for broadcast in (False, True):
        other, its_optimizer = build()
        # torch fills an empty state by a step on zero gradients, unless it finds others.
        other(torch.ones(2, 4)).sum().backward()
        brought = copy.deepcopy(state) if rank == 0 or not broadcast else {}
        how = options(broadcast_from_rank0=broadcast)
        set_optimizer_state_dict(other, its_optimizer, brought, options=how)
        its = get_optimizer_state_dict(other, its_optimizer, options=options())
        found.append(len(its["state"]["weight"]) > 1 and is_same(its["state"], state["state"]))
    return found


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_rank_may_own_nothing(ranks, kind):
    assert ranks.returns(own_nothing, 2, kind) == [[True, True]] * 2


def linear(**hyper: Any) -> tuple[nn.Module, Shampoo]:
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    optimizer = Shampoo(model.parameters(), **{"precondition_frequency": 1, **hyper})
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def test_a_full_load_refuses_other_blocks_in_its_own_words():
    """torch alone would fail on the name of a count that this optimizer has not."""
    state = get_optimizer_state_dict(*linear(max_preconditioner_dim=2), options=options())
    model, optimizer = linear(max_preconditioner_dim=4)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        shampoo.BlockGridMismatchError, match=r"max_preconditioner_dim=2, this .* uses 4"
    ):
        set_optimizer_state_dict(model, optimizer, state, options=options())
    assert is_same(optimizer.state_dict()["state"], before["state"])


def test_a_full_load_takes_on_another_schedule():
    hyper = {"refresh_schedule": "staggered", "precondition_frequency": 3}
    state = get_optimizer_state_dict(*linear(**hyper), options=options())
    model, optimizer = linear()
    set_optimizer_state_dict(model, optimizer, copy.deepcopy(state), options=options())
    its = get_optimizer_state_dict(model, optimizer, options=options())
    assert "block0.slot0" in its["state"]["weight"]
    assert is_same(its["state"], state["state"])


def test_a_full_load_names_another_optimizer_and_keeps_its_own():
    model, optimizer = linear()
    adam = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 6)).sum().backward()
    adam.step()
    adam.zero_grad()
    state = get_optimizer_state_dict(model, adam, options=options())
    optimizer.state[model.weight]["ema"] = torch.ones(5, 6)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        shampoo.ForeignCheckpointError, match=r"it has exp_avg, exp_avg_sq; no block"
    ):
        set_optimizer_state_dict(model, optimizer, state, options=options())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert is_same(after["state"], before["state"])


def load_adam(rank: int) -> str:
    """What a load that broadcasts it says of another optimizer's state."""
    model, optimizer = linear()
    adam = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 6)).sum().backward()
    adam.step()
    adam.zero_grad()
    state = get_optimizer_state_dict(model, adam, options=options()) if rank == 0 else {}
    before = copy.deepcopy(optimizer.state_dict())
    try:
        how = options(broadcast_from_rank0=True)
        set_optimizer_state_dict(model, optimizer, state, options=how)
    except shampoo.ForeignCheckpointError as error:
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]
        assert is_same(optimizer.state_dict()["state"], before["state"])
        return str(error)
    return ""


def test_all_ranks_name_another_optimizer_that_one_has_brought(ranks):
    for words in ranks.returns(load_adam, 2):
        assert "the state of another optimizer (it has exp_avg, exp_avg_sq; no block*)" in words


def say_what_is_partial(rank: int, folder: Path) -> dict[str, list[str]]:
    """The warnings of each way to ask for the state."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("shampoo").addHandler(handler)
    try:
        model, optimizer = runs.build("replicated")
        optimizer.state_dict()
        runs.train(model, optimizer, range(2))
        found = {}
        get_state_dict(model, optimizer)
        get_state_dict(model, optimizer, options=options(cpu_offload=True))
        checkpoint.save(folder, model, optimizer, step=2)
        copy.deepcopy(optimizer)
        optimizer.consolidate_state_dict()
        optimizer.state_dict()
        found["whole"] = said[:]
        runs.train(model, optimizer, range(2, 3))
        for _ in range(2):
            optimizer.state_dict()
        found["part"] = said[:]
    finally:
        logging.getLogger("shampoo").removeHandler(handler)
    return found


def test_a_state_of_one_ranks_blocks_says_so_once(ranks, tmp_path):
    for rank, found in enumerate(ranks.returns(say_what_is_partial, 2, tmp_path)):
        assert found["whole"] == []
        [words] = found["part"]
        assert f"state_dict() on rank {rank} holds " in words
        assert " of 23 blocks" in words
        assert "consolidate_state_dict()" in words
        assert "shampoo.checkpoint" in words
    [alone] = ranks.returns(say_what_is_partial, 1, tmp_path)
    assert alone == {"whole": [], "part": []}
