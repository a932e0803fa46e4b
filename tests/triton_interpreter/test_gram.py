"""gram_ema_ against the reference, judged in float64."""

import pytest
import torch
from comparison import SIZES, assert_as_good, strided, symmetric

from shampoo.kernels.reference import ops as reference
from shampoo.kernels.triton.gram import LaunchConfig, gram_ema_, supports

CONFIG = LaunchConfig(32, 32, 4, 2)
SHAPES = [(2, n) for n in SIZES] + [
    *((1, n, 65) for n in SIZES),
    *((2, 3, 63), (2, 63, 3), (1, 33, 257)),
    *((2, 5, 65, 7), (1, 33, 3, 34), (2, 1, 63, 1), (1, 3, 4, 35, 6), (1, 2, 3, 2, 33, 2)),
]


def check(factor, grad, mode, config=CONFIG, layout="contiguous"):
    expected, truth = factor.clone(), factor.double()
    reference.gram_ema_([expected], [grad.float()], [mode], 0.9, 0.3)
    reference.gram_ema_([truth], [grad.double()], [mode], 0.9, 0.3)
    arguments = [factor], [strided(grad, layout)], [mode], 0.9, 0.3
    assert supports(*arguments)
    before = grad.clone()
    gram_ema_(*arguments, config=config)
    assert torch.equal(factor, factor.mT)
    assert torch.equal(grad, before)
    assert_as_good(factor, expected, truth)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_mode(shape):
    for mode, size in enumerate(shape[1:]):
        check(symmetric(shape[0], size), torch.randn(shape), mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 65, 33), (1, 5, 33, 7)], ids=str)
def test_half_precision(shape, dtype):
    for mode, size in enumerate(shape[1:]):
        check(symmetric(shape[0], size), torch.randn(shape).to(dtype), mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(2, 1), (1, 127), (2, 63, 3), (1, 33, 65), (2, 5, 33, 7), (1, 3, 4, 35, 6)], ids=str
)
def test_numbers_in_memory_give_the_same_bits(shape, dtype):
    """float64 rounded to float32 as a launch does it: 0.9 down, 0.3 up."""
    grad = torch.randn(shape).to(dtype)
    numbers = torch.tensor([0.9, 0.3], dtype=torch.float64).unbind()
    for mode, size in enumerate(shape[1:]):
        factor = symmetric(shape[0], size)
        expected = factor.clone()
        gram_ema_([expected], [grad], [mode], 0.9, 0.3, config=CONFIG)
        assert supports([factor], [grad], [mode], *numbers)
        gram_ema_([factor], [grad], [mode], *numbers, config=CONFIG)
        assert torch.equal(factor, expected)
    assert [number.item() for number in numbers] == [0.9, 0.3]


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_strides(layout):
    for mode, size in enumerate((33, 65)):
        check(symmetric(2, size), torch.randn(2, 33, 65), mode, layout=layout)


@pytest.mark.parametrize("size", [20, 100, 300])
def test_the_tiles_of_the_table(size):
    check(symmetric(1, size), torch.randn(1, size, 70), 0, config=None)


def test_what_is_stored_between_factors_stays():
    wide = torch.full((2, 35, 40), 5.0)
    factor = wide[:, :33, :33]
    factor.copy_(symmetric(2, 33))
    check(factor, torch.randn(2, 33, 40), 0)
    assert (wide[:, 33:] == 5).all()
    assert (wide[:, :, 33:] == 5).all()


def test_only_the_upper_triangle_is_read():
    factor = symmetric(1, 65).triu().masked_fill(torch.ones(65, 65).tril(-1) > 0, torch.nan)
    expected = symmetric(1, 65)
    expected.copy_(factor.triu().nan_to_num())
    expected += expected.triu(1).mT
    grad = torch.randn(1, 65, 33)
    gram_ema_([factor], [grad], [0], 0.9, 0.3, config=CONFIG)
    gram_ema_([expected], [grad], [0], 0.9, 0.3, config=CONFIG)
    assert torch.equal(factor, expected)


def test_blocks_do_not_depend_on_each_other():
    factor, grad = symmetric(3, 65), torch.randn(3, 65, 40)
    alone = factor[1:2].clone()
    grad[0] = torch.nan
    gram_ema_([factor], [grad], [0], 0.9, 0.3, config=CONFIG)
    gram_ema_([alone], [grad[1:2]], [0], 0.9, 0.3, config=CONFIG)
    assert torch.equal(factor[1:2], alone)
    assert factor[0].isnan().all()


def test_what_is_left_to_the_reference():
    full, grad = symmetric(1, 8), torch.randn(1, 8, 4)
    assert not supports([full[:, 0]], [grad], [0], 0.9, 0.1)  # a diagonal factor
    assert not supports([full.double()], [grad.double()], [0], 0.9, 0.1)
    assert not supports([full], [grad[:, :, :0]], [0], 0.9, 0.1)
    number = torch.tensor(0.5, dtype=torch.float64)
    for other in (0.5, number.float(), number.repeat(2), number.to("meta")):
        assert not supports([full], [grad], [0], other, number)
        assert not supports([full], [grad], [0], number, other)
