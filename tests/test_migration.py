"""What docs/coming_from.md promises to those who come from another optimizer."""

import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from shampoo import Shampoo

PAGE = (Path(__file__).parents[1] / "docs" / "coming_from.md").read_text(encoding="utf-8")


def ill_conditioned(scale: float, steps: int) -> list[Tensor]:
    """Gradients of a matrix whose singular values span four decades."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for n in (16, 12))
    u, v = u * torch.logspace(0, -2, 16), (v * torch.logspace(0, -2, 12)).mT
    return [scale * u @ torch.randn(16, 12, generator=generator) @ v for _ in range(steps)]


def warnings_of(caplog: pytest.LogCaptureFixture, scale: float, **hyper: Any) -> list[str]:
    caplog.clear()
    params = [Parameter(torch.zeros(16, 12)), Parameter(torch.zeros(16, 12))]
    named = [("first", params[0]), ("second", params[1])]
    opt = Shampoo(named, precondition_frequency=2, **hyper)
    with caplog.at_level(logging.WARNING):
        for grad in ill_conditioned(scale, 8):
            params[0].grad, params[1].grad = 1e-1 * grad / scale, grad
            opt.step()
    return [record.getMessage() for record in caplog.records]


def test_an_eps_that_outweighs_a_factor_is_said_once_with_the_remedy(caplog):
    [message] = warnings_of(caplog, 1e-4, eps=1e-8)
    for part in ("eps=1e-08", "factor0 of second", "2.2e-08", "1e-12", "grafting_eps"):
        assert part in message, f"{part!r} is not in {message!r}"


@pytest.mark.parametrize(
    ("scale", "hyper"),
    [
        (1e-4, {}),
        (1e-1, {"eps": 1e-8}),
        (0.0, {"eps": 1e-8}),  # nothing to precondition is nothing to warn of
        (1e-4, {"eps": 1e-8, "relative_eps": 1e4}),  # the relative ridge is the larger one
        (1e-4, {"eps": 1e-8, "precondition": False}),
        (1e-4, {"eps": 1e-8, "start_preconditioning_step": math.inf}),
    ],
    ids=str,
)
def test_an_eps_that_outweighs_nothing_is_not_mentioned(caplog, scale, hyper):
    if scale == 0.0:
        caplog.clear()
        param, other = Parameter(torch.zeros(4, 4)), Parameter(torch.zeros(4, 4))
        opt = Shampoo([param, other], precondition_frequency=2, **hyper)
        for _ in range(4):
            param.grad, other.grad = torch.zeros(4, 4), torch.ones(4, 4)
            opt.step()
        assert not caplog.records
    else:
        assert not warnings_of(caplog, scale, **hyper)


def test_the_warning_is_true_of_the_steps(caplog):
    """Where it is given the step is the gradient's, where not it is another direction."""
    cosines = {}
    for scale in (1e-1, 1e-5):
        param = Parameter(torch.zeros(16, 12))
        opt = Shampoo([param], lr=1.0, betas=(0.0, 0.999), precondition_frequency=2, eps=1e-8)
        for grad in ill_conditioned(scale, 8):
            before = param.detach().clone()
            param.grad = grad
            opt.step()
        move = before - param.detach()
        cosines[scale] = float((move * grad).sum() / move.norm() / grad.norm())
    assert cosines[1e-5] > 0.99 > cosines[1e-1]
    assert len(caplog.records) == 1


def recipe() -> str:
    """The block of the page that has OneCycleLR."""
    [block] = [b for b in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "OneCycleLR" in b]
    return block


def test_the_recipe_from_sgd_under_onecycle_keeps_its_momentum():
    model, steps = nn.Linear(4, 3), 10
    namespace = {"torch": torch, "Shampoo": Shampoo, "model": model, "steps": steps}
    exec(recipe(), namespace)
    opt, scheduler = namespace["optimizer"], namespace["scheduler"]
    rates = []
    for t in range(steps - 1):
        for i, param in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(10 * t + i)
            param.grad = torch.randn(param.shape, generator=generator)
        opt.step()
        scheduler.step()
        rates.append(opt.param_groups[0]["lr"])
        for group in opt.param_groups:
            assert group["lr"] == rates[-1]
            assert group["betas"] == (0.0, 0.999)
            assert group["momentum"] == 0.9
    assert max(rates) > 10 * min(rates)
    assert not any(key.endswith("exp_avg") for state in opt.state.values() for key in state)


def test_the_recipe_from_sgd_under_onecycle_is_sgd_without_preconditioning():
    """torch's own, which cycles the same rates, while neither cycles its momentum."""
    nets = [nn.Linear(4, 3), nn.Linear(4, 3)]
    nets[1].load_state_dict(nets[0].state_dict())
    namespace = {"torch": torch, "Shampoo": Shampoo, "model": nets[0], "steps": 20}
    exec(recipe(), namespace)
    for group in namespace["optimizer"].param_groups:
        group["start_preconditioning_step"] = math.inf
    sgd = torch.optim.SGD(nets[1].parameters(), lr=0.1, momentum=0.9, nesterov=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        sgd, max_lr=0.1, total_steps=20, cycle_momentum=False
    )
    for t in range(19):
        for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(t))
            theirs.grad = ours.grad.clone()
        for each in (namespace["optimizer"], sgd, namespace["scheduler"], cycle):
            each.step()
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adagrad", "rmsprop", "adam"])
def test_a_normalized_graft_makes_steps_that_grow_with_the_gradient(kind):
    """As documented; the plain graft's do not. Powers of two, so that the scale is exact."""
    moves = {}
    for name in (kind, f"{kind}_normalized"):
        for scale in (1.0, 1024.0):
            param = Parameter(torch.zeros(8, 6))
            opt = Shampoo([param], lr=1.0, grafting=name, grafting_eps=1e-30)
            for t in range(15):
                generator = torch.Generator().manual_seed(t)
                param.grad = scale * torch.randn(8, 6, generator=generator)
                opt.step()
            moves[name, scale] = param.detach().norm()
    grown = moves[f"{kind}_normalized", 1024.0] / moves[f"{kind}_normalized", 1.0]
    torch.testing.assert_close(grown, torch.tensor(1024.0), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(moves[kind, 1024.0], moves[kind, 1.0], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("suffix", ["", "_normalized"])
def test_the_first_step_of_rmsprop_is_as_much_longer_as_documented(suffix):
    lengths = []
    for kind in ("rmsprop", "adam"):
        param = Parameter(torch.zeros(8, 6))
        hyper = {"grafting": kind + suffix, "grafting_eps": 1e-30}
        opt = Shampoo([param], lr=1.0, **hyper)
        param.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        opt.step()
        lengths.append(float(param.detach().norm()))
    assert math.isclose(lengths[0] / lengths[1], 1 / math.sqrt(1 - 0.95), rel_tol=1e-4)
