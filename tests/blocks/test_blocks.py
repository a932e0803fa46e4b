"""Merging, blocking and long dimensions: algorithm.md section 8, G1 to G4."""

import itertools
import math

import pytest
import torch
from reference_shampoo import merged_shape
from torch import Tensor
from torch.nn import Parameter
from trajectory import (
    PURE,
    apply,
    assert_relative,
    compare,
    directions,
    double_shampoo,
)

from shampoo import Shampoo


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7,), (7, 5), (5, 4, 7), (3, 5, 2, 4), (3, 2, 3, 2, 3)])
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("merge_dims", ["matrix", "full", "none"])
def test_g1_cutting_and_reassembling_is_the_identity(shape, limit, merge_dims):
    """With the graft of SGD and no start, the direction is the gradient, bit for bit."""
    G = randn(*shape)
    (P,) = directions(
        [G],
        betas=(0.0, 1.0),
        grafting="sgd",
        start_preconditioning_step=math.inf,
        max_preconditioner_dim=limit,
        merge_dims=merge_dims,
        precondition_1d=True,
        large_dim_method="blocking",
    )
    assert torch.equal(P, G)


@pytest.mark.parametrize("shape", [(7,), (8, 5), (5, 2, 7)])
@pytest.mark.parametrize("grafting", ["none", "adam", "adagrad_normalized"])
def test_g2_blocks_are_independent_optimizers(shape, grafting):
    """Chunks of 3 leave a last chunk of 1 or 2; a chunk of 1 keeps the order of its tensor."""
    limit, order = 3, len(shape)
    history = [randn(*shape) for _ in range(5)]
    hyper = {
        **{"grafting": grafting, "precondition_frequency": 2, "betas": (0.9, 0.95)},
        **{"merge_dims": "none", "precondition_1d": True, "exponent": "paper"},
        "large_dim_method": "blocking",
    }
    found = directions(history, max_preconditioner_dim=limit, **hyper)
    cuts = [[slice(i, i + limit) for i in range(0, size, limit)] for size in shape]
    for part in itertools.product(*cuts):
        block = [G[part].clone() for G in history]
        sizes = [size for size in block[0].shape if size > 1]
        if len(sizes) < order:
            continue  # as a tensor of its own it would lose a mode; compare() covers it
        for P, expected in zip(found, directions(block, **hyper), strict=True):
            assert_relative(P[part], expected)


@pytest.mark.parametrize("shape", [(7,), (7, 4), (5, 2, 7)])
def test_g2_a_limit_that_no_dimension_reaches_changes_nothing(shape):
    history = [randn(*shape) for _ in range(4)]
    hyper = {"precondition_frequency": 2, "merge_dims": "none", "precondition_1d": True}
    hyper["large_dim_method"] = "blocking"
    for P, expected in zip(
        directions(history, max_preconditioner_dim=7, **hyper),
        directions(history, max_preconditioner_dim=1024, **hyper),
        strict=True,
    ):
        assert torch.equal(P, expected)


@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 2)])
def test_g2_blocks_of_one_element_are_adagrad(shape):
    history = [randn(*shape) for _ in range(4)]
    found = directions(history, eps=1e-30, max_preconditioner_dim=1, **PURE)
    for t, P in enumerate(found, start=1):
        assert_relative(P, history[t - 1] / sum(G**2 for G in history[:t]).sqrt())


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 4), (9,), (2, 5, 3, 2)])
@pytest.mark.parametrize("limit", [2, 3, 4])
@pytest.mark.parametrize("merge_dims", ["matrix", "full", "none"])
def test_g2_every_grid_follows_the_reference(shape, limit, merge_dims):
    compare(
        [shape, (5, 7)],
        6,
        lr=0.1,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        momentum=0.5,
        max_preconditioner_dim=limit,
        merge_dims=merge_dims,
        precondition_frequency=2,
        precondition_1d=True,
        large_dim_method="blocking",
    )


@pytest.mark.parametrize("grafting", ["adam", "lamb"])
def test_g2_a_large_parameter_follows_the_reference(grafting):
    """More than a million elements: long stacks, whose passes may be divided."""
    compare(
        [(1100, 1000), (64, 64), (300,)],
        3,
        lr=0.1,
        grafting=grafting,
        weight_decay=0.1,
        momentum=0.5,
        max_preconditioner_dim=64,
        precondition_frequency=2,
    )


# shape, limit, merged by "full", by "matrix", by "none"
MERGED = [
    ((1, 2, 5, 1), 10, (10,), (2, 5), (2, 5)),
    ((1, 2, 5, 1), 1, (2, 5), (2, 5), (2, 5)),
    ((16, 16), 1024, (256,), (16, 16), (16, 16)),
    ((64, 3, 7, 7), 1024, (64, 147), (64, 147), (64, 3, 7, 7)),
    ((64, 3, 7, 7), 2048, (64, 147), (64, 147), (64, 3, 7, 7)),
    ((64, 64, 3, 3), 4096, (64, 576), (64, 576), (64, 64, 3, 3)),
    ((512, 512, 3, 3), 2048, (512, 512, 9), (512, 512, 9), (512, 512, 3, 3)),
    ((512, 512, 3, 3), 8192, (512, 4608), (512, 4608), (512, 512, 3, 3)),
    ((32, 3, 64, 64), 8192, (96, 4096), (96, 4096), (32, 3, 64, 64)),
    ((1, 1), 8, (1,), (1,), (1,)),
    ((), 8, (1,), (1,), (1,)),
    ((7, 1), 8, (7,), (7,), (7,)),
    ((4, 3, 2), 1024, (24,), (4, 6), (4, 3, 2)),
    ((3, 2, 5), 8, (6, 5), (6, 5), (3, 2, 5)),
    ((2, 2, 2, 2), 4, (4, 4), (4, 4), (2, 2, 2, 2)),
    ((9, 2), 4, (9, 2), (9, 2), (9, 2)),
]


def grid(shape: tuple[int, ...], limit: int) -> list[tuple[int, ...]]:
    """Shapes of the blocks, row-major."""
    cuts = [[min(limit, size - i) for i in range(0, size, limit)] for size in shape]
    return list(itertools.product(*cuts))


@pytest.mark.parametrize(("shape", "limit", "full", "matrix", "none"), MERGED)
def test_g3_merged_shapes(shape, limit, full, matrix, none):
    """Read off the state that the inert first step allocates, which computes nothing."""
    for merge_dims, merged in {"full": full, "matrix": matrix, "none": none}.items():
        assert merged_shape(shape, merge_dims, limit) == merged  # the reference knows the table
        param = Parameter(torch.zeros(shape))
        opt = Shampoo(
            [param],
            max_preconditioner_dim=limit,
            merge_dims=merge_dims,
            precondition_1d=True,
            large_dim_method="blocking",
        )
        param.grad = torch.zeros(shape)
        opt.step()
        state = opt.state[param]
        for k, block in enumerate(grid(merged, limit)):
            assert state[f"block{k}.exp_avg"].shape == block, merge_dims
            for mode, size in enumerate(block):
                assert state[f"block{k}.factor{mode}"].shape == (size, size), merge_dims
            assert f"block{k}.factor{len(block)}" not in state, merge_dims
        assert f"block{k + 1}.exp_avg" not in state, merge_dims


def test_g3_a_dimension_of_size_zero_has_no_state_and_no_update():
    param, other = Parameter(torch.zeros(3, 0, 2)), Parameter(torch.randn(2, 2))
    opt = Shampoo([param, other])
    apply(opt, [param, other], [torch.zeros(3, 0, 2), torch.randn(2, 2)])
    assert not opt.state.get(param, {})


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded_grad"])
@pytest.mark.parametrize("merge_dims", ["matrix", "full", "none"])
def test_g3_any_layout_is_updated_in_place(layout, merge_dims):
    shape = (4, 3, 2, 5)
    values = randn(*shape)
    if layout == "channels_last":
        param = Parameter(values.clone().to(memory_format=torch.channels_last))
    elif layout == "transposed":
        param = Parameter(values.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0))
    elif layout == "strided":
        param = Parameter(torch.zeros(8, 3, 2, 10).double()[::2, :, :, ::2].copy_(values))
    else:
        param = Parameter(values.clone())
    twin = Parameter(values.clone())
    address, strides = param.data_ptr(), param.stride()
    hyper = {
        **{"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "precondition_frequency": 2},
        **{"max_preconditioner_dim": 4, "merge_dims": merge_dims},
    }
    ours, theirs = double_shampoo([param], **hyper), double_shampoo([twin], **hyper)
    for step in range(4):
        grad = randn(*shape)
        if layout == "expanded_grad":
            grad = randn(4, 3, 1, 5).expand(shape)
        strided = torch.empty_strided(shape, param.stride()).double().copy_(grad)
        param.grad = grad if layout == "expanded_grad" or step == 0 else strided
        ours.step()
        apply(theirs, [twin], [grad.contiguous()])
        assert_relative(param, twin, 1e-12)
    assert (param.data_ptr(), param.stride()) == (address, strides)


LONG = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1, "precondition_frequency": 2}


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (7, 6), (2, 7, 3), (6, 2, 5), (3, 3)])
@pytest.mark.parametrize("method", ["adagrad", "diagonal"])
@pytest.mark.parametrize("grafting", ["none", "adam", "adagrad"])
def test_g4_long_dimensions_follow_the_reference(shape, method, grafting):
    compare(
        [shape, (4, 3)],
        7,
        large_dim_method=method,
        grafting=grafting,
        max_preconditioner_dim=4,
        merge_dims="none",
        eps=1e-4,
        relative_eps=1e-2,
        **LONG,
    )


@pytest.mark.parametrize("method", ["adagrad", "diagonal"])
@pytest.mark.parametrize("grafting", ["none", "sgd"])
def test_g4_a_long_vector_follows_the_reference(method, grafting):
    compare(
        [(9,), (3,)],
        6,
        large_dim_method=method,
        grafting=grafting,
        max_preconditioner_dim=4,
        precondition_1d=True,
        eps=1e-4,
        **LONG,
    )


@pytest.mark.parametrize("grafting", ["lars", "lamb"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_g4_the_adagrad_method_is_never_rescaled_by_layer(grafting, momentum):
    compare(
        [(7, 3), (4, 3)],
        5,
        large_dim_method="adagrad",
        grafting=grafting,
        momentum=momentum,
        max_preconditioner_dim=4,
        eps=1e-4,
        **{**LONG, "weight_decay": 0.0},
    )


@pytest.mark.parametrize("beta2", [0.9, 1.0])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_g4_the_adagrad_method_divides_by_the_root_of_the_accumulator(beta2, bias_correction):
    """From step 1, whole tensor, no graft."""
    eps = 0.3
    history = [randn(6, 3) for _ in range(4)]
    found = directions(
        history,
        betas=(0.0, beta2),
        eps=eps,
        large_dim_method="adagrad",
        max_preconditioner_dim=4,
        bias_correction=bias_correction,
    )
    for t, P in enumerate(found, start=1):
        if beta2 == 1:
            v = sum(G**2 for G in history[:t])
        else:
            v = sum((1 - beta2) * beta2 ** (t - s) * history[s - 1] ** 2 for s in range(1, t + 1))
            v = v / (1 - beta2**t) if bias_correction else v
        assert_relative(P, history[t - 1] / (v.sqrt() + eps), 1e-12)


def test_g4_a_diagonal_mode_shrinks_large_rows():
    """The power is negative: P = L^(-1/4) G diag(a + eps)^(-1/4) with non-trivial a (Q3)."""
    eps = 1e-6
    history = [randn(3, 6) * torch.arange(1, 7) for _ in range(5)]
    hyper = {**PURE, "large_dim_method": "diagonal", "max_preconditioner_dim": 4, "eps": eps}
    for t, P in enumerate(directions(history, **hyper), start=1):
        a = sum((G**2).sum(0) for G in history[:t])
        values, vectors = torch.linalg.eigh(sum(G @ G.T for G in history[:t]))
        XL = (vectors * (values + eps) ** -0.25) @ vectors.T
        assert_relative(P, XL @ history[t - 1] * (a + eps) ** -0.25)


def test_g4_two_diagonal_modes_are_applied_fresh_from_the_start_on():
    eps = 1e-6
    history = [randn(6, 5) for _ in range(7)]
    hyper = {
        **{**PURE, "precondition_frequency": 3, "start_preconditioning_step": 4},
        **{"large_dim_method": "diagonal", "max_preconditioner_dim": 4, "eps": eps},
    }
    for t, P in enumerate(directions(history, **hyper), start=1):
        rows = sum((G**2).sum(1) for G in history[:t]) + eps
        cols = sum((G**2).sum(0) for G in history[:t]) + eps
        fresh = history[t - 1] * rows[:, None] ** -0.25 * cols**-0.25
        assert_relative(P, fresh if t >= 4 else history[t - 1], 1e-12)


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 1.0)])
@pytest.mark.parametrize("exponent", [{}, {"exponent": "paper"}, {"exponent_multiplier": 1.5}])
def test_g4_the_exponent_of_a_diagonal_mode(betas, exponent):
    compare(
        [(7, 3), (2, 6, 3)],
        5,
        large_dim_method="diagonal",
        max_preconditioner_dim=4,
        merge_dims="none",
        grafting="sgd",
        **{**LONG, "betas": betas},
        **exponent,
    )
