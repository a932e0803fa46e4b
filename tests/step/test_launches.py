"""What an ordinary step launches on a GPU, whatever the number of tensors."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from host_build import HostOps
from launches import Launches, parameter

# After the installed package, which the checkout must not shadow.
sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.shapes import MODELS
from shampoo import Shampoo

pytest.importorskip("triton", reason="triton is not installed: its launches are not counted")

ORDINARY = 13  # not a refresh, and all blocks have roots by then
REFRESH = 30  # and what the refresh before it has sent says that all roots passed


def ordinary_step(model: str, backend: str) -> Launches:
    return step_of(MODELS[model]().shapes, backend)


def step_of(
    shapes: Sequence[tuple[int, ...]],
    backend: str = "auto",
    last: int = ORDINARY,
    has_classes: bool = True,
    **hyper: Any,
) -> Launches:
    with Launches(backend, has_classes) as launches, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        params = [parameter(shape) for shape in shapes]
        opt = Shampoo(params, **hyper)
        for step in range(1, last + 1):
            launches.is_counting = step >= last - 1  # the one before makes tables that stay
            launches.counts.clear()
            opt.step()
    return launches


# With defaults: where all kernels passed and win, where there is no Triton, or no CUDA toolkit. By
# torch a tile takes some launches of its own.
MOST = {
    ("auto", "gpt2"): 60,
    ("auto", "resnet50"): 150,
    ("cuda", "gpt2"): 100,
    ("cuda", "resnet50"): 192,
    ("triton", "gpt2"): 985,
    ("triton", "resnet50"): 1097,
}


@pytest.mark.parametrize(("backend", "model"), MOST)
def test_an_ordinary_step_is_few_launches(backend, model):
    launches = ordinary_step(model, backend)
    assert 0 < launches.total() <= MOST[backend, model], launches.counts.most_common()


# With defaults, a whole step that refreshes, and how many chains of root iterations are in it,
# where size classes win and where not. ResNet-50 has factors of 12 kinds, which are 4 classes.
MOST_OF_A_REFRESH = {
    ("resnet50", False): (530, 12),
    ("resnet50", True): (295, 4),
    ("gpt2", False): (345, 7),
    ("gpt2", True): (345, 6),
}


@pytest.mark.parametrize(("model", "has_classes"), MOST_OF_A_REFRESH)
def test_a_refresh_is_a_fixed_list_of_launches(model, has_classes):
    launches = step_of(MODELS[model]().shapes, "auto", REFRESH, has_classes)
    most, chains = MOST_OF_A_REFRESH[model, has_classes]
    assert 0 < launches.total() <= most, launches.counts.most_common()
    assert launches.by_name()["normalize_kernel"] == chains


@pytest.mark.parametrize("last", [ORDINARY, REFRESH])
def test_launches_do_not_grow_with_the_number_of_tensors(last):
    """More of the same shapes, below what a table of 96 tiles, a segment and a class hold."""
    shapes = [(64, 32), (48, 48), (256, 64), (64,)]
    few, many = (step_of(shapes * times, last=last).total() for times in (1, 9))
    assert 0 < few == many


def test_what_is_due_of_several_stacks_is_one_class():
    """Also a few rows of each, as where refreshes are spread over the steps."""
    shapes = [(64, 48), (48, 32), (40, 24), (56, 16)] * 3
    how = {"precondition_frequency": 4, "refresh_schedule": "staggered"}
    chains = [
        step_of(shapes, "auto", 12, has_classes, **how).by_name()["normalize_kernel"]
        for has_classes in (False, True)
    ]
    assert chains[1] == 1 < chains[0]


# Of a refresh of one stack of factors, beyond an ordinary step: 21 products and 6 launches beside
# them, 2 for what is diagonal, 6 of the root check, a bias correction, what is kept, 4 of the watch
# over ridges; where classes pay, 5 more for the sizes of what is alone in its class. By torch alone
# the products are those of float32, and all else is as much again.
OF_A_REFRESH = {("triton", False): 41, ("triton", True): 46, ("reference", False): 207}


@pytest.mark.parametrize(("backend", "has_classes"), OF_A_REFRESH)
def test_a_refresh_of_a_stack_is_few_launches(backend, has_classes):
    ordinary, refresh = (
        step_of([(300, 300)] * 3, backend, last, has_classes) for last in (ORDINARY, REFRESH)
    )
    more = refresh.counts - ordinary.counts
    assert any(line.startswith("roots/") for _, line in more), "no refresh was counted"
    assert 0 < refresh.total() - ordinary.total() <= OF_A_REFRESH[backend, has_classes], more


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
