"""The Triton kernels on a GPU, through the op table: what the interpreter cannot tell.

Tensor cores round and truncate in their own way, bf16 is a type of its own, and programs race.
"""

import pytest
import torch
from root_cases import EPS, PAIRS, Exact, direction_error, exact, fixture, stack

from shampoo import ops
from shampoo.kernels.reference import ops as reference
from shampoo.roots.minimax_table import minimax_schedule
from shampoo.roots.root_check import passes_root_check
from shampoo.roots.size_classes import padded

pytestmark = pytest.mark.gpu

# p from: (direction, root) limits at each of EPS; roots.md, section 12, "standard"
LIMITS = {
    4: ((1e-3, 3e-3, 1.5e-2), (2e-3, 2e-2, 1e-1)),
    2: ((2e-3, 6e-3, 3e-2), (2e-3, 2e-2, 1e-1)),
}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no GPU: the Triton kernels are tested in the interpreter only")
    monkeypatch.setenv("SHAMPOO_BACKEND", "triton")
    ops.load_kernels(required=True)


def solve(A, p, relative_eps):
    root, ridge = torch.full_like(A, torch.nan), torch.empty(len(A), device="cuda").double()
    schedule = [c for step in minimax_schedule(p, relative_eps) for c in step]
    ops.minimax_root_(root, ridge, A, p, 0.0, relative_eps, schedule)
    return root, ridge


@pytest.mark.parametrize("relative_eps", EPS)
@pytest.mark.parametrize("p", [4, 2])
@pytest.mark.parametrize("name", PAIRS)
def test_the_standard_level_on_the_fixtures(name, p, relative_eps):
    worst_direction, worst_root = (row[EPS.index(relative_eps)] for row in LIMITS[p])
    roots = []
    for side in (0, 1):
        A, truth = fixture(name)[side].cuda()[None], exact(name, side)
        root, ridge = solve(A, p, relative_eps)
        assert torch.equal(root, root.mT)
        assert passes_root_check(root, A, ridge, p).all()
        assert truth.error(root[0].cpu(), p, relative_eps * truth.norm) <= worst_root
        roots.append(root[0].cpu())
    assert direction_error(*roots, name, p, relative_eps) <= worst_direction


@pytest.mark.parametrize("n", [1, 63, 65, 257, 600])
def test_roots_are_the_same_from_run_to_run_and_in_any_batch(n):
    A = stack(5, n).cuda()
    root, ridge = solve(A, 4, 1e-6)
    for _ in range(3):
        again, _ = solve(A, 4, 1e-6)
        assert torch.equal(root, again)
    A[0] = torch.nan
    alone, own = solve(A[3:4], 4, 1e-6)
    assert torch.equal(alone[0], root[3])
    assert torch.equal(own[0], ridge[3])
    assert torch.equal(solve(A, 4, 1e-6)[0][1:], root[1:])


def test_roots_of_a_size_class_depend_on_nothing_but_themselves():
    factors = [stack(2, n).cuda() for n in (300, 129, 64)]
    schedule = [c for step in minimax_schedule(4, 1e-6) for c in step]

    def together(stacks, side):
        A, sizes = padded([(each,) for each in stacks], side)
        root, ridge = torch.zeros_like(A), torch.empty(len(A), device="cuda").double()
        ops.minimax_class_root_(root, ridge, A, sizes, 4, 0.0, 1e-6, schedule)
        assert passes_root_check(root, A, ridge, 4, sizes).all()
        return root

    root = together(factors, 300)
    assert torch.equal(together(factors[1:], 200)[:, :129, :129], root[2:, :129, :129])
    for row, n in enumerate((300, 300, 129, 129, 64, 64)):
        matrix = factors[row // 2][row % 2].cpu()
        truth = Exact(matrix)
        assert truth.error(root[row, :n, :n].cpu(), 4, 1e-6 * truth.norm) <= LIMITS[4][1][1]
        assert not root[row, n:].any()


def test_a_graph_holds_a_refresh():
    A = stack(3, 100).cuda()
    root, ridge = torch.empty_like(A), torch.empty(3, device="cuda").double()
    schedule = [c for step in minimax_schedule(4, 1e-6) for c in step]
    ops.minimax_root_(root, ridge, A, 4, 0.0, 1e-6, schedule)
    expected = root.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.minimax_root_(root, ridge, A, 4, 0.0, 1e-6, schedule)
    root.zero_()
    graph.replay()
    assert torch.equal(root, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 257), (2, 600, 130), (2, 33, 1024), (2, 8, 300, 7)], ids=str)
def test_gram_and_precondition(shape, dtype):
    grad = torch.randn(shape, device="cuda").to(dtype)
    roots = []
    for mode, size in enumerate(shape[1:]):
        factor = stack(1, size, 3.0).cuda().repeat(shape[0], 1, 1)
        roots.append(factor.clone())
        truth, expected = factor.double(), factor.clone()
        reference.gram_ema_([truth], [grad.double()], [mode], 0.9, 0.1)
        reference.gram_ema_([expected], [grad.float()], [mode], 0.9, 0.1)
        ops.gram_ema_([factor], [grad], [mode], 0.9, 0.1)
        assert torch.equal(factor, factor.mT)
        error, torchs = ((x.double() - truth).abs().max() for x in (factor, expected))
        assert error <= 2 * torchs + 2**-20 * truth.abs().max()
    out, norm = torch.full(shape, torch.nan, device="cuda"), torch.empty(shape[0], device="cuda")
    truth, length = out.double(), norm.double()
    reference.precondition_([truth], [length], [grad.double()], [root.double() for root in roots])
    ops.precondition_([out], [norm], [grad], roots)
    assert (out.double() - truth).norm() <= 2**-18 * truth.norm()
    assert ((norm.double() - length).abs() <= 2**-18 * length).all()
    again, same = torch.empty_like(out), torch.empty_like(norm)
    ops.precondition_([again], [same], [grad], roots)
    assert torch.equal(out, again)
    assert torch.equal(norm, same)


def test_stacks_together_have_the_bits_of_each_alone():
    shapes = [(3, 33), (2, 257, 64), (64, 64, 128), (2, 600, 130), (2, 8, 300, 7), (1, 1024, 768)]
    grads = [torch.randn(shape, device="cuda") for shape in shapes]
    stacks = [(grad, k) for grad in grads for k in range(grad.dim() - 1)]
    start = [stack(1, g.shape[k + 1], 3.0).cuda().repeat(len(g), 1, 1) for g, k in stacks]
    together, alone = ([factor.clone() for factor in start] for _ in range(2))
    ops.gram_ema_(together, [grad for grad, _ in stacks], [k for _, k in stacks], 0.9, 0.1)
    for factor, (grad, k) in zip(alone, stacks, strict=True):
        ops.gram_ema_([factor], [grad], [k], 0.9, 0.1)
    results = []
    for is_alone in (False, True):
        outs = [torch.full_like(grad, torch.nan) for grad in grads]
        norms = [torch.full_like(grad.flatten(1)[:, 0], torch.nan) for grad in grads]
        roots = iter(start)
        own = [[next(roots) for _ in grad.shape[1:]] for grad in grads]
        if is_alone:
            for out, norm, grad, mine in zip(outs, norms, grads, own, strict=True):
                ops.precondition_([out], [norm], [grad], mine)
        else:
            ops.precondition_(outs, norms, grads, start)
        results.append([*outs, *norms])
    assert all(map(torch.equal, [*together, *results[0]], [*alone, *results[1]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 33), (2, 257, 64), (2, 600, 130), (2, 8, 300, 7)], ids=str)
def test_a_graph_accumulates_by_numbers_that_moved(shape, dtype):
    """To the bit what the same numbers from the host give."""
    grad = torch.randn(shape, device="cuda").to(dtype)
    numbers = torch.tensor([0.9, 0.1], dtype=torch.float64, device="cuda")
    for mode, size in enumerate(shape[1:]):
        # Only the kernel leaves out what is below the diagonal.
        below = torch.full((size, size), torch.nan, device="cuda").tril(-1)
        start = stack(1, size, 3.0).cuda().repeat(shape[0], 1, 1) + below
        factor, graph = start.clone(), torch.cuda.CUDAGraph()
        ops.gram_ema_([factor], [grad], [mode], *numbers.unbind())
        with torch.cuda.graph(graph):
            ops.gram_ema_([factor], [grad], [mode], *numbers.unbind())
        for beta, weight in ((0.9, 0.1), (0.999, 0.3), (1.0, 0.0)):
            numbers.copy_(torch.tensor([beta, weight], dtype=torch.float64))
            expected = start.clone()
            ops.gram_ema_([expected], [grad], [mode], beta, weight)
            factor.copy_(start)
            graph.replay()
            assert factor.isfinite().all()
            assert torch.equal(factor, expected)


def test_the_root_check_flags_failures():
    A = stack(4, 257).cuda()
    root, ridge = solve(A, 4, 1e-6)
    assert passes_root_check(root, A, ridge, 4).tolist() == [True] * 4
    root[0, 1, 2] = torch.nan
    root[1] *= 1.3
    root[2, 256, 256] *= -1
    assert passes_root_check(root, A, ridge, 4).tolist() == [False] * 3 + [True]
