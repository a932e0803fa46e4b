"""State bytes: algorithm.md section 8, G5, against the formula of section 7.1."""

import pytest
import torch
from pairwise import pairwise
from torch.nn import Parameter
from trajectory import apply, state_tensors

from shampoo import Shampoo


def unique_bytes(opt: torch.optim.Optimizer) -> int:
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in state_tensors(opt).values()
    }
    return sum(storages.values())


def expected_bytes(
    opt: Shampoo, factor_numbers: int, elements: int, per_element: int, factor_size: int
) -> int:
    """Formula 7.1, with 8 bytes for each counter of steps and 4 for each counter of failures."""
    keys = [key for _, key in state_tensors(opt)]
    steps, failures = keys.count("step"), sum(".failures" in key for key in keys)
    assert steps == sum(
        param.numel() > 0 for group in opt.param_groups for param in group["params"]
    )
    return factor_size * factor_numbers + per_element * elements + 8 * steps + 4 * failures


GRIDS = [
    # shape, limit, sum over blocks and modes of d^2
    ((8, 8), 8, 128),
    ((8, 8), 4, 4 * 32),
    ((7, 5), 4, (16 + 16) + (16 + 1) + (9 + 16) + (9 + 1)),
    ((3, 2, 4), 4, 9 + 4 + 16),
    ((6,), 4, 16 + 4),
]


GRAFTS = ["none", "sgd", "adam", "adagrad_normalized"]


@pytest.mark.parametrize(
    ("grid", "grafting", "dtype", "beta1", "momentum"),
    pairwise(GRIDS, GRAFTS, [torch.float32, torch.float64], [0.0, 0.9], [0.0, 0.9]),
    ids=str,
)
def test_g5_state_bytes_are_the_formula(grid, grafting, dtype, beta1, momentum):
    shape, limit, squares = grid
    param = Parameter(torch.randn(shape, dtype=dtype))
    opt = Shampoo(
        [param],
        betas=(beta1, 0.99),
        momentum=momentum,
        max_preconditioner_dim=limit,
        merge_dims="none",
        grafting=grafting,
        precondition_1d=True,
        precondition_frequency=2,
        preconditioner_dtype=dtype,
    )
    for _ in range(3):
        apply(opt, [param], [torch.randn(shape, dtype=dtype)])
    size = dtype.itemsize
    buffers = (grafting not in ("none", "sgd")) + (beta1 > 0) + (momentum > 0)
    expected = expected_bytes(opt, 2 * squares, param.numel(), size * buffers, size)
    assert unique_bytes(opt) == expected
    failures = sum(".failures" in key for _, key in state_tensors(opt))
    assert failures == sum(".factor" in key for _, key in state_tensors(opt))


def test_g5_many_parameters_share_stacks_without_waste():
    shapes = [(8, 8), (8, 8), (5, 7), (8,), (3,), (2, 3, 4), ()]
    params = [Parameter(torch.randn(shape)) for shape in shapes]
    opt = Shampoo(params, max_preconditioner_dim=4, merge_dims="none", precondition_frequency=2)
    for _ in range(3):
        apply(opt, params, [torch.randn(shape) for shape in shapes])
    squares = 2 * 4 * 32 + (32 + 25 + 17 + 10) + (4 + 9 + 16)
    elements = sum(param.numel() for param in params)
    assert unique_bytes(opt) == expected_bytes(opt, 2 * squares, elements, 8, 4)


@pytest.mark.parametrize("grafting", ["none", "adam"])
def test_g5_bf16_parameters_have_float32_statistics(grafting):
    param = Parameter(torch.randn(8, 6, dtype=torch.bfloat16))
    opt = Shampoo([param], max_preconditioner_dim=4, grafting=grafting)
    apply(opt, [param], [torch.randn(8, 6, dtype=torch.bfloat16)])
    squares = 2 * (16 + 16) + 2 * (16 + 4)
    per_element = 4 + 4 * (grafting == "adam")
    assert unique_bytes(opt) == expected_bytes(opt, 2 * squares, 48, per_element, 4)


@pytest.mark.parametrize("grafting", ["none", "adam", "sgd"])
def test_g5_vectors_without_factors_cost_what_their_method_costs(grafting):
    param = Parameter(torch.randn(1, 50))
    opt = Shampoo([param], grafting=grafting, max_preconditioner_dim=16)
    apply(opt, [param], [torch.randn(1, 50)])
    # without a graft it is the diagonal method, which has an accumulator too
    per_element = 4 * (1 + (grafting != "sgd"))
    assert unique_bytes(opt) == expected_bytes(opt, 0, 50, per_element, 4)


@pytest.mark.parametrize(
    ("method", "numbers"),
    [("adagrad", 7 * 3), ("diagonal", 7 + 2 * 9)],
)
def test_g5_long_dimensions_cost_the_table_of_3_3(method, numbers):
    param = Parameter(torch.randn(7, 3))
    opt = Shampoo(
        [param],
        betas=(0.0, 0.9),
        grafting="none",
        large_dim_method=method,
        max_preconditioner_dim=4,
        precondition_frequency=1,
    )
    for _ in range(2):
        apply(opt, [param], [torch.randn(7, 3)])
    assert unique_bytes(opt) == expected_bytes(opt, numbers, 0, 0, 4)


def test_g5_precondition_false_keeps_no_factors():
    params = [Parameter(torch.randn(8, 8)), Parameter(torch.randn(8, 8))]
    opt = Shampoo([{"params": params[:1], "precondition": False}, {"params": params[1:]}])
    apply(opt, params, [torch.randn(8, 8), torch.randn(8, 8)])
    assert not [key for key in opt.state[params[0]] if ".factor" in key or ".root" in key]
    assert [key for key in opt.state[params[1]] if ".factor" in key]
