"""A parameter without a gradient takes no step: every count is a parameter's own.

So a parameter moves as if it were alone with its gradients, bit for bit, whatever its neighbours in
a stack do.
"""

import copy
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from trajectory import random_grads, random_params

from shampoo import Shampoo
from shampoo.grafting import GRAFTING

# Two stacks of equal blocks, one of them of blocks that are large enough to be worked on as views.
SHAPES = [(6, 4)] * 5 + [(130, 128)] * 3 + [(3,), (5,), (2, 3, 3), (7, 9)]


def pattern(steps: int, count: int, seed: int = 0) -> list[list[bool]]:
    """Which gradients are there: another set in every step, some parameters late, some rare."""
    choice = random.Random(seed)
    odds = [choice.choice((0.2, 0.5, 0.9)) for _ in range(count)]
    late = [choice.choice((0, 0, steps // 3)) for _ in range(count)]
    drawn = [
        [t >= late[i] and choice.random() < odds[i] for i in range(count)] for t in range(steps)
    ]
    drawn[0][0] = True
    return drawn


def run(
    opt: torch.optim.Optimizer,
    params: Sequence[Parameter],
    history: Sequence[Sequence[Tensor]],
    present: Sequence[Sequence[bool]],
) -> None:
    for grads, here in zip(history, present, strict=True):
        for param, grad, is_here in zip(params, grads, here, strict=True):
            param.grad = grad.clone() if is_here else None
        opt.step()


def drawn(
    steps: int, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> tuple[list[Parameter], list[list[Tensor]], list[list[bool]]]:
    params = random_params(*shapes, dtype=torch.float32)
    return params, random_grads(params, steps), pattern(steps, len(shapes))


@pytest.mark.parametrize(
    "hyper",
    [
        *({"grafting": grafting} for grafting in GRAFTING),
        {"betas": (0.0, 0.99), "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.9, "decoupled_weight_decay": False, "weight_decay": 0.1},
        {"large_dim_method": "diagonal", "max_preconditioner_dim": 5},
        {"large_dim_method": "adagrad", "max_preconditioner_dim": 5, "betas": (0.9, 1.0)},
        {"precondition": False},
        {"bias_correction": False, "start_preconditioning_step": 5},
        {"precondition_frequency": 9},
        {"preconditioner_dtype": torch.float64, "root_method": "eigh"},
    ],
    ids=str,
)
def test_a_parameter_moves_as_if_it_were_alone(hyper: dict[str, Any]):
    hyper = {"precondition_frequency": 3, "lr": 0.05, "precondition_1d": True, **hyper}
    params, history, present = drawn(14)
    alone = [Parameter(param.detach().clone()) for param in params]
    run(Shampoo(params, **hyper), params, history, present)
    for i, param in enumerate(alone):
        # A step of one parameter without a gradient is none at all.
        run(
            Shampoo([param], **hyper), [param], [[g[i]] for g in history], [[h[i]] for h in present]
        )
        assert param.equal(params[i]), i


@pytest.mark.parametrize(
    ("hyper", "make"),
    [
        (
            {"weight_decay": 0.1},
            lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
        ),
        (
            {"weight_decay": 0.1, "decoupled_weight_decay": False},
            lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
        ),
        (
            {"grafting": "rmsprop", "betas": (0.0, 0.99)},
            lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.99),
        ),
        (
            {"grafting": "sgd", "betas": (0.0, 0.99), "momentum": 0.9},
            lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        ),
        (
            {"grafting": "adagrad", "betas": (0.0, 0.99), "grafting_eps": 1e-10},
            lambda p: torch.optim.Adagrad(p, lr=0.01),
        ),
    ],
    ids=["AdamW", "Adam", "RMSprop", "SGD", "Adagrad"],
)
def test_irregular_gradients_give_what_torch_gives(hyper, make):
    params, history, present = drawn(60)
    others = [Parameter(param.detach().clone()) for param in params]
    run(Shampoo(params, lr=0.01, precondition=False, **hyper), params, history, present)
    run(make(others), others, history, present)
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("start", [1, 4])
def test_staggered_roots_follow_the_counts_of_their_parameters(start):
    params, history, present = drawn(30)
    hyper = {"precondition_frequency": 4, "start_preconditioning_step": start}
    opt = Shampoo(params, refresh_schedule="staggered", **hyper)
    seen = [0] * len(params)
    for grads, here in zip(history, present, strict=True):
        before = copy.deepcopy(opt.state_dict()["state"])
        run(opt, params, [grads], [here])
        for i, param in enumerate(params):
            seen[i] += here[i]
            for key, value in opt.state[param].items():
                if "root" in key:
                    slot = int(opt.state[param][key.replace("root", "slot")])
                    is_due = here[i] and seen[i] >= start and (seen[i] - start) % 4 == slot
                    was = before[i][key] if before else torch.zeros_like(value)
                    assert value.equal(was) != is_due, (i, key)


def test_capturable_steps_are_those_of_the_host():
    params, history, present = drawn(16)
    others = [Parameter(param.detach().clone()) for param in params]
    hyper = {"precondition_frequency": 3, "momentum": 0.9, "weight_decay": 0.1}
    run(Shampoo(params, capturable=True, **hyper), params, history, present)
    run(Shampoo(others, **hyper, root_method="minimax"), others, history, present)
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)


def test_capturable_steps_that_are_skipped_count_for_nobody():
    """A gradient that is not finite skips the step, which the host does not see, for all."""
    params, history, present = drawn(12)
    others = [Parameter(param.detach().clone()) for param in params]
    ours, theirs = (
        Shampoo(each, start_preconditioning_step=math.inf, capturable=True)
        for each in (params, others)
    )
    bad = [grad.clone() for grad in history[5]]
    bad[0][0, 0] = torch.nan
    run(
        ours,
        params,
        [*history[:5], bad, *history[5:]],
        [*present[:5], [True] * len(params), *present[5:]],
    )
    run(theirs, others, history, present)
    assert ours.skipped_steps == 1
    for param, other in zip(params, others, strict=True):
        assert param.equal(other)
        assert ours.state[param]["step"] == theirs.state[other]["step"]


def test_draws_of_stochastic_rounding_are_new_for_a_parameter_in_each_of_its_steps():
    """Its own count decides what it draws, so that a neighbour's absence repeats nothing."""
    params = [Parameter(torch.ones(64, 4, dtype=torch.bfloat16)) for _ in range(2)]
    opt = Shampoo(params, lr=1e-3, stochastic_rounding=True, precondition=False, grafting="sgd")
    moves: list[Tensor] = []
    for t in range(4):
        params[0].grad = torch.ones_like(params[0]) if t % 2 == 0 else None
        params[1].grad = torch.ones_like(params[1])
        with torch.no_grad():
            for param in params:
                param.fill_(1.0)
        opt.step()
        moves.append(params[1].detach().clone())
    assert all(not a.equal(b) for i, a in enumerate(moves) for b in moves[:i])


class Calls(TorchDispatchMode):
    """Counts what reaches torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_another_set_in_every_step_takes_no_more_operations_for_more_matrices():
    """However many matrices there are, and however the sets change, a stack stays one batch."""

    def operations(count: int) -> int:
        params, history, present = drawn(8, [(8, 8)] * count)
        opt = Shampoo(params, precondition_frequency=4)
        run(opt, params, history[:7], present[:7])
        for param, grad, is_here in zip(params, history[7], present[7], strict=True):
            param.grad = grad if is_here else None
        with Calls() as calls:
            opt.step()
        return calls.count

    few, many = operations(20), operations(400)
    assert many <= 1.2 * few + 10, (few, many)
