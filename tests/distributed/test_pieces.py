"""What travels where: on random meshes, every element of every block arrives exactly once."""

import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from shampoo.blocks.blocking import MERGE_MODES, cut, merge_dims, merge_groups
from shampoo.blocks.ownership import assign_owners
from shampoo.distributed.pieces import Piece, PiecesByPeer, ShardedParam, pieces_of, spans
from shampoo.distributed.shard_regions import Box, Region, region_of


@dataclass
class Case:
    """Parameters on a mesh, what each rank holds of them, and the routes of every rank."""

    sharded: list[ShardedParam]
    whole: list[Tensor]  # merged; elements differ
    local: list[list[Tensor]]  # by parameter and rank, merged
    routes: list[PiecesByPeer]


def shard(tensor: Tensor, mesh: tuple[int, ...], cuts: tuple[int | None, ...], rank: int) -> Tensor:
    """A rank's part if axis k of the mesh cuts dimension ``cuts[k]``, or replicates (None)."""
    coordinate = list(itertools.product(*map(range, mesh)))[rank]
    for parts, which, dim in zip(mesh, coordinate, cuts, strict=True):
        if dim is not None:
            length = -(-tensor.shape[dim] // parts)
            start = min(which * length, tensor.shape[dim])
            tensor = tensor.narrow(dim, start, min(length, tensor.shape[dim] - start))
    return tensor


def make(
    shapes: list[tuple[int, ...]],
    mesh: tuple[int, ...],
    cuts: list[tuple[int | None, ...]],
    limit: int,
    mode: str,
) -> Case:
    size = torch.Size(mesh).numel()
    case, first, loads = Case([], [], [], []), 0, [0.0] * size
    for member, (shape, cut_dims) in enumerate(zip(shapes, cuts, strict=True)):
        merged, groups = merge_dims(shape, limit, mode), merge_groups(shape, limit, mode)
        values = torch.arange(first, first + torch.Size(shape).numel()).reshape(shape)
        strides = values.stride()
        regions, local = [], []
        for rank in range(size):
            part = shard(values, mesh, cut_dims, rank)
            offset, rest = [], part.storage_offset()
            for stride in strides:
                offset.append(rest // stride)
                rest %= stride
            regions.append(region_of(shape, part.shape, offset, groups))
            local.append(part.reshape(regions[-1].dims if part.numel() else 0))
        tiles = cut(merged, [limit] * len(merged))
        blocks = [
            entry
            for tile in tiles
            for entry in zip(tile.block_indices(), tile.split(1), strict=True)
        ]
        costs = [float(tile.block_numel) for _, tile in sorted(blocks, key=lambda entry: entry[0])]
        case.sharded.append(
            ShardedParam(member, blocks, assign_owners(costs, size, loads), regions)
        )
        case.whole.append(values.reshape(merged))
        case.local.append(local)
        first += values.numel()
    case.routes = [pieces_of(case.sharded, me, size) for me in range(size)]
    return case


def random_case(seed: int) -> Case:
    chance = random.Random(seed)
    mesh = chance.choice([(1,), (2,), (5,), (2, 2), (3, 2), (2, 1, 3)])
    shapes, cuts = [], []
    for _ in range(3):
        shape = tuple(chance.randint(1, 7) for _ in range(chance.randint(1, 4)))
        shapes.append(shape)
        cuts.append(tuple(chance.choice([None, *range(len(shape))]) for _ in mesh))
    return make(shapes, mesh, cuts, chance.randint(2, 9), chance.choice(MERGE_MODES))


def inside(tensor: Tensor, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    return tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]


SEEDS = range(40)


@pytest.mark.parametrize("seed", SEEDS)
def test_both_ends_derive_the_same_lists(seed):
    routes = random_case(seed).routes
    for me, own in enumerate(routes):
        for other, their in enumerate(routes):
            assert own.gradients_out[other] == their.gradients_in[me]
            assert own.directions_out[other] == their.directions_in[me]


@pytest.mark.parametrize("seed", SEEDS)
def test_owners_get_every_gradient_element_once_and_holders_every_direction(seed):
    case = random_case(seed)
    tiles = {(p.member, block): tile for p in case.sharded for block, tile in p.blocks}
    owners = {(p.member, block): p.owners[block] for p in case.sharded for block, _ in p.blocks}
    blocks = {name: torch.full(tile.extent, -1) for name, tile in tiles.items()}
    for me, routes in enumerate(case.routes):
        for sender, pieces in enumerate(routes.gradients_in):
            for piece in pieces:
                assert owners[piece.member, piece.block] == me
                held = case.local[piece.member][sender]
                assert held.shape == piece.local_dims
                to = inside(blocks[piece.member, piece.block], piece.start, piece.shape)
                assert (to == -1).all(), "a gradient came twice"
                to.copy_(inside(held, piece.local_start, piece.shape))
    for name, block in blocks.items():
        expected = inside(case.whole[name[0]], tiles[name].start, tiles[name].extent)
        assert torch.equal(block, expected)
    for me, routes in enumerate(case.routes):
        found = [torch.full_like(local[me], -1) for local in case.local]
        for owner, pieces in enumerate(routes.directions_in):
            for piece in pieces:
                assert owners[piece.member, piece.block] == owner
                to = inside(found[piece.member], piece.local_start, piece.shape)
                assert (to == -1).all(), "a direction came twice"
                to.copy_(inside(blocks[piece.member, piece.block], piece.start, piece.shape))
        for local, direction in zip(case.local, found, strict=True):
            assert torch.equal(direction, local[me])


def sent(pieces: list[list[Piece]], me: int) -> int:
    """Elements that leave a rank."""
    return sum(piece.numel for peer, own in enumerate(pieces) if peer != me for piece in own)


@pytest.mark.parametrize("mesh", [(2, 2), (4, 2), (2, 4)])
def test_replicas_take_turns_as_senders(mesh):
    """Also where owners take turns in the same order, as those of equal blocks do."""
    case = make([(128, 64)] * 2, mesh, [(None, 0)] * 2, 4, "none")
    loads = [sent(routes.gradients_out, me) for me, routes in enumerate(case.routes)]
    assert min(loads) > 0
    assert max(loads) < 1.25 * sum(loads) / len(loads)


def test_an_owner_that_holds_a_piece_gets_it_from_itself():
    for seed in SEEDS:
        for me, routes in enumerate(random_case(seed).routes):
            here = {(piece.member, piece.block, piece.start) for piece in routes.directions_in[me]}
            for sender, pieces in enumerate(routes.gradients_in):
                for piece in pieces:
                    own = (piece.member, piece.block, piece.start) in here
                    assert own == (sender == me)


def test_pieces_lie_one_after_another_behind_a_header_for_each_peer():
    routes = make([(6, 4)], (2,), [(0,)], 3, "none").routes[0]
    offsets = [offset for offset, _ in spans(routes.directions_in, 2)]
    sizes = [[piece.numel for piece in peer] for peer in routes.directions_in]
    expected, offset = [], 0
    for peer in sizes:
        offset += 2
        for numel in peer:
            expected.append(offset)
            offset += numel
    assert offsets == expected
    assert sum(map(sum, sizes)) == 12


def test_a_piece_is_a_tile_of_what_its_holder_has():
    piece = Piece(0, 3, (1, 0), (5, 4), (2, 1), (2, 3))
    tile = piece.local_tile()
    assert (tile.dims, tile.start, tile.extent, tile.blocks) == ((5, 4), (2, 1), (2, 3), 1)
    assert piece.numel == 6


def test_empty_shards_send_and_receive_nothing():
    case = make([(3, 4)], (4,), [(0,)], 8, "none")
    assert case.sharded[0].regions[3] == Region((0, 4), ())
    last = case.routes[3]
    assert last.gradients_out == [[]] * 4
    assert last.directions_in == [[]] * 4
    assert case.sharded[0].regions[2].boxes == (Box((2, 0), (0, 0), (1, 4)),)
