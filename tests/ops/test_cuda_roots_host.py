"""The roots of csrc/cuda/minimax_small.cu, emulated on the host, at their standard level."""

import pytest
import torch
from host_build import HostOps
from root_cases import Exact, fixture, spd, stack

# (direction, root) limits, standard level
LIMITS = {
    (2, 1e-4): (2e-3, 2e-3),
    (2, 1e-6): (6e-3, 2e-2),
    (4, 1e-4): (1e-3, 2e-3),
    (4, 1e-6): (3e-3, 2e-2),
}

# Principal blocks of the factors of a layer: whole matrices where those are small enough.
BLOCKS = [
    ("f0", slice(0, 64), slice(0, 128)),
    ("f1", slice(0, 128), slice(0, 96)),
    ("f1", slice(0, 128), slice(400, 500)),
    ("f2", slice(100, 133), slice(0, 64)),
    ("f3", slice(128, 256), slice(0, 32)),
]


@pytest.fixture(params=["forward", "backward", "truncating"])
def ops(request):
    """Both orders of the warps, and tensor cores that round toward zero."""
    return HostOps(request.param == "truncating", request.param == "backward")


@pytest.fixture(scope="module")
def host():
    return HostOps()


def block(A, rows):
    return A[rows, rows].contiguous()


@pytest.mark.parametrize(("p", "relative_eps"), LIMITS, ids=str)
@pytest.mark.parametrize(("name", "rows", "columns"), BLOCKS, ids=str)
def test_real_factors_meet_the_standard_level(ops, name, rows, columns, p, relative_eps):
    L, R, now, later = fixture(name)
    factors = block(L, rows), block(R, columns)
    roots, truths = [], []
    for A in factors:
        X, ridge = ops.small_root(A[None], p, relative_eps)
        exact = Exact(A)
        assert ridge.item() == pytest.approx(relative_eps * exact.norm, rel=1e-5)
        assert torch.equal(X, X.mT)
        assert (X.diagonal(dim1=1, dim2=2) > 0).all()
        damping = relative_eps * exact.norm
        assert exact.error(X[0], p, damping) <= LIMITS[p, relative_eps][1]
        roots.append(X[0].double())
        truths.append(exact.root(p, damping))
    for G in (now, later):
        G = G[rows, columns].double()
        wanted = truths[0] @ G @ truths[1]
        error = (roots[0] @ G @ roots[1] - wanted).norm() / wanted.norm()
        assert error <= LIMITS[p, relative_eps][0]


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128])
def test_every_size(ops, n, p):
    A = spd(torch.logspace(0, -5, n), seed=n)[None]
    before = A.clone()
    X, _ = ops.small_root(A, p, 1e-6)
    exact = Exact(A[0])
    assert exact.error(X[0], p, 1e-6 * exact.norm) <= LIMITS[p, 1e-6][1]
    assert torch.equal(X, X.mT)
    assert torch.equal(A, before)


def in_two_halves(A):
    """What the planes of the kernel hold of [B, n, n]: 22 bits of every entry, in float64."""
    scale = 2048.0 / torch.exp2(A.abs().amax((1, 2), keepdim=True).log2().floor())
    high = (A * scale).half()
    low = (A * scale - high).half()
    return (high.double() + low.double()) / scale


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("n", [2, 3, 8])
def test_small_matrices_lose_what_two_halves_lose(host, n, p):
    """Few entries average no rounding away: of matrices with n = 2 and a condition of 1e6, one in
    two hundred misses the standard level at p = 2. Rounding A alone to two halves, with exact
    roots, costs two thirds of that."""
    A = torch.stack([spd(torch.logspace(0, -6, n), seed=seed) for seed in range(48)])
    roots, _ = host.small_root(A, p, 1e-6)
    got, floor = [], []
    for matrix, root, rounded in zip(A, roots, in_two_halves(A), strict=True):
        exact = Exact(matrix)
        ridge = 1e-6 * exact.norm
        got.append(exact.error(root, p, ridge))
        floor.append(exact.error(Exact(rounded).root(p, ridge), p, ridge))
    got, floor = torch.tensor(got), torch.tensor(floor)
    assert got.square().mean().sqrt() <= 3 * floor.square().mean().sqrt()
    assert got.quantile(0.9) <= LIMITS[p, 1e-6][1]
    assert got.max() <= 2 * LIMITS[p, 1e-6][1]


@pytest.mark.parametrize("relative_eps", [1e-2, 1e-3, 1e-4, 1e-5, 1e-7])
@pytest.mark.parametrize("p", [2, 3, 4, 5, 6, 8])
def test_every_power(host, p, relative_eps):
    # Between the limits of 1e-4 and 1e-6, as noise is between them.
    limit = {1e-5: 5e-3, 1e-7: 1e-1}.get(relative_eps, 2e-3)
    for n in (20, 40, 70):
        A = spd(torch.logspace(0, -6, n), seed=n)
        for residual in (None, 0):  # the last steps in half precision, or all in full
            X, _ = host.small_root(A[None], p, relative_eps, residual=residual)
            exact = Exact(A)
            assert exact.error(X[0], p, relative_eps * exact.norm) <= limit


@pytest.mark.parametrize("n", [7, 40, 90, 100])
def test_a_root_does_not_depend_on_its_neighbours(host, n):
    A = stack(3, n, 5.0)
    together, ridges = host.small_root(A, 4, 1e-6)
    backward, _ = HostOps(backward=True).small_root(A, 4, 1e-6)
    assert torch.equal(together, backward)
    for i in range(3):
        alone, ridge = host.small_root(A[i : i + 1].clone(), 4, 1e-6)
        assert torch.equal(alone[0], together[i])
        assert ridge[0] == ridges[i]
    for value in (torch.nan, torch.inf):
        sick = A.clone()
        sick[1, 2, 5] = sick[1, 5, 2] = value
        X, ridge = host.small_root(sick, 4, 1e-6)
        assert torch.equal(X[::2], together[::2])
        assert X[1].isnan().all()
        assert ridge[1].isnan()


@pytest.mark.parametrize(("n", "padded"), [(20, 32), (50, 63), (70, 96), (100, 128)])
def test_zero_rows_change_nothing_within_a_size_class(host, n, padded):
    A = spd(torch.logspace(0, -5, n))
    larger = torch.zeros(padded, padded)
    larger[:n, :n] = A
    X, _ = host.small_root(A[None], 4, 1e-6)
    Y, ridge = host.small_root(larger[None], 4, 1e-6)
    assert torch.equal(X[0], Y[0, :n, :n])
    assert not Y[0, :n, n:].any()
    expected = ridge.item() ** -0.25
    torch.testing.assert_close(Y[0, n:, n:], torch.eye(padded - n) * expected, rtol=1e-2, atol=0)


def test_only_the_upper_triangle_is_read(host):
    A = spd(torch.logspace(0, -4, 50))
    X, _ = host.small_root(A[None], 4, 1e-6)
    upper = torch.where(torch.ones(50, 50).triu().bool(), A, torch.nan)
    assert torch.equal(host.small_root(upper[None], 4, 1e-6)[0], X)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e25])
def test_scale_is_taken_out(host, scale):
    A = spd(torch.logspace(0, -5, 48)) * scale
    X, _ = host.small_root(A[None], 4, 1e-6)
    exact = Exact(A)
    assert exact.error(X[0], 4, 1e-6 * exact.norm) <= 2e-2


def test_powers_of_two_change_only_the_exponent(host):
    A = spd(torch.logspace(0, -5, 48))[None]
    X, _ = host.small_root(A, 4, 1e-6)
    assert torch.equal(host.small_root(A * 2.0**40, 4, 1e-6)[0], X * 2.0**-10)


def test_degenerate_matrices(host):
    zero, rank_one = torch.zeros(20, 20), torch.zeros(20, 20)
    rank_one[3:9, 3:9] = 2.0
    X, ridge = host.small_root(torch.stack([zero, rank_one]), 4, 1e-6, eps=1e-8)
    torch.testing.assert_close(X[0], torch.eye(20) * 100.0, rtol=1e-2, atol=0)
    assert ridge[0] == 1e-8
    exact = Exact(rank_one)
    assert exact.error(X[1], 4, 1e-6 * exact.norm) <= 4 * 2e-2


def test_the_larger_of_the_two_ridges_counts(host):
    A = spd(torch.logspace(0, -5, 33))
    exact = Exact(A)
    X, ridge = host.small_root(A[None], 4, 1e-6, eps=1e-3)
    assert ridge.item() == 1e-3
    assert exact.error(X[0], 4, 1e-3) <= 2e-3
