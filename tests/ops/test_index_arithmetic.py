"""Tables of any 64 bits: refused before any memory is touched, by the compiled kernels.

A table that is taken, wrongly, writes anywhere: so they are given to a process of their own.
"""

import json
import subprocess
import sys

import pytest
from compiled import load_compiled

LARGEST = 2**63 - 1
PLACES = {
    # A grid times an extent, a place plus these, or a product of dims that wraps around.
    "grid * extent is 2^64": [0, 0, 16, 0, 2**33, 2**31],
    "grid * extent is 2^64 + 16": [0, 0, 16, 0, (2**64 + 16) // 272, 272],
    "start + grid * extent is 2^63": [0, 0, 16, 15, 1, LARGEST - 14],
    "start + extent is -2^63": [0, 0, 16, LARGEST, 1, 1],
    "a place at the end of 64 bits": [0, LARGEST - 7, 16, 0, 1, 16],
    "a place before the first": [0, -(2**63), 16, 0, 1, 16],
    "dims are 2^64 + 16": [0, 0, (2**64 + 16) // 272, 272, 0, 0, 1, 1, 1, 16],
    "dims are 2^64": [0, 0, 2**32, 2**32, 0, 0, 1, 1, 1, 16],
    "dims are 2^63, negative": [0, 0, 2**32, 2**31, 0, 0, 1, 1, 1, 16],
    "dims are 2^128": [0, 0, 2**62, 2**2, 2**62, 2**2, *[0] * 4, *[1] * 4, 1, 1, 1, 16],
    "a tensor that is not there": [2**40, 0, 16, 0, 1, 16],
    "a tensor before the first": [-(2**63), 0, 16, 0, 1, 16],
}
CALLS = ("gather", "moments", "update")
PROGRAM = """
import json
import sys
import torch
from shampoo import ops
ops.load_kernels(required=True)
huge, memory = torch.zeros(1).expand(2**62), torch.zeros(4, dtype=torch.float64)

def moments(norm, sources, table, grad):
    ops.graft_moments_(
        grad, None, None, None, norm, sources, table, 1.0, False, 0.9, 1.0, 0.9, 0.1, 1.0, 1e-8,
        False
    )

def said(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "nothing"

for name, row in json.loads(sys.argv[1]).items():
    table = torch.tensor([row])
    values, norm = torch.arange(16.0), torch.zeros(1)
    flat, params = torch.zeros(16), torch.zeros(16)
    calls = {
        "gather": lambda: ops.gather_blocks_(flat, [values], table, 1.0, False),
        "moments": lambda: moments(norm, [values], table, flat),
        "update": lambda: ops.update_blocks_(
            [params], None, values, torch.ones(1), table, 0.1, 0.0, 0.0, False, None, 0.0
        ),
    }
    for op, call in calls.items():
        words = said(call)
        if flat.any() or norm.any() or params.any():
            words = "memory was touched"
        print(json.dumps([f"{op}, {name}", words]), flush=True)
# Expanded tensors have elements without memory; the sum of theirs is 2^64, which would be 0.
table = torch.tensor([[0, 0, 2**62, 0, 1, 2**62]] * 4)
words = said(lambda: moments(torch.zeros(4), [huge], table, None))
print(json.dumps(["tiles", words]), flush=True)
print(json.dumps(["tensors", said(lambda: ops.magnitudes_(memory, [huge] * 4))]), flush=True)
"""


@pytest.fixture(scope="module")
def answers():
    """What each call said, as far as the process came."""
    load_compiled()
    command = [sys.executable, "-c", PROGRAM, json.dumps(PLACES)]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    except subprocess.TimeoutExpired as stopped:  # it counts to 2^62
        output = (stopped.stdout or b"").decode()
    return dict(map(json.loads, output.splitlines()))


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("op", CALLS)
def test_a_row_that_points_outside_is_refused(answers, op, name):
    assert answers[f"{op}, {name}"].startswith("tiles[0] ")


@pytest.mark.parametrize("what", ["tiles", "tensors"])
def test_more_elements_than_can_be_counted_are_refused(answers, what):
    assert f"{what}[0] to {what}[1] have {LARGEST} elements or more" in answers[what]
