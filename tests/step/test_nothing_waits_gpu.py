"""The default step on a GPU waits for nothing, and takes the steps that one that waits takes."""

import pytest
import torch
from gpu_mixtures import MARKS, SHAPES
from gpu_mixtures import VARIANTS as MIXTURES
from torch.nn import Parameter
from trajectory import snapshot

from shampoo import Shampoo
from shampoo.ops import transit

pytestmark = MARKS
VARIANTS = {**MIXTURES, "kl": {"preconditioner": "kl_shampoo"}}
BAD = (0, 3, 7, 8)  # steps that are skipped


def make(**arguments):
    torch.manual_seed(0)
    params = [Parameter(torch.randn(shape, device="cuda")) for shape in SHAPES]
    for param in params:
        param.grad = torch.zeros_like(param)
    limits = {"max_preconditioner_dim": 64, "precondition_frequency": 3}
    return params, Shampoo(params, lr=1e-2, **limits, **arguments)


def gradients():
    history = []
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(shape, generator=generator) for shape in SHAPES]
        if step in BAD:
            grads[step % 3].view(-1)[3] = torch.nan
        history.append([grad.cuda() for grad in grads])
    return history


def train(params, opt, history):
    for grads in history:
        for param, grad in zip(params, grads, strict=True):
            param.grad.copy_(grad)
        opt.step()


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_waits_for_the_device(variant):
    """The first step neither, with its state and tables; torch raises for what does."""
    params, opt = make(**VARIANTS[variant])
    history = gradients()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(params, opt, history)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert opt.skipped_steps == len(BAD)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_steps_are_those_of_a_host_that_waits(variant, monkeypatch):
    found = []
    for near in (frozenset({"cpu"}), frozenset({"cpu", "cuda"})):
        monkeypatch.setattr(transit, "NEAR", near)
        params, opt = make(**VARIANTS[variant])
        train(params, opt, gradients())
        assert opt.skipped_steps == len(BAD)
        found.append(snapshot(opt))
    for key, value in found[1].items():  # references round numbers of the device elsewhere
        torch.testing.assert_close(found[0][key], value, rtol=1e-2, atol=1e-3)


def test_a_step_returns_before_the_device_begins_with_it():
    params, opt = make()
    history = gradients()
    train(params, opt, history[1:3])
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    awake = torch.cuda.Event()
    awake.record()
    train(params, opt, history[1:2])
    assert not awake.query()
