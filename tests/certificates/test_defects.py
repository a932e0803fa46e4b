"""Kernels with a defect on the CPU: each is caught, named and survived, with the right bits."""

import dataclasses
import json
import os
import re

import pytest
import torch
from defects import DEFECTS, Faulty
from torch import nn

from shampoo import Shampoo, certificates, ops
from shampoo.certificates import certificate, runner
from shampoo.certificates.cases import CASES
from shampoo.certificates.checks import Trial
from shampoo.ops import OPS, jit

CPU = torch.device("cpu")

# Each defect in an op that can have it, so that two rounds hold all of them.
SILENT = {
    "gram_ema_": "last_tile",
    "precondition_": "past_the_end",
    "gather_blocks_": "unwritten",
    "minimax_root_": "asymmetric",
    "eigh_": "batch_dependent",
    "graft_moments_": "not_deterministic",
    "update_blocks_": "wrong_in_bfloat16",
    "magnitudes_": "raises",
    "graft_scale_": "last_tile",
}
LOUD = {
    "gram_ema_": "segmentation_fault",
    "precondition_": "illegal_instruction",
    "graft_moments_": "hangs",
    "update_blocks_": "slow",
}
LARGE = {"minimax_root_": "wrong_when_large"}
SAID = {
    "last_tile": r"error .* exceeds",
    "past_the_end": "wrote beside out",
    "unwritten": "left an element of out unwritten",
    "asymmetric": "root is not symmetric",
    "batch_dependent": r"gave other bits for block \d+ alone than in the batch",
    "not_deterministic": "gave other bits",
    "wrong_in_bfloat16": r"error .* exceeds .*of bfloat16",
    "raises": "raised RuntimeError: no kernel image",
    "segmentation_fault": "died by SIGSEGV",
    "illegal_instruction": "died by SIGILL",
    "hangs": "did not end within",
}


def test_every_defect_is_here():
    assert {*SILENT.values(), *LOUD.values(), *LARGE.values()} == set(DEFECTS)


@pytest.mark.parametrize(("op", "defect"), SILENT.items())
def test_a_silent_defect_is_found_in_the_cases(op, defect):
    """And nothing else: the reference has none."""
    found = [Trial(case, OPS[op], CPU, "cpp") for case in CASES[op] if case.on_cpu]
    kernel = Faulty(defect)
    findings = [trial.examine(lambda _: kernel.load(OPS[op], "")[0]) for trial in found]
    assert any(finding.failure for finding in findings)
    clean = [Trial(case, OPS[op], CPU, "reference") for case in CASES[op] if case.on_cpu]
    assert {trial.examine(lambda _: OPS[op].reference).failure for trial in clean} == {""}


@pytest.fixture
def injected(monkeypatch):
    """Puts kernels with a defect where the library registers its own."""
    libraries = []

    def inject(chosen):
        for op, defect in chosen.items():
            record = dataclasses.replace(OPS[op], kernels=(Faulty(defect),))
            monkeypatch.setitem(OPS, op, record)
            library = torch.library.Library("shampoo", "IMPL")
            for overload in record.schemas:
                run, _ = record.load("cpp", overload)
                library.impl(record.full_name(overload), run, "CPU")
            libraries.append(library)

    yield inject
    libraries.clear()


def trained(width=70):
    """Weights after some steps with refreshes, of a small model with a weight in bfloat16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 33), nn.Tanh(), nn.Linear(33, 3))
    half = nn.Parameter(torch.randn(40, 30).to(torch.bfloat16))
    params = [*model.parameters(), half]
    cut = {"max_preconditioner_dim": 512, "large_dim_method": "blocking"}
    optimizer = Shampoo(params, lr=0.01, precondition_frequency=2, **cut)
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(torch.randn(16, width)).square().mean() + half.float().square().mean()
        loss.backward()
        optimizer.step()
    return [weight.detach().clone() for weight in (*model.parameters(), half)]


def with_references(names, width=70):
    """The same training with the references of some ops, put there by hand."""
    aside = torch.library.Library("shampoo", "IMPL")
    for name in names:
        for overload in OPS[name].schemas:
            aside.impl(OPS[name].full_name(overload), OPS[name].reference, "CPU")
    os.environ["SHAMPOO_BACKEND"] = "reference"  # no more is loaded, or set aside
    try:
        return trained(width)
    finally:
        del os.environ["SHAMPOO_BACKEND"]


def certified(is_timed=False):
    """The certificate of this process's kernels, and the warning that names what failed."""
    found = certificates.certificate_of(CPU, is_timed=is_timed)
    with pytest.warns(RuntimeWarning, match="did not pass their checks") as caught:
        certificates.load_kernels()
    [warning] = [str(each.message) for each in caught]
    return found, warning


def test_silent_defects_are_named_and_training_has_the_bits_of_references(own_cache, injected):
    expected = with_references(SILENT)
    injected(SILENT)
    found, warning = certified()
    for op, defect in SILENT.items():
        failed = [each for each in found.reports if each.op == op and each.failure]
        assert failed
        words = [f"{op} (cpp, {each.dtype}): {each.failure} in {each.worst}" for each in failed]
        assert any(re.search(SAID[defect], each) for each in words), words
        assert all(each in warning for each in words)
        assert not ops.runs_kernel_on_cpu(op)
    torch.testing.assert_close(trained(), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_loud_defects_are_verdicts_and_the_rest_goes_on(own_cache, injected, monkeypatch):
    expected = with_references(LOUD)
    injected(LOUD)
    monkeypatch.setattr(runner, "PATIENCE", 30.0)
    found, warning = certified(is_timed=True)
    by_op = {}
    for report in found.reports:
        by_op.setdefault(report.op, []).append(report)
    for op in SILENT:
        assert by_op[op], "every kernel was examined, whatever those before it did"
        if op not in LOUD:
            assert all(report.passed for report in by_op[op]), by_op[op]
            assert ops.runs_kernel_on_cpu(op)
        elif LOUD[op] == "slow":
            assert all(report.passed for report in by_op[op])
            [timed] = [report for report in by_op[op] if report.timings]
            assert not timed.is_used
            assert all(timing.speed < 1.0 for timing in timed.timings)
            assert not ops.runs_kernel_on_cpu(op)
        else:
            said = SAID[LOUD[op]]
            assert all(re.search(said, each.failure) for each in by_op[op])
            assert f"{op} (cpp, float32)" in warning
            assert not ops.runs_kernel_on_cpu(op)
    torch.testing.assert_close(trained(), expected, rtol=0, atol=0)
    assert json.loads(certificate.path_of(found.facts).read_text())["is_timed"]
    monkeypatch.setenv("SHAMPOO_BACKEND", "cuda")
    with pytest.raises(jit.BuildError, match=r"gram_ema_ \(cpp, float32\): died by SIGSEGV"):
        certificates.load_kernels()
    monkeypatch.delenv("SHAMPOO_BACKEND")
    with pytest.raises(jit.BuildError, match=r"precondition_ \(cpp, float64\): died by SIGILL"):
        certificates.load_kernels(required=True)


def test_a_defect_at_a_size_of_the_model_is_found_before_its_first_step(own_cache, injected):
    """What passed all that every machine is asked for, and is wrong where this model is."""
    expected = with_references(LARGE, width=300)
    injected(LARGE)
    certificates.load_kernels()
    assert ops.runs_kernel_on_cpu("minimax_root_")
    with pytest.warns(RuntimeWarning, match=r"minimax_root_ \(cpp, float32\): error .* n=300"):
        found = trained(width=300)
    assert not ops.runs_kernel_on_cpu("minimax_root_")
    assert ops.runs_kernel_on_cpu("precondition_")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    certificates.load_kernels()
    assert not ops.runs_kernel_on_cpu("minimax_root_"), "the next optimizer knows of it"
