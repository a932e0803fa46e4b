"""inverse_root without an optimizer runs the kernels that one would, and asks once a device."""

import inspect
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from compiled import load_compiled
from patience import PATIENCE
from torch._subclasses.fake_tensor import FakeTensorMode

from shampoo import inverse_root, roots
from shampoo.certificates import alone

PROGRAM = """
import json, torch, warnings
torch.set_num_threads(1)
import shampoo
from shampoo import ops
A = torch.randn(3, 40, 40, generator=torch.Generator().manual_seed(0))
A = A @ A.mT
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first, second = (shampoo.inverse_root(A, 4) for _ in range(2))
assert first.equal(second)
runs = ops.runs_kernel_on_cpu("minimax_root_")
if runs:
    shampoo.Shampoo([torch.nn.Parameter(torch.ones(3))])
    assert first.equal(shampoo.inverse_root(A, 4))
residual = torch.linalg.matrix_power(first.double(), 4) @ A.double()
print(json.dumps([runs, len(caught), float((residual.diagonal(dim1=1, dim2=2) - 1).abs().max())]))
"""


def ran(**changed):
    kept = {key: value for key, value in os.environ.items() if key not in ("SHAMPOO_BACKEND",)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, env={**kept, **changed}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    runs, warned, error = json.loads(done.stdout)
    assert error < 0.1
    return runs, warned, done.stderr


def test_it_loads_what_an_optimizer_would():
    load_compiled()
    assert ran()[:2] == (True, 0)


def test_it_takes_references_where_that_is_asked_for_or_nothing_can_be_built(tmp_path):
    assert ran(SHAMPOO_BACKEND="reference")[:2] == (False, 0)
    cannot = ran(SHAMPOO_CACHE_DIR=str(tmp_path), CXX="/bin/false", CUDA_HOME="")
    assert cannot[:2] == (False, 1), "one warning, not one a call"


def test_an_uncertified_kernel_does_not_run(tmp_path):
    """As for an optimizer: SHAMPOO_TUNE=0 forbids the check, so there is no licence."""
    assert ran(SHAMPOO_CACHE_DIR=str(tmp_path), SHAMPOO_TUNE="0")[0] is False


@pytest.fixture
def asked(monkeypatch):
    """The shapes that are asked for, in place of the checks."""
    found = []
    monkeypatch.setattr(alone, "prepare", found.append)
    alone._ask.cache_clear()
    yield found
    alone._ask.cache_clear()


def test_a_device_is_asked_about_once_and_at_no_size(asked):
    for n in (300, 5, 300):
        inverse_root(torch.eye(n)[None], 4)
    assert asked == [{torch.device("cpu"): []}]


def test_it_can_be_pickled():
    assert pickle.loads(pickle.dumps(inverse_root)) is inverse_root


def test_what_cannot_run_here_asks_for_nothing(asked):
    for wrong, message in ((torch.ones(3), "Invalid shape"), (torch.ones(1, 2, 3), "Must be")):
        with pytest.raises(ValueError, match=message):
            inverse_root(wrong, 4)
    with FakeTensorMode():
        assert inverse_root(torch.empty(2, 7, 7), 4).shape == (2, 7, 7)
    assert asked == []
    A = torch.eye(6).repeat(2, 1, 1)
    compiled = torch.compile(lambda A: inverse_root(A, 4), backend="eager")
    assert torch.equal(compiled(A), roots.inverse_root(A, 4))


def test_it_says_what_the_solver_says():
    assert inspect.signature(inverse_root) == inspect.signature(roots.inverse_root)
    assert inspect.getdoc(inverse_root) == inspect.getdoc(roots.inverse_root)
