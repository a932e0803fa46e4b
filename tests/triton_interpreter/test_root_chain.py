"""The whole root iteration: the "standard" level of accuracy, symmetry and independence."""

import pytest
import torch
from comparison import error
from root_cases import EPS, Exact, direction_error, exact, fixture, spd, stack

from shampoo.kernels.triton.minimax import minimax_root_, supports
from shampoo.kernels.triton.symmetric_gemm import LaunchConfig
from shampoo.roots.minimax_table import minimax_schedule, tabulated_powers

CONFIG = LaunchConfig(32, 32, 4, 2)

# p from: (direction, root) limits at each of EPS, on a GPU
LIMITS = {
    4: ((1e-3, 3e-3, 1.5e-2), (2e-3, 2e-2, 1e-1)),
    2: ((2e-3, 6e-3, 3e-2), (2e-3, 2e-2, 1e-1)),
    1: ((4e-3, 3e-2, 1e-1), (5e-3, 1.5e-1, 1.5)),
}


def limits(p, relative_eps):
    direction, root = LIMITS[4 if p >= 4 else 2 if p >= 2 else 1]
    return direction[EPS.index(relative_eps)], root[EPS.index(relative_eps)]


def solve(A, p, relative_eps, eps=0.0, config=None, **options):
    root, ridge = torch.full_like(A, torch.nan), torch.full((len(A),), torch.nan).double()
    schedule = [c for step in minimax_schedule(p, relative_eps) for c in step]
    assert supports(root, ridge, A, p, eps, relative_eps, schedule)
    minimax_root_(root, ridge, A, p, eps, relative_eps, schedule, config=config, **options)
    return root, ridge


@pytest.mark.parametrize(
    ("p", "relative_eps", "sides"),
    [(4, 1e-6, 2), (2, 1e-6, 2), *((p, eps, 1) for p in (4, 2) for eps in (1e-4, 1e-7))],
)
def test_the_standard_level_on_real_factors(p, relative_eps, sides):
    roots = []
    worst_direction, worst_root = limits(p, relative_eps)
    for side in range(sides):  # n = 64 and 288
        A, truth = fixture("f0")[side], exact("f0", side)
        root, ridge = solve(A[None], p, relative_eps)
        assert torch.equal(root, root.mT)
        assert abs(ridge.item() / (relative_eps * truth.norm) - 1) < 1e-6
        assert truth.error(root[0], p, relative_eps * truth.norm) <= worst_root
        roots.append(root[0])
    if sides == 2:
        assert direction_error(*roots, "f0", p, relative_eps) <= worst_direction


@pytest.mark.parametrize("p", [4, 2])
def test_the_standard_level_with_large_tiles(p):
    A, truth = fixture("f1")[0], exact("f1", 0)
    root, _ = solve(A[None], p, 1e-6)
    assert truth.error(root[0], p, 1e-6 * truth.norm) <= limits(p, 1e-6)[1]


@pytest.mark.parametrize("p", tabulated_powers())
def test_every_power_and_ragged_sizes(p):
    for n in (1, 3, 33) if p != 4 else (1, 3, 63, 65):
        A = stack(1 if n > 3 else 2, n)
        root, ridge = solve(A, p, 1e-4, config=CONFIG)
        for matrix, X, used in zip(A, root, ridge, strict=True):
            assert torch.equal(X, X.mT)
            assert Exact(matrix).error(X, p, used.item()) <= limits(p, 1e-4)[1]


def test_the_ridge_that_is_absolute():
    A = stack(2, 33)
    root, ridge = solve(A, 4, 1e-6, eps=1e-3, config=CONFIG)
    assert torch.equal(ridge, torch.full_like(ridge, 1e-3))
    assert Exact(A[0]).error(root[0], 4, 1e-3) <= 2e-3


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_scale(scale):
    A = stack(1, 65) * scale
    root, ridge = solve(A, 4, 1e-4, config=CONFIG)
    truth = Exact(A[0] / scale)
    assert truth.error(root[0].double() * scale**0.25, 4, ridge.item() / scale) <= 2e-3


def test_zero_rank_one_and_zero_rows():
    column = torch.randn(65, 1)
    holes = stack(1, 65)[0]
    holes[3], holes[:, 3] = 0, 0
    A = torch.stack([torch.zeros(65, 65), column @ column.mT, holes])
    root, ridge = solve(A, 4, 1e-4, eps=1e-8, config=CONFIG)
    assert error(root[0], 1e2 * torch.eye(65).double()) <= 1e2 * 5e-4  # the tolerance of a schedule
    for matrix, X, used in zip(A[1:], root[1:], ridge[1:], strict=True):
        assert Exact(matrix).error(X, 4, used.item()) <= 4 * 2e-3


def test_matrices_depend_on_nothing_but_themselves():
    A = stack(3, 33)
    A[1] = torch.nan
    A[2, 5, 5] = torch.inf
    before = A.clone()
    root, ridge = solve(A, 4, 1e-6, config=CONFIG)
    assert torch.equal(A.nan_to_num(), before.nan_to_num())
    assert not root[1:3].isfinite().any()
    for row in (0,):
        alone, own = solve(A[row : row + 1], 4, 1e-6, config=CONFIG)
        assert torch.equal(alone[0], root[row])
        assert torch.equal(own[0], ridge[row])
        wide = torch.zeros(1, 70, 70)
        wide[0, :33, :33] = A[row]
        padded, own = solve(wide, 4, 1e-6, config=CONFIG)
        assert torch.equal(padded[0, :33, :33], root[row])
        assert torch.equal(own[0], ridge[row])


def test_mixed_sizes_in_one_class():
    sizes = (65, 33, 1, 96)
    A = torch.full((4, 96, 96), torch.nan)  # nobody reads what is beyond a size
    for b, n in enumerate(sizes):
        A[b, :n, :n] = spd(torch.logspace(0, -5, n), seed=b)
    real = torch.tensor(sizes, dtype=torch.int32)
    root, ridge = solve(A, 4, 1e-4, config=CONFIG, sizes=real)
    for b, n in enumerate(sizes):
        alone, own = solve(A[b : b + 1, :n, :n], 4, 1e-4, config=CONFIG)
        assert torch.equal(alone[0], root[b, :n, :n])
        assert torch.equal(own[0], ridge[b])
        assert root[b, n:].isnan().all()


def test_a_slice_of_a_larger_tensor():
    wide, into = torch.zeros(2, 40, 44), torch.full((2, 40, 44), 7.0)
    wide[:, :33, :33] = stack(2, 33)
    ridge = torch.empty(2).double()
    schedule = [c for step in minimax_schedule(4, 1e-4) for c in step]
    view, root = wide[:, :33, :33], into[:, :33, :33]
    minimax_root_(root, ridge, view, 4, 0.0, 1e-4, schedule, config=CONFIG)
    expected, _ = solve(view.contiguous(), 4, 1e-4, config=CONFIG)
    assert torch.equal(root, expected)
    assert (into[:, 33:] == 7).all()
    assert (into[:, :, 33:] == 7).all()
