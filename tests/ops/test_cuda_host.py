"""The CUDA kernels that move blocks, emulated on the host, under the tests of every other backend
and some of their own: what only they do, and sizes at which their tables and tiles end."""

import itertools

import pytest
import torch
from host_build import HostOps
from test_graft_moments import (  # noqa: F401 - the same
    test_graft_moments,
    test_graft_moments_gathers,
    test_graft_moments_keeps_a_nan_in_its_block,
    test_graft_moments_looks_ahead,
    test_graft_moments_may_gather_a_segment_from_itself,
    test_graft_moments_may_write_the_direction_over_the_gradient,
    test_graft_moments_takes_nothing_of_a_nan,
    test_graft_moments_without_a_memory_is_exact,
)
from test_op_numbers import (  # noqa: F401 - the same
    NUMBERS,
    test_a_scale_of_zero_is_no_step_whatever_the_direction_holds,
    test_every_block_may_draw_by_a_count_of_its_own,
    test_every_block_may_have_corrections_of_its_own,
    test_nothing_times_nan_is_nothing,
    test_numbers_may_lie_on_the_device,
)
from test_ops import (  # noqa: F401 - collected here too, with the fixture below
    test_gather_blocks,
    test_update_blocks,
    test_update_blocks_leaves_the_gaps_of_a_strided_parameter_alone,
)

from shampoo.certificates.cases.tiles import PARAM, packed, table
from shampoo.kernels.reference import ops as reference


@pytest.fixture
def impl():
    return HostOps()


@pytest.fixture(params=[name for name in NUMBERS if hasattr(HostOps, name)])
def op(request):
    return request.param


ORDERS = [(3000,), (40, 64), (64, 130), (20, 17, 12), (3, 5, 4, 8), (5,)]


def tensors(shapes, dtypes):
    return [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]


@pytest.mark.parametrize("limit", [6, 8, 13, 4096])
@pytest.mark.parametrize("dtype", PARAM, ids=str)
@pytest.mark.parametrize("flat", [torch.float32, torch.float64], ids=str)
def test_tensors_of_every_order_in_one_launch(impl, flat, dtype, limit):
    """Whole tiles are aligned here, so four elements are moved at a time, and more than a chunk."""
    dtypes = itertools.cycle([dtype, torch.float32, torch.bfloat16])
    params = tensors(ORDERS, dtypes)
    tiles, boxes, numel = table(ORDERS, limit)
    out = torch.full((numel,), torch.nan, dtype=flat)
    impl.gather_blocks_(out, params, tiles, 1.0, False)
    expected = torch.empty_like(out)
    reference.gather_blocks_(expected, params, tiles, 1.0, False)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)

    scale = torch.rand(len(boxes), dtype=flat)
    moved = []
    for function in (impl.update_blocks_, reference.update_blocks_):
        weights = [param.clone() for param in params]
        function(weights, None, out, scale, tiles, 0.1, 0.5, 0.0, False)
        moved.append(weights)
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=0)


def shifted(values, shift):
    """The same values ``shift`` elements behind the start of their memory."""
    memory = torch.empty(values.numel() + shift, dtype=values.dtype)
    return memory[shift:].view(values.shape).copy_(values)


@pytest.mark.parametrize("shifts", [(1, 0), (0, 1), (2, 2), (4, 4)], ids=str)
@pytest.mark.parametrize("dtype", PARAM, ids=str)
def test_memory_that_starts_anywhere(impl, dtype, shifts):
    """Four elements may be moved at once only where a GPU allows it; the emulation insists."""
    tiles, boxes, numel = table([(40, 64)], 16)
    param = shifted(torch.randn(40, 64).to(dtype), shifts[0])
    flat, moments = (shifted(torch.rand(numel), shifts[1]) for _ in range(2))
    expected = [tensor.clone() for tensor in (flat, moments, param)]
    scale, norm = torch.rand(len(boxes)), torch.empty(len(boxes))
    for ops, (out, square, weight) in ((impl, (flat, moments, param)), (reference, expected)):
        ops.gather_blocks_(out, [weight], tiles, 1.0, False)
        ops.graft_moments_(
            *(None, None, square, out, norm, [weight], tiles, 1.0, False),
            *(0.9, 1.0, 0.5, 0.5, 1.0, 1e-8, False),
        )
        ops.update_blocks_([weight], None, out, scale, tiles, 0.1, 0.5, 0.0, False)
    torch.testing.assert_close([flat, moments, param], expected)


@pytest.mark.parametrize("which", range(6))
def test_one_moment_that_starts_elsewhere(impl, which):
    start = [torch.randn(512), torch.randn(512), torch.rand(512), torch.full((512,), torch.nan)]
    start += [torch.full((512,), torch.nan), torch.randn(512)]
    scalars = (0.5, True, 0.9, 0.1, 0.99, 0.01, 0.01, 1e-8, False)
    results = []
    for ops in (impl, reference):
        given = [shifted(tensor, int(i == which)) for i, tensor in enumerate(start)]
        *flat, ahead, source = given
        norm = torch.full((2,), torch.nan)
        ops.graft_moments_(*flat, norm, [source], packed([(2, 256)]), *scalars, ahead)
        results.append((*flat, norm, ahead))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("which", range(2))
def test_momentum_or_direction_that_starts_elsewhere(impl, which):
    tiles, boxes, numel = table([(40, 64)], 16)
    start, param = torch.randn(2, numel), torch.randn(40, 64)
    scale, results = torch.rand(len(boxes)), []
    for ops in (impl, reference):
        momentum, direction = (shifted(start[i], int(i == which)) for i in range(2))
        weight = param.clone()
        ops.update_blocks_([weight], momentum, direction, scale, tiles, 0.1, 0.5, 0.9, True)
        results.append((weight, momentum))
    torch.testing.assert_close(*results)


def test_nothing_to_do_starts_nothing(impl):
    """A GPU refuses a launch of no blocks, and so does the emulation."""
    nothing, none = torch.empty(0), torch.empty(0, 10, dtype=torch.int64)
    scalars = (1.0, False, 0.9, 1.0, 0.99, 0.01, 1.0, 1e-8, True)
    impl.graft_moments_(None, None, nothing, None, nothing.clone(), [], none, *scalars)
    impl.gather_blocks_(nothing, [], none, 1.0, False)
    impl.update_blocks_([], None, nothing, nothing, none, 0.1, 0.0, 0.0, False)


@pytest.mark.parametrize("count", [96, 97, 200])
def test_more_tiles_than_one_launch_takes(impl, count):
    shapes = [(1 + i % 7, 4) for i in range(count)]
    params = tensors(shapes, itertools.repeat(torch.float32))
    tiles, boxes, numel = table(shapes, 4096)
    out, expected = torch.full((2, numel), torch.nan).unbind()
    impl.gather_blocks_(out, params, tiles, 1.0, False)
    reference.gather_blocks_(expected, params, tiles, 1.0, False)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    scale = torch.arange(len(boxes)).float()
    weights = [param.clone() for param in params]
    impl.update_blocks_(weights, None, out, scale, tiles, 1.0, 0.0, 0.0, False)
    for index, (weight, param) in enumerate(zip(weights, params, strict=True)):
        torch.testing.assert_close(weight, param - index * param)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("count", [96, 97, 200])
def test_more_tiles_than_one_launch_takes_with_moments(impl, count, normalized):
    runs = [(1 + i % 3, 1 + i % 5 + 600 * (i % 50 == 0)) for i in range(count)]
    tiles = packed(runs)
    numel, blocks = sum(a * b for a, b in runs), sum(a for a, _ in runs)
    source = torch.randn(numel)
    results = []
    for ops in (impl, reference):
        norm = torch.full((blocks,), torch.nan)
        (grad, direction), square = torch.full((2, numel), torch.nan), torch.ones(numel)
        scalars = (1.0, False, 0.9, 1.0, 0.99, 0.01, 1.0, 1e-8, normalized)
        ops.graft_moments_(grad, None, square, direction, norm, [source], tiles, *scalars)
        results.append((grad, square, direction, norm))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("size", [3, 511, 512, 513, 1024, 20000])
@pytest.mark.parametrize("flat", [torch.float32, torch.float64], ids=str)
def test_norms_do_not_depend_on_place_alignment_or_neighbours(impl, flat, size):
    """The order of the sum follows the size of a block alone."""
    grad = torch.randn(size, dtype=flat)
    scalars = (1.0, False, 0.9, 1.0, 0.99, 0.01, 1.0, 1e-8, False)
    norms = []
    for before, shift in itertools.product((0, 1, 3, 10), (0, 1, 2)):
        source = torch.cat([torch.randn(before, dtype=flat), grad, torch.randn(size, dtype=flat)])
        tiles = packed([(before, 1), (2, size)] if before else [(2, size)])
        norm = torch.full((before + 2,), torch.nan, dtype=flat)
        impl.graft_moments_(*[None] * 4, norm, [shifted(source, shift)], tiles, *scalars)
        norms.append(norm[before].item())
    assert len(set(norms)) == 1
    assert norms[0] == pytest.approx(grad.double().norm().item(), rel=torch.finfo(flat).eps)


def test_an_expanded_gradient_is_read_as_it_is(impl):
    tiles, _, numel = table([(12, 8)], 4)
    for source in (torch.tensor(3.0).expand(12, 8), torch.arange(8.0).expand(12, 8)):
        out, expected = torch.full((2, numel), torch.nan).unbind()
        impl.gather_blocks_(out, [source], tiles, 1.0, False)
        reference.gather_blocks_(expected, [source], tiles, 1.0, False)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dims", [(3, 8), (8, 3), (2, 12), (24,), (2, 3, 4)], ids=str)
def test_a_merged_shape_may_cut_across_the_dimensions_of_a_tensor(impl, dims):
    source = torch.arange(24.0).view(6, 4).T  # [4, 6], neither dimension joins the other
    tiles, _, numel = table([dims], 2)
    out, expected = torch.full((2, numel), torch.nan).unbind()
    impl.gather_blocks_(out, [source], tiles, 1.0, False)
    reference.gather_blocks_(expected, [source], tiles, 1.0, False)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_a_tensor_of_too_many_separate_dimensions_is_refused(impl):
    source = torch.randn([3] * 14)[(slice(0, 3, 2), slice(None)) * 7]
    tiles, _, numel = table([(source.numel(),)], 4096)
    with pytest.raises(ValueError, match=r"dimensions that do not join.*make it contiguous"):
        impl.gather_blocks_(torch.empty(numel), [source], tiles, 1.0, False)


@pytest.mark.parametrize("dtype", PARAM, ids=str)
def test_four_elements_are_moved_at_once_where_they_may_be(impl, dtype):
    """One at a time would be right too, and slow."""
    param = torch.randn(64, 96).to(dtype)
    tiles, boxes, numel = table([(64, 96)], 16)
    out, momentum = torch.empty(numel), torch.zeros(numel)
    counts = [impl.module.wide_accesses()]
    impl.gather_blocks_(out, [param], tiles, 1.0, False)
    counts.append(impl.module.wide_accesses())
    impl.update_blocks_([param], momentum, out, torch.ones(len(boxes)), tiles, 1.0, 0.0, 0.9, True)
    counts.append(impl.module.wide_accesses())
    reads_and_writes = [
        (after - before) * 4 / numel for before, after in itertools.pairwise(counts)
    ]
    assert reads_and_writes == [2, 5]


@pytest.mark.parametrize("normalized", [False, True])
def test_a_tile_that_cannot_be_described_leaves_everything_as_it_was(impl, normalized):
    """The last of more than one launch: those before it must not have started."""
    good = [torch.randn(4) for _ in range(96)]
    bad = torch.randn([3] * 14)[(slice(0, 3, 2), slice(None)) * 7]
    tiles, boxes, numel = table([(4,)] * 96 + [(bad.numel(),)], 1 << 20)
    weights = [weight.clone() for weight in good]
    flat, scale = torch.randn(3, numel), torch.ones(len(boxes))
    average, square, direction = (tensor.clone() for tensor in flat)
    scalars = (1.0, False, 0.9, 0.1, 0.99, 0.01, 0.01, 1e-8, normalized)
    with pytest.raises(ValueError, match="make it contiguous"):
        impl.graft_moments_(
            None, average, square, direction, scale.clone(), [*good, bad], tiles, *scalars
        )
    with pytest.raises(ValueError, match="make it contiguous"):
        impl.update_blocks_([*weights, bad], average, direction, scale, tiles, 0.1, 0.0, 0.9, False)
    assert torch.equal(torch.stack([average, square, direction]), flat)
    assert all(torch.equal(*pair) for pair in zip(weights, good, strict=True))
