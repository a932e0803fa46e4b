"""``capturable=True`` on a GPU: steps replayed from CUDA graphs, and nothing that waits."""

import pytest
import torch
from gpu_mixtures import MARKS, SHAPES, VARIANTS
from torch.nn import Parameter
from trajectory import assert_same_bits, snapshot

from shampoo import Replay, Shampoo

pytestmark = MARKS


def make(capturable, dtype=torch.float32, **arguments):
    torch.manual_seed(0)
    params = [Parameter(torch.randn(shape, device="cuda").to(dtype)) for shape in SHAPES]
    for param in params:
        param.grad = torch.zeros_like(param)
    lr = torch.tensor(1e-2, device="cuda") if capturable else 1e-2
    limits = {"max_preconditioner_dim": 64, "precondition_frequency": 3, "root_method": "minimax"}
    return params, Shampoo(params, lr=lr, capturable=capturable, **limits, **arguments)


def put(step, *lists):
    generator = torch.Generator().manual_seed(step)
    for i, same in enumerate(zip(*lists, strict=True)):
        grad = torch.randn(same[0].shape, generator=generator)
        if step == 7 and i == 1:
            grad[3] = torch.nan
        for param in same:
            param.grad.copy_(grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_replayed_steps_are_the_eager_ones(variant, dtype):
    """Ordinary steps and refreshes, while the learning rate moves and one step is skipped."""
    theirs, eager = make(True, dtype, **VARIANTS[variant])
    ours, opt = make(True, dtype, **VARIANTS[variant])
    replay = Replay(opt, opt.step)
    for step in range(16):
        put(step, theirs, ours)
        for optimizer in (eager, opt):
            optimizer.param_groups[0]["lr"].fill_(0.01 * (1 + step % 4))
        eager.step()
        replay()
        assert_same_bits(snapshot(opt), snapshot(eager))
    assert None not in replay._recorded.values()
    assert opt.skipped_steps == eager.skipped_steps == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_capturable_steps_are_the_ordinary_ones(variant):
    theirs, ordinary = make(False, **VARIANTS[variant])
    ours, opt = make(True, **VARIANTS[variant])
    for step in range(7):
        put(step, theirs, ours)
        ordinary.step()
        opt.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)  # references round elsewhere


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_waits_for_the_device(variant):
    params, opt = make(True, **VARIANTS[variant])
    for step in range(6):
        put(step, params)
        opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_whole_iteration_is_replayed():
    results = []
    for capturable in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4)
        ).cuda()
        opt = Shampoo(model.parameters(), lr=1e-2, capturable=capturable, precondition_frequency=4)
        batch, losses = torch.empty(64, 16, device="cuda"), []

        def iteration(opt=opt, model=model, batch=batch):
            opt.zero_grad()
            loss = (model(batch) - batch[:, :4].sin()).square().mean()
            loss.backward()
            opt.step()
            return loss

        run = Replay(opt, iteration) if capturable else iteration
        for step in range(24):
            generator = torch.Generator().manual_seed(step)
            batch.copy_(torch.randn(64, 16, generator=generator))
            losses.append(run().item())
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=2e-2)
    assert results[1][-1] < results[1][0]


def test_an_ordinary_step_cannot_be_captured():
    params, opt = make(False)
    put(0, params)
    opt.step()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()


def test_a_learning_rate_on_the_host_is_refused():
    params, opt = make(True)
    put(0, params)
    opt.param_groups[0]["lr"] = torch.tensor(1e-2)
    with pytest.raises(ValueError, match=r"Invalid lr on cpu. Must be on cuda:0"):
        opt.step()
