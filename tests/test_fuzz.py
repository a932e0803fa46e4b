"""What must hold of every program: thousands of them, generated.

A fixed set runs by default. ``SHAMPOO_FUZZ=5000 pytest tests/test_fuzz.py`` runs so many others,
drawn anew each time (``--hypothesis-seed`` draws them again). A program that fails is made as small
as it gets and printed; it goes into :data:`FOUND` when it is mended.
"""

import logging
import os

import pytest
import torch
from fuzz_machine import Machine, RefusedError
from fuzz_programs import Op, Program, Slope, Weight, programs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import Parameter
from torch_twins import TWINS

from shampoo import Shampoo

RUNS = int(os.environ.get("SHAMPOO_FUZZ", "0"))


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    """Steps are skipped by the hundred; what is logged of them would bury what has failed."""
    logger = logging.getLogger("shampoo")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def profile(runs: int) -> settings:
    """Everything is said here: importing torch's own suite changes the defaults of hypothesis."""
    return settings(
        max_examples=RUNS or runs,
        derandomize=RUNS == 0,
        database=None,
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,  # each is made small, which takes minutes
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@profile(600)
@given(programs())
def test_a_program_keeps_what_every_program_must(program):
    """Finite, alike in all twins, unchanged after an error, with the steps that were taken."""
    try:
        Machine(program).run(program)
    except RefusedError:
        return  # by the constructor, with a value, its bound and the remedy


@pytest.mark.slow
@profile(100)
@given(
    st.sampled_from(sorted(TWINS)),
    st.lists(st.sampled_from([(3, 4), (5,), (), (2, 3, 2), (4, 1)]), min_size=2, max_size=4),
    st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=4, max_size=16),
    st.sampled_from([0.0, 0.1]),
    st.integers(0, 3),
)
def test_without_preconditioning_any_pattern_of_gradients_gives_torchs_own(
    name, shapes, pattern, weight_decay, seed
):
    """The gradients are there now and then, for each parameter when it likes."""
    their_class, their_hyper, hyper = TWINS[name]
    generator = torch.Generator().manual_seed(seed)
    ours = [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [Parameter(param.detach().clone()) for param in ours]
    starts = [param.detach().clone() for param in ours]
    common = {"lr": 0.01, "weight_decay": weight_decay}
    optimizer = Shampoo(ours, precondition=False, **common, **hyper)
    twin = their_class(theirs, **common, **their_hyper)
    for presence in pattern:
        for param, copy, is_there in zip(ours, theirs, presence, strict=False):
            grad = torch.randn(param.shape, generator=generator)
            param.grad, copy.grad = (grad, grad.clone()) if is_there else (None, None)
        optimizer.step()
        twin.step()
        for param, copy, start in zip(ours, theirs, starts, strict=True):
            expected = copy.detach()
            # A weight that passes through zero is held to the way that it has come.
            scale = max(float(expected.abs().max()), float((expected - start).abs().max()))
            assert float((param.detach() - expected).abs().max()) <= 1e-6 * scale


# Programs that have failed once, as small as they get.
FOUND = {
    "an entry of a wrapper that comes before the first step": Program(
        [Weight((3, 4))], {}, [Op("foreign_entry", (0,)), Op("step", (0, (Slope(),)))]
    ),
    "an entry of a wrapper under a copy that has no state yet": Program(
        [Weight((3, 4))], {}, [Op("twin", ("deepcopy",)), Op("foreign_entry", (0,))]
    ),
    "an entry of a wrapper that is saved before the first step": Program(
        [Weight((3, 4))], {}, [Op("foreign_entry", (0,)), Op("twin", ("file",))]
    ),
    "an entry of a wrapper when another plan is made": Program(
        [Weight((3, 4))],
        {},
        [
            Op("step", (0, (Slope(),))),
            Op("foreign_entry", (0,)),
            Op("join", (Weight((4,)),)),
            Op("step", (1, (Slope(),))),
        ],
    ),
    "LARS on denormal gradients": Program(
        [Weight((4, 4))], {"grafting": "lars"}, [Op("step", (0, (Slope("normal", -42),)))]
    ),
    "LAMB on tiny gradients of large weights": Program(
        [Weight((4, 4), power=19)], {"grafting": "lamb"}, [Op("step", (0, (Slope("normal", -30),)))]
    ),
    "a first step that is refused leaves no state": Program(
        [Weight((3, 4))], {"nonfinite": "raise"}, [Op("step", (0, (Slope("nan"),)))]
    ),
    "a first step on a gradient that is sparse leaves no state": Program(
        [Weight((3, 4))], {}, [Op("bad_gradient", (0, "sparse"))]
    ),
    "as many elements in another shape": Program(
        [Weight((3, 4))], {}, [Op("bad_gradient", (0, "turned"))]
    ),
    "a copy in place of a value, and a new plan": Program(
        [Weight((3, 4)), Weight((4,))],
        {"precondition_frequency": 2, "momentum": 0.9},
        [
            Op("twin", ("deepcopy",)),
            Op("step", (0, (Slope(),))),
            Op("replace", ("values",)),
            Op("step", (1, (Slope(),))),
            Op("join", (Weight((2, 3, 2)),)),
            Op("step", (2, (Slope(),))),
        ],
    ),
    "a parameter that starts anew beside one that goes on": Program(
        [Weight((3, 4)), Weight((3, 4), seed=1)],
        {"precondition_frequency": 2},
        [
            Op("step", (0, (Slope(),))),
            Op("clear", (0,)),
            Op("step", (1, (Slope(),))),
            Op("twin", ("load",)),
            Op("step", (2, (Slope(), Slope("none")))),
            Op("step", (3, (Slope(),))),
        ],
    ),
}


@pytest.mark.parametrize("program", FOUND.values(), ids=FOUND)
def test_a_program_that_failed_once_does_not_again(program):
    Machine(program).run(program)
