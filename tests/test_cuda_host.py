"""The CUDA kernels that move blocks, emulated on the host, under the tests of every other backend
and some of their own: what only they do, and sizes at which their tables and tiles end."""

import itertools

import pytest
import torch
from host_build import HostOps
from test_op_numbers import (  # noqa: F401 - the same
    NUMBERS,
    test_nothing_times_nan_is_nothing,
    test_numbers_may_lie_on_the_device,
)
from test_ops import (  # noqa: F401 - collected here too, with the fixture below
    LAYOUTS,
    PARAM,
    table,
    test_gather_blocks,
    test_graft_moments,
    test_graft_moments_keeps_a_nan_in_its_block,
    test_graft_moments_may_write_the_direction_over_the_gradient,
    test_graft_moments_without_a_memory_is_exact,
    test_update_blocks,
    test_update_blocks_leaves_the_gaps_of_a_strided_parameter_alone,
)

from shampoo.kernels import reference


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
    runs = torch.tensor([[numel // 256, 256]])
    for ops, (out, square, weight) in ((impl, (flat, moments, param)), (reference, expected)):
        ops.gather_blocks_(out, [weight], tiles, 1.0, False)
        ops.graft_moments_(
            *(None, square, out, norm[: numel // 256], out, runs),
            *(0.9, 1.0, 0.5, 0.5, 1.0, 1e-8, False),
        )
        ops.update_blocks_([weight], None, out, scale, tiles, 0.1, 0.5, 0.0, False)
    torch.testing.assert_close([flat, moments, param], expected)


@pytest.mark.parametrize("which", range(4))
def test_one_moment_that_starts_elsewhere(impl, which):
    start = [torch.randn(512), torch.rand(512), torch.full((512,), torch.nan), torch.randn(512)]
    runs, scalars = torch.tensor([[2, 256]]), (0.9, 0.1, 0.99, 0.01, 0.01, 1e-8, False)
    results = []
    for ops in (impl, reference):
        average, square, direction, grad = (
            shifted(tensor, int(i == which)) for i, tensor in enumerate(start)
        )
        norm = torch.full((2,), torch.nan)
        ops.graft_moments_(average, square, direction, norm, grad, runs, *scalars)
        results.append((average, square, direction, norm))
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


@pytest.mark.parametrize("runs", [[], [[0, 5]], [[0, 5]] * 257], ids=len)
def test_nothing_to_do_starts_nothing(impl, runs):
    """A GPU refuses a launch of no blocks, and so does the emulation."""
    nothing, none = torch.empty(0), torch.empty(0, 10, dtype=torch.int64)
    table = torch.tensor(runs, dtype=torch.int64).reshape(-1, 2)
    scalars = (0.9, 1.0, 0.99, 0.01, 1.0, 1e-8, True)
    impl.graft_moments_(None, nothing, None, nothing.clone(), nothing, table, *scalars)
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


@pytest.mark.parametrize("count", [256, 257, 300])
def test_more_runs_than_one_launch_takes(impl, count):
    runs = torch.tensor([[1 + i % 3, 1 + i % 5] for i in range(count)])
    numel, blocks = int(runs.prod(1).sum()), int(runs[:, 0].sum())
    grad = torch.randn(numel)
    norm, expected = torch.full((2, blocks), torch.nan).unbind()
    direction = torch.full((numel,), torch.nan)
    scalars = (0.9, 1.0, 0.99, 0.01, 1.0, 1e-8, True)
    impl.graft_moments_(None, torch.ones(numel), direction, norm, grad, runs, *scalars)
    want = torch.empty(numel)
    reference.graft_moments_(None, torch.ones(numel), want, expected, grad, runs, *scalars)
    torch.testing.assert_close((direction, norm), (want, expected))


@pytest.mark.parametrize("size", [512, 513, 1024, 20000])
def test_norms_do_not_depend_on_what_lies_beside_a_block(impl, size):
    """Not on its neighbours, nor on its alignment: the order of the sum follows its size alone."""
    grad = torch.randn(size)
    norms = []
    for before in (0, 4 * 300, 8 * 999):
        flat = torch.cat([torch.randn(before), grad, torch.randn(size)])
        runs = torch.tensor([[before // 4, 4], [2, size]])
        norm = torch.full((before // 4 + 2,), torch.nan, dtype=torch.float64)
        scalars = (0.9, 1.0, 0.99, 0.01, 1.0, 1e-8, False)
        impl.graft_moments_(None, None, None, norm, flat, runs, *scalars)
        norms.append(norm[before // 4].item())
    assert norms[0] == norms[1] == norms[2]
    assert norms[0] == pytest.approx(grad.double().norm().item(), rel=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", PARAM, ids=str)
def test_gather_flags_the_blocks_that_are_not_finite(impl, dtype, bad):
    shapes = [(40, 64), (33, 7)]
    params = tensors(shapes, [dtype, dtype])
    tiles, boxes, numel = table(shapes, 16)
    out = torch.empty(numel)
    flags = torch.zeros(len(boxes) + 1, dtype=torch.uint8)
    impl.gather_blocks_(out, params, tiles, 1.0, False, flags)
    assert not flags.any()
    params[0][17, 35], params[1][32, 6] = bad, bad
    impl.gather_blocks_(out, params, tiles, 1.0, False, flags)
    bad_blocks = [
        block
        for block, (source, box, _) in enumerate(boxes)
        if not params[source][box].isfinite().all()
    ]
    assert flags.nonzero()[:, 0].tolist() == bad_blocks
    assert len(bad_blocks) == 2


def test_gather_flags_what_overflows_in_the_cast(impl):
    tiles, _, numel = table([(4, 4)], 4)
    flags = torch.zeros(1, dtype=torch.uint8)
    source = torch.full((4, 4), 1e300, dtype=torch.float64)
    impl.gather_blocks_(torch.empty(numel), [source], tiles, 1.0, False, flags)
    assert flags.tolist() == [1]


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
