"""Thin parameters: ``large_dim_method="auto"`` never takes more than 5 times AdamW's bytes."""

import math
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_shampoo import block_lengths, block_slices, merged_shape
from torch import nn
from torch.nn import Parameter
from trajectory import apply, assert_same_bits, compare, random_grads, random_params, snapshot

from shampoo import BlockGridMismatchError, Shampoo, checkpoint, plan
from shampoo.blocks.layout import Geometry, Layout
from shampoo.preconditioner.choice import layout_of

NAMED = [
    *[(8, 4096), (4096, 8), (8, 11008), (3, 4096), (10, 256), (1000, 512), (50257, 768), (2, 64)],
    *[(1, 3), (3,), (5,), (768,), (), (1, 1, 7), (3, 3, 512), (64, 3, 7, 7), (512, 512, 3, 3)],
    *[(1025, 1025), (1025, 7), (256, 1024), (192, 768), (2, 2, 2, 2, 2), (3, 64, 1, 1)],
]


def geometry(limit: int, merge: str, method: str = "auto") -> Geometry:
    types = {"preconditioner_dtype": "float32", "grafting": "adam", "capturable": False}
    types |= {"refresh_schedule": "together", "preconditioner": "shampoo"}
    return Geometry(limit, merge, True, True, method, **types)


def numbers(layout: Layout) -> int:
    """Of factors and roots."""
    return sum(
        tile.blocks * (side if alone else 2 * side**2)
        for tile in layout.tiles
        for side, alone in zip(tile.extent, layout.diagonal, strict=True)
    )


def random_shape(draw: random.Random) -> tuple[int, ...]:
    order = draw.choice([0, 1, 1, 2, 2, 2, 2, 3, 3, 4, 5])
    largest = 10 ** draw.uniform(0, 4.5 if order < 3 else 2)
    return tuple(math.ceil(largest ** draw.random()) for _ in range(order))


@pytest.mark.parametrize("seed", range(4))
def test_no_shape_takes_more_than_5_times_adamw(seed):
    """With both moments, 2 numbers an element; and what blocking takes no more for is blocked."""
    draw = random.Random(seed)
    thin = 0
    for shape in NAMED + [random_shape(draw) for _ in range(1500)]:
        limit = draw.choice([1, 2, 3, 8, 100, 128, 1000, 1024, 8192, 10**6])
        merge = draw.choice(["matrix", "full", "none"])
        numel = math.prod(shape)
        layout = layout_of(shape, geometry(limit, merge))
        full = layout_of(shape, geometry(limit, merge, "blocking"))
        assert numbers(layout) + 2 * numel <= 5 * 2 * numel, (shape, limit, merge)
        assert sum(tile.blocks * tile.block_numel for tile in layout.tiles) == numel
        is_affordable = numbers(full) + 2 * numel <= 5 * 2 * numel
        assert (layout == full) == is_affordable, (shape, limit, merge)
        thin += not is_affordable
    assert thin > 300


def test_the_rule_is_the_one_of_the_reference():
    draw = random.Random(0)
    shapes = [
        shape for shape in (random_shape(draw) for _ in range(1500)) if math.prod(shape) < 3e4
    ]
    assert len(shapes) > 500
    for shape in shapes:
        limit, merge = draw.choice([3, 8, 100, 1024]), draw.choice(["matrix", "full", "none"])
        merged = merged_shape(shape, merge, limit)
        layout = layout_of(shape, geometry(limit, merge))
        lengths, whole = block_lengths(merged, limit, "auto")
        assert list(layout.diagonal) == whole, (shape, limit, merge)
        sides = sorted(tuple(s.stop - s.start for s in p) for p in block_slices(merged, lengths))
        found = [tile.extent for tile in layout.tiles for _ in range(tile.blocks)]
        assert sorted(found) == sides, (shape, limit, merge)


@pytest.mark.parametrize(
    ("shape", "blocks", "diagonal"),
    [
        ((8, 4096), 1, (False, True)),
        ((4096, 8), 1, (True, False)),
        ((8, 256), 1, (False, True)),
        ((10, 256), 7, (False, False)),  # of 37, the last one of 34
        ((256, 1024), 2, (False, False)),  # whole, it would be 5.25 times AdamW's
        ((256, 768), 1, (False, False)),
        ((64, 64, 3, 3), 3, (False, False)),  # 64 x 576
        ((64, 4096), 20, (False, False)),
        ((50257, 768), 50, (False, False)),
        ((1025, 1025), 4, (False, False)),
        ((4,), 1, (False,)),
        ((5,), 2, (False,)),
        ((33,), 1, (True,)),
        ((2,) * 13, 1, (False, True)),  # 8 x 1024
    ],
)
def test_what_is_cut_shorter_and_what_is_thin(shape, blocks, diagonal):
    layout = layout_of(shape, geometry(1024, "matrix"))
    assert layout.diagonal == diagonal
    assert layout.blocks == blocks


def state_bytes(opt: torch.optim.Optimizer, param: Parameter, skip: tuple[str, ...] = ()) -> int:
    """Without scalars: steps, failures."""
    return sum(
        value.nbytes
        for key, value in opt.state[param].items()
        if value.ndim > 0 and not key.endswith(skip or ("never",))
    )


class Adapters(nn.Module):
    """LoRA pairs beside a head, a stem and a vector."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1536, rank, bias=False), nn.Linear(rank, 1100, bias=False)
        self.stem, self.head = nn.Conv2d(3, 64, 7), nn.Linear(256, 10)
        self.square = nn.Linear(96, 96)


def stepped(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: int = 2) -> None:
    for seed in range(steps):
        for param in params:
            generator = torch.Generator().manual_seed(seed)
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


@pytest.mark.filterwarnings("ignore:shampoo")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("limit", [16, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_bytes_of_adapters_are_within_5_times_adamws(momentum, limit, dtype):
    """AdamW's are those of float32 statistics, two numbers an element. It has no momentum."""
    params = list(Adapters(8).to(dtype).parameters())
    opt = Shampoo(
        params,
        momentum=momentum,
        max_preconditioner_dim=limit,
        precondition_1d=True,
        precondition_frequency=1,
    )
    stepped(opt, params)
    wide = [Parameter(param.detach().float()) for param in params]
    adamw = torch.optim.AdamW(wide)
    stepped(adamw, wide)
    for param, twin in zip(params, wide, strict=True):
        bound = 5 * state_bytes(adamw, twin)
        assert state_bytes(opt, param, (".momentum",)) <= bound, tuple(param.shape)
    a = state_bytes(opt, params[0], (".momentum",))
    full = limit == 16  # short blocks, of 8 x 16, keep two full factors
    assert a == 4 * (2 * 8 * 1536 + (96 * 2 * (64 + 256) if full else 2 * 64 + 1536))


@pytest.mark.parametrize("grafting", ["adam", "none", "adagrad_normalized"])
@pytest.mark.parametrize("limit", [5, 16, 1024])
@pytest.mark.parametrize("merge_dims", ["matrix", "full", "none"])
@pytest.mark.filterwarnings("ignore:shampoo")
def test_thin_parameters_follow_the_reference(grafting, limit, merge_dims):
    compare(
        [(3, 40), (40, 3), (6,), (4,), (4, 2, 30), (12, 10), (2, 2, 2, 2, 2), (1, 1, 7), ()],
        7,
        lr=0.1,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        momentum=0.5,
        grafting=grafting,
        eps=1e-4,
        relative_eps=1e-2,
        max_preconditioner_dim=limit,
        merge_dims=merge_dims,
        precondition_frequency=2,
        precondition_1d=True,
    )


def test_one_warning_names_the_first_parameter_the_bytes_and_the_choices():
    model = Adapters(8)
    model.stem.weight.requires_grad_(False)  # (64, 147) is not thin; frozen or not
    named = list(model.named_parameters())
    with pytest.warns(UserWarning, match="shampoo: ") as seen:
        opt = Shampoo([{"params": named[:1]}, {"params": named[1:]}], precondition_frequency=1)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    message = str(seen[0].message)
    params = [param for _, param in named]
    full = Shampoo(params, precondition_frequency=1, large_dim_method="blocking")
    trained = [param for param in params if param.requires_grad]
    for each in (opt, full):
        stepped(each, trained)

    def bytes_of(optimizer: Shampoo, param: Parameter) -> int:
        """With the counters of failures, which state has too."""
        return sum(v.nbytes for key, v in optimizer.state[param].items() if key != "step")

    thin = [model.a.weight, model.b.weight]
    kept, blocked = (sum(bytes_of(each, param) for param in thin) for each in (opt, full))
    assert f"2 thin parameters, {kept:,} bytes of state instead of {blocked:,}" in message
    first = bytes_of(opt, thin[0]), bytes_of(full, thin[0])
    assert f"a.weight, shape (8, 1536): {first[0]:,} bytes of state instead of {first[1]:,}" in (
        message
    )
    for choice in ('large_dim_method="blocking"', "max_preconditioner_dim", "precondition=False"):
        assert choice in message
    # Every choice of the message is one.
    blocks = layout_of((8, 1536), geometry(16, "matrix"))
    assert not any(blocks.diagonal)


def test_no_warning_where_nothing_is_thin_frozen_or_named():
    thin, square = Parameter(torch.zeros(8, 512)), Parameter(torch.zeros(64, 64))
    frozen = Parameter(torch.zeros(8, 512), requires_grad=False)
    empty = Parameter(torch.zeros(0, 512))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = Shampoo([square, frozen, empty])
        for method in ("blocking", "diagonal", "adagrad"):
            Shampoo([thin], large_dim_method=method)
        Shampoo([{"params": [thin], "precondition": False}])
    with pytest.warns(UserWarning, match=r"for parameter 0 of group 1, shape \(8, 512\): ") as seen:
        opt.add_param_group({"params": [thin]})
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_the_plan_says_what_the_optimizer_does():
    model, dim = Adapters(8), {"max_preconditioner_dim": 1024}
    report = plan(model, 1, **dim)
    with pytest.warns(UserWarning, match="shampoo: ") as seen:
        opt = Shampoo(model.named_parameters(), **dim)
    params = list(model.parameters())
    stepped(opt, params, 1)
    held = sum(value.nbytes for param in params for value in opt.state[param].values())
    assert report.state_bytes == (held,)
    assert report.diagonal_blocks == 2
    assert f"shampoo: {report.notes[-1]}" == str(seen[0].message)
    assert report.notes[-1] in str(report)
    assert "2 diagonal in a side" in str(report)
    full = plan(model, 1, **dim, large_dim_method="blocking")
    assert full.diagonal_blocks == 0
    assert not full.notes
    assert full.state_bytes[0] > 4 * held


def test_the_plan_of_adapters_of_a_7b_model_is_near_adamws():
    shapes = [(8, 4096), (4096, 8), (8, 11008), (11008, 8)] * 32
    report = plan(shapes, 1)
    numel = sum(math.prod(shape) for shape in shapes)
    assert report.state_bytes[0] < 1.1 * 8 * numel
    assert plan(shapes, 1, large_dim_method="blocking").state_bytes[0] > 100 * 8 * numel


def test_the_command_plans_either_way(tmp_path):
    shapes = tmp_path / "shapes.json"
    shapes.write_text("[[8, 4096]]")
    command = [sys.executable, "-m", "shampoo", "plan", str(shapes), "--world-size", "1"]
    texts = [
        subprocess.run([*command, *more], check=True, capture_output=True, text=True).stdout
        for more in ([], ["--large-dim-method", "blocking"])
    ]
    assert "tensor0, shape (8, 4096): 279,044 bytes of state instead of" in texts[0]
    assert "272.5 KiB on the busiest rank" in texts[0]
    assert "diagonal" not in texts[1]
    assert "32.25 MiB on the busiest rank" in texts[1]


SHAPES = [(3, 40), (40, 3), (12, 10), (5,)]
HYPER: dict[str, Any] = {
    **{"lr": 0.1, "momentum": 0.5, "precondition_frequency": 3, "max_preconditioner_dim": 16},
    "precondition_1d": True,
}


def trained(steps: int = 4, **hyper: Any) -> tuple[list[Parameter], Shampoo]:
    params = random_params(*SHAPES, dtype=torch.float32)
    opt = Shampoo(params, **{**HYPER, **hyper})
    for grads in random_grads(params, steps):
        apply(opt, params, grads)
    return params, opt


def assert_continues(
    params: list[Parameter], opt: Shampoo, others: list[Parameter], other: Shampoo
) -> None:
    assert_same_bits(snapshot(other), snapshot(opt))
    for grads in random_grads(params, 5, seed=7):
        apply(opt, params, grads)
        apply(other, others, grads)
    assert_same_bits(snapshot(other), snapshot(opt))


def twins(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(param.detach().clone()) for param in params]


@pytest.mark.filterwarnings("ignore:shampoo")
@pytest.mark.parametrize("method", ["blocking", "diagonal", "adagrad"])
@pytest.mark.parametrize("is_fresh", [True, False])
def test_auto_takes_on_the_method_of_a_checkpoint(method, is_fresh):
    params, opt = trained(large_dim_method=method)
    others, other = trained(0 if is_fresh else 2)
    for twin, param in zip(others, params, strict=True):
        twin.data.copy_(param.data)
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["large_dim_method"] == method
    assert_continues(params, opt, others, other)


@pytest.mark.filterwarnings("ignore:shampoo")
@pytest.mark.parametrize(
    ("saved", "ours"), [("auto", "blocking"), ("blocking", "diagonal"), ("adagrad", "blocking")]
)
def test_a_named_method_is_not_changed_by_a_checkpoint(saved, ours):
    _, opt = trained(large_dim_method=saved)
    _, other = trained(2, large_dim_method=ours)
    before = snapshot(other)
    with pytest.raises(
        BlockGridMismatchError,
        match=f"large_dim_method='{saved}', this optimizer uses '{ours}'",
    ):
        other.load_state_dict(opt.state_dict())
    assert_same_bits(snapshot(other), before)
    assert other.param_groups[0]["large_dim_method"] == ours


@pytest.mark.filterwarnings("ignore:shampoo")
def test_what_was_saved_before_the_argument_was_blocked():
    params, opt = trained(large_dim_method="blocking")
    state = opt.state_dict()
    for group in state["param_groups"]:
        del group["large_dim_method"]
    others = twins(params)
    other = Shampoo(others, **HYPER)
    other.load_state_dict(state)
    assert other.param_groups[0]["large_dim_method"] == "blocking"
    del opt.param_groups[0]["large_dim_method"], opt.defaults["large_dim_method"]
    copy = pickle.loads(pickle.dumps(opt))
    opt.param_groups[0]["large_dim_method"] = "blocking"
    assert copy.param_groups[0]["large_dim_method"] == "blocking"
    copied = copy.param_groups[0]["params"]
    assert_continues(copied, copy, others, other)


def thin_model(seed: int, **hyper: Any) -> tuple[nn.Module, Shampoo]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(40, 3), nn.Linear(3, 50), nn.Linear(50, 12))
    return model, Shampoo(
        model.named_parameters(), lr=0.1, momentum=0.5, precondition_frequency=2, **hyper
    )


def fit(model: nn.Module, optimizer: Shampoo, seeds: range) -> None:
    for seed in seeds:
        batch = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def resumed(rank: int, folder: Path, steps: int) -> tuple[dict[str, Any], str]:
    """A job: the parameters after five more steps of an optimizer in which no method is named."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, optimizer = thin_model(1)
    fit(model, optimizer, range(20, 20 + steps))
    checkpoint.load(folder, model, optimizer)
    method = optimizer.param_groups[0]["large_dim_method"]
    fit(model, optimizer, range(4, 9))
    return {name: param.detach() for name, param in model.named_parameters()}, method


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_folder_of_checkpoints_brings_its_method(ranks, tmp_path, world, steps):
    model, optimizer = thin_model(0, large_dim_method="blocking")
    fit(model, optimizer, range(4))
    checkpoint.save(tmp_path, model, optimizer, step=4)
    fit(model, optimizer, range(4, 9))
    for found, method in ranks.returns(resumed, world, tmp_path, steps):
        assert method == "blocking"
        for name, param in model.named_parameters():
            assert torch.equal(found[name], param), name


def loaded(rank: int, state: dict[str, Any]) -> list[torch.Tensor]:
    """A job: one process's state, loaded where two ranks have divided other blocks already."""
    params = random_params(*SHAPES, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = Shampoo(params, **HYPER, num_trainers_per_group=2)
    for grads in random_grads(params, 2):
        apply(opt, params, grads)
    for param in params:
        param.data.fill_(0.5)
    opt.load_state_dict(state)
    for grads in random_grads(params, 5, seed=7):
        apply(opt, params, grads)
    return [param.detach() for param in params]


def test_ranks_divide_the_blocks_of_a_checkpoint_anew(ranks):
    params, opt = trained(large_dim_method="blocking")
    state = opt.state_dict()
    found = ranks.returns(loaded, 2, state)
    for param in params:
        param.data.fill_(0.5)
    for grads in random_grads(params, 5, seed=7):
        apply(opt, params, grads)
    for each in found:
        assert all(torch.equal(a, b) for a, b in zip(each, params, strict=True))
