"""Refreshes of size classes by the kernels: the chain, and the check that is told the sizes."""

import pytest
import torch
from root_cases import Exact, spd, stack

from shampoo import ops
from shampoo.certificates import runner
from shampoo.certificates.cases import CASES
from shampoo.certificates.checks import Trial
from shampoo.certificates.class_timing import class_calls, rivals
from shampoo.certificates.report import Timing
from shampoo.certificates.timing import quantiles
from shampoo.certificates.workloads import WORKLOADS
from shampoo.kernels.triton import minimax, symmetric_gemm
from shampoo.kernels.triton.minimax import minimax_root_
from shampoo.kernels.triton.minimax_class import minimax_class_root_
from shampoo.kernels.triton.root_check import check_roots_
from shampoo.kernels.triton.symmetric_gemm import launch_config
from shampoo.ops import OPS
from shampoo.roots.minimax_table import minimax_schedule
from shampoo.roots.size_classes import Due, padded, refresh_together_

HOW = {"p": 4, "eps": 1e-12, "relative_eps": 1e-4, "method": "minimax"}


def solved(factors, side):
    A, sizes = padded([(factor,) for factor in factors], side)
    root, ridge = torch.zeros_like(A), torch.full((len(A),), torch.nan).double()
    schedule = [c for step in minimax_schedule(4, 1e-4) for c in step]
    minimax_class_root_(root, ridge, A, sizes, 4, 0.0, 1e-4, schedule)
    return root, ridge


def test_a_root_depends_neither_on_its_class_nor_on_its_neighbours(monkeypatch):
    """On a card that has smaller tiles for the second of two classes by itself."""
    monkeypatch.setattr(symmetric_gemm, "capability", lambda device: symmetric_gemm.HOPPER)
    assert launch_config(65, None) != launch_config(150, None)
    configs, solve = [], minimax.minimax_root_

    def noted(*arguments, config, **options):
        configs.append(config)
        solve(*arguments, config=config, **options)

    monkeypatch.setattr(minimax, "minimax_root_", noted)
    factors = [stack(1, n, decades=4.0) for n in (65, 33, 1)]
    root, ridge = solved(factors, 65)
    for side in (33, 150):
        alone, own = solved(factors[1:2], side)
        assert torch.equal(alone[0, :33, :33], root[1, :33, :33])
        assert torch.equal(own[0], ridge[1])
    assert len(set(configs)) == 1, "the interpreter adds up alike whatever the tiles"
    for X, factor in zip(root, factors, strict=True):
        n = factor.shape[1]
        exact = Exact(factor[0])
        assert exact.error(X[:n, :n], 4, 1e-4 * exact.norm) <= 2e-3
        assert not X[n:].any()
        assert not X[:, n:].any()


@pytest.mark.parametrize(
    ("op", "words"), [("minimax_class_root_", "n=65 "), ("check_roots_", "=32")]
)
def test_the_cases_of_classes(op, words):
    cases = [case for case in CASES[op] if words in case.words and case.dtype == torch.float32]
    assert cases
    for case in cases[:2]:
        finding = Trial(case, OPS[op], torch.device("cpu"), "triton").examine(
            lambda overload: OPS[op].load("triton", overload)[0]
        )
        assert not finding.failure, (case.name, finding)


def test_a_refresh_by_the_kernels(monkeypatch):
    """Of an ordinary matrix, a diagonal one, one that fails and one that eigh repairs."""
    monkeypatch.setattr(ops, "minimax_class_root_", minimax_class_root_)
    monkeypatch.setattr(ops, "check_roots_", check_roots_)
    spectrum = torch.logspace(0, -4, 20)
    spectrum[-1] = -10e-4 * float((spectrum.double() ** 4).sum() ** 0.25)
    factors = [stack(2, 40, decades=4.0), stack(3, 20, decades=4.0)]
    factors[0][1] = torch.linspace(1.0, 3.0, 40).diag()
    factors[1][0, 3, 3] = torch.nan
    factors[1][1] = spd(spectrum)
    due = []
    for factor in factors:
        count = len(factor)
        flags = torch.zeros(count, dtype=torch.int32), torch.zeros(count, dtype=torch.bool)
        due.append(Due(torch.zeros_like(factor), factor, *flags, 1.0, None, slice(0, count), None))
    refresh_together_(due, **HOW)
    assert [each.failures.tolist() for each in due] == [[0, 0], [1, 0, 0]]
    assert [each.ready.tolist() for each in due] == [[True] * 2, [False, True, True]]
    for index, row in ((0, 0), (0, 1), (1, 2)):
        exact = Exact(factors[index][row])
        assert exact.error(due[index].root[row], 4, 1e-4 * exact.norm) <= 2e-3
    assert due[1].root[1].isfinite().all()


def test_what_is_timed_are_the_same_roots():
    arguments = WORKLOADS["minimax_class_root_"](4, 64, torch.device("cpu"))
    sizes = arguments[3].tolist()
    assert sizes == [64, 48, 32, 16]
    kept, ways = [], rivals(["triton"])
    modules = [[run.__module__ for run, _ in kernels] for kernels in ways]
    assert modules == [["shampoo.kernels.triton.minimax"], []]

    def noted(before):
        def call(root, *rest):
            if before:
                kept.append(root.clone())
            minimax_root_(root, *rest)
            if not before:
                kept.append(root.clone())

        return call

    calls = class_calls(minimax_class_root_, arguments, [[(noted(True), None)]])
    calls["kernel"]()
    calls["0"]()  # which finds what the class has left there
    class_calls(minimax_class_root_, arguments, [[(noted(False), None)]])["0"]()
    assert [each.shape[1] for each in kept] == sizes * 2
    for X, Y in zip(kept[:4], kept[4:], strict=True):
        torch.testing.assert_close(X, Y, rtol=1e-2, atol=1e-3 * float(Y.abs().max()))


def test_the_runner_times_a_class_against_its_stacks(monkeypatch):
    """Under the side of the class, as the choice at that size."""
    ran = []

    def timed(calls, *_):
        for call in calls.values():
            call()
        ran.extend(calls)
        seconds = {"kernel": 4.0, "0": 9.0, "1": 7.0}
        return {name: quantiles([seconds[name]]) for name in calls}

    monkeypatch.setattr(runner, "timed", timed)
    monkeypatch.setattr(minimax, "minimax_root_", lambda root, *_, **__: ran.append(root.shape[1]))
    op = OPS["minimax_class_root_"]
    how = op, op.load("triton"), torch.device("cpu"), torch.float32, [(32, 4)]
    assert runner._timings(*how, ["triton"]) == [Timing(32, kernel=4.0, reference=7.0)]
    assert ran == [32, 32, 24, 16, 8, "kernel", "0", "1"]
