"""Rows 10 to 19 of the fault table, ``docs/faults.md``, and what befalls process groups."""

import copy
import datetime
import gc
import logging
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fault_runs import HYPER, LAYOUTS, TIMEOUT, Run, digest, said_by, wait_for_all
from ranks import Ranks
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from shampoo import Shampoo
from shampoo.distributed.replica_checksums import checksum


class Training:
    """A model in a wrapper, trained by real losses, each rank on samples of its own."""

    def __init__(self, wrapper: str, rank: int, **hyper: Any) -> None:
        self.rank = rank
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(9, 13), nn.Tanh(), nn.Linear(13, 8), nn.Linear(8, 4))
        self.model: nn.Module = self.inner
        if wrapper == "ddp":
            self.model = DistributedDataParallel(self.inner)
        else:
            fully_shard(self.inner)
        self.opt = Shampoo(self.model.parameters(), **{**HYPER, "lr": 0.01, **hyper})

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 * step + self.rank)
        return self.model(torch.randn(6, 9, generator=generator)).square().mean()

    def backward(self, step: int) -> None:
        self.opt.zero_grad()
        self.loss(step).backward()

    def step(self, *steps: int) -> None:
        for step in steps:
            self.backward(step)
            self.opt.step()

    def weights(self) -> str:
        params = list(self.inner.parameters())
        return digest([p.full_tensor() if isinstance(p, DTensor) else p for p in params])

    def held(self) -> str:
        states = [value for p in self.inner.parameters() for value in self.opt.state[p].values()]
        return digest(states)


WRAPPERS = pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])


# Row 10


def _swap(rank: int, after: int) -> Any:
    """As Accelerate does: placeholders while the model is sharded, then its new parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 13), nn.Linear(13, 8))
    opt = Shampoo(model.parameters(), **HYPER)
    for _ in range(after):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        opt.step()
    group = opt.param_groups[0]
    group["params"] = [torch.empty(0) for _ in group["params"]]
    fully_shard(model)
    group["params"] = list(model.parameters())
    warnings: list[logging.LogRecord] = []
    logger = logging.getLogger("shampoo.state.persistent")
    logger.addFilter(warnings.append)
    before = [param.full_tensor().clone() for param in model.parameters()]
    for step in range(1, 4):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(6, 9, generator=generator)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    logger.removeFilter(warnings.append)
    moved = [
        not torch.equal(old, new.full_tensor())
        for old, new in zip(before, model.parameters(), strict=True)
    ]
    steps = {int(opt.state[param]["step"]) for param in model.parameters()}
    weights = digest([param.full_tensor() for param in model.parameters()])
    return all(moved), steps, len(opt.state), [entry.getMessage() for entry in warnings], weights


@pytest.mark.parametrize("after", [0, 2])
def test_10_parameters_are_swapped(ranks: Ranks, after: int) -> None:
    answers = ranks.run(_swap, 2, after, timeout=TIMEOUT)
    lost = "shampoo: 4 parameters were replaced; their state is dropped"
    for answer in answers:
        assert answer == (True, {3}, 4, [lost] if after else [], answers[0][4])


# Row 11


def _ask_for_state(rank: int, wrapper: str) -> Any:
    asked, twin = Training(wrapper, rank, momentum=0.9), Training(wrapper, rank, momentum=0.9)
    before = asked.weights()
    found = get_optimizer_state_dict(asked.model, asked.opt)["state"]
    steps = {int(entries["step"]) for entries in found.values()}
    is_same = before == asked.weights()
    asked.step(1, 2, 3, 4)
    twin.step(1, 2, 3, 4)
    return steps, is_same, asked.weights() == twin.weights(), asked.held() == twin.held()


@WRAPPERS
def test_11_state_dict_before_the_first_step(ranks: Ranks, wrapper: str) -> None:
    answers = ranks.run(_ask_for_state, 2, wrapper, timeout=TIMEOUT)
    assert answers == [({0}, True, True, True)] * 2


# Row 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_16_every_flipped_bit_changes_the_checksum(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 12).to(dtype).view(11, 1)
    expected = int(checksum(tensor))
    bits = tensor.view(torch.uint8).view(-1)
    for byte in range(len(bits)):
        for bit in range(8):
            bits[byte] ^= 1 << bit
            assert int(checksum(tensor)) != expected
            bits[byte] ^= 1 << bit
    assert int(checksum(tensor)) == expected
    assert int(checksum(tensor.flip(0))) != expected
    assert int(checksum(tensor.expand(11, 3).t())) == int(
        checksum(tensor.expand(11, 3).t().clone())
    )


def test_16_long_tensors_are_summed_in_pieces_that_count_on() -> None:
    long = torch.zeros((1 << 20) + 3)
    sums = set()
    for place in (0, 2, (1 << 20) - 1, 1 << 20, (1 << 20) + 2):
        long.zero_()[place] = 1.0
        sums.add(int(checksum(long)))
    assert len(sums) == 5
    assert int(checksum(torch.empty(0))) == 0


def _drift(rank: int, layout: str, where: int, every: int) -> Any:
    run = Run(layout, check_replicas_every=every)
    run.opt.param_groups[0]["param_names"] = list("abcde")
    run.step(1, 2)  # compared before the first step, and before the third
    if rank == where:
        param = run.params[1].detach()
        shard = param.to_local() if isinstance(param, DTensor) else param
        shard.view(torch.int32)[0, 0] ^= 1
    before = run.held()
    found = []
    for step in (3, 4):
        run.feed(step)
        found.append(said_by(run.opt.step))
    return found, before == run.held()


@pytest.mark.parametrize(
    ("layout", "where", "words"),
    [
        ("ddp", 1, "rank 0 holds others than rank 1"),
        ("groups of 2 in 4", 3, "rank 0 holds others than rank 3"),
        ("hsdp 2x2", 3, "rank 1 holds others than rank 3"),
        ("tensor parallel, ddp 2x2", 3, "rank 1 holds others than rank 3"),  # 0 and 2 hold the same
        ("fsdp2 and plain", 0, "rank 0 holds others than rank 1"),
    ],
)
def test_16_replicas_drift(ranks: Ranks, layout: str, where: int, words: str) -> None:
    for found, is_same in ranks.run(
        _drift, LAYOUTS[layout].world, layout, where, 2, timeout=TIMEOUT
    ):
        for error, said in found:  # again, until somebody does something
            assert error == "ReplicaMismatchError"
            assert "b is not the same on ranks that must hold the same bits" in said
            assert words in said
        assert is_same


@pytest.mark.parametrize(("layout", "every"), [("ddp", 0), ("ddp", 5), ("fsdp2", 1)])
def test_16_nobody_looks(ranks: Ranks, layout: str, every: int) -> None:
    """Not asked to, not yet, or there is nothing that two ranks hold."""
    for found, _ in ranks.run(_drift, LAYOUTS[layout].world, layout, 1, every, timeout=TIMEOUT):
        assert found == [("nothing", "")] * 2


def _drift_undivided(rank: int) -> Any:
    run = Run("ddp", num_trainers_per_group=1, check_replicas_every=1)
    run.step(1)
    if rank == 1:
        run.params[0].detach()[0, 0] += 1
    run.feed(2)
    return said_by(run.opt.step)[0]


def test_16_replicas_drift_that_divide_nothing(ranks: Ranks) -> None:
    assert ranks.run(_drift_undivided, 2, timeout=TIMEOUT) == ["ReplicaMismatchError"] * 2


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_16_bad_periods_are_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid check_replicas_every=.*integer >= 0"):
        Shampoo([Parameter(torch.ones(2, 2))], check_replicas_every=value)


# Row 17


def _deterministic(rank: int, wrapper: str) -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(2):
            run = Training(wrapper, rank, refresh_schedule="staggered", grafting="lamb")
            run.step(1, 2, 3, 4, 5)
            found.append((run.weights(), run.held()))
    finally:
        torch.use_deterministic_algorithms(False)
    return found


@WRAPPERS
def test_17_deterministic_mode(ranks: Ranks, wrapper: str) -> None:
    for first, second in ranks.run(_deterministic, 2, wrapper, timeout=TIMEOUT):
        assert first == second


# Row 18


def _overflow(rank: int, wrapper: str, where: list[int]) -> Any:
    run, twin = Training(wrapper, rank), Training(wrapper, rank)
    scaler = GradScaler("cpu", init_scale=1024.0)  # powers of two: unscaling is exact
    scales = []
    for step in range(1, 6):
        run.opt.zero_grad()
        loss = scaler.scale(run.loss(step))
        (loss * float("inf") if step in (2, 4) and rank in where else loss).backward()
        scaler.step(run.opt)
        scaler.update()
        scales.append(scaler.get_scale())
    twin.step(1, 3, 5)
    return scales, run.opt.skipped_steps, run.weights() == twin.weights(), run.held() == twin.held()


@WRAPPERS
@pytest.mark.parametrize("where", [[0, 1], [1]])
def test_18_grad_scaler_skips(ranks: Ranks, wrapper: str, where: list[int]) -> None:
    """The wrapper's reduction of gradients brings the Inf of one rank to all."""
    for answer in ranks.run(_overflow, 2, wrapper, where, timeout=TIMEOUT):
        assert answer == ([1024.0, 512.0, 512.0, 256.0, 256.0], 0, True, True)


# Row 19


def _grow(rank: int, layout: str, how: str) -> Any:
    run = Run(layout)
    late = [Parameter(run.place(9, torch.ones(8, 20))), Parameter(run.place(9, torch.ones(17, 9)))]
    for param in late:
        param.requires_grad_(False)
    if how == "unfrozen":
        run.opt.param_groups[0]["params"] += late
    run.step(1, 2, 3)
    owned = {key: value.clone() for key, value in run.state().items() if "factor" in key[1]}
    before = [param.full_tensor() if isinstance(param, DTensor) else param for param in late]
    before = [param.detach().clone() for param in before]
    for param in late:
        param.requires_grad_(True)
    if how == "added":
        run.opt.add_param_group({"params": late})
    run.params += late
    run.step(4)
    kept = all(key in run.state() for key in owned)
    steps = [int(run.opt.state[param]["step"]) for param in run.params]
    roots = [
        bool(value.any())
        for (index, key), value in run.state().items()
        if index >= len(run.params) - 2 and "root" in key
    ]
    moved = [
        not torch.equal(old, new.full_tensor() if isinstance(new, DTensor) else new)
        for old, new in zip(before, late, strict=True)
    ]
    # A copy, and a load, find blocks at the owners that they have.
    twin = copy.deepcopy(run.opt)
    run.opt.load_state_dict(copy.deepcopy(run.opt.state_dict()))
    run.step(5, 6)
    ours = run.weights()
    run.opt, run.params = twin, [p for group in twin.param_groups for p in group["params"]]
    run.step(5, 6)
    return kept, steps, any(roots), all(moved), ours, run.weights()


@pytest.mark.parametrize("how", ["added", "unfrozen"])
@pytest.mark.parametrize("layout", ["ddp", "groups of 2 in 4", "fsdp2", "hsdp 2x2"])
def test_19_parameters_come_later(ranks: Ranks, layout: str, how: str) -> None:
    answers = ranks.run(_grow, LAYOUTS[layout].world, layout, how, timeout=TIMEOUT)
    for kept, steps, has_roots, moved, ours, copied in answers:
        assert kept
        assert steps == [4, 4, 4, 4, 4, 1, 1]
        assert not has_roots  # grafting alone, until their own second step
        assert moved
        assert ours == copied == answers[0][4]


# What befalls process groups


def _renew(rank: int, layout: str, folder: str) -> Any:
    twin = Run(layout)
    twin.step(1, 2, 3, 4)
    expected = twin.weights()
    del twin
    run = Run(layout)
    run.step(1, 2)
    # gloo goes on with a group that was destroyed, NCCL does not: nobody may keep it.
    used = [weakref.ref(group) for group in dist.distributed_c10d._world.pg_map]
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/again",
        rank=rank,
        world_size=LAYOUTS[layout].world,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    run.step(3, 4)
    gc.collect()
    return run.weights() == expected, [group() for group in used if group() is not None]


@pytest.mark.parametrize("layout", ["ddp", "groups of 2 in 4"])
def test_the_process_group_is_destroyed_and_made_again(
    ranks: Ranks, tmp_path: Path, layout: str
) -> None:
    answers = ranks.run(_renew, LAYOUTS[layout].world, layout, str(tmp_path), timeout=TIMEOUT)
    assert answers == [(True, [])] * LAYOUTS[layout].world


def _shrink(rank: int, folder: str) -> Any:
    run = Run("ddp")
    run.step(1, 2)
    saved = copy.deepcopy(run.opt.state_dict())
    before = run.parts()
    dist.destroy_process_group()
    run.feed(3)
    said = said_by(run.opt.step)
    is_same = before == run.parts()
    _, incomplete = said_by(lambda: run.opt.load_state_dict(saved))
    dist.init_process_group("gloo", init_method=f"file://{folder}/{rank}", rank=0, world_size=1)
    return said, is_same, incomplete


def test_the_process_group_shrinks(ranks: Ranks, tmp_path: Path) -> None:
    """Statistics of the ranks that left are not silently begun anew."""
    for (error, words), is_same, incomplete in ranks.run(
        _shrink, 2, str(tmp_path), timeout=TIMEOUT
    ):
        assert error == "IncompleteCheckpointError"
        assert "the ranks that divide the blocks are not those that divided them" in words
        assert "missing" in incomplete
        assert is_same


def _copy(rank: int, how: str) -> Any:
    pair = rank // 2 * 2
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    run = Run("ddp", process_group=groups[rank // 2], lr=0.1 + pair)  # two stages of a pipeline
    run.step(1, 2)
    copied = Run("ddp", lr=0.1 + pair)
    if how == "deepcopy":
        copied.opt = copy.deepcopy(run.opt)
    else:
        copied.opt = pickle.loads(pickle.dumps(run.opt))
    copied.params = [p for group in copied.opt.param_groups for p in group["params"]]
    run.step(3, 4)
    copied.step(3, 4)
    return run.held() == copied.held(), run.weights()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_steps_with_the_ranks_of_the_original(ranks: Ranks, how: str) -> None:
    answers = ranks.run(_copy, 4, how, timeout=TIMEOUT)
    assert all(answer[0] is True for answer in answers), answers
    weights = [answer[1] for answer in answers]
    assert weights[0] == weights[1] != weights[2] == weights[3]


def _stay_away(rank: int) -> Any:
    run = Run("ddp")
    run.step(1)
    before = run.parts()
    run.feed(2)
    error = "nothing"
    if rank == 0:
        # Now: on a busy machine, to make a group and to take a step may take longer.
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=3), dist.group.WORLD)
        try:
            run.opt.step()
        except RuntimeError as raised:  # torch's own
            error = str(raised)
    wait_for_all("late")
    return error, before == run.parts()


def test_a_rank_that_does_not_step_is_noticed_after_the_timeout(ranks: Ranks) -> None:
    zero, one = ranks.run(_stay_away, 2)
    assert "Timed out waiting 3000ms" in zero[0]
    assert zero[1]
    assert one == ("nothing", True)
