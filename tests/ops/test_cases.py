"""The cases of every op, which certificates and benchmarks run too, on the kernels of this CPU."""

import pytest
import torch
from compiled import load_compiled

from shampoo.certificates.cases import CASES
from shampoo.certificates.checks import Trial
from shampoo.ops import OPS

CPU = torch.device("cpu")


def test_every_op_has_cases_with_the_arguments_of_its_schema():
    assert set(CASES) == set(OPS)
    for name, cases in CASES.items():
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            assert tuple(case.arguments()) == OPS[name].arguments
            assert {*case.overwritten, *case.symmetric} <= {*OPS[name].outputs}


def test_a_case_is_the_same_every_time_and_draws_nothing_of_others():
    state = torch.get_rng_state()
    for cases in CASES.values():
        one, other = (cases[0].arguments() for _ in range(2))
        torch.testing.assert_close([*one.values()], [*other.values()], equal_nan=True)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["reference", "cpp"])
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_kernels_do_every_case_right(op, kind):
    if kind not in ("reference", *op.kinds("cpu")):
        return
    load_compiled()
    trials = [Trial(case, op, CPU, kind) for case in CASES[op.name]]
    taken = [trial for trial in trials if trial.accepts(None)]
    assert taken
    for trial in taken:
        found = trial.examine(lambda overload: op.load(kind, overload)[0])
        assert not found.failure, trial.case.name
        assert found.error <= found.limit
