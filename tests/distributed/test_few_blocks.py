"""More ranks than blocks: some own nothing, and train, save and load as the others do."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from resharded_runs import digest, placed
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from shampoo import Shampoo, checkpoint

WORLD = 4
SAVED, STEPS = 3, 6
# How the ranks share them. By itself, "ddp" would let every rank do the work of so few.
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, divided": {"num_trainers_per_group": WORLD},
    "fsdp2": {},
}
SHAPES = {1: (7, 5), 2: (13, 5), 3: (3, 20)}  # by blocks; the last has fewer rows than ranks


def build(layout: str, blocks: int, seed: int = 0) -> tuple[nn.Module, Shampoo]:
    torch.manual_seed(seed)
    rows, columns = SHAPES[blocks]
    model: nn.Module = nn.Linear(columns, rows, bias=False)
    if layout == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    elif layout.startswith("ddp"):
        model = DistributedDataParallel(model)
    opt = Shampoo(
        model.parameters(),
        **{"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "precondition_frequency": 2},
        **{"max_preconditioner_dim": 8, "large_dim_method": "blocking"},
        **LAYOUTS.get(layout, {}),
    )
    return model, opt


def train(model: nn.Module, optimizer: Shampoo, first: int, last: int) -> None:
    for step in range(first, last):
        [param] = model.parameters()
        grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
        param.grad = placed(grad, param)
        optimizer.step()
        optimizer.zero_grad()


def _train(rank: int, layout: str, blocks: int, folder: Path) -> tuple[str, int, int, int]:
    """The digest at the end, and blocks on this rank: its own, consolidated, in torch's full."""
    model, optimizer = build(layout, blocks)
    train(model, optimizer, 0, SAVED)
    checkpoint.save(folder, model, optimizer, step=SAVED)
    own = _blocks(optimizer.state_dict())
    optimizer.consolidate_state_dict(to=dist.get_world_size() - 1)
    consolidated = _blocks(optimizer.state_dict())
    options = StateDictOptions(full_state_dict=True)
    full = _blocks(get_state_dict(model, optimizer, options=options)[1])
    train(model, optimizer, SAVED, STEPS)
    return digest(model), own, consolidated, full


def _blocks(state_dict: Any) -> int:
    [entries] = state_dict["state"].values()
    assert "step" in entries
    return len({key.split(".")[0] for key in entries} - {"step"})


def _go_on(rank: int, layout: str, blocks: int, folder: Path) -> str:
    model, optimizer = build(layout, blocks, seed=1)
    assert checkpoint.load(folder, model, optimizer) == SAVED
    train(model, optimizer, SAVED, STEPS)
    return digest(model)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("blocks", SHAPES)
def test_ranks_without_blocks_train_save_and_load_to_the_bit(
    ranks: Ranks, tmp_path: Path, layout: str, blocks: int
) -> None:
    [(alone, *counts)] = ranks.returns(_train, 1, "plain", blocks, tmp_path / "alone")
    assert counts == [blocks] * 3
    found = ranks.returns(_train, WORLD, layout, blocks, tmp_path / "some")
    assert [each[0] for each in found] == [alone] * WORLD
    own = [each[1] for each in found]
    is_divided = layout != "ddp"
    assert sorted(own) == ([0] * (WORLD - blocks) + [1] * blocks if is_divided else [blocks] * 4)
    assert found[-1][2] == blocks
    assert [each[3] for each in found] == [blocks] * WORLD
    assert ranks.returns(_go_on, WORLD, layout, blocks, tmp_path / "some") == [alone] * WORLD
    assert ranks.returns(_go_on, 1, "plain", blocks, tmp_path / "some") == [alone]
    assert ranks.returns(_go_on, WORLD, layout, blocks, tmp_path / "alone") == [alone] * WORLD
