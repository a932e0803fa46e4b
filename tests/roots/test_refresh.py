"""The probe on good and injected bad roots, and the ladder that repairs or keeps."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from root_cases import PAIRS, Exact, exact, fixture, spd, stack
from torch import Tensor

from shampoo import Shampoo, inverse_root, ops
from shampoo.kernels.reference import ops as reference
from shampoo.roots.refresh import PendingFlags, refresh_roots_
from shampoo.roots.root_check import check_values, passes_root_check

OPTIONS: dict[str, Any] = {
    "p": 4, "correction": 1.0, "eps": 1e-12, "relative_eps": 1e-6, "method": "minimax",
}  # fmt: skip


def state(factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count = len(factor)
    failures = torch.zeros(count, dtype=torch.int32)
    return torch.zeros_like(factor), failures, torch.zeros(count, dtype=torch.bool)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("p", [2, 3, 4, 5, 8])
def test_probe_passes_good_roots(name: str, p: int) -> None:
    for side, A in enumerate(fixture(name)[:2]):
        ridge = torch.tensor([1e-6 * exact(name, side).norm], dtype=torch.float64)
        X = inverse_root(A[None], p, method="minimax")
        commutator, form = check_values(X, A[None], ridge, p)
        assert commutator.item() <= (5e-3 if p >= 4 else 3e-2)
        assert 0.98 <= form.item() <= 1.02
        assert passes_root_check(X, A[None], ridge, p).all()


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_probe_flags_injected_failures(p: int, scale: float) -> None:
    A = stack(7, 64, decades=6.0) * scale
    ridge = 1e-6 * torch.tensor([Exact(a).norm for a in A], dtype=torch.float64)
    X = inverse_root(A, p, eps=0.0)
    X[1, 3, 5] = torch.nan
    X[2] *= 1.5
    X[3] = -X[3]
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    # A root of a matrix that TF32 rounding has touched.
    X[4] = inverse_root((A[4] + 3e-4 * scale * (noise + noise.mT) / 8)[None], p, eps=0.0)[0]
    X[5, 0, 0] = torch.inf
    expected = [True, False, False, False, p == 1, False, True]
    got = passes_root_check(X, A, ridge, p).tolist()
    if p == 1:
        got[4] = True  # the commutator does not tell for p = 1
    assert got == expected


@pytest.mark.parametrize("p", [2, 3, 4, 7])
def test_probe_flags_a_rotated_root(p: int) -> None:
    """Only the commutator sees it: the quadratic form stays near 1."""
    A = stack(1, 64, decades=4.0)
    reference = Exact(A[0])
    ridge = torch.tensor([1e-6 * reference.norm], dtype=torch.float64)
    vectors = reference.vectors.clone()
    angle = torch.tensor(0.4)
    first, second = reference.vectors[:, -1], reference.vectors[:, -12]
    vectors[:, -1] = angle.cos() * first + angle.sin() * second
    vectors[:, -12] = angle.cos() * second - angle.sin() * first
    X = (vectors * (reference.values + ridge) ** (-1 / p) @ vectors.mT).float()[None]
    commutator, form = check_values(X, A, ridge, p)
    assert 0.9 <= form.item() <= 1.1
    assert commutator.item() > (2e-2 if p >= 4 else 8e-2)
    assert not passes_root_check(X, A, ridge, p).any()


def test_probe_flags_a_negative_mode() -> None:
    """An eigenvalue of -10 ridge: the coupled iteration diverges on it."""
    spectrum = torch.logspace(0, -6, 48)
    norm = float((spectrum.double() ** 4).sum() ** 0.25)
    spectrum[-1] = -10e-6 * norm
    A = spd(spectrum)[None]
    X = inverse_root(A, 4, method="minimax")
    assert not passes_root_check(X, A, torch.tensor([1e-6 * norm], dtype=torch.float64), 4).any()


def test_probe_accepts_a_pseudo_inverse_and_real_powers() -> None:
    G = torch.randn(1, 20, 3, generator=torch.Generator().manual_seed(0))
    A = torch.cat([G @ G.mT, torch.zeros(1, 20, 20)])
    A[0] = (A[0] + A[0].mT) / 2
    X = inverse_root(A, 4, eps=0.0, relative_eps=0.0)
    assert passes_root_check(X, A, torch.zeros(2, dtype=torch.float64), 4).all()
    B = stack(1, 30)
    ridge = torch.tensor([1e-6 * Exact(B[0]).norm], dtype=torch.float64)
    assert passes_root_check(inverse_root(B, 4.4), B, ridge, 4.4).all()
    assert not passes_root_check(inverse_root(B, 3.0) * torch.nan, B, ridge, 4.4).any()


@pytest.mark.parametrize("method", ["auto", "eigh", "coupled_newton", "minimax"])
def test_refresh_is_the_root_of_the_corrected_factor(method: str) -> None:
    A = stack(5, 40)
    root, failures, ready = state(A)
    failures += 3
    before, generator = A.clone(), torch.get_rng_state()
    refresh_roots_(root, A, failures, ready, **{**OPTIONS, "correction": 0.19, "method": method})
    assert torch.equal(root, inverse_root(A / 0.19, 4, method=method))
    assert torch.equal(A, before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert ready.all()
    assert not failures.any()


def test_negative_mode_is_repaired_and_neighbours_keep_their_bits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    A = stack(4, 48)
    spectrum = torch.logspace(0, -6, 48)
    norm = float((spectrum.double() ** 4).sum() ** 0.25)
    spectrum[-1] = -10e-6 * norm
    A[2] = spd(spectrum)
    root, failures, ready = state(A)
    refresh_roots_(root, A, failures, ready, **OPTIONS)
    keep = [0, 1, 3]
    assert torch.equal(root[keep], inverse_root(A, 4, method="minimax")[keep])
    assert ready.all()
    assert not failures.any()
    assert root[2].isfinite().all()
    assert torch.linalg.eigvalsh(root[2].double()).min() > 0
    assert not caplog.records


def test_bad_factor_keeps_its_root_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    A = stack(4, 33)
    root, failures, ready = state(A)
    A[1, 0, 0] = torch.nan
    refresh_roots_(root, A, failures, ready, **OPTIONS)
    assert ready.tolist() == [True, False, True, True]
    assert not root[1].any()
    assert root.isfinite().all()
    good = stack(4, 33)
    refresh_roots_(root, good, failures, ready, **OPTIONS)
    assert failures.tolist() == [0, 0, 0, 0]
    previous = root.clone()
    good[2] = torch.inf
    good[3] *= 2
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for k in range(1, 5):
            refresh_roots_(root, good, failures, ready, **OPTIONS)
            assert failures.tolist() == [0, 0, k, 0]
    assert torch.equal(root[2], previous[2])
    assert not torch.equal(root[3], previous[3])
    assert ready.all()
    assert len(caplog.records) == 4
    assert "1 of 4 inverse roots failed" in caplog.text


def test_second_rung_is_a_larger_ridge_and_third_is_eigh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Injected: the fast solver ruins one matrix, first at the base ridge, then at every ridge."""
    solver = ops.minimax_root_
    calls: list[tuple[int, float]] = []
    worst = [1e-6]

    def broken(root: Tensor, ridge: Tensor, factor: Tensor, *args: Any) -> None:
        solver(root, ridge, factor, *args)
        calls.append((len(factor), args[2]))
        bad = factor[:, 0, 0] > 50
        if args[2] <= worst[0]:
            root[bad] = torch.randn(root.shape[1:])

    monkeypatch.setattr(ops, "minimax_root_", broken)
    A = stack(3, 40)
    A[1] *= 100 / A[1, 0, 0]
    norm = Exact(A[1]).norm
    for ruined, relative_eps in ((1e-6, 1e-5), (1.0, 1e-6)):
        worst[0] = ruined
        calls.clear()
        root, failures, ready = state(A)
        refresh_roots_(root, A, failures, ready, **OPTIONS)
        assert [count for count, _ in calls] == [3, 1]
        assert calls[1][1] == pytest.approx(1e-5)
        assert Exact(A[1]).error(root[1], 4, relative_eps * norm) <= 2e-3
        assert ready.all()
        assert not failures.any()


def test_decomposition_that_does_not_converge_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    decompose = torch.linalg.eigh

    def stubborn(matrices: Tensor, **out: Any) -> Any:
        if (matrices[:, 0, 0] > 50).any():
            raise torch.linalg.LinAlgError("injected: failed to converge")
        return decompose(matrices, **out)

    A = stack(5, 12)
    A[3] *= 100 / A[3, 0, 0]
    clean = inverse_root(A, 4, method="eigh")
    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    monkeypatch.setattr(ops, "eigh_", reference.eigh_)
    root, failures, ready = state(A)
    refresh_roots_(root, A, failures, ready, **{**OPTIONS, "method": "eigh"})
    assert ready.tolist() == [True, True, True, False, True]
    assert failures.tolist() == [0, 0, 0, 1, 0]
    keep = [0, 1, 2, 4]
    torch.testing.assert_close(root[keep], clean[keep], rtol=1e-5, atol=0.0)


def test_flags_travel_and_climb_the_ladder() -> None:
    """What a GPU does between refreshes, with the copy standing in for the asynchronous one."""
    pending = PendingFlags(3)
    everything = slice(None)
    assert pending.receive(everything).tolist() == [0, 0, 0]
    rungs = []
    for outcome in ([0, 2, 0], [0, 2, 0], [0, 1, 2], [0, 1, 0], [0, 0, 0]):
        pending.send(everything, torch.tensor(outcome, dtype=torch.uint8))
        rungs.append(pending.receive(everything).tolist())
    assert rungs == [[0, 1, 0], [0, 2, 0], [0, 2, 1], [0, 2, 0], [0, 0, 0]]


def test_flags_of_some_rows_leave_the_others() -> None:
    pending = PendingFlags(4)
    pending.send(slice(1, 3), torch.tensor([2, 2], dtype=torch.uint8))
    pending.send(torch.tensor([0, 2]), torch.tensor([2, 2], dtype=torch.uint8))
    assert pending.receive(slice(None)).tolist() == [1, 1, 2, 0]
    assert pending.receive(torch.tensor([2, 3])).tolist() == [2, 0]


def test_where_the_host_does_not_look_the_next_refresh_repairs() -> None:
    """As on a GPU, in steps that only the device knows to be taken; one that is not is no step."""
    A = stack(4, 48)
    spectrum = torch.logspace(0, -6, 48)
    norm = float((spectrum.double() ** 4).sum() ** 0.25)
    spectrum[-1] = -10e-6 * norm
    A[2] = spd(spectrum)
    kept = root, failures, ready = state(A)
    pending = PendingFlags(4)
    for is_accepted, has_roots, is_repaired, count in [
        (False, False, False, 0), (True, True, False, 1), (False, True, False, 1),
        (True, True, True, 0), (True, True, True, 0),
    ]:  # fmt: skip
        before = [each.clone() for each in kept]
        accepted = torch.tensor(is_accepted)
        refresh_roots_(root, A, failures, ready, **OPTIONS, accepted=accepted, pending=pending)
        assert failures.tolist() == [0, 0, count, 0]
        assert ready.tolist() == [has_roots, has_roots, is_repaired, has_roots]
        assert is_accepted or all(map(torch.equal, kept, before))


def test_refresh_of_nothing() -> None:
    empty = torch.empty(0, 4, 4)
    refresh_roots_(empty, empty, *state(empty)[1:], **OPTIONS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_refresh_on_a_gpu_repairs_at_the_next_refresh() -> None:
    A = stack(4, 48)
    spectrum = torch.logspace(0, -6, 48)
    norm = float((spectrum.double() ** 4).sum() ** 0.25)
    spectrum[-1] = -10e-6 * norm
    A[2] = spd(spectrum)
    factor = A.cuda()
    root, failures, ready = (tensor.cuda() for tensor in state(A))
    pending = PendingFlags(4)
    refresh_roots_(root, factor, failures, ready, **OPTIONS, pending=pending)
    assert ready.tolist() == [True, True, False, True]
    for _ in range(2):
        torch.cuda.synchronize()
        refresh_roots_(root, factor, failures, ready, **OPTIONS, pending=pending)
    assert ready.all()
    assert not failures.any()


@pytest.mark.parametrize("root_method", ["auto", "eigh", "coupled_newton", "minimax"])
@pytest.mark.parametrize("shape", [(4, 4), (1, 6, 1, 2)])
def test_a_factor_that_is_not_finite_is_counted_and_keeps_its_root(
    root_method: str, shape: tuple[int, ...]
) -> None:
    """A diagonal one too, which takes no solver, and one of size 1."""
    param = torch.nn.Parameter(torch.zeros(shape))
    opt = Shampoo([param], precondition_frequency=1, root_method=root_method)
    param.grad = torch.zeros(shape)
    param.grad.view(-1)[0] = 1.0  # both factors are diagonal
    opt.step()
    state = opt.state[param]
    kept = state["block0.root0"].clone()
    for failures in (1, 2):
        state["block0.factor0"][0, 0] = torch.inf
        opt.step()
        assert int(state["block0.failures0"]) == failures
        assert int(state["block0.failures1"]) == 0
        assert torch.equal(state["block0.root0"], kept)
        assert param.isfinite().all()
    state["block0.factor0"][0, 0] = 1.0
    opt.step()
    assert int(state["block0.failures0"]) == 0
