"""precondition_ against the reference, judged in float64."""

import pytest
import torch
from comparison import SIZES, assert_as_good, error, strided, symmetric

from shampoo.kernels.reference import ops as reference
from shampoo.kernels.triton.precondition import LaunchConfig, precondition_, supports

CONFIG = LaunchConfig(32, 32, 32, 4, 2)
SHAPES = [(2, n) for n in SIZES] + [
    *((1, n, 65) for n in SIZES),
    *((2, 63, 3), (1, 33, 257)),
    *((2, 5, 65, 7), (1, 33, 3, 34), (2, 1, 63, 1), (1, 3, 4, 35, 6)),
]
SPLIT = 2**-20  # two fp16 numbers hold 22 bits of each operand


def spread(batch, n, decades=4):
    """[batch, n, n]: roots as Shampoo's are, with entries over some orders of magnitude."""
    basis = torch.linalg.qr(torch.randn(batch, n, n, dtype=torch.float64)).Q
    root = basis * torch.logspace(0, decades, n, dtype=torch.float64) @ basis.mT
    return ((root + root.mT) / 2).float()


def check(grad, roots, config=CONFIG, layout="contiguous"):
    truth, length = torch.empty(grad.shape, dtype=torch.float64), torch.empty(len(grad)).double()
    reference.precondition_([truth], [length], [grad.double()], [root.double() for root in roots])
    expected = torch.empty(grad.shape)
    reference.precondition_([expected], [torch.empty(len(grad))], [grad.float()], roots)
    out, norm = torch.full(grad.shape, torch.nan), torch.full((len(grad),), torch.nan)
    arguments = [out], [norm], [strided(grad, layout)], roots
    assert supports(*arguments)
    precondition_(*arguments, config=config)
    for block, wanted, torchs in zip(out, truth, expected, strict=True):
        assert_as_good(block, torchs, wanted, SPLIT)
    assert error(norm, length) <= SPLIT * length.max().item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_order(shape):
    check(torch.randn(shape), [spread(shape[0], size) for size in shape[1:]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 65), (2, 65, 33), (1, 5, 33, 7)], ids=str)
def test_half_precision(shape, dtype):
    check(torch.randn(shape).to(dtype), [spread(shape[0], size) for size in shape[1:]])


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_strides(layout):
    check(torch.randn(2, 33, 65), [spread(2, 33), spread(2, 65)], layout=layout)


@pytest.mark.parametrize("shape", [(1, 20, 100), (1, 140, 30)], ids=str)
def test_the_tiles_of_the_table(shape):
    check(torch.randn(shape), [spread(1, size) for size in shape[1:]], config=None)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e17])
def test_every_block_has_its_own_scale(scale):
    grad = torch.randn(3, 33, 20)
    grad[1] *= scale
    left = spread(3, 33)
    left[1] /= scale
    check(grad, [left, spread(3, 20)])


def test_zero_and_not_finite():
    grad = torch.randn(4, 33, 20)
    roots = [symmetric(4, 33), symmetric(4, 20)]
    out, norm = torch.empty(4, 33, 20), torch.empty(4)
    precondition_([out], [norm], [grad], roots, config=CONFIG)
    alone, length = out[3].clone(), norm[3].clone()
    grad[0], grad[1, 5, 3] = 0, torch.nan
    roots[0][2] = 0
    precondition_([out], [norm], [grad], roots, config=CONFIG)
    assert (out[0] == 0).all()
    assert norm[0] == 0
    assert not norm[1].isfinite()
    assert (out[2] == 0).all()
    assert torch.equal(out[3], alone)  # whatever its neighbours hold
    assert torch.equal(norm[3], length)


def test_what_is_left_to_the_reference():
    out, norm, grad = torch.empty(1, 8, 4), torch.empty(1), torch.randn(1, 8, 4)
    roots = [symmetric(1, 8), symmetric(1, 4)]
    assert supports(out, norm, grad, roots)
    assert not supports(out, norm, grad, [roots[0][:, 0], roots[1]])  # a diagonal mode
    assert not supports(out.double(), norm, grad.double(), [root.double() for root in roots])
    assert not supports(out.mT.contiguous().mT, norm, grad, roots)
