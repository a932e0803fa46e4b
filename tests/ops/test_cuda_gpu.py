"""The CUDA kernels on a GPU, under the tests of every other backend; streams and graphs."""

import pytest
import torch
from root_cases import Exact, fixture, spd, stack
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
from test_stack_ops import (  # noqa: F401 - the same
    test_magnitudes_miss_no_bad_element,
    test_magnitudes_nan_outranks_inf,
    test_magnitudes_of_any_layout,
)

from shampoo import ops
from shampoo.roots.minimax_table import minimax_schedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


class DeviceOps:
    """The ops on copies of their tensors on a device, with the same strides; results come back."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __getattr__(self, name):
        def call(*arguments):
            copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

            def place(argument):
                if isinstance(argument, list):
                    return [place(each) for each in argument]
                if not isinstance(argument, torch.Tensor) or argument.dtype == torch.int64:
                    return argument  # tables stay on the host
                key = argument.data_ptr()  # one tensor may be two arguments
                if key not in copies:
                    shape, stride = argument.shape, argument.stride()
                    copy = torch.empty_strided(
                        shape, stride, dtype=argument.dtype, device=self.device
                    )
                    copies[key] = argument, copy.copy_(argument)
                return copies[key][1]

            getattr(ops, name)(*map(place, arguments))
            for original, copy in copies.values():
                original.copy_(copy)

        return call


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setenv("SHAMPOO_BACKEND", "cuda")
    ops.load_kernels(required=True)


@pytest.fixture
def impl():
    return DeviceOps("cuda")


def small_root(A, p, relative_eps):
    A = A.cuda()
    X, ridge = torch.full_like(A, torch.nan), torch.empty(len(A), dtype=torch.float64).cuda()
    schedule = [c for step in minimax_schedule(p, relative_eps) for c in step]
    ops.minimax_small_root_(X, ridge, A, p, 0.0, relative_eps, schedule)
    return X.cpu(), ridge.cpu()


@pytest.mark.parametrize("relative_eps", [1e-4, 1e-6])
@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("name", ["f0", "f1", "f2", "f3"])
def test_small_roots_of_real_factors_meet_the_standard_level(name, p, relative_eps):
    limit = {1e-4: 2e-3, 1e-6: 2e-2}[relative_eps]
    for factor in fixture(name)[:2]:
        for n in (32, 64, 96, 128):
            if n > len(factor):
                continue
            A = factor[:n, :n].contiguous()
            X, _ = small_root(A[None], p, relative_eps)
            exact = Exact(A)
            assert torch.equal(X, X.mT)
            assert exact.error(X[0], p, relative_eps * exact.norm) <= limit


@pytest.mark.parametrize("n", [1, 17, 32, 33, 64, 65, 96, 97, 127, 128])
def test_small_roots_do_not_depend_on_their_neighbours(n):
    A = stack(1, n, 5.0).expand(300, n, n).clone()  # more blocks than multiprocessors
    A[::2] = spd(torch.logspace(0, -4, n), seed=7)
    X, _ = small_root(A, 4, 1e-6)
    sharded, ridge = torch.full_like(A, torch.nan).cuda(), torch.empty(300).double().cuda()
    schedule = [c for step in minimax_schedule(4, 1e-6) for c in step]
    ops.minimax_root_(sharded, ridge, A.cuda(), 4, 0.0, 1e-6, schedule)
    assert torch.equal(sharded.cpu(), X)  # one kernel behind both names
    again, _ = small_root(A, 4, 1e-6)
    assert torch.equal(X, again)
    for i in (0, 1):
        assert (X[i::2] == X[i]).all()
        alone, _ = small_root(A[i : i + 1], 4, 1e-6)
        assert torch.equal(alone[0], X[i])
    exact = Exact(A[1])
    assert exact.error(X[1], 4, 1e-6 * exact.norm) <= 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_magnitudes_of_many_tensors(dtype):
    """More than one launch takes, some longer than one piece, wherever their memory starts."""
    lengths = [10 + 37 * i % 5000 for i in range(600)] + [(1 << 24) + 5, 20_000_003]
    memory = torch.randn(sum(lengths), device="cuda").to(dtype)
    tensors = [part[index % 9 :] for index, part in enumerate(memory.split(lengths))]
    found = torch.full((len(tensors),), torch.nan, dtype=torch.float64, device="cuda")
    ops.magnitudes_(found, tensors)
    assert found.tolist() == [tensor.abs().max().item() for tensor in tensors]


def test_magnitudes_of_more_elements_than_32_bits_count():
    """Rows that overlap, so that the memory is short: the ends are read once."""
    memory = torch.zeros((1 << 16) + (1 << 16), device="cuda")
    memory[-1] = -2.0
    tensor = memory.as_strided(((1 << 16) + 1, 1 << 16), (1, 1))
    found = torch.full((1,), torch.nan, dtype=torch.float64, device="cuda")
    ops.magnitudes_(found, [tensor])
    assert found.tolist() == [2.0]


def test_magnitudes_on_two_devices():
    tensors = [torch.full((3,), -2.0, device="cuda"), torch.ones(5)]
    for tensors_in_order in (tensors, tensors[::-1]):
        for device in ("cpu", "cuda"):
            out = torch.empty(2, dtype=torch.float64, device=device)
            ops.magnitudes_(out, tensors_in_order)
            assert out.tolist() == [tensor.abs().max().item() for tensor in tensors_in_order]


def test_kernels_replay_from_a_graph():
    grad = torch.randn(96, 96, device="cuda")
    weight = torch.zeros_like(grad)
    tiles = torch.tensor([[0, 0, 96, 96, 0, 0, 3, 3, 32, 32]])
    flat, square, norm = (torch.zeros(n, device="cuda") for n in (9216, 9216, 9))
    factor = stack(3, 100, 5.0).cuda()
    root, ridge = torch.zeros_like(factor), torch.zeros(3, dtype=torch.float64, device="cuda")
    largest = torch.zeros(2, dtype=torch.float64, device="cuda")
    schedule = [c for step in minimax_schedule(4, 1e-6) for c in step]

    def step() -> None:
        ops.magnitudes_(largest, [grad, factor])
        ops.gather_blocks_(flat, [grad], tiles, 1.0, False)
        scalars = (0.5, True, 0.9, 1.0, 0.5, 0.5, 1.0, 1e-8, True)
        ops.graft_moments_(flat, None, square, None, norm, [grad], tiles, *scalars)
        ops.update_blocks_([weight], None, flat, norm, tiles, 0.1, 0.0, 0.0, False)
        ops.minimax_small_root_(root, ridge, factor, 4, 0.0, 1e-6, schedule)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for tensor in (weight, square, root):
        tensor.zero_()
    grad.normal_().mul_(0.1)  # the largest magnitudes start anew in every replay
    graph.replay()
    assert largest.tolist() == [tensor.abs().max().item() for tensor in (grad, factor)]
    replayed = [tensor.clone() for tensor in (weight, square, norm, root)]
    for tensor in (weight, square, root):
        tensor.zero_()
    step()
    for tensor, expected in zip((weight, square, norm, root), replayed, strict=True):
        assert torch.equal(tensor, expected)
