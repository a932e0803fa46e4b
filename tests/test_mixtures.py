"""Random mixtures of all arguments against the reference, on poisoned memory.

Gradients come and go, and an argument may change on the way.
"""

import math
import random
from typing import Any

import pytest
from trajectory import compare

GRAFTS = [
    *("none", "sgd", "adagrad", "rmsprop", "adam", "lars", "lamb"),
    *("adagrad_normalized", "rmsprop_normalized", "adam_normalized"),
]


def mixture(pick: random.Random) -> dict[str, Any]:
    frequency = pick.choice([1, 2, 3])
    start = pick.choice([-1, frequency, frequency + 1, frequency + 2, math.inf])
    momentum = pick.choice([0.0, 0.9])
    hyper = {
        "lr": 0.1,
        "betas": (pick.choice([0.0, 0.5, 0.9]), pick.choice([0.9, 0.99, 1.0])),
        "eps": pick.choice([1e-4, 1e-3, 0.1]),
        "relative_eps": pick.choice([0.0, 1e-5, 1e-2]),
        "weight_decay": pick.choice([0.0, 0.1]),
        "decoupled_weight_decay": pick.choice([True, False]),
        "momentum": momentum,
        "nesterov": momentum > 0 and pick.choice([True, False]),
        "max_preconditioner_dim": pick.choice([1, 2, 3, 4, 6, 100]),
        "precondition_frequency": frequency,
        "start_preconditioning_step": start,
        "merge_dims": pick.choice(["matrix", "full", "none"]),
        "precondition_1d": pick.choice([True, False]),
        "precondition": pick.random() < 0.85,
        "exponent": pick.choice(["covariance", "paper", 1.5, [1, 3], [0, 0, 5]]),
        "exponent_multiplier": pick.choice([1.0, 1.0, 0.7]),
        "bias_correction": pick.choice([True, False]),
        "grafting": pick.choice(GRAFTS),
        "grafting_beta2": pick.choice([None, 0.9, 1.0]),
        "grafting_eps": pick.choice([1e-3, 1e-1]),
        "large_dim_method": pick.choice(["blocking", "auto", "adagrad", "diagonal"]),
        "maximize": pick.random() < 0.3,
    }
    if hyper["grafting"] in ("lars", "lamb") and hyper["large_dim_method"] == "adagrad":
        hyper["weight_decay"] = 0.0  # which decay applies there is not specified
    return hyper


def mixed_shapes(pick: random.Random) -> list[tuple[int, ...]]:
    orders = [pick.choice([0, 1, 2, 2, 3, 4]) for _ in range(pick.choice([1, 3, 4]))]
    shapes = [tuple(pick.choice([1, 2, 3, 4, 5, 7]) for _ in range(o)) for o in orders]
    return shapes + shapes[:2]  # equal shapes, so that stacks hold several blocks


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("seed", range(80))
def test_a_random_mixture_follows_the_reference(seed):
    pick = random.Random(seed)
    hyper, shapes = mixture(pick), mixed_shapes(pick)
    changes = [
        *({"lr": 0.01}, {"eps": 0.3}, {"weight_decay": 0.0}, {"grafting_eps": 0.3}),
        {"bias_correction": not hyper["bias_correction"]},
    ]
    idle = set()
    if pick.choice([True, False]):
        every = [(t, i) for t in range(1, 9) for i in range(len(shapes))]
        idle = {place for place in every if pick.random() < 0.15}
    change = {5: pick.choice(changes)} if pick.choice([True, False]) else {}
    compare(shapes, 8, change=change, mask=lambda t, i: (t, i) not in idle, **hyper)
