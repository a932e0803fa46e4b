"""The magnitudes of csrc/cuda/magnitudes.cu, emulated on the host.

Every element of any layout counts, nothing beside the tensors does, and every number goes where it
belongs.
"""

import math

import pytest
import torch
from host_build import HostOps
from pairwise import pairwise
from test_stack_ops import (  # noqa: F401 - collected here too, with the fixture below
    test_magnitudes_miss_no_bad_element,
    test_magnitudes_nan_outranks_inf,
    test_magnitudes_of_any_layout,
)

from shampoo.certificates.cases.tiles import PARAM
from shampoo.kernels.reference import ops as reference

CHUNK = 8192  # elements that one thread block reads
LONGEST = 1 << 24  # of what a launch takes as one piece
PIECES = 280  # that one launch takes
BESIDE = 1000.0  # what lies around the tensors, larger than all that is in them


@pytest.fixture
def impl():
    return HostOps()


@pytest.fixture(params=["forward", "backward"])
def either(request):
    """Both orders of the warps and of the thread blocks."""
    return HostOps(backward=request.param == "backward")


def magnitudes(ops, tensors):
    """What an op finds, in memory that starts as NaN, with some behind that must stay as it is."""
    memory = torch.full((len(tensors) + 2,), torch.nan, dtype=torch.float64)
    ops.magnitudes_(memory[1:-1], tensors)
    assert memory[[0, -1]].isnan().all()
    return memory[1:-1]


def peaks(at, numel, shift, dtype):
    """A tensor for each place: small, but for the element there, which may be negative.

    They begin ``shift`` elements behind where the memory is aligned, with ``BESIDE`` around them.
    """
    room = -(-(shift + numel + 16) // 16) * 16
    memory = torch.full((len(at), room), BESIDE).to(dtype)
    inside = memory[:, shift : shift + numel].fill_(-0.25)
    for row, place in enumerate(at):
        inside[row, place] = (-1) ** row * (1.0 + row / 512)
    return list(inside)


@pytest.mark.parametrize(
    ("numel", "dtype", "shift"), pairwise([1, 3, 63, 65, 127, 257], PARAM, [0, 1, 4, 7]), ids=str
)
def test_every_element_counts_wherever_the_memory_starts(impl, numel, dtype, shift):
    tensors = peaks(range(numel), numel, shift, dtype)
    expected = [abs(tensor[place].item()) for place, tensor in enumerate(tensors)]
    assert magnitudes(impl, tensors).tolist() == expected


@pytest.mark.parametrize(
    ("numel", "dtype", "shift"),
    pairwise([CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 9], PARAM, [0, 3]),
    ids=str,
)
def test_every_element_counts_where_thread_blocks_meet(either, numel, dtype, shift):
    borders = [0, CHUNK, 2 * CHUNK, numel]
    at = sorted({b + i for b in borders for i in range(-9, 9) if 0 <= b + i < numel})
    tensors = peaks(at, numel, shift, dtype)
    expected = [abs(tensor[place].item()) for place, tensor in zip(at, tensors, strict=True)]
    assert magnitudes(either, tensors).tolist() == expected


def views():
    """Views of memory that holds ``BESIDE`` where they do not reach."""

    def within(sizes, view):
        memory = torch.full(sizes, BESIDE)
        return view(memory).copy_(torch.rand(view(memory).shape).mul_(-1))

    return {
        "number": within((3,), lambda m: m[1]),
        "column": within((700, 5), lambda m: m[:, 2]),
        "steps": within((9000, 2), lambda m: m[:, 1]),  # more than a thread block reads
        "rows": within((40, 80), lambda m: m[3:17, :31]),
        "steps in rows": within((40, 80), lambda m: m[1::3, ::2].mT),
        "box": within((9, 8, 7), lambda m: m[1:8, 2:5, 3:6]),
        "permuted box": within((9, 8, 7), lambda m: m[1:8, 2:5, 3:6].permute(2, 0, 1)),
        "four axes": within((5, 6, 7, 8), lambda m: m[1:, 2:, 3:, 4:]),
        "five axes": within((4, 5, 4, 5, 4), lambda m: m[1:, 1:4, 1:, 1:4, 1:]),
        "seven axes": within([4] * 7, lambda m: m[(slice(1, 3),) * 7]),
        "expanded number": torch.tensor(-3.0).expand(12, 8),
        "expanded row": torch.arange(8.0).expand(12, 8),
        "expanded box": within((5, 6), lambda m: m[1:, 2:4])[:, None].expand(4, 9, 2),
        "overlapping": torch.arange(30.0).as_strided((20, 11), (1, 1)),
    }


VIEWS = views()


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", PARAM, ids=str)
def test_views_are_read_as_they_are(impl, dtype, name):
    view = VIEWS[name]
    memory = torch.as_strided(view, (view.untyped_storage().size() // 4,), (1,), 0).to(dtype)
    tensor = memory.as_strided(view.shape, view.stride(), view.storage_offset())
    [found] = magnitudes(impl, [tensor])
    assert found.item() == tensor.abs().max().item()


@pytest.mark.parametrize("shape", [(7, 9), (3, 5, 6), (2, 3, 4, 5), (2, 3, 2, 3, 4)], ids=str)
def test_every_element_of_a_strided_tensor_counts(impl, shape):
    numel = math.prod(shape)
    tensors = torch.full((numel, *(2 * size for size in shape)), BESIDE)
    tensors = tensors[(slice(None), *(slice(1, None, 2) for _ in shape))].fill_(-0.5)
    for place, tensor in enumerate(tensors):
        tensor[tuple(int(i) for i in torch.unravel_index(torch.tensor(place), shape))] = 1.0 + place
    found = magnitudes(impl, list(tensors))
    assert found.tolist() == [1.0 + place for place in range(numel)]


@pytest.mark.parametrize("place", [LONGEST // 2, LONGEST // 2 + 1, LONGEST + 2])
def test_a_tensor_that_is_cut_into_pieces(impl, place):
    tensor = torch.zeros(LONGEST + 3, dtype=torch.float16)
    tensor[place] = -2.0
    assert magnitudes(impl, [torch.ones(1), tensor, torch.ones(1)]).tolist() == [1, 2, 1]


@pytest.mark.parametrize("place", [0, 8191])
def test_a_strided_tensor_that_is_cut_into_pieces(impl, place):
    """Its rows overlap, so that its memory is short."""
    memory = torch.zeros(4097 + 4096 - 1)
    memory[place] = -2.0
    tensor = memory.as_strided((4097, 4096), (1, 1))
    assert tensor.numel() > LONGEST
    assert magnitudes(impl, [tensor]).tolist() == [2.0]


@pytest.mark.parametrize("count", [PIECES - 1, PIECES, PIECES + 1, 2 * PIECES + 7])
def test_more_tensors_than_one_launch_takes(impl, count):
    tensors = [torch.full((1 + index % 5,), -1.0 - index) for index in range(count)]
    tensors[count // 2] = torch.full((2 * CHUNK + 1,), 0.5)
    found = magnitudes(impl, tensors)
    expected = torch.empty_like(found)
    reference.magnitudes_(expected, tensors)
    assert torch.equal(found, expected)


def test_no_tensors_start_nothing(impl):
    """A GPU refuses a launch of no blocks, and so does the emulation."""
    impl.magnitudes_(torch.empty(0, dtype=torch.float64), [])


@pytest.mark.parametrize("dtype", PARAM, ids=str)
def test_numbers_of_every_kind(impl, dtype):
    limits = torch.finfo(dtype)
    values = [0.0, -0.0, limits.smallest_normal, limits.max, limits.min, 1.0, math.inf, -math.inf]
    values += [limits.smallest_normal * limits.eps, -limits.smallest_normal * limits.eps]
    tensors = [torch.tensor([0.0] * 40 + [value]).to(dtype) for value in values[:2]]
    tensors += [torch.tensor([-0.0] * 40 + [value], dtype=dtype) for value in values[2:]]
    found = magnitudes(impl, tensors)
    expected = torch.tensor([abs(tensor[-1].item()) for tensor in tensors], dtype=torch.float64)
    assert expected[-1] > 0  # a subnormal is not lost on the way
    assert torch.equal(found.view(torch.int64), expected.view(torch.int64))  # no zero has a sign


@pytest.mark.parametrize(
    ("dtype", "bad", "numel"),
    pairwise(PARAM, [math.nan, -math.nan, math.inf, -math.inf], [1, 257, 2 * CHUNK + 5]),
    ids=str,
)
def test_what_is_not_finite_is_seen_wherever_it_lies(either, dtype, bad, numel):
    at = sorted({0, numel // 2, numel - 1})
    tensors = peaks(at, numel, 1, dtype)
    for place, tensor in zip(at, tensors, strict=True):
        tensor[place] = bad
    tensors += [peaks([0], numel, 1, dtype)[0], tensors[0].clone()]
    tensors[-1][numel // 3] = math.nan  # beside an Inf
    *found, clean, both = magnitudes(either, tensors).tolist()
    assert all(math.isnan(one) if math.isnan(bad) else one == math.inf for one in found)
    assert clean == 1.0
    assert math.isnan(both)


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.mark.parametrize("dtype", PARAM, ids=str)
def test_any_bits_of_a_nan_are_a_nan(impl, dtype):
    """The lowest payload, signaling and quiet, with and without a sign."""
    integers = INTEGERS[dtype.itemsize]
    inf = torch.tensor(math.inf, dtype=dtype).view(integers).item()
    lowest, sign = inf + 1, torch.iinfo(integers).min
    for bits in (lowest, lowest + sign, torch.iinfo(integers).max, -1):
        tensor = torch.full((CHUNK + 70,), math.inf, dtype=dtype)
        tensor.view(integers)[CHUNK + 66] = bits
        assert magnitudes(impl, [tensor]).isnan().all()


def test_bits_do_not_depend_on_the_order_of_warps_and_blocks():
    torch.manual_seed(0)
    tensors = [torch.randn(40_000).to(dtype) for dtype in PARAM]
    for tensor in list(tensors):  # two that are not the same
        both = tensor.clone()
        bits = both.view(INTEGERS[both.dtype.itemsize])
        bits[3], bits[39_000] = -1, torch.iinfo(bits.dtype).max - 1
        tensors.append(both)
    forward, backward = (magnitudes(HostOps(backward=order), tensors) for order in (False, True))
    assert torch.equal(forward.view(torch.int64), backward.view(torch.int64))
    assert forward[: len(PARAM)].tolist() == [t.abs().max().item() for t in tensors[: len(PARAM)]]
    assert forward[len(PARAM) :].isnan().all()
