"""The list of products that the GPU walks, carried out here in float64."""

import math

import pytest
import torch
from root_cases import EPS, Exact, spd

from shampoo.kernels.reference.minimax import Step, minimax_root_, steps_of
from shampoo.kernels.triton.minimax_program import (
    ROOT,
    minimax_program,
    residual_steps,
    split_scale,
)
from shampoo.roots.minimax_table import minimax_schedule, tabulated_powers


def run(program, A, relative_eps):
    """The root of A, and the largest magnitude that was ever stored."""
    eye = torch.eye(len(A), dtype=torch.float64)
    norm = Exact(A).norm
    rho = relative_eps * norm
    M = (A + rho * eye) / (norm + rho)
    c0, c1, c2 = program.first
    buffers = [torch.full_like(eye, torch.nan) for _ in range(program.buffers)]
    for (buffer, scale), value in (
        (program.matrix, M),
        (program.start, c0 * eye + c1 * M + c2 * M @ M),
    ):
        buffers[buffer] = scale * value
    largest = max(b.nan_to_num().abs().max().item() for b in buffers)
    root = None
    for step in program.products:
        a, b, c, d, e = step.coefficients
        left, right, addend = (buffers[at] for at in (step.left, step.right, step.addend))
        assert step.out not in (step.left, step.right, step.addend)
        value = a * left @ right
        if step.doubled:
            value += a * right @ left
        value += b * left + c * right + d * eye + e * addend
        assert not value.isnan().any()
        if step.out == ROOT:
            assert step is program.products[-1]
            root = value * (norm + rho) ** (-1 / program.p)
        else:
            buffers[step.out] = value
            largest = max(largest, value.abs().max().item())
    return root, largest


@pytest.mark.parametrize("relative_eps", EPS)
@pytest.mark.parametrize("p", tabulated_powers())
def test_the_list_computes_the_root_within_its_bounds(p, relative_eps):
    schedule = minimax_schedule(p, relative_eps)
    program = minimax_program(p, schedule, relative_eps)
    for spectrum in (
        torch.logspace(0, -12, 24),
        torch.ones(24),
        torch.tensor([1.0] + [0.0] * 23),
        torch.tensor([1.0, 0.5] * 12),
    ):
        A = spd(spectrum, dtype=torch.float64)
        root, largest = run(program, A, relative_eps)
        expected, ridge = torch.empty(1, 24, 24).double(), torch.empty(1).double()
        flat = [c for step in schedule for c in step]
        minimax_root_(expected, ridge, A[None], p, 0.0, relative_eps, flat)
        difference = (root - expected[0]).norm() / expected[0].norm()
        assert difference < 1e-6  # what rounding in float64 leaves of cond 1e7
        assert largest <= 2**12 * 1.01


def test_numbers_of_products():
    """roots.md, section 4, without the square that the first norm needs."""
    wanted = {(4, 1e-4): 17, (4, 1e-6): 23, (4, 1e-7): 25, (2, 1e-4): 15, (2, 1e-6): 21}
    for (p, relative_eps), count in wanted.items():
        schedule = minimax_schedule(p, relative_eps)
        program = minimax_program(p, schedule, relative_eps)
        used = [step for step in program.products if step.products]
        assert len(used) == count - 1
        single = [step for step in used if step.products == 1]
        assert bool(single) == (residual_steps(p, schedule) > 0)
        assert [step.doubled for step in used].count(True) == 1
        assert program.buffers <= 5


def test_schedules_of_one_step_and_of_degree_one():
    """Coupled Newton is the same list: T = ((p + 1) I - M) / p."""
    A = spd(torch.logspace(0, -0.1, 8), dtype=torch.float64)
    newton = (Step(1.25, -0.25, 0.0, 0.0, 0.0),) * 7
    for schedule in (newton, newton[:1], newton[:2], newton[:3]):
        root, _ = run(minimax_program(4, schedule, 1e-2), A, 1e-2)
        expected, ridge = torch.empty(1, 8, 8).double(), torch.empty(1).double()
        minimax_root_(expected, ridge, A[None], 4, 0.0, 1e-2, sum(schedule, ()))
        assert torch.allclose(root, expected[0], rtol=1e-12)


def test_scales_are_powers_of_two_that_leave_room():
    for bound in (1e-3, 1.0, 2.0, 2.11, 5e6):
        scale = split_scale(bound)
        assert math.log2(scale) == int(math.log2(scale))
        assert 2**11 < scale * bound <= 2**12


def test_schedules_come_as_one_list():
    flat = [1.0, 2.0, 3.0, 0.0, 0.0, 4.0, 5.0, 6.0, 7.0, 0.5]
    assert steps_of(flat) == (Step(1.0, 2.0, 3.0, 0.0, 0.0), Step(4.0, 5.0, 6.0, 7.0, 0.5))
    with pytest.raises(ValueError, match="shorter"):
        steps_of(flat[:7])


@pytest.mark.parametrize(
    ("p", "relative_eps", "count"),
    [(1, 1e-6, 0), (2, 1e-5, 0), (2, 1e-6, 1), (4, 1e-6, 1), (4, 1e-7, 0), (6, 1e-2, 2)],
)
def test_no_step_of_degree_four_is_taken_in_single_products(p, relative_eps, count):
    schedule = minimax_schedule(p, relative_eps)
    assert residual_steps(p, schedule) == count
    assert all(step.degree < 4 for step in schedule[len(schedule) - count :])
