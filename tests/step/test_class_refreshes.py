"""Whole runs whose refreshes are of size classes, beside runs in which every stack is refreshed by
itself: the same roots but for rounding, in the same steps."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from far import Far, Post, far, near, parameter
from torch import Tensor
from torch.nn import Parameter

from shampoo import Shampoo
from shampoo.roots import size_classes

SHAPES = [(24, 16), (16, 9), (7,), (24, 3), (9, 5)]
ARGUMENTS: dict[str, Any] = {"lr": 0.01, "precondition_frequency": 2, "root_method": "minimax"}
VARIANTS: dict[str, dict[str, Any]] = {
    "together": {},
    "staggered": {"refresh_schedule": "staggered", "precondition_frequency": 3},
    "one power": {"exponent": "covariance"},
    "cubes": {"max_preconditioner_dim": 8, "large_dim_method": "blocking"},
    "kl": {"preconditioner": "kl_shampoo"},
    "diagonal modes": {"max_preconditioner_dim": 16, "large_dim_method": "diagonal"},
}
STEPS = 7
CLOSE = 2e-3  # of a root or a weight, of the whole: what two root iterations differ by


@pytest.fixture
def padded(monkeypatch) -> Iterator[list[int]]:
    """Lets classes win while it holds True; how many stacks each had."""
    counts, pad = [], size_classes.padded

    def counted(stacks: Any, side: int) -> Any:
        counts.append(len(stacks))
        return pad(stacks, side)

    monkeypatch.setattr(size_classes, "padded", counted)
    yield counts
    assert min(counts) > 1


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def params_of(opt: Shampoo) -> list[Tensor]:
    return opt.param_groups[0]["params"]


def take(opt: Shampoo, grads: list[Tensor | None], has_classes: bool) -> None:
    for param, grad in zip(params_of(opt), grads, strict=True):
        is_far = param.device.type == "far"
        param.grad = None if grad is None else far(grad) if is_far else grad.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(size_classes, "is_padded", lambda *how, **_: has_classes)
        opt.step()


def assert_close(one: Shampoo, other: Shampoo) -> None:
    for mine, its in zip(params_of(one), params_of(other), strict=True):
        assert_near(near(mine.data), near(its.data), "weight")
        assert one.state[mine].keys() == other.state[its].keys()
        for key, value in one.state[mine].items():
            assert_near(near(value), near(other.state[its][key]), key)


def assert_near(value: Tensor, expected: Tensor, key: str) -> None:
    if not expected.is_floating_point():
        assert torch.equal(value, expected), key
    else:
        error = (value - expected).double().norm()
        assert error <= CLOSE * expected.double().norm(), (key, error)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_in_classes_is_one_without(variant, padded):
    twins = [
        Shampoo([Parameter(each) for each in weights()], **{**ARGUMENTS, **VARIANTS[variant]})
        for _ in range(2)
    ]
    for step in range(STEPS):
        for opt, has_classes in zip(twins, (True, False), strict=True):
            take(opt, gradients(step), has_classes)
        assert_close(*twins)
    assert padded


def test_parameters_that_differ_in_how_many_steps_they_took(padded):
    """Each factor is divided by the correction of its own."""
    twins = [Shampoo([Parameter(each) for each in weights()], **ARGUMENTS) for _ in range(2)]
    for step in range(STEPS):
        grads: list[Tensor | None] = [*gradients(step)]
        if step < 2:
            grads[step] = None
        for opt, has_classes in zip(twins, (True, False), strict=True):
            take(opt, grads, has_classes)
        assert_close(*twins)
    assert padded


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("schedule", ["together", "staggered"])
def test_on_a_device_nothing_waits_and_skipped_steps_change_nothing(
    schedule, capturable, padded, monkeypatch
):
    with Far():
        post = Post(delay=1)
        post.install(monkeypatch)
        how = {**ARGUMENTS, "refresh_schedule": schedule, "capturable": capturable}
        twins = [Shampoo([parameter(each) for each in weights()], **how) for _ in range(2)]
        for step in range(STEPS):
            grads = gradients(step)
            if step in (1, 4):
                grads[0][3, 3] = torch.nan
            post.now += 1
            for opt, has_classes in zip(twins, (True, False), strict=True):
                take(opt, [*grads], has_classes)
            assert_close(*twins)
    assert padded


def test_metrics_are_those_of_every_factor(padded):
    twins = [Shampoo([Parameter(each) for each in weights()], **ARGUMENTS) for _ in range(2)]
    for opt in twins:
        opt.record_metrics()
    for step in range(4):
        for opt, has_classes in zip(twins, (True, False), strict=True):
            take(opt, gradients(step), has_classes)
    one, other = (opt.metrics() for opt in twins)
    assert one.keys() == other.keys()
    for key, value in other.items():
        if "root" in key or "condition" in key:
            assert one[key] == pytest.approx(value, rel=0.2, abs=2e-3, nan_ok=True), key
    assert padded
