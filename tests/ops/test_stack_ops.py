"""Ops on whole tensors and stacks: magnitudes and eigendecompositions."""

import math

import pytest
import torch
from compiled import load_compiled

from shampoo import ops
from shampoo.kernels.reference import ops as reference


@pytest.fixture(params=["reference", "compiled"])
def impl(request):
    if request.param == "reference":
        return reference
    try:
        ops.load_kernels(required=True)
    except RuntimeError as reason:
        pytest.skip(f"the compiled kernels are not tested: {reason}")
    return ops


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_magnitudes_of_any_layout(impl, dtype):
    torch.manual_seed(0)
    tensors = [
        torch.randn(5, 7),
        torch.randn(300, 401).mT,
        torch.randn(40, 80)[:, ::2],
        torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last),
        torch.tensor(-2.0),
        torch.zeros(3),
        torch.full((2,), -0.0),
    ]
    tensors = [tensor.to(dtype) for tensor in tensors]
    out = torch.full((len(tensors),), torch.nan, dtype=torch.float64)
    impl.magnitudes_(out, tensors)
    assert out.tolist() == [tensor.abs().max().item() for tensor in tensors]


@pytest.mark.parametrize("at", [0, 1, 63, 64, 99_998, 99_999])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_magnitudes_miss_no_bad_element(impl, at, value):
    tensors = [torch.ones(10), torch.full((100_000,), 3e38), torch.ones(10)]
    tensors[1][at] = value
    out = torch.empty(3, dtype=torch.float64)
    impl.magnitudes_(out, tensors)
    assert out[0] == out[2] == 1.0
    assert math.isnan(out[1]) if math.isnan(value) else out[1] == math.inf


def test_magnitudes_nan_outranks_inf(impl):
    tensor = torch.ones(200_000)
    tensor[5], tensor[150_000] = math.nan, math.inf
    out = torch.empty(1, dtype=torch.float64)
    impl.magnitudes_(out, [tensor])
    assert math.isnan(out[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("count", "size"), [(1, 1), (1, 33), (5, 8), (3, 100), (0, 4)])
@pytest.mark.parametrize("threads", [1, 2])
def test_eigh_decomposes_every_matrix(impl, dtype, count, size, threads):
    stack = torch.randn(count, size, size, dtype=dtype)
    stack = stack + stack.mT
    values = torch.full((count, size), torch.nan, dtype=dtype)
    vectors = torch.full_like(stack, torch.nan)
    before, kept = torch.get_num_threads(), stack.clone()
    torch.set_num_threads(threads)
    try:
        impl.eigh_(values, vectors, stack)
    finally:
        torch.set_num_threads(before)
    near = {"rtol": 0, "atol": 64 * size * torch.finfo(dtype).eps}
    torch.testing.assert_close(vectors * values[:, None] @ vectors.mT, stack, **near)
    eye = torch.eye(size, dtype=dtype).expand_as(stack)
    torch.testing.assert_close(vectors.mT @ vectors, eye, **near)
    assert (values.diff(dim=1) >= 0).all()
    assert torch.equal(stack, kept)


@pytest.mark.parametrize("bad", [0, 2, 4])
def test_eigh_of_a_matrix_that_does_not_converge_is_nan_alone(impl, bad):
    stack = torch.randn(5, 6, 6, dtype=torch.float64)
    stack = stack + stack.mT
    clean = [torch.linalg.eigh(matrix) for matrix in stack]
    stack[bad, 2, 3] = stack[bad, 3, 2] = torch.nan  # what LAPACK reports as not converging
    values, vectors = torch.zeros(5, 6, dtype=torch.float64), torch.zeros_like(stack)
    impl.eigh_(values, vectors, stack)
    assert values[bad].isnan().all()
    assert vectors[bad].isnan().all()
    for i in set(range(5)) - {bad}:
        torch.testing.assert_close(values[i], clean[i][0], rtol=1e-12, atol=1e-12)


SPREAD = {  # of [2, 6, 5, 4], in memory that is not contiguous
    "transposed": lambda grad: grad.mT.contiguous().mT,
    "sliced": lambda grad: torch.stack((grad, grad + 1), dim=-1)[..., 0],
    "permuted": lambda grad: grad.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", SPREAD)
def test_memory_of_a_gradient_changes_no_bit_of_its_factors(impl, kind, dtype):
    grad = torch.randn(2, 6, 5, 4, dtype=dtype)
    spread = SPREAD[kind](grad)
    # At the address of the first: other strides, and other sizes. No copy of it may be taken.
    turned = spread.transpose(2, 3)
    part = spread[:, :, :3]
    assert not spread.is_contiguous()
    assert spread.data_ptr() == turned.data_ptr() == part.data_ptr()
    given = [spread, spread, turned, spread, part, turned]
    modes = [0, 1, 1, 2, 1, 2]
    results = []
    for grads in (given, [each.contiguous() for each in given]):
        sides = [each.shape[mode + 1] for each, mode in zip(grads, modes, strict=True)]
        factors = [torch.ones(2, side, side, dtype=dtype) for side in sides]
        impl.gram_ema_(factors, grads, modes, 0.9, 0.1)
        results.append(factors)
    if impl is ops:
        torch.testing.assert_close(*results, rtol=0, atol=0)
    else:  # whose products go by memory
        torch.testing.assert_close(*results)


def test_a_gradient_is_packed_once_for_all_of_its_modes():
    load_compiled()
    grad = torch.randn(3, 40, 30, 20).mT
    factors = [torch.ones(3, side, side) for side in grad.shape[1:]]
    with torch.autograd.profiler.profile() as profile:
        ops.gram_ema_(factors, [grad] * 3, [0, 1, 2], 0.9, 0.1)
    assert sum(event.name == "aten::clone" for event in profile.function_events) == 1
