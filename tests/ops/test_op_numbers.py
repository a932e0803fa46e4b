"""The overloads of the ops whose numbers lie on the device."""

import pytest
import torch
from compiled import load_compiled
from op_arguments import good_arguments
from torch import Tensor

from shampoo import ops
from shampoo.certificates.cases.tiles import FLAT, table

NUMBERS = {name: op.moving for name, op in ops.OPS.items() if op.moving}


@pytest.fixture(params=NUMBERS)
def op(request):
    return request.param


def in_dtype(value, dtype):
    if isinstance(value, list):
        return [in_dtype(each, dtype) for each in value]
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype, copy=True) if is_float else value


@pytest.mark.parametrize("change", [{}, {"accumulate": True, "nesterov": False}])
@pytest.mark.parametrize("flat", FLAT, ids=str)
def test_numbers_may_lie_on_the_device(impl, flat, op, change):
    given = vars(good_arguments())[op]
    given |= {name: value for name, value in change.items() if name in given}
    results = []
    for as_tensor in (False, True):
        arguments = {name: in_dtype(value, flat) for name, value in given.items()}
        if as_tensor:
            for name in NUMBERS[op]:
                arguments[name] = torch.tensor(arguments[name], dtype=torch.float64)
        getattr(impl, op)(*arguments.values())
        results.append([v for v in arguments.values() if not isinstance(v, (int, float))])
        results[-1] = [v for v in results[-1] if not (isinstance(v, Tensor) and v.dim() == 0)]
    torch.testing.assert_close(*results, rtol=0.0, atol=0.0)


def count_blocks(tiles):
    order = (tiles.shape[1] - 2) // 4
    return int(tiles[:, 2 + 2 * order : 2 + 3 * order].prod(1).sum())


def owner_of_elements(tiles, numel):
    """[numel], to which block of the table an element of the segment belongs."""
    order = (tiles.shape[1] - 2) // 4
    owners, block = torch.full((numel,), -1), 0
    for row in tiles.tolist():
        grid, extent = row[2 + 2 * order : 2 + 3 * order], row[2 + 3 * order :]
        size = torch.Size(extent).numel()
        for cell in range(torch.Size(grid).numel()):
            start = row[1] + cell * size
            owners[start : start + size] = block
            block += 1
    return owners


@pytest.mark.parametrize("flat", FLAT, ids=str)
@pytest.mark.parametrize("normalized", [False, True])
def test_every_block_may_have_corrections_of_its_own(impl, flat, normalized):
    """Each block comes out as by a call with its own numbers for all."""
    tiles, _, numel = table([(8, 3), (2, 6), (5,)], 4)
    sources = [torch.randn(8, 3), torch.randn(2, 6), torch.randn(5)]
    blocks = count_blocks(tiles)
    corrections = [torch.rand(blocks, dtype=torch.float64) + 0.1 for _ in range(2)]
    state = [torch.rand(numel, dtype=flat) for _ in range(2)]

    def run(first, second):
        given = [torch.zeros(numel, dtype=flat), *(each.clone() for each in state)]
        direction, norm = torch.zeros(numel, dtype=flat), torch.zeros(blocks, dtype=flat)
        rest = 1.0, False, 0.9, first, 0.99, 0.01, second, 1e-8, normalized
        impl.graft_moments_(*given, direction, norm, sources, tiles, *rest)
        return direction, norm

    direction, norm = run(*corrections)
    owners = owner_of_elements(tiles, numel)
    for block in range(blocks):
        alone, length = run(*(float(each[block]) for each in corrections))
        assert torch.equal(direction[owners == block], alone[owners == block])
        assert norm[block] == length[block]


def test_every_block_may_draw_by_a_count_of_its_own(impl):
    tiles, _, numel = table([(8, 3), (2, 6), (5,)], 4)
    blocks = count_blocks(tiles)
    steps = torch.arange(3, 3 + blocks, dtype=torch.float64)
    direction, scale = torch.randn(numel), torch.ones(blocks)

    def run(step):
        params = [torch.ones(shape, dtype=torch.bfloat16) for shape in ((8, 3), (2, 6), (5,))]
        impl.update_blocks_(params, None, direction, scale, tiles, 0.003, 0.0, 0.0, False, 7, step)
        gathered = torch.empty(numel)
        impl.gather_blocks_(gathered, params, tiles, 1.0, False)
        return gathered

    mixed, owners = run(steps), owner_of_elements(tiles, numel)
    for block in range(blocks):
        alone = run(float(steps[block]))
        assert torch.equal(mixed[owners == block], alone[owners == block])
    assert not torch.equal(mixed, run(3.0))


def test_numbers_of_blocks_are_as_many_as_blocks():
    load_compiled()
    arguments = vars(good_arguments())["graft_moments_"]
    arguments["correction1"] = torch.ones(1000, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"correction1 is .*one for each block"):
        ops.graft_moments_(**arguments)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("flat", FLAT, ids=str)
def test_nothing_times_nan_is_nothing(impl, flat, as_tensor, accumulate):
    tiles, _, numel = table([(5, 7)], 4)
    source = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 1.0]).repeat(7).view(5, 7)
    out = torch.full((numel,), 3.0, dtype=flat)
    alpha = torch.tensor(0.0, dtype=torch.float64) if as_tensor else 0.0
    impl.gather_blocks_(out, [source], tiles, alpha, accumulate)
    assert (out == (3.0 if accumulate else 0.0)).all()


@pytest.mark.parametrize(("mu", "nesterov"), [(0.0, False), (0.5, False), (0.5, True)])
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("flat", FLAT, ids=str)
def test_a_scale_of_zero_is_no_step_whatever_the_direction_holds(impl, flat, param, mu, nesterov):
    """Two blocks: the direction of the first is not finite, that of the second moves it."""
    tiles, _, numel = table([(8, 4)], 4)
    weight, buffer = torch.ones(8, 4, dtype=param), torch.zeros(numel, dtype=flat)
    direction = torch.ones(numel, dtype=flat)
    direction[:16] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0]).repeat(4)
    scale = torch.tensor([0.0, 2.0], dtype=flat)
    momentum = buffer if mu else None
    impl.update_blocks_([weight], momentum, direction, scale, tiles, 0.25, 0.0, mu, nesterov)
    assert (weight[:4] == 1.0).all()
    assert (weight[4:] == (1.0 - 0.25 * 2.0 * (1.0 + mu * nesterov))).all()
    assert (buffer[:16] == 0.0).all()


def test_a_number_on_the_device_is_one_float64(op):
    load_compiled()
    for wrong in (torch.tensor(0.5), torch.tensor([0.5] * 9, dtype=torch.float64)):
        for name in NUMBERS[op]:
            arguments = vars(good_arguments())[op]
            for each in NUMBERS[op]:
                arguments[each] = torch.tensor(0.5, dtype=torch.float64)
            getattr(ops, op)(**arguments)
            arguments[name] = wrong
            with pytest.raises(RuntimeError, match=rf"{name} is .*Must be one number"):
                getattr(ops, op)(**arguments)
