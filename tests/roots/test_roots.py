"""Roots of real factors and of synthetic spectra against float64, at the precise level."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pairwise import pairwise
from root_cases import (
    EPS,
    METHODS,
    PAIRS,
    Exact,
    direction_error,
    exact,
    fixture,
    float32_eigh,
    limits,
    spd,
    stack,
)

import shampoo.roots.minimax_table
from shampoo import inverse_root
from shampoo.kernels.reference.newton import coupled_newton, iteration_bound
from shampoo.roots.minimax_table import minimax_schedule, tabulated_powers

ROOT = Path(__file__).parents[2]


@functools.cache
def float32_eigh_error(name: str, p: int, relative_eps: float) -> float:
    XL, XR = (float32_eigh(A, p, relative_eps) for A in fixture(name)[:2])
    return direction_error(XL, XR, name, p, relative_eps)


# Each power and ridge has coefficients and limits of its own, so together they are one axis.
SCHEDULES = [*itertools.product(range(1, 9), EPS)]


@pytest.mark.parametrize(("schedule", "method", "name"), pairwise(SCHEDULES, METHODS, PAIRS))
def test_real_factors(schedule: tuple[int, float], method: str, name: str) -> None:
    """The precise level for every method, and never worse than the textbook in float32."""
    p, relative_eps = schedule
    roots = []
    direction, limit = limits(p, relative_eps)
    for side, A in enumerate(fixture(name)[:2]):
        X = inverse_root(A[None], p, relative_eps=relative_eps, method=method)[0]
        assert torch.equal(X, X.mT)
        assert X.diagonal().min() > 0
        reference = exact(name, side)
        assert reference.error(X, p, relative_eps * reference.norm) <= limit
        roots.append(X)
    error = direction_error(*roots, name, p, relative_eps)
    assert error <= direction
    assert error <= float32_eigh_error(name, p, relative_eps) + 1e-3


@pytest.mark.parametrize("p", tabulated_powers())
@pytest.mark.parametrize("relative_eps", EPS)
@pytest.mark.parametrize("method", METHODS)
def test_synthetic_spectra(method: str, relative_eps: float, p: int) -> None:
    n = 48
    flat = torch.ones(n)
    geometric = torch.logspace(0, -8, n)
    few = torch.cat([torch.ones(3), torch.full((n - 3,), 1e-5)])
    deficient = torch.cat(
        [torch.rand(n // 2, generator=torch.Generator().manual_seed(1)), torch.zeros(n - n // 2)]
    )
    A = torch.stack([spd(s, i) for i, s in enumerate((flat, geometric, few, deficient))])
    X = inverse_root(A, p, relative_eps=relative_eps, method=method)
    assert torch.equal(X, X.mT)
    for i in range(len(A)):
        reference = Exact(A[i])
        limit = limits(p, relative_eps)[1] * (4 if i == 3 else 1)
        assert reference.error(X[i], p, relative_eps * reference.norm) <= limit


@pytest.mark.parametrize(
    ("method", "promised"),
    [("eigh", 1e-5), ("coupled_newton", 1e-5), ("minimax", 3e-3), ("auto", 3e-3)],
)
@pytest.mark.parametrize("p", [2, 3, 4, 6, 8])
def test_every_method_is_as_accurate_as_its_documentation_says(
    method: str, promised: float, p: int
) -> None:
    factors = [(exact(name, side), fixture(name)[side]) for name in PAIRS for side in range(2)]
    for relative_eps in (1e-4, 1e-6):
        for reference, A in factors:
            X = inverse_root(A[None], p, relative_eps=relative_eps, method=method)[0]
            assert reference.error(X, p, relative_eps * reference.norm) <= promised


@pytest.mark.parametrize("method", ["minimax", "coupled_newton"])
def test_large_matrix(method: str) -> None:
    A = spd(torch.logspace(0, -6, 320))
    X = inverse_root(A[None], 4, method=method)[0]
    reference = Exact(A)
    assert reference.error(X, 4, 1e-6 * reference.norm) <= 2e-3


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("condition", [2, 6])
def test_newton_equals_eigh_in_float64(p: int, condition: int) -> None:
    A = spd(torch.logspace(0, -condition, 96), dtype=torch.float64)[None]
    wanted = inverse_root(A, p, eps=1e-30, relative_eps=0.0, method="eigh")
    got = inverse_root(A, p, eps=1e-30, relative_eps=0.0, method="coupled_newton")
    scale = wanted.abs().max()
    assert (got - wanted).abs().max() <= 1e-9 * scale
    loose, _, count = coupled_newton(A, p, 1e-6, 100, early_exit=True)
    assert (loose - wanted).abs().max() <= 5e-6 * scale
    tight, _, more = coupled_newton(A, p, 1e-10, 100, early_exit=True)
    assert 0 <= int(more - count) <= 2
    assert (tight - wanted).abs().max() <= 1e-9 * scale


@pytest.mark.parametrize("p", [1, 2, 4, 6, 8])
def test_newton_at_condition_1e8(p: int) -> None:
    """max|X^p B - M| is an invariant, and the iteration count is the published one."""
    B = spd(torch.logspace(0, -8, 96), dtype=torch.float64)[None]
    X, M, count = coupled_newton(B, p, 1e-6, 100, early_exit=True)
    assert (torch.matrix_power(X, p) @ B - M).abs().max() <= 1e-6
    assert int(count) <= (35 if p == 1 else 30)
    assert (M - torch.eye(96, dtype=torch.float64)).abs().max() <= 1e-6


@pytest.mark.parametrize("p", [2, 4])
def test_newton_on_float32_input_at_condition_1e8(p: int) -> None:
    """A float32 iteration converges to a wrong root here."""
    A = spd(torch.logspace(0, -8, 128))
    reference = Exact(A)
    ridge = 1e-7 * reference.norm
    X = inverse_root(A[None], p, eps=ridge, relative_eps=0.0, method="coupled_newton")[0]
    assert reference.error(X, p, ridge) <= 1e-4


def test_newton_iteration_bound_is_enough_and_early_exit_changes_no_bit() -> None:
    B = stack(3, 40, decades=3.0).double()
    B[1] *= 1e-3
    bound = iteration_bound(4, 1e-4, 40, 1e-10)
    short = coupled_newton(B, 4, 1e-10, bound, early_exit=True)
    long = coupled_newton(B, 4, 1e-10, bound, early_exit=False)
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))
    assert int(short[2].max()) < bound < 40


def test_newton_that_diverges_stops_with_a_finite_iterate() -> None:
    """A negative mode makes the residual grow by more than 1.2: the iterate before is returned."""
    spectrum = torch.logspace(0, -3, 24)
    spectrum[-1] = -0.1
    X, M, count = coupled_newton(spd(spectrum, dtype=torch.float64)[None], 4, 1e-10, 100, True)
    assert (M - torch.eye(24, dtype=torch.float64)).norm() <= 24**0.5
    assert X.isfinite().all()
    assert int(count) < 30


@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_newton_says_so_of_a_matrix_that_it_cannot_finish(p: int, dtype: torch.dtype) -> None:
    """An indefinite one diverges, and without a ridge eigenvalues of zero never grow to one."""
    indefinite = torch.logspace(0, -3, 24)
    indefinite[-1] = -0.1
    deficient = torch.cat([torch.ones(12), torch.zeros(12)])
    A = torch.stack([spd(s, dtype=dtype) for s in (indefinite, deficient, deficient + 0.5)])
    X = inverse_root(A, p, eps=1e-30, relative_eps=0.0, method="coupled_newton")
    assert X[:2].isnan().all()
    reference = Exact(A[2])
    assert reference.error(X[2], p, 1e-30) <= 1e-5, "the neighbour is right"
    with_ridge = inverse_root(A[1:2], p, relative_eps=1e-6, method="coupled_newton")
    assert with_ridge.isfinite().all()


@pytest.mark.parametrize("method", ["eigh", "coupled_newton"])
@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("corner", [1, -1])
def test_tridiagonal_families(method: str, p: int, corner: int) -> None:
    for n in (10, 100):
        for alpha, beta in ((1e-3, 1e-3 / 3), (1.0, 1e-3), (1.0, 0.1), (1e2, 1.0), (1e2, 33.0)):
            A = torch.diag(torch.full((n,), alpha))
            A += torch.diag(torch.full((n - 1,), beta), 1) + torch.diag(
                torch.full((n - 1,), beta), -1
            )
            A[0, 0] += corner * beta
            if corner > 0:
                A[-1, -1] += beta
            j = torch.arange(n, dtype=torch.float64)
            if corner > 0:
                values = alpha + 2 * beta * torch.cos(j * torch.pi / n)
            else:
                values = alpha + 2 * beta * torch.cos(2 * (j + 1) * torch.pi / (2 * n + 1))
            X = inverse_root(A[None], p, relative_eps=0.0, method=method)[0].double()
            wanted = (values ** (-1 / p)).sort().values
            torch.testing.assert_close(torch.linalg.eigvalsh(X), wanted, rtol=1e-5, atol=0.0)
            back = torch.linalg.matrix_power(torch.linalg.inv(X), p)
            assert (back - A.double()).abs().max() <= 1e-4 * alpha


@pytest.mark.parametrize("method", METHODS)
def test_identity(method: str) -> None:
    X = inverse_root(torch.eye(7).repeat(2, 1, 1), 4, relative_eps=0.0, eps=1e-12, method=method)
    assert (X - torch.eye(7)).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_negative_eigenvalue_is_shifted_before_the_ridge(dtype: torch.dtype) -> None:
    spectrum = torch.tensor([2.0, 1.0, 0.5, -0.25])
    A = spd(spectrum, dtype=dtype)[None]
    X = inverse_root(A, 2, eps=0.1, relative_eps=0.0, method="eigh")[0].double()
    wanted = (spectrum.double() + 0.35) ** -0.5
    torch.testing.assert_close(torch.linalg.eigvalsh(X), wanted, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_diagonal_matrices_are_exact_and_chosen_one_by_one(method: str) -> None:
    diagonal = torch.tensor([3.0, 1e-3, 0.0, 7.0, 1e-9])
    nearly = torch.diag(diagonal)
    nearly[0, 1] = nearly[1, 0] = 1e-5
    A = torch.stack([torch.diag(diagonal), nearly])
    X = inverse_root(
        A, 4, eps=1e-6, relative_eps=0.0 if method != "minimax" else 1e-7, method=method
    )
    exact_root = (diagonal.double() + 1e-6) ** -0.25
    assert torch.equal(X[0], torch.diag(exact_root).float())
    assert X[1][0, 1] != 0
    if method == "eigh":
        off = inverse_root(A, 4, eps=1e-6, relative_eps=0.0, method="coupled_newton")[1]
        torch.testing.assert_close(X[1], off, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 3, 17, 33])
def test_sizes_scales_and_degenerate_matrices(method: str, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    G = torch.randn(n, n, generator=generator)
    full = G @ G.mT
    one = torch.outer(G[0], G[0])
    holes = full.clone()
    holes[n // 2] = 0
    holes[:, n // 2] = 0
    base = torch.stack([(A + A.mT) / 2 for A in (full, one, holes)])
    A = torch.cat([base, base * 1e-30, base * 1e25, torch.zeros(1, n, n)])
    X = inverse_root(A, 4, eps=1e-38, method=method)
    assert X.isfinite().all()
    assert torch.equal(X, X.mT)
    for matrix, root in zip(A[:-1], X[:-1], strict=True):
        reference = Exact(matrix)
        assert reference.error(root, 4, max(1e-6 * reference.norm, 1e-38)) <= 8e-3
    zero = torch.eye(n) * (1e-38) ** -0.25
    torch.testing.assert_close(X[-1], zero, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_empty_stack_and_zero_matrix_without_eps(method: str) -> None:
    assert inverse_root(torch.empty(0, 5, 5), 4, method=method).shape == (0, 5, 5)
    assert inverse_root(torch.empty(3, 0, 0), 4, method=method).shape == (3, 0, 0)
    X = inverse_root(torch.zeros(2, 3, 3), 4, eps=0.0, method=method)
    assert torch.equal(X, torch.eye(3).expand(2, 3, 3))


def test_rank_one_pseudo_inverse_is_the_polar_factor() -> None:
    """The first step of Shampoo on a rank-one gradient: L^(-1/4) G R^(-1/4) = u v^T."""
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 128, generator=generator)
    G = torch.outer(u, v) / 11
    polar = torch.outer(u.double() / u.double().norm(), v.double() / v.double().norm())
    L, R = G @ G.mT, G.mT @ G
    A = torch.stack([(L + L.mT) / 2, (R + R.mT) / 2])

    def error(**options: float) -> float:
        XL, XR = inverse_root(A, 4, **options).double()  # type: ignore[arg-type]
        return float((XL @ G.double() @ XR - polar).norm())

    assert error(eps=0.0, relative_eps=0.0) <= 1e-5
    assert error(eps=1e-12, relative_eps=0.0) <= 0.2
    assert torch.equal(
        inverse_root(torch.zeros(1, 4, 4), 2, eps=0, relative_eps=0), torch.zeros(1, 4, 4)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1e-6, 0.37, 1e8])
def test_relative_ridge_follows_the_scale(method: str, factor: float) -> None:
    A = stack(2, 30, decades=3.0)
    X = inverse_root(A, 4, eps=0.0, relative_eps=1e-4, method=method)
    Y = inverse_root(A * factor, 4, eps=0.0, relative_eps=1e-4, method=method)
    assert (Y * factor**0.25 - X).abs().max() <= 1e-5 * X.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_larger_of_the_two_ridges_counts(method: str) -> None:
    A = stack(1, 30, decades=3.0)
    absolute = inverse_root(A, 2, eps=0.03, relative_eps=1e-4, method=method)[0]
    assert Exact(A[0]).error(absolute, 2, 0.03) <= 1e-3


@pytest.mark.parametrize("p", [1.5, 2.5, 4 / 0.7, 9, 4])
def test_auto_takes_any_power_in_any_precision(p: float) -> None:
    for dtype, limit in ((torch.float32, 2e-3), (torch.float64, 1e-9)):
        A = stack(2, 40, decades=3.0).to(dtype)
        for matrix, root in zip(A, inverse_root(A, p), strict=True):
            reference = Exact(matrix)
            assert reference.error(root, p, 1e-6 * reference.norm) <= limit


@pytest.mark.parametrize("method", METHODS)
def test_neighbours_input_and_generator_are_untouched(method: str) -> None:
    A = stack(6, 33)
    before, state = A.clone(), torch.get_rng_state()
    clean = inverse_root(A, 4, method=method)
    assert torch.equal(clean, inverse_root(A, 4, method=method))
    assert torch.equal(A, before)
    assert torch.equal(torch.get_rng_state(), state)
    for poison in (torch.nan, torch.inf):
        A[2, 3, 4] = A[2, 4, 3] = poison
        dirty = inverse_root(A, 4, method=method)
        assert not dirty[2].isfinite().all()
        keep = [0, 1, 3, 4, 5]
        assert torch.equal(dirty[keep], clean[keep])


@pytest.mark.parametrize(
    ("method", "p", "n", "bad"),
    pairwise(METHODS, [1, 2, 4], [1, 2, 5], [torch.inf, -torch.inf, torch.nan]),
)
def test_a_matrix_that_is_not_finite_has_no_root(method: str, p: int, n: int, bad: float) -> None:
    """Diagonal, full or all of it, of any size, between neighbours that keep their bits."""
    places = [(0, 0), (n - 1, n - 1), (0, n - 1)]
    A = torch.eye(n).repeat(2 * len(places) + 3, 1, 1) * 3.0
    A[0] = stack(1, n)[0] + torch.eye(n)
    A[len(places) + 1 : 2 * len(places) + 1] += 0.5
    clean = inverse_root(A, p, method=method)
    for i, (row, column) in enumerate(places * 2):
        A[1 + i, row, column] = A[1 + i, column, row] = bad
    A[-1] = bad
    root = inverse_root(A, p, method=method)
    assert root[1:-2].isnan().all()
    assert root[-1].isnan().all()
    assert torch.equal(root[[0, -2]], clean[[0, -2]])
    if method in ("auto", "eigh"):
        assert inverse_root(A, p, eps=0.0, relative_eps=0.0, method=method)[1:-2].isnan().all()


@pytest.mark.parametrize("method", METHODS)
def test_root_does_not_depend_on_its_batch(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    A = stack(5, 40)
    together = inverse_root(A, 4, method=method)
    monkeypatch.setattr("shampoo.roots.solver._CPU_CHUNK", 1)
    alone = inverse_root(A, 4, method=method)
    for matrix, one, other in zip(A, together, alone, strict=True):
        reference = Exact(matrix)
        ridge = 1e-6 * reference.norm
        assert abs(reference.error(one, 4, ridge) - reference.error(other, 4, ridge)) <= 1e-3
        assert reference.error(one, 4, ridge) <= 2e-3


@pytest.mark.parametrize("setting", ["medium", "high"])
def test_precision_settings_neither_leak_in_nor_out(setting: str) -> None:
    A = stack(2, 96)
    wanted = inverse_root(A, 4, method="minimax")
    matmul = torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        flags = matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = inverse_root(A, 4, method="minimax")
            assert torch.is_autocast_enabled("cpu")
        assert (matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == flags
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got, wanted)


def test_inherited_precision_stays_inherited() -> None:
    """In a fresh process, where nothing has been set yet, by way of the newer interface."""
    script = (
        "import torch; from shampoo import inverse_root\n"
        "torch.backends.fp32_precision = 'tf32'\n"
        "matmul = torch.backends.mkldnn.matmul\n"
        "inverse_root(torch.rand(1, 30, 30) + 30 * torch.eye(30), 4, method='minimax')\n"
        "assert matmul.fp32_precision == 'tf32', matmul.fp32_precision\n"
        "torch.backends.fp32_precision = 'ieee'\n"
        "assert matmul.fp32_precision == 'ieee', matmul.fp32_precision\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0}, "Invalid p=0. Must be finite and > 0"),
        ({"p": 4.5, "method": "coupled_newton"}, "Invalid p=4.5 .* integer: use 'eigh'"),
        ({"p": 9, "method": "minimax"}, "Invalid p=9 .* one of 1, 2, 3, 4, .*: use 'eigh'"),
        ({"p": 2.5, "method": "minimax"}, "Invalid p=2.5"),
        ({"p": 4, "method": "qr"}, "Invalid method='qr'. Must be one of auto, eigh"),
        ({"p": 4, "eps": -1.0}, "Invalid eps=-1.0. Must be finite and >= 0.0"),
        ({"p": 4, "relative_eps": float("nan")}, "Invalid relative_eps=nan"),
        ({"p": 4, "eps": 0.0, "relative_eps": 0.0, "method": "minimax"}, "pseudo-inverse"),
        ({"p": 4, "eps": 0.0, "relative_eps": 0.0, "method": "coupled_newton"}, "pseudo-inverse"),
    ],
)
def test_errors_name_value_bound_and_remedy(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inverse_root(torch.eye(3)[None], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("A", "message"),
    [
        (torch.eye(3), r"Invalid shape \(3, 3\). Must be \[B, n, n\]: one matrix is A\[None\]"),
        (torch.zeros(2, 3, 4), r"Invalid shape \(2, 3, 4\)"),
        (torch.zeros(1, 3, 3, dtype=torch.float16), "Invalid dtype torch.float16"),
        (torch.zeros(1, 3, 3, dtype=torch.int64), "Invalid dtype torch.int64"),
        (torch.zeros(1, 3, 3, dtype=torch.complex64), "Invalid dtype torch.complex64"),
    ],
)
def test_errors_of_the_stack(A: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inverse_root(A, 4)


def test_schedule_is_the_largest_tabulated_below() -> None:
    rows = json.loads(
        (Path(shampoo.roots.minimax_table.__file__).parent / "coefficients.json").read_text()
    )
    table = rows["schedules"]["4"]
    for asked, found in (
        (1e-6, "1e-06"),
        (5e-6, "1e-06"),
        (9e-7, "1e-07"),
        (1e-9, "1e-07"),
        (0.5, "1e-02"),
    ):
        assert [list(s) for s in minimax_schedule(4, asked)] == table[found]["coefficients"]
    assert tabulated_powers() == (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)


def test_soft_clamp_below_the_table() -> None:
    A = spd(torch.logspace(0, -9, 32))[None]
    X = inverse_root(A, 4, eps=0.0, relative_eps=1e-10, method="minimax")
    assert X.isfinite().all()
    assert X.abs().max() <= 1.5 * 1e-7**-0.25


@pytest.mark.slow
def test_shipped_table_is_what_the_script_makes() -> None:
    pytest.importorskip("mpmath")
    path = Path(shampoo.roots.minimax_table.__file__).parent / "coefficients.json"
    command = [sys.executable, ROOT / "tools" / "generate_coefficients.py", "--check", path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "largest relative deviation" in result.stdout
