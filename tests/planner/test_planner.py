"""The planner against real optimizers, brute force over elements, and the design's own tables."""

import math
from functools import partial

import pytest
import torch
from grouped_models import GPT
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from trajectory import apply, state_tensors

from shampoo import Shampoo, groups, plan
from shampoo.blocks.cost import CostModel
from shampoo.blocks.layout import Geometry
from shampoo.blocks.ownership import assign_owners
from shampoo.blocks.staggering import aligned_phases
from shampoo.planner.architectures import ARCHITECTURES
from shampoo.preconditioner import KINDS
from shampoo.preconditioner.choice import cost_of, layout_of

# Constants of distributed.md: section 5's balance, and 5.1's 150 and 15 TFLOP/s.
RELATIVE = CostModel(accumulate=((1, 1.0),), apply=((1, 1.0),), root=((1, 100.0),), byte=0.0)
TIMED = CostModel(
    accumulate=((1, 1 / 150e12),), apply=((1, 1 / 150e12),), root=((1, 30 / 15e12),), byte=0.0
)
SHAPES = [(9, 6), (4, 4), (2, 3, 5), (1, 3, 7), (7,), (1,), (), (5, 2, 3, 2), (3, 1, 13), (8, 1)]


def matrices(name):
    """What is factored in an architecture, seen as matrices, as section 5 counts it."""
    return [
        (math.prod(shape[:-1]), shape[-1]) if len(shape) == 3 else (shape[0], math.prod(shape[1:]))
        for shape in ARCHITECTURES[name]().shapes.values()
        if sum(size > 1 for size in shape) > 1
    ]


def random_parameters(shapes, dtype=torch.float32):
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def bytes_of(optimizer):
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in state_tensors(optimizer).values()
    }
    return sum(storages.values())


STATE_CASES = [
    {},
    {"grafting": "none"},
    {"grafting": "sgd", "betas": (0.0, 0.99)},
    {"grafting": "lamb", "momentum": 0.9},
    {"preconditioner_dtype": torch.float64, "momentum": 0.5},
    {"refresh_schedule": "staggered", "precondition_1d": True},
    {"large_dim_method": "adagrad"},
    {"large_dim_method": "diagonal", "grafting": "none"},
    {"precondition": False},
    {"merge_dims": "full"},
    {"merge_dims": "none", "momentum": 0.9},
]


@pytest.mark.parametrize("arguments", STATE_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bytes_are_those_a_real_optimizer_allocates(arguments, dtype):
    arguments = {"max_preconditioner_dim": 4, "precondition_frequency": 2, **arguments}
    params = random_parameters(SHAPES, dtype)
    optimizer = Shampoo(params, **arguments)
    apply(optimizer, params, [torch.randn(shape, dtype=dtype) for shape in SHAPES])
    report = plan(SHAPES, 1, parameter_dtype=dtype, **arguments)
    assert report.state_bytes == (bytes_of(optimizer),)
    keys = [key for param in params for key in optimizer.state[param]]
    assert report.factored_blocks == sum(key.endswith(".factor0") for key in keys)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_owners_hold_every_block_once(layout):
    alone = plan(SHAPES, 1, max_preconditioner_dim=4)
    shared = plan(SHAPES, 6, layout=layout, num_trainers_per_group=3, max_preconditioner_dim=4)
    assert shared.owners == (3 if layout == "ddp" else 6)
    counters = 8 * len(SHAPES)  # of steps, on every rank
    held = sum(size - counters for size in shared.state_bytes)
    assert held == alone.state_bytes[0] - counters
    assert sum(shared.compute_seconds) == pytest.approx(alone.compute_seconds[0], rel=1e-12)


def test_a_module_is_planned_as_its_trained_parameters():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(30, 20), nn.Conv2d(3, 8, 3), nn.Linear(7, 7))
    model.requires_grad_(True)[2].requires_grad_(False)
    model.to(torch.bfloat16)
    roles = [group["params"] for group in groups(model)]  # vectors first
    shapes = {name: tuple(p.shape) for role in roles for name, p in role if name[0] != "2"}
    expected = plan(shapes, 1, parameter_dtype=torch.bfloat16, max_preconditioner_dim=16)
    assert plan(model, 1, max_preconditioner_dim=16) == expected
    # Groups are divided among ranks one after another, and shapes are of one group.
    shared, by_shape = (plan(each, 2, max_preconditioner_dim=16) for each in (model, shapes))
    assert shared.blocks == by_shape.blocks == expected.blocks
    assert expected.tensors == 4


def test_grafted_only_is_a_group_without_preconditioning():
    shapes = {"embed.weight": (40, 6), "body.weight": (8, 6), "head.weight": (10, 6)}
    params = dict(zip(shapes, random_parameters(shapes.values()), strict=True))
    rest = [params["body.weight"], params["head.weight"]]
    grafted = {"params": [params["embed.weight"]], "precondition": False}
    optimizer = Shampoo([{"params": rest}, grafted], max_preconditioner_dim=4)
    apply(optimizer, list(params.values()), [torch.randn(shape) for shape in shapes.values()])
    report = plan(shapes, 1, grafted_only=["embed*"], max_preconditioner_dim=4)
    assert report.state_bytes == (bytes_of(optimizer),)
    assert report.factored_blocks == 2 * 2 + 3 * 2


@pytest.mark.parametrize("arguments", [{}, {"grafted_only": ["h.0.up*"]}, {"precondition": False}])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_planned_in_the_groups_that_the_optimizer_has_of_it(tied, arguments):
    model = GPT(tied).bfloat16()
    taken = set(model.h[0].up.parameters()) if "grafted_only" in arguments else set()
    ours = {"max_preconditioner_dim": 8, "precondition": arguments.get("precondition", True)}
    roles = groups(model)
    for role in roles:
        role["params"] = [each for each in role["params"] if each[1] not in taken]
        role["precondition"] &= ours["precondition"]
    if taken:
        named = [*model.h[0].up.named_parameters()]
        roles.append({"params": named, "precondition": False})
    optimizer = Shampoo([role for role in roles if role["params"]], **ours) if taken else None
    optimizer = optimizer or Shampoo(model, **ours)
    params = [*model.parameters()]
    apply(optimizer, params, [torch.randn_like(param) for param in params])
    report = plan(model, 1, max_preconditioner_dim=8, **arguments)
    assert report.state_bytes == (bytes_of(optimizer),)
    keys = [key for param in params for key in optimizer.state[param]]
    assert report.factored_blocks == sum(key.endswith(".factor0") for key in keys)
    said = "heads (1, 592 elements), positional (1, 128 elements): by the grafted method alone"
    if not tied:
        said = f"embeddings (1, 592 elements), {said}"
    assert any(note.startswith(said) for note in report.notes)
    assert said in str(report)


def test_a_model_without_roles_has_no_note_of_them():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert plan(model, 1).notes == plan([(8, 8), (8, 8), (8,), (8,)], 1).notes == ()


@pytest.mark.parametrize("name", ["llama-7b", "vit-l16", "resnet50"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_eight_ranks_are_balanced_at_blocks_of_1024(name, layout):
    shapes = ARCHITECTURES[name]().shapes
    report = plan(shapes, 8, layout=layout, precondition_frequency=50, block_candidates=())
    assert report.owners == 8
    assert 1.0 <= report.compute_imbalance <= 1.05


def even(size, limit):
    """Lengths of an even cut, which section 5 simulated; the package cuts ragged."""
    parts = -(-size // limit)
    quotient, longer = divmod(size, parts)
    return [quotient + 1] * longer + [quotient] * (parts - longer)


@pytest.mark.parametrize(
    ("name", "limit", "imbalances"),
    [
        ("llama-7b", 1024, {8: 1.00, 512: 1.02, 4096: 1.26}),
        ("llama-7b", 2048, {512: 1.17, 4096: 2.63}),
        ("vit-l16", 1024, {8: 1.02, 64: 1.10, 512: 1.77, 4096: 14.1}),
        ("resnet50", 1024, {8: 1.00, 64: 2.97, 512: 23.8, 4096: 190}),
        ("resnet50", 2048, {64: 5.72, 4096: 366}),
    ],
)
def test_balance_is_the_one_of_the_design(name, limit, imbalances):
    costs = [
        RELATIVE.block_seconds(KINDS["shampoo"].cost((rows, columns), ("full", "full")), 50)
        for m, n in matrices(name)
        for rows in even(m, limit)
        for columns in even(n, limit)
    ]
    for ranks, expected in imbalances.items():
        loads = [0.0] * ranks
        assign_owners(costs, ranks, loads)
        assert max(loads) * ranks / sum(loads) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("name", "ranks", "period", "together", "staggered"),
    [
        ("vit-l16", 8, 0.24, 0.160, 0.006),
        ("vit-l16", 64, 0.03, 0.022, 0.005),
        ("llama-7b", 8, 5.14, 3.459, 0.106),
        ("llama-7b", 512, 0.08, 0.055, 0.005),
    ],
)
def test_refresh_schedules_take_the_time_of_the_design(name, ranks, period, together, staggered):
    links = {"island_bandwidth": 1e30, "network_bandwidth": 1e30}
    report = plan(
        matrices(name),
        ranks,
        layout="fsdp2",
        precondition_frequency=50,
        cost_model=TIMED,
        block_candidates=(),
        **links,
    )
    assert report.together.mean * 50 == pytest.approx(period, abs=0.02)
    assert report.together.worst == pytest.approx(together, rel=0.03)
    # There, both roots of a block share a slot; here each has its own.
    assert 0.45 * staggered < report.staggered.worst < staggered + 5e-4
    assert report.together.mean <= report.staggered.mean * (1 + 1e-9)
    assert report.staggered.mean <= report.together.mean * 1.02


@pytest.mark.parametrize(
    ("name", "group", "compute", "distributor"),
    [
        ("resnet50", 64, 0.5, 6.6),
        ("vit-l16", 8, 4.8, 1.6),
        ("vit-l16", 512, 0.1, 26.8),
        ("llama-7b", 8, 103, 34),
        ("llama-7b", 64, 12.8, 332),
    ],
)
def test_gathering_takes_the_time_of_the_design(name, group, compute, distributor):
    report = plan(
        matrices(name),
        1024,
        num_trainers_per_group=group,
        max_preconditioner_dim=2048 if name == "resnet50" else 1024,
        precondition_frequency=50,
        communication_dtype=torch.bfloat16,
        cost_model=TIMED,
        block_candidates=(),
    )
    assert max(report.compute_seconds) * 1e3 == pytest.approx(compute, abs=0.05, rel=0.01)
    assert report.exchange_seconds * 1e3 == pytest.approx(distributor, abs=0.05, rel=0.01)


@pytest.mark.parametrize(
    ("name", "shards", "holders", "best"),
    [("vit-l16", 8, 4.9, 0.31), ("llama-7b", 64, 11.5, 0.13), ("llama-70b", 512, 48, 0.04)],
)
def test_locality_is_the_one_of_the_design(name, shards, holders, best):
    report = plan(matrices(name), shards, layout="fsdp2", block_candidates=())
    assert report.holders == pytest.approx(holders, rel=0.02)
    assert report.best_locality == pytest.approx(best, abs=0.006)


def geometry(limit):
    names = ("merge_dims", "precondition_1d", "precondition", "large_dim_method")
    values = dict(zip(names, ("matrix", False, True, "blocking"), strict=True))
    types = {"preconditioner_dtype": "float32", "grafting": "adam"}
    types |= {"refresh_schedule": "together", "preconditioner": "shampoo"}
    return Geometry(limit, **values, **types, capturable=False)


def blocks_of(shape, limit):
    """The elements of every block, row-major, by indexing a tensor of element numbers."""
    layout = layout_of(shape, geometry(limit))
    dims = layout.tiles[0].dims
    parts = [torch.arange(math.prod(dims)).view(dims)]
    for mode in range(len(dims)):
        parts = [piece for part in parts for piece in part.split(limit, dim=mode)]
    return layout, [set(part.flatten().tolist()) for part in parts]


def shards_of(shape, shards):
    """The elements on every shard, chunked as FSDP2 chunks dimension 0."""
    rows = torch.arange(math.prod(shape)).view(shape or (1,)).chunk(shards)
    found = [set(part.flatten().tolist()) for part in rows]
    return found + [set()] * (shards - len(found))


@pytest.mark.parametrize(("shards", "replicas"), [(1, 1), (2, 1), (3, 1), (5, 1), (2, 2), (3, 2)])
def test_sharded_traffic_is_what_counting_elements_gives(shards, replicas):
    ranks, limit, model = shards * replicas, 4, CostModel()
    received, costs, everything = [0] * ranks, [], []
    for shape in SHAPES:
        layout, blocks = blocks_of(shape, limit)
        costs += model.grid_seconds(layout.tiles, 10, partial(cost_of, layout))
        everything += [(block, shards_of(shape, shards)) for block in blocks]
    owners = assign_owners(costs, ranks, [0.0] * ranks)
    on_owner = on_best = holders = 0
    for owner, (block, shard) in zip(owners, everything, strict=True):
        received[owner] += 2 * len(block - shard[owner % shards])  # bf16 gradients
        for rank in set(range(ranks)) - {owner}:
            received[rank] += 4 * len(block & shard[rank % shards])  # float32 directions
        on_owner += len(block & shard[owner % shards])
        on_best += max(len(block & piece) for piece in shard)
        holders += sum(bool(block & piece) for piece in shard)
    report = plan(
        SHAPES,
        ranks,
        layout="fsdp2" if replicas == 1 else "hsdp",
        replicas=replicas,
        max_preconditioner_dim=limit,
        parameter_dtype=torch.bfloat16,
        communication_dtype=torch.float32,
    )
    numel = sum(math.prod(shape) for shape in SHAPES)
    assert report.traffic_bytes == tuple(received)
    assert report.locality == on_owner / numel
    assert report.best_locality == on_best / numel
    assert report.holders == holders / len(everything)


def test_gathered_slices_are_padded_to_the_longest():
    ranks, costs, numels = 3, [], []
    for shape in SHAPES:
        layout, blocks = blocks_of(shape, 4)
        costs += CostModel().grid_seconds(layout.tiles, 10, partial(cost_of, layout))
        numels += map(len, blocks)
    slices = [0] * ranks
    for owner, numel in zip(assign_owners(costs, ranks, [0.0] * ranks), numels, strict=True):
        slices[owner] += numel
    longest = 2 * (16 + math.ceil(max(slices) / 16) * 16)  # a header, whole lines
    report = plan(
        SHAPES,
        6,
        num_trainers_per_group=ranks,
        max_preconditioner_dim=4,
        communication_dtype=torch.float16,
    )
    assert report.traffic_bytes == (2 * longest,) * 3
    assert report.buffer_bytes == 3 * longest
    assert report.padding == 3 * longest / (2 * sum(numels))
    assert plan(SHAPES, 1).traffic_bytes == (0,)


def real_step(rank, world, replicas, arguments):
    """Bytes of state, received and of buffers that one rank of a real optimizer has."""
    shapes = [shape for shape in SHAPES if shape]
    values = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    params = [nn.Parameter(value) for value in values]
    if replicas:
        mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("r", "s"))
        params = [
            nn.Parameter(distribute_tensor(value, mesh, [Replicate(), Shard(0)]))
            for value in values
        ]
    optimizer = Shampoo(params, max_preconditioner_dim=4, **arguments)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    [distributor] = optimizer._distributors.by_team.values()
    if not replicas:
        [buffer] = distributor._buffers
        own = buffer[rank].nbytes
        return bytes_of(optimizer), buffer.nbytes - own, buffer.nbytes
    received = held = 0
    for wire in (distributor._incoming.wire, distributor._directions):
        size = wire.incoming.element_size()
        # less a word for every rank
        received += size * sum(n - 1 for peer, n in enumerate(wire.incoming_splits) if peer != rank)
        held += size * sum(n - 1 for n in wire.incoming_splits + wire.outgoing_splits)
    return bytes_of(optimizer), received, held


@pytest.mark.parametrize(
    ("layout", "replicas", "arguments"),
    [
        ("ddp", 0, {"num_trainers_per_group": 3}),
        ("ddp", 0, {"num_trainers_per_group": 3, "communication_dtype": torch.float16}),
        ("fsdp2", 1, {}),
        ("fsdp2", 1, {"momentum": 0.9, "weight_decay": 0.1, "refresh_schedule": "staggered"}),
        ("fsdp2", 1, {"weight_decay": 0.1, "communication_dtype": torch.bfloat16}),
        ("fsdp2", 1, {"grafting": "lamb"}),
        ("fsdp2", 1, {"grafting": "lamb", "large_dim_method": "adagrad"}),
        ("hsdp", 3, {}),
    ],
)
def test_real_ranks_hold_and_receive_what_was_planned(ranks, layout, replicas, arguments):
    shapes = [shape for shape in SHAPES if shape]
    found = ranks.returns(real_step, 3, 3, replicas, arguments)
    report = plan(
        shapes,
        3,
        layout=layout,
        replicas=max(1, replicas),
        parameter_dtype=torch.bfloat16,
        max_preconditioner_dim=4,
        **arguments,
    )
    state, received, held = zip(*found, strict=True)
    assert report.state_bytes == state
    assert report.traffic_bytes == received
    # Under HSDP, which of its holders sends a piece is averaged.
    assert report.buffer_bytes == pytest.approx(max(held), rel=0.1 * (layout == "hsdp"), abs=0)


@pytest.mark.parametrize("period", [1, 2, 5, 50])
def test_slots_let_the_dearest_roots_of_all_ranks_meet(period):
    costs = [[9, 7, 7, 2, 1], [8, 8, 6], [], [9, 1, 1, 1, 1, 1]]
    slots = aligned_phases(costs, period)
    assert len(slots) == 6  # one for each position, on whichever rank
    assert slots == sorted(slots)
    assert set(slots) <= set(range(period))
    slowest = [9, 8, 7, 2, 1, 1]
    for slot in set(slots):
        taken = sum(cost for cost, place in zip(slowest, slots, strict=True) if place == slot)
        assert taken <= sum(slowest) / period + 9
    assert aligned_phases([[], []], period) == []


def test_equal_roots_are_spread_evenly():
    assert aligned_phases([[3] * 4, [3] * 3], 8) == [0, 2, 4, 6]
    assert aligned_phases([[3] * 6], 3) == [0, 0, 1, 1, 2, 2]
    assert aligned_phases([[7] * 49], 49) == list(range(49))  # 1 / 49 * 49 < 1 in floats


def test_a_staggered_step_takes_the_ordinary_step_and_its_slot():
    # Rank 0 owns a block of 8 and the one of 4, rank 1 the other of 8. Of a total of 9 * 128, the
    # roots of rank 0 start at 0, 4, 8 and 8.5 of 9: in slots 0, 1, 3 and 3.
    report = plan(
        [(8, 8), (8, 8), (4, 4)],
        2,
        layout="fsdp2",
        max_preconditioner_dim=8,
        precondition_frequency=4,
        cost_model=RELATIVE,
        island_bandwidth=1e30,
        block_candidates=(),
    )
    ordinary, root = 3 * (8 * 8 * 16 + 4 * 4 * 8), 100 * 8**3
    steps = [ordinary + root, ordinary + root, ordinary, ordinary + 2 * root / 8]
    assert report.staggered.worst == pytest.approx(max(steps), rel=1e-12)
    assert report.staggered.mean == pytest.approx(sum(steps) / 4, rel=1e-12)
    assert report.together.worst == pytest.approx(ordinary + 2 * root + 2 * root / 8, rel=1e-12)
    assert report.refresh_slots == 3


def test_a_period_refreshes_everything_once_whatever_the_schedule():
    report = plan([(16, 16)] * 6, 2, max_preconditioner_dim=8, precondition_frequency=5)
    mean = report.together.mean - report.exchange_seconds - report.update_seconds
    assert mean == pytest.approx(report.staggered.mean - report.exchange_seconds
                                 - report.update_seconds)  # fmt: skip
    assert mean == pytest.approx(max(report.compute_seconds))
    assert report.refresh_slots == 5
    assert report.staggered.worst < report.together.worst


def test_a_smaller_group_is_explained():
    notes = plan([(8, 8)] * 9, 8, max_preconditioner_dim=8).notes
    assert "four of the 9 blocks an owner" in notes[0]
    assert plan([(8, 8)], 8, num_trainers_per_group=16).notes == (
        "num_trainers_per_group=16 is more than the world",
    )


def test_small_messages_are_noted_since_latency_is_not_modelled():
    [note] = plan([(64, 64)] * 4, 4, layout="fsdp2").notes
    assert "latency is not modelled" in note
    assert plan([(1024, 1024)] * 4, 4, layout="fsdp2").notes == ()
    assert plan([(64, 64)], 1, layout="fsdp2").notes == ()


@pytest.mark.parametrize(
    ("shapes", "ranks", "asked", "candidates", "recommended"),
    [
        ([(512, 512)] * 8, 2, 512, (256, 1024), 1024),  # cut alike, so not dearer
        ([(512, 512)] * 8, 2, 256, (256, 512), 256),  # 512 is dearer
        ([(512, 512)] * 8, 8, 512, (256,), 256),  # balanced, but one block an owner
        ([(512, 512)] * 9, 2, 512, (256,), 256),  # enough blocks, but 5 to 4
        ([(512, 512)] * 4, 512, 512, (256, 512), 256),  # never enough: the shortest step
        ([(512, 512)] * 4, 512, 512, (), 512),
    ],
)
def test_recommended_block_balances_and_is_no_dearer(shapes, ranks, asked, candidates, recommended):
    report = plan(
        shapes,
        ranks,
        layout="fsdp2",
        max_preconditioner_dim=asked,
        block_candidates=candidates,
        network_bandwidth=350e9,
    )
    assert report.recommended_block == recommended
    assert report.max_preconditioner_dim == asked


@pytest.mark.parametrize(
    ("name", "numel", "tensors"),
    [("vit-l16", 304_326_632, 296), ("llama-7b", 6_738_415_616, 291),
     ("llama-70b", 68_976_648_192, 723)],
)  # fmt: skip
def test_architectures_have_the_published_sizes(name, numel, tensors):
    architecture = ARCHITECTURES[name]()
    assert (architecture.numel, len(architecture.shapes)) == (numel, tensors)
    assert set(architecture.embeddings) <= set(architecture.shapes)
