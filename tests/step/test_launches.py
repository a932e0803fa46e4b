"""What an ordinary step launches on a GPU, whatever the number of tensors."""

import warnings

import pytest
import torch
from host_build import HostOps
from launches import Launches, parameter

from benchmarks.shapes import MODELS
from shampoo import Shampoo

pytest.importorskip("triton", reason="triton is not installed: its launches are not counted")

ORDINARY = 13  # not a refresh, and all blocks have roots by then


def ordinary_step(model: str, backend: str = "auto") -> Launches:
    with Launches(backend) as launches, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        params = [parameter(shape) for shape in MODELS[model]().shapes]
        opt = Shampoo(params)
        for step in range(1, ORDINARY + 1):
            launches.is_counting = step >= ORDINARY - 1  # the one before makes tables that stay
            launches.counts.clear()
            opt.step()
    return launches


# With defaults, where all kernels passed and win.
MOST = {"gpt2": 60, "resnet50": 150}


@pytest.mark.parametrize("model", MOST)
def test_an_ordinary_step_is_few_launches(model):
    launches = ordinary_step(model)
    assert 0 < launches.total() <= MOST[model], launches.counts.most_common()


def test_what_only_counts_counts_what_runs():
    host = HostOps()
    sources = [torch.randn(4, 4) for _ in range(97)]  # one more than a table holds
    tiles = torch.tensor([[i, 16 * i, 4, 4, 0, 0, 1, 1, 4, 4] for i in range(97)])
    out = torch.zeros(97 * 16)
    found = []
    for dry in (True, False):
        host.module.set_dry(dry)
        before = host.module.launches()
        host.gather_blocks_(out, sources, tiles, 1.0, False)
        found.append(host.module.launches() - before)
        assert bool(out.any()) is not dry
    assert found == [2, 2]
