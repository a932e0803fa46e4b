"""What their cases find of kernels of diagonal_root_ and keep_roots_ with one defect each."""

import pytest
import torch

from shampoo.certificates.cases import CASES
from shampoo.certificates.checks import Trial
from shampoo.kernels.reference.keep_roots import FAILED, LEFT
from shampoo.ops import OPS

CPU = torch.device("cpu")


def failures_of(op, kernel):
    """What is found in each case that is small."""
    cases = [case for case in CASES[op] if case.arguments()["root"].shape[-1] <= 65]
    trials = [Trial(case, OPS[op], CPU, "triton") for case in cases]
    return [trial.examine(lambda _: kernel).failure for trial in trials]


def nearly_diagonal(root, ridge, factor, *rest):
    """Denormal numbers beside the diagonal are taken for zero, as where a GPU flushes them."""
    flushed = torch.where(factor.abs() < torch.finfo(factor.dtype).tiny, 0.0, factor)
    OPS["diagonal_root_"].reference(root, ridge, flushed, *rest)


def blind_on_the_diagonal(root, ridge, factor, *rest):
    """What is not finite is only looked for beside the diagonal."""
    kept = root.clone()
    OPS["diagonal_root_"].reference(root, ridge, factor, *rest)
    bad = ~factor.diagonal(dim1=1, dim2=2).isfinite().all(dim=1)
    root[bad] = kept[bad]


def no_shift(root, ridge, factor, p, eps, relative_eps):
    """A negative eigenvalue is left where it is."""
    OPS["diagonal_root_"].reference(root, ridge, factor, p, eps, relative_eps)
    negative = factor.diagonal(dim1=1, dim2=2).amin(dim=1) < 0
    ridge[negative] *= 0.5


def float32_powers(root, ridge, factor, p, eps, relative_eps):
    """The ridge is known to half of float32's digits alone."""
    OPS["diagonal_root_"].reference(root, ridge, factor, p, eps, relative_eps * (1 + 2**-12))


def first_rows(root, ridge, factor, *rest):
    """Only the first rows of a matrix are cleared."""
    kept = root.clone()
    OPS["diagonal_root_"].reference(root, ridge, factor, *rest)
    root[:, 64:] = kept[:, 64:]


def takes_all(root, outcome, failures, ready, candidate, ok, accepted=None):
    OPS["keep_roots_"].reference(root, outcome, failures, ready, candidate, ok, accepted)
    root.copy_(candidate)


def always_accepted(root, outcome, failures, ready, candidate, ok, accepted=None):
    OPS["keep_roots_"].reference(root, outcome, failures, ready, candidate, ok)


def counts_on(root, outcome, failures, ready, candidate, ok, accepted=None):
    """A root that passed leaves its count."""
    before = failures.clone()
    OPS["keep_roots_"].reference(root, outcome, failures, ready, candidate, ok, accepted)
    failures.copy_(torch.where(ok, before, failures))


def counts_what_is_left(root, outcome, failures, ready, candidate, ok, accepted=None):
    OPS["keep_roots_"].reference(root, outcome, failures, ready, candidate, ok, accepted)
    failures += (outcome == LEFT).int()


def never_left(root, outcome, failures, ready, candidate, ok, accepted=None):
    OPS["keep_roots_"].reference(root, outcome, failures, ready, candidate, ok, accepted)
    outcome[outcome == LEFT] = FAILED


def ready_if_passed(root, outcome, failures, ready, candidate, ok, accepted=None):
    """Roots of former refreshes are forgotten, and a root of zeros is one."""
    OPS["keep_roots_"].reference(root, outcome, failures, ready, candidate, ok, accepted)
    ready.copy_(ok)


def outcome_unwritten(root, outcome, failures, ready, candidate, ok, accepted=None):
    scratch = torch.empty_like(outcome)
    OPS["keep_roots_"].reference(root, scratch, failures, ready, candidate, ok, accepted)


DEFECTS = {
    "diagonal_root_": (
        *(nearly_diagonal, blind_on_the_diagonal, no_shift, float32_powers, first_rows),
    ),
    "keep_roots_": (
        *(takes_all, always_accepted, counts_on, counts_what_is_left, never_left),
        *(ready_if_passed, outcome_unwritten),
    ),
}


@pytest.mark.parametrize("op", DEFECTS)
def test_the_reference_has_no_defect(op):
    assert {*failures_of(op, OPS[op].reference)} == {""}


@pytest.mark.parametrize(
    ("op", "kernel"),
    [(op, kernel) for op, kernels in DEFECTS.items() for kernel in kernels],
    ids=lambda each: each if isinstance(each, str) else each.__name__,
)
def test_a_defect_is_found_in_the_cases(op, kernel):
    assert any(failures_of(op, kernel))
