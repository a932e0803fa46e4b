"""Stacks of several sides that are refreshed as one: each root, and each outcome, is its own."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from root_cases import Exact, limits, spd, stack
from torch import Tensor

from shampoo import ops
from shampoo.kernels.reference.root_check import white_vectors
from shampoo.ops.licence import REFERENCE
from shampoo.roots import refresh, size_classes
from shampoo.roots.refresh import PendingFlags, refresh_roots_
from shampoo.roots.root_check import passes_root_check
from shampoo.roots.size_classes import Due, Stack, classes, most_matrices, refresh_together_

HOW: dict[str, Any] = {"p": 4, "eps": 1e-12, "relative_eps": 1e-6, "method": "minimax"}
RIDGES = HOW["eps"], HOW["relative_eps"], "auto"
SIDES = (48, 33, 20, 1)

pytestmark = pytest.mark.usefixtures("nan_filled_empty")  # padding that nobody zeroed is NaN


def negative(n: int) -> Tensor:
    """A matrix whose smallest eigenvalue is -10 ridges: only eigh takes it."""
    spectrum = torch.logspace(0, -6, n)
    spectrum[-1] = -10e-6 * float((spectrum.double() ** 4).sum() ** 0.25)
    return spd(spectrum)


def due(
    factors: list[Tensor], corrections: Any = 1.0, has_flags: bool = False, is_watched: bool = False
) -> list[Due]:
    """Stacks without roots yet."""
    found = []
    for index, factor in enumerate(factors):
        count = len(factor)
        found.append(
            Due(
                torch.zeros_like(factor),
                factor,
                torch.zeros(count, dtype=torch.int32),
                torch.zeros(count, dtype=torch.bool),
                corrections[index] if isinstance(corrections, list) else corrections,
                PendingFlags(count) if has_flags else None,
                slice(0, count),
                torch.full((3, count), -1.0, dtype=torch.float64) if is_watched else None,
            )
        )
    return found


def separately(stacks: list[Due], accepted: Tensor | None = None) -> None:
    for each in stacks:
        refresh_together_([each], **HOW, accepted=accepted)


def assert_alike(together: list[Due], alone: list[Due], corrections: Any = 1.0) -> None:
    """The same outcomes, and roots within the limits of docs/roots.md."""
    for index, (mine, its) in enumerate(zip(together, alone, strict=True)):
        assert torch.equal(mine.failures, its.failures)
        assert torch.equal(mine.ready, its.ready)
        divisor = corrections[index] if isinstance(corrections, list) else corrections
        divisor = torch.as_tensor(divisor).expand(len(mine.root))
        rows = zip(mine.root, its.root, mine.factor / divisor[:, None, None].float(), strict=True)
        for X, Y, A in rows:
            assert X.isfinite().all()
            assert torch.equal(X, X.mT)
            assert bool(X.any()) is bool(Y.any())
            if X.any() and A.isfinite().all() and torch.linalg.eigvalsh(A.double())[0] > -1e-7:
                exact = Exact(A)
                ridge = max(1e-12, 1e-6 * exact.norm)
                assert exact.error(X, 4, ridge) <= limits(4, 1e-6)[1]


def ordinary() -> list[Tensor]:
    return [stack(2, n, decades=5.0) * 10.0**k for k, n in enumerate(SIDES)]


def test_roots_in_a_class_are_those_of_their_stacks() -> None:
    factors = ordinary()
    before = [each.clone() for each in factors]
    together, alone = due(factors), due(factors)
    refresh_together_(together, **HOW)
    separately(alone)
    assert_alike(together, alone)
    assert all(each.ready.all() for each in together)
    assert all(map(torch.equal, factors, before))


def test_diagonal_matrices_are_exact_to_the_bit() -> None:
    factors = ordinary()
    for factor, n in zip(factors, SIDES, strict=True):
        factor[0] = torch.linspace(1.0, 3.0, n).diag()
    factors[1][1] = 0  # without a ridge of its own, but that of eps
    together, alone = due(factors), due(factors)
    refresh_together_(together, **HOW)
    separately(alone)
    assert_alike(together, alone)
    for mine, its in zip(together, alone, strict=True):
        torch.testing.assert_close(mine.root[0], its.root[0], rtol=1e-7, atol=0.0)
        assert torch.equal(mine.root[0], mine.root[0].diagonal().diag())
    assert torch.equal(together[1].root[1], alone[1].root[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_fails_is_counted_in_its_own_row_alone(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    factors = ordinary()
    together, alone = due(factors), due(factors)
    for stacks in (together, alone):
        stacks[2].root[:] = 7.0 * torch.eye(SIDES[2])
        stacks[2].ready[:] = True
        stacks[0].failures[0] = 3
    factors[1][0, 2, 5] = value
    factors[2][1, 0, 0] = value
    with caplog.at_level(logging.WARNING):
        refresh_together_(together, **HOW)
    assert "2 of 8 inverse roots failed" in caplog.text
    separately(alone)
    assert_alike(together, alone)
    assert [each.failures.tolist() for each in together] == [[0, 0], [1, 0], [0, 1], [0, 0]]
    assert [bool(each.ready.all()) for each in together] == [True, False, True, True]
    assert together[1].ready.tolist() == [False, True]
    assert torch.equal(together[2].root[1], 7.0 * torch.eye(SIDES[2]))


def test_what_is_retried_leaves_the_others_their_roots() -> None:
    factors = ordinary()
    untouched = due(factors)
    refresh_together_(untouched, **HOW)
    factors = [each.clone() for each in factors]
    factors[0][1], factors[2][0] = negative(SIDES[0]), negative(SIDES[2])
    together, alone = due(factors), due(factors)
    refresh_together_(together, **HOW)
    separately(alone)
    assert_alike(together, alone)
    for index, row in ((0, 1), (2, 0)):
        mine, its = together[index].root[row], alone[index].root[row]
        assert ((mine - its).norm() / its.norm()) < 2e-3
        untouched[index].root[row] = mine
    assert all(torch.equal(a.root, b.root) for a, b in zip(together, untouched, strict=True))


def test_every_attempt_knows_the_sizes_of_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, and where some rows are retried."""
    factors = ordinary()[::-1]
    factors[3][1] = negative(SIDES[0])
    factors[1][0] = torch.nan
    seen, solved = [], []
    check, solve = refresh.passes_root_check, ops.minimax_class_root_

    def noted(X: Tensor, A: Tensor, ridge: Tensor, p: float, sizes: Tensor) -> Tensor:
        seen.append(sizes.tolist())
        return check(X, A, ridge, p, sizes)

    def solving(root: Tensor, ridge: Tensor, factor: Tensor, sizes: Tensor, *how: Any) -> None:
        solved.append(sizes.tolist())
        solve(root, ridge, factor, sizes, *how)

    monkeypatch.setattr(ops, "minimax_class_root_", solving)
    monkeypatch.setattr(refresh, "passes_root_check", noted)
    monkeypatch.setattr(refresh, "chunks", lambda stack: map(slice, range(0, 8, 3), (3, 6, 8)))
    stacks = due(factors)
    refresh_together_(stacks, **HOW)
    assert solved == seen[:4], "all but by eigh"
    assert seen[:3] == [[1, 1, 20], [20, 33, 33], [48, 48]]
    assert seen[3] == [20, 48], "with a larger ridge"
    assert seen[4:] in ([[20]], [[20, 48]]), "what that does not repair, by eigh"
    assert [bool(each.ready.all()) for each in stacks] == [True, False, True, True]


def test_where_the_host_does_not_look_each_stack_hears_of_its_own() -> None:
    """In steps that only a device knows to be taken, of which one that is not changes nothing."""
    factors = ordinary()
    factors[0][1], factors[1][0, 0, 0] = negative(SIDES[0]), torch.nan
    together, alone = (due(factors, has_flags=True, is_watched=True) for _ in range(2))
    for is_accepted, failures in (
        (False, [[0, 0], [0, 0]]),
        (True, [[0, 1], [1, 0]]),
        (False, [[0, 1], [1, 0]]),
        (True, [[0, 0], [2, 0]]),
        (True, [[0, 0], [3, 0]]),
    ):
        before = [(each.root.clone(), each.ready.clone(), each.found.clone()) for each in together]
        refresh_together_(together, **HOW, accepted=torch.tensor(is_accepted))
        separately(alone, torch.tensor(is_accepted))
        assert_alike(together, alone)
        assert [each.failures.tolist() for each in together[:2]] == failures
        assert not any(each.failures.any() for each in together[2:])
        for (root, ready, found), each in zip(before, together, strict=True):
            kept = torch.equal(root, each.root) and torch.equal(ready, each.ready)
            assert is_accepted or (kept and torch.equal(found, each.found))
    for mine, its in zip(together, alone, strict=True):
        heard = [each.pending.receive(slice(None)).tolist() for each in (mine, its)]
        assert heard[0] == heard[1]
    assert together[1].pending.receive(slice(None)).tolist() == [2, 0]


def test_stacks_may_change_their_company() -> None:
    """A letter that comes late is heard of by each of those that were together when it was sent."""
    factors = ordinary()
    factors[0][1] = negative(SIDES[0])
    stacks = due(factors, has_flags=True)
    accepted = torch.tensor(True)
    refresh_together_(stacks, **HOW, accepted=accepted)
    assert [each.failures.tolist() for each in stacks] == [[0, 1], [0, 0], [0, 0], [0, 0]]
    refresh_together_(stacks[1:], **HOW, accepted=accepted)
    refresh_together_(stacks[:1], **HOW, accepted=accepted)
    assert stacks[0].failures.tolist() == [0, 0]
    assert stacks[0].ready.all()


def test_findings_are_those_of_each_matrix() -> None:
    factors = ordinary()
    factors[3][0] = torch.nan
    together, alone = (due(factors, is_watched=True) for _ in range(2))
    refresh_together_(together, **HOW)
    separately(alone)
    for mine, its in zip(together, alone, strict=True):
        assert mine.found is not None
        error, ridge, largest = mine.found
        assert torch.equal(error >= 0, its.found[0] >= 0)
        assert ((error - its.found[0]).abs() <= 2e-3).all()
        torch.testing.assert_close(ridge, its.found[1], rtol=1e-6, atol=0.0)
        torch.testing.assert_close(largest, its.found[2], rtol=0.1, atol=0.0)
    assert together[3].found[:, 0].tolist() == [-1.0] * 3


def test_corrections_may_differ_from_matrix_to_matrix() -> None:
    factors = ordinary()
    generator = torch.Generator().manual_seed(3)
    own = [torch.rand(2, generator=generator, dtype=torch.float64) + 0.1 for _ in factors]
    for corrections in (own, 0.25, torch.tensor(0.25, dtype=torch.float64)):
        together, alone = due(factors, corrections), due(factors, corrections)
        refresh_together_(together, **HOW)
        separately(alone)
        assert_alike(together, alone, corrections)


def test_the_check_is_of_the_matrix_and_not_of_its_padding() -> None:
    """Of a root that is 30 % off, padding would make one that is 2 % off."""
    A = stack(1, 8, decades=2.0)
    (alone,) = due([A])
    refresh_together_([alone], **HOW)
    _, X, sizes = size_classes.padded([(A, alone.root)], 96)
    X.diagonal(dim1=1, dim2=2)[:, 8:] = 1e6**0.25
    X[:, :8, :8] *= 1.12
    ridge = torch.tensor([1e-6 * Exact(A[0]).norm], dtype=torch.float64)
    how = size_classes.padded([(A,)], 96)[0], ridge, 4
    assert passes_root_check(X, *how), "without the sizes"
    assert not passes_root_check(X, *how, sizes)
    X[:, :8, :8] = alone.root
    assert passes_root_check(X, *how, sizes)
    X.diagonal(dim1=1, dim2=2)[:, 8:] = 0.0  # as the kernel leaves it
    assert passes_root_check(X, *how, sizes)


def test_one_stack_is_neither_copied_nor_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size_classes, "padded", None)
    given = []
    monkeypatch.setattr(size_classes, "refresh_roots_", lambda root, *_, **how: given.append(root))
    [alone] = due([stack(2, 20)])
    refresh_together_([alone], **HOW)
    assert given[0] is alone.root


@pytest.fixture
def praised(monkeypatch: pytest.MonkeyPatch) -> None:
    def at(op: str, like: Tensor, side: int) -> str:
        return REFERENCE if side == 300 else "triton"

    monkeypatch.setattr(size_classes, "kernel_at", at)


SINGLE = torch.empty(0, 8, 8)


def division(stacks: list[Stack], like: Tensor = SINGLE, how: Any = RIDGES) -> list[list[int]]:
    found = classes(stacks, like, *how)
    assert sorted(index for each in found for index in each) == list(range(len(stacks)))
    return found


def test_a_class_is_filled_from_the_largest_side_down(praised: None) -> None:
    assert most_matrices(1024) == 16
    assert most_matrices(64) == 512
    sides = [(64, 24), (1024, 18), (512, 36), (1000, 2), (256, 39), (192, 9), (128, 27)]
    stacks = [Stack(side, count, 4) for side, count in sides]
    # 18 matrices of 1024 are more than a class holds, 2 and 36 of 1000 and 36 and 39 of 512 too.
    assert division(stacks) == [[1], [3], [2], [4, 5, 6, 0]]
    for group in division(stacks):
        members = [stacks[index] for index in group]
        total = sum(each.matrices for each in members)
        assert len(group) == 1 or total <= most_matrices(max(each.side for each in members))


def test_roots_that_are_taken_otherwise_are_apart(praised: None) -> None:
    sides = [Stack(64, 2, 4), Stack(32, 2, 6), Stack(16, 2, 4), Stack(8, 2, 6)]
    assert division(sides) == [[0, 2], [1, 3]]
    no_schedule = [Stack(64, 2, 4.5), Stack(32, 2, 4.5)]
    assert division(no_schedule) == [[0], [1]]
    pair = [Stack(64, 2, 4), Stack(32, 2, 4)]
    assert division(pair) == [[0, 1]]
    assert division(pair, SINGLE.double()) == [[0], [1]]
    assert division(pair, how=(0.0, 1e-9, "auto")) == [[0], [1]], "the schedules would saturate"
    for method in ("eigh", "coupled_newton"):
        assert division(pair, how=(1e-12, 1e-6, method)) == [[0], [1]]


def test_rows_of_one_stack_that_do_not_lie_together_are_joined_too(praised: None) -> None:
    assert division([Stack(256, 1, 4)] * 5) == [[0, 1, 2, 3, 4]]


def test_a_side_that_does_not_pay_is_in_no_class(praised: None) -> None:
    stacks = [Stack(400, 2, 4), Stack(300, 2, 4), Stack(290, 2, 4), Stack(100, 2, 4)]
    assert division(stacks) == [[0, 2, 3], [1]]


def test_where_classes_pay_their_op_takes_also_what_is_alone(praised: None, monkeypatch) -> None:
    """So that the bits of a root do not follow what else is due."""
    taken = []
    for name in ("minimax_root_", "minimax_class_root_"):
        op = getattr(ops, name)

        def noted(*how: Any, op: Any = op, name: str = name) -> None:
            taken.append((name, how[0].shape[1]))
            op(*how)

        monkeypatch.setattr(ops, name, noted)
    for side in (20, 300):
        refresh_together_(due([stack(1, side)]), **HOW)
    refresh_together_(due([stack(1, 20), stack(1, 24)]), **HOW)
    assert taken == [
        ("minimax_class_root_", 20),
        ("minimax_root_", 300),
        ("minimax_class_root_", 24),
    ]


def test_on_a_cpu_every_stack_is_refreshed_by_itself() -> None:
    assert division([Stack(64, 2, 4), Stack(64, 2, 4), Stack(32, 2, 4)]) == [[0], [1], [2]]


def test_refresh_roots_takes_sizes() -> None:
    """Beyond them a root means nothing, and a previous one stays where a new one fails."""
    A, sizes = size_classes.padded([(stack(1, 20),), (torch.full((1, 9, 9), torch.nan),)], 24)
    root = torch.zeros_like(A)
    failures, ready = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.bool)
    refresh_roots_(root, A, failures, ready, **HOW, correction=1.0, sizes=sizes)
    assert (failures.tolist(), ready.tolist()) == ([0, 1], [True, False])
    exact = Exact(A[0, :20, :20])
    assert exact.error(root[0, :20, :20], 4, 1e-6 * exact.norm) <= 2e-3
    assert not root[1].any()


@pytest.mark.parametrize("n", [1, 2, 7, 8, 33])
def test_a_matrix_is_probed_alike_whatever_the_side_of_its_class(n: int) -> None:
    device = torch.device("cpu")
    for dtype in (torch.float32, torch.float64):
        many = white_vectors(300, dtype, device)
        assert white_vectors(n, dtype, device).equal(many[:n])
