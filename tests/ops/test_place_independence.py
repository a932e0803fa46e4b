"""The result of a block has the same bits wherever it lies, whatever is beside it, on any threads.

Ranks hold a block at other offsets and in other batches than one process does, and must move its
parameters alike.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from shampoo import inverse_root, ops
from shampoo.kernels.reference.norms import absmax, elementwise_power, frobenius, schatten4
from shampoo.ops import jit

BLOCKS, TARGET = 5, 2
PLACES = [  # threads, which blocks, elements in front of them
    *((1, slice(0, 5), 0), (1, slice(2, 3), 1), (1, slice(1, 4), 6), (1, slice(2, 4), 15)),
    *((2, slice(0, 5), 3), (2, slice(2, 3), 8), (2, slice(1, 4), 5)),
]
FLAT = [torch.float32, torch.float64]
SHAPES = [(1,), (300,), (5, 7), (37, 64), (130, 257), (33, 5, 40), (2, 3, 4, 5)]

Results = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def _compiled() -> Iterator[None]:
    if not jit.compiler_version():
        pytest.skip("no C++ compiler: only the compiled kernels promise this")
    ops.load_kernels(required=True)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def placed(values: Tensor, offset: int) -> Tensor:
    """A copy that starts ``offset`` elements into its memory."""
    memory = values.new_zeros(values.numel() + offset)
    memory[offset:] = values.reshape(-1)
    return memory[offset:].view(values.shape)


def assert_independent(run: Callable[..., Results], *stacks: Tensor) -> None:
    """Of results that are stacks, the target block's are the same for every placement."""
    expected: Results | None = None
    for threads, batch, offset in PLACES:
        torch.set_num_threads(threads)
        given = [placed(stack[batch], offset * (i + 1) % 16) for i, stack in enumerate(stacks)]
        found = tuple(result[TARGET - batch.start].clone() for result in run(*given))
        expected = expected or found
        for one, other in zip(expected, found, strict=True):
            assert not other.isnan().any()
            assert torch.equal(one, other), (threads, batch, offset)


def symmetric(*shape: int, dtype: torch.dtype) -> Tensor:
    stack = torch.randn(shape, dtype=dtype)
    return stack + stack.mT


def factors(n: int, dtype: torch.dtype) -> Tensor:
    """Ill-conditioned: their eigenvalues span six decades."""
    scales = torch.logspace(0, -3, n, dtype=torch.float64)
    gradients = torch.randn(BLOCKS, n, n + 3, dtype=torch.float64) * scales[:, None]
    return (gradients @ gradients.mT).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLAT, ids=str)
@pytest.mark.parametrize("diagonal", [None, 0, -1])
def test_precondition(dtype, shape, diagonal):
    roots = [symmetric(BLOCKS, d, d, dtype=dtype) for d in shape]
    if diagonal is not None:
        roots[diagonal] = roots[diagonal][:, 0].clone()

    def run(grad: Tensor, out: Tensor, *roots: Tensor) -> Results:
        norm = torch.full_like(grad.flatten(1)[:, 0], torch.nan)
        ops.precondition_([out], [norm], [grad], roots)
        return out, norm

    grad = torch.randn(BLOCKS, *shape, dtype=dtype)
    assert_independent(run, grad, torch.full_like(grad, torch.nan), *roots)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 70000)], ids=str)
@pytest.mark.parametrize("dtype", FLAT, ids=str)
def test_gram_ema(dtype, shape):
    grad = torch.randn(BLOCKS, *shape, dtype=dtype)
    for mode, size in enumerate(shape):
        full = symmetric(BLOCKS, size, size, dtype=dtype) if size <= 1000 else torch.empty(0)
        for factor in (full, torch.rand(BLOCKS, size, dtype=dtype)):
            if factor.numel() == 0:
                continue

            def run(factor: Tensor, grad: Tensor, mode: int = mode) -> Results:
                ops.gram_ema_([factor], [grad], [mode], 0.9, 0.2)
                return (factor,)

            assert_independent(run, factor, grad)


@pytest.mark.parametrize("dtype", FLAT, ids=str)
def test_stacks_of_a_list(dtype):
    """On any threads, which take the matrices of all stacks in whatever order they come to them."""
    shapes = [*SHAPES, (130, 257), (600, 520), (64,)]
    grads = [torch.randn(1 + i % 4, *shape, dtype=dtype) for i, shape in enumerate(shapes)]
    stacks = [(grad, mode) for grad in grads for mode in range(grad.dim() - 1)]
    start = [symmetric(len(g), *[g.shape[k + 1]] * 2, dtype=dtype) for g, k in stacks]
    start[3] = start[3][:, 0].clone()  # a diagonal
    expected: list[Tensor] | None = None
    for threads, is_alone in ((1, True), (1, False), (2, False), (3, False)):
        torch.set_num_threads(threads)
        factors = [factor.clone() for factor in start]
        outs = [torch.full_like(grad, torch.nan) for grad in grads]
        norms = [grad.new_full((len(grad),), torch.nan) for grad in grads]
        if is_alone:
            for factor, (grad, mode) in zip(factors, stacks, strict=True):
                ops.gram_ema_([factor], [grad], [mode], 0.9, 0.2)
            at = 0
            for out, norm, grad in zip(outs, norms, grads, strict=True):
                ops.precondition_([out], [norm], [grad], start[at : (at := at + grad.dim() - 1)])
        else:
            sources, modes = [grad for grad, _ in stacks], [mode for _, mode in stacks]
            ops.gram_ema_(factors, sources, modes, 0.9, 0.2)
            ops.precondition_(outs, norms, grads, start)
        found = [*factors, *outs, *norms]
        assert not any(each.isnan().any() for each in found)
        expected = expected or found
        assert all(map(torch.equal, found, expected)), threads


@pytest.mark.parametrize("numel", [3, 1000, 70001])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("dtype", FLAT, ids=str)
def test_graft_moments(dtype, normalized, numel):
    def run(avg: Tensor, square: Tensor, direction: Tensor, ahead: Tensor, grad: Tensor) -> Results:
        flat = [t.flatten() for t in (avg, square, direction)]
        norm = grad.new_empty(len(grad))
        tiles = torch.tensor([[0, 0, grad.numel(), 0, *grad.shape]])
        settings = (1.0, False, 0.9, 0.7, 0.99, 0.01, 0.3, 1e-8, normalized, ahead.flatten())
        ops.graft_moments_(None, *flat, norm, [grad], tiles, *settings)
        return avg, square, direction, norm, ahead

    grad = torch.randn(BLOCKS, numel, dtype=dtype)
    zeros = torch.zeros_like(grad)
    assert_independent(run, grad.sin(), grad.abs(), zeros, zeros, grad)


@pytest.mark.parametrize("param", [torch.bfloat16, torch.float32], ids=str)
def test_gather_and_update(param):
    numel = 33013

    def tiles(count: int) -> Tensor:
        return torch.tensor([[0, 0, count, numel, 0, 0, count, 1, 1, numel]])

    def gather(source: Tensor, out: Tensor) -> Results:
        ops.gather_blocks_(out.flatten(), [source], tiles(len(source)), 0.3, True)
        return (out,)

    def update(weight: Tensor, momentum: Tensor, direction: Tensor, scale: Tensor) -> Results:
        segment = momentum.flatten(), direction.flatten(), scale
        ops.update_blocks_([weight], *segment, tiles(len(weight)), 0.1, 0.01, 0.9, True)
        return weight, momentum

    weight = torch.randn(BLOCKS, numel).to(param)
    direction = torch.randn(BLOCKS, numel)
    assert_independent(gather, weight, direction)
    assert_independent(update, weight, direction.cos(), direction, torch.rand(BLOCKS))


@pytest.mark.parametrize("n", [1, 5, 64, 200])
def test_eigh(n):
    def run(stack: Tensor) -> Results:
        values, vectors = torch.empty_like(stack[:, 0]), torch.empty_like(stack)
        ops.eigh_(values, vectors, stack)
        return values, vectors

    assert_independent(run, factors(n, torch.float64))


@pytest.mark.parametrize("n", [5, 33, 130])
@pytest.mark.parametrize("dtype", FLAT, ids=str)
@pytest.mark.parametrize("p", [4, 6])
@pytest.mark.parametrize("method", ["eigh", "minimax"])
def test_roots(method, p, dtype, n):
    def run(factor: Tensor) -> Results:
        return (inverse_root(factor, p, method=method),)

    assert_independent(run, factors(n, dtype))
    assert_independent(run, factors(n, dtype).diagonal(dim1=1, dim2=2).diag_embed())


@pytest.mark.parametrize("n", [1, 5, 33, 257])
@pytest.mark.parametrize("dtype", FLAT, ids=str)
def test_norms(dtype, n):
    stack = torch.randn(BLOCKS, n, n, dtype=dtype)
    assert_independent(lambda stack: (absmax(stack), frobenius(stack)), stack)
    assert_independent(lambda values: (schatten4(values.double()),), stack[:, 0])


@pytest.mark.parametrize("exponent", [-1 / 4, -1 / 6, 0.3, 4.0])
@pytest.mark.parametrize("dtype", FLAT, ids=str)
def test_elementwise_power(dtype, exponent):
    values = torch.rand(200, 3, dtype=dtype) + 0.1
    expected = elementwise_power(values, exponent)
    near = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(expected, values**exponent, rtol=near, atol=0)
    for count in range(1, 20):
        for start in range(0, 200 - count, count):
            found = elementwise_power(values[start : start + count], exponent)
            assert torch.equal(found, expected[start : start + count])
