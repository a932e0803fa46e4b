"""Core algebra: algorithm.md section 8, group A."""

import math
from functools import reduce

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from trajectory import PURE, apply, assert_relative, compare, directions, double_shampoo

COVARIANCE = {"exponent": "covariance"}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def power(A: Tensor, exponent: float) -> Tensor:
    """A^exponent of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh(A)
    return (vectors * values**exponent) @ vectors.T


def pseudo_power(A: Tensor, exponent: float, rank: int) -> Tensor:
    values, vectors = torch.linalg.eigh(A)
    values, vectors = values[-rank:], vectors[:, -rank:]
    return (vectors * values**exponent) @ vectors.T


def well_conditioned(rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V with singular values between 1 and 2."""
    U = torch.linalg.qr(randn(rows, rows)).Q
    V = torch.linalg.qr(randn(cols, cols)).Q
    k = min(rows, cols)
    return U[:, :k], torch.linspace(1, 2, k, dtype=torch.float64), V[:, :k]


@pytest.mark.parametrize("eps", [1e-2, 1e-6])
def test_a1_a_vector_gets_full_matrix_adagrad(eps):
    history = [randn(5) for _ in range(8)]
    found = directions(history, eps=eps, **PURE)
    for t in range(5, 9):
        A = sum(torch.outer(g, g) for g in history[:t])
        expected = power(A + eps * torch.eye(5, dtype=torch.float64), -0.5) @ history[t - 1]
        assert_relative(found[t - 1], expected)


@pytest.mark.parametrize(("eps", "bound"), [(1e-4, 1e-4), (1e-8, 1e-8), (1e-12, 1e-8)])
def test_a1_a_rank_deficient_vector_nears_the_pseudo_inverse(eps, bound):
    history = [randn(6) for _ in range(3)]
    found = directions(history, eps=eps, **PURE)[-1]
    A = sum(torch.outer(g, g) for g in history)
    assert (found - pseudo_power(A, -0.5, rank=3) @ history[-1]).norm() <= bound


def test_a1_without_any_ridge_the_root_is_the_pseudo_inverse():
    history = [randn(6) for _ in range(3)]
    found = directions(history, eps=0.0, **PURE)[-1]
    A = sum(torch.outer(g, g) for g in history)
    assert_relative(found, pseudo_power(A, -0.5, rank=3) @ history[-1])


def test_a2_the_first_step_of_a_vector_is_its_unit_vector():
    g = randn(5)
    (found,) = directions([g], eps=1e-14, **PURE)
    assert_relative(found, g / g.norm(), 1e-7)


@pytest.mark.parametrize("shape", [(4, 4), (4, 6), (6, 4)])
def test_a3_the_first_step_of_a_matrix_is_its_polar_factor(shape):
    U, S, V = well_conditioned(*shape)
    (found,) = directions([(U * S) @ V.T], eps=1e-14, **PURE)
    assert_relative(found, U @ V.T)


def test_a3_with_exponent_one_half_singular_values_are_inverted():
    U, S, V = well_conditioned(4, 4)
    (found,) = directions([(U * S) @ V.T], eps=1e-14, **{**PURE, "exponent": 2})
    assert_relative(found, (U / S) @ V.T, 1e-8)


def test_a4_a_matrix_is_preconditioned_by_fourth_roots_of_explicit_sums():
    history = [randn(4, 6) for _ in range(7)]
    eps = 1e-6
    for t, found in enumerate(directions(history, eps=eps, **PURE), start=1):
        L = sum(G @ G.T for G in history[:t]) + eps * torch.eye(4, dtype=torch.float64)
        R = sum(G.T @ G for G in history[:t]) + eps * torch.eye(6, dtype=torch.float64)
        assert_relative(found, power(L, -0.25) @ history[t - 1] @ power(R, -0.25))


def test_a4_order_three_is_a_kronecker_product_of_sixth_roots():
    history = [randn(3, 4, 2) for _ in range(5)]
    eps = 1e-6
    found = directions(history, eps=eps, **PURE)[-1]
    roots = []
    for mode, letter in enumerate("abc"):
        other = letter.upper()
        equation = f"abc,{'abc'.replace(letter, other)}->{letter}{other}"
        A = sum(torch.einsum(equation, G, G) for G in history)
        roots.append(power(A + eps * torch.eye(history[0].shape[mode]).double(), -1 / 6))
    expected = reduce(torch.kron, roots) @ history[-1].flatten()
    assert_relative(found.flatten(), expected)


def test_a4_order_four_takes_eighth_roots():
    history = [randn(2, 3, 2, 4) for _ in range(5)]
    eps = 1e-6
    found = directions(history, eps=eps, **PURE)[-1]
    expected = history[-1]
    for letter in "abcd":
        other = letter.upper()
        equation = f"abcd,{'abcd'.replace(letter, other)}->{letter}{other}"
        A = sum(torch.einsum(equation, G, G) for G in history)
        X = power(A + eps * torch.eye(A.shape[0]).double(), -1 / 8)
        equation = f"{other}{letter},abcd->{'abcd'.replace(letter, other)}"
        expected = torch.einsum(equation, X, expected)
    assert_relative(found, expected)


@pytest.mark.parametrize("shape", [(6,), (5, 3), (3, 2, 4), (2, 3, 2, 3), (2, 2, 3, 2, 2)])
@pytest.mark.parametrize("grafting", ["none", "adam"])
@pytest.mark.parametrize("root_method", ["auto", "eigh"])
def test_a4_every_order_follows_the_reference(shape, grafting, root_method):
    compare(
        [shape],
        8,
        lr=0.1,
        betas=(0.9, 0.95),
        precondition_frequency=2,
        merge_dims="none",
        precondition_1d=True,
        large_dim_method="blocking",
        grafting=grafting,
        root_method=root_method,
    )


@pytest.mark.parametrize(("shape", "rank"), [((3, 4), 2), ((2, 3, 2), 1)])
def test_a5_the_kronecker_factors_bound_the_full_matrix(shape, rank):
    """G18 Lemma 8, on the factors that the package accumulated."""

    def low_rank() -> Tensor:  # every unfolding has at most this rank
        letters = "abcd"[: len(shape)]
        terms = [[randn(size) for size in shape] for _ in range(rank)]
        equation = f"{','.join(letters)}->{letters}"
        return sum(torch.einsum(equation, *vectors) for vectors in terms)

    eps, order = 0.1, len(shape)
    param = Parameter(torch.zeros(shape, dtype=torch.float64))
    opt = double_shampoo([param], lr=0.0, **PURE)
    full = eps * torch.eye(math.prod(shape)).double()
    for _ in range(6):
        G = low_rank()
        apply(opt, [param], [G])
        full += torch.outer(G.flatten(), G.flatten()) / math.prod([rank ** (1 / order)] * order)
    factors = [opt.state[param][f"block0.factor{mode}"] for mode in range(order)]
    bounds = [power(A + eps * torch.eye(len(A)).double(), 1 / order) for A in factors]
    gap = reduce(torch.kron, bounds) - full
    assert torch.linalg.eigvalsh(gap).min() >= -1e-10


SCALE_FREE = {**PURE, "eps": 1e-30}


@pytest.mark.parametrize("shape", [(4,), (4, 5), (2, 3, 4)])
def test_a6_the_scale_of_the_history_does_not_matter(shape):
    history = [randn(*shape) for _ in range(24)]
    found = directions(history, **SCALE_FREE)[-1]
    scaled = directions([37.0 * G for G in history], **SCALE_FREE)[-1]
    assert_relative(scaled, found)


def test_a6_rotated_gradients_give_the_rotated_direction():
    history = [randn(4, 5) for _ in range(9)]
    Qa, Qb = torch.linalg.qr(randn(4, 4)).Q, torch.linalg.qr(randn(5, 5)).Q
    found = directions(history, **SCALE_FREE)[-1]
    rotated = directions([Qa @ G @ Qb.T for G in history], **SCALE_FREE)[-1]
    assert_relative(rotated, Qa @ found @ Qb.T)


@pytest.mark.parametrize("order", [(1, 0), (2, 0, 1), (1, 2, 0), (3, 1, 0, 2)])
def test_a6_permuting_the_modes_permutes_the_update(order):
    shape = (4, 3, 2, 3)[: len(order)]
    history = [randn(*shape) for _ in range(20)]
    found = directions(history, **SCALE_FREE)[-1]
    permuted = directions([G.permute(order).contiguous() for G in history], **SCALE_FREE)[-1]
    assert_relative(permuted, found.permute(order))


def test_a7_the_worked_example_of_square_roots():
    param = Parameter(torch.zeros(2, 3, dtype=torch.float64))
    opt = double_shampoo([param], eps=1e-14, **{**PURE, "exponent": 2})
    apply(opt, [param], [torch.tensor([[1, 0, 0], [0, 1, 0]]).double()])
    apply(opt, [param], [torch.tensor([[0, 0, 0], [0, 0, 2]]).double()])
    state = opt.state[param]
    assert_relative(state["block0.root0"], torch.diag(torch.tensor([1, 5**-0.5])).double(), 1e-7)
    root1 = torch.diag(torch.tensor([1, 1, 0.5], dtype=torch.float64))
    assert_relative(state["block0.root1"], root1)


@pytest.mark.parametrize(
    ("shape", "hyper", "expected"),
    [
        ((4,), COVARIANCE, -1 / 2),
        ((4, 3), COVARIANCE, -1 / 2),
        ((2, 3, 2), {**COVARIANCE, "merge_dims": "none"}, -1 / 2),
        ((2, 3, 2, 2), {**COVARIANCE, "merge_dims": "none"}, -1 / 2),
        ((4,), {}, -1 / 2),
        ((4, 3), {}, -1 / 4),
        ((2, 3, 2), {"merge_dims": "none"}, -1 / 6),
        ((2, 3, 2), {"merge_dims": "matrix"}, -1 / 4),  # the order after merging counts
        ((2, 3, 2), {"merge_dims": "full"}, -1 / 2),
        ((4, 1, 3), {"merge_dims": "none"}, -1 / 4),  # a size-1 dimension is no mode
        ((2, 3, 2, 2), {"merge_dims": "none"}, -1 / 8),
        ((4, 3), {"exponent": 2}, -1 / 2),
        ((2, 3, 2), {"exponent": 3, "merge_dims": "none"}, -1 / 3),
        ((4,), {"exponent": [1, 3, 5]}, -1 / 1),
        ((4, 3), {"exponent": [1, 3, 5]}, -1 / 3),
        ((2, 3, 2), {"exponent": [1, 3, 5], "merge_dims": "none"}, -1 / 5),
        ((2, 3, 2, 2), {"exponent": [1, 3, 5], "merge_dims": "none"}, -1 / 8),
        ((4, 3), {"exponent": [1, 0, 5]}, -1 / 4),  # zero means the paper's
        ((4, 3), {"exponent": 1.5}, -2 / 3),
        ((2, 3, 2), {"exponent": [0, 0, 2.5], "merge_dims": "none"}, -1 / 2.5),
        ((4, 3), {**COVARIANCE, "exponent_multiplier": 1.82}, -0.91),
        ((4, 3), {"exponent_multiplier": 1.82}, -0.455),
        ((4, 3), {"exponent": 3, "exponent_multiplier": 0.5}, -1 / 6),
        ((5, 3), {"max_preconditioner_dim": 4}, -1 / 4),  # a ragged block keeps its order
    ],
)
def test_a7_exponents(shape, hyper, expected):
    param = Parameter(torch.zeros(shape, dtype=torch.float64))
    opt = double_shampoo([param], eps=1e-3, **{**PURE, **hyper})
    for _ in range(3):
        apply(opt, [param], [randn(*shape)])
    state = opt.state[param]
    factors = [key for key in state if ".factor" in key]
    assert factors
    for key in factors:
        A = state[key]
        target = power(A + 1e-3 * torch.eye(len(A)).double(), expected)
        assert_relative(state[key.replace("factor", "root")], target, what=key)


GRAFTS = [
    *("none", "sgd", "adagrad", "rmsprop", "adam", "lars", "lamb"),
    *("adagrad_normalized", "rmsprop_normalized", "adam_normalized"),
]


@pytest.mark.parametrize("grafting", GRAFTS)
@pytest.mark.parametrize("precondition_1d", [True, False])
def test_a8_a_zero_gradient_gives_a_zero_update(grafting, precondition_1d):
    """From the first step on; another parameter moves, else the step would be inert."""
    still, moving = Parameter(randn(4, 3)), Parameter(randn(3))
    vector = Parameter(randn(4))
    before = [still.detach().clone(), vector.detach().clone()]
    zeros = [torch.zeros_like(still), torch.zeros_like(vector)]
    opt = double_shampoo(
        [still, vector, moving],
        lr=1.0,
        grafting=grafting,
        precondition_frequency=1,
        precondition_1d=precondition_1d,
    )
    for _ in range(3):
        apply(opt, [still, vector, moving], [zeros[0], zeros[1], randn(3)])
    assert torch.equal(still, before[0])
    assert torch.equal(vector, before[1])
    assert moving.isfinite().all()


def test_a8_a_zero_gradient_after_real_ones_gives_a_zero_update():
    param = Parameter(randn(4, 3))
    opt = double_shampoo([param], lr=1.0, betas=(0.0, 0.9), precondition_frequency=2)
    for _ in range(3):
        apply(opt, [param], [randn(4, 3)])
    before = param.detach().clone()
    apply(opt, [param], [torch.zeros_like(param)])
    assert torch.equal(param, before)


@pytest.mark.parametrize("merge_dims", ["matrix", "full", "none"])
@pytest.mark.parametrize("precondition_1d", [True, False])
@pytest.mark.parametrize("grafting", ["none", "adam", "lamb"])
def test_a8_degenerate_shapes_follow_the_reference(merge_dims, precondition_1d, grafting):
    shapes = [(), (1,), (1, 1), (1, 1, 1), (0,), (3, 0, 2), (1, 4), (4, 1), (1, 3, 1, 2), (5, 1, 1)]
    opt = compare(
        shapes,
        6,
        lr=0.1,
        precondition_frequency=2,
        merge_dims=merge_dims,
        precondition_1d=precondition_1d,
        large_dim_method="blocking",
        grafting=grafting,
        weight_decay=0.1,
        relative_eps=1e-4,  # without a graft, rounding grows with the condition of few gradients
    )
    params = opt.param_groups[0]["params"]
    assert not opt.state.get(params[4], {}), "a size-0 parameter has no state"
    assert not opt.state.get(params[5], {}), "a size-0 parameter has no state"
