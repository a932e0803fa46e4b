"""Optimizers of torch, and the arguments under which Shampoo takes their steps.

It does so where it takes the length and the direction of its graft: before the start, and without
preconditioning.
"""

from typing import Any

import torch

_ADAM = {"betas": (0.9, 0.95), "eps": 1e-8}
_AS_ADAM = {"grafting": "adam", "betas": (0.9, 0.95), "grafting_eps": 1e-8}
_RMSPROP = {"alpha": 0.95, "eps": 1e-6}
_AS_RMSPROP = {
    **{"grafting": "rmsprop", "betas": (0.0, 0.99)},
    **{"grafting_beta2": 0.95, "grafting_eps": 1e-6},
}
_AS_SGD = {"grafting": "sgd", "betas": (0.0, 0.99)}
_MOMENTUM = {"momentum": 0.9}
_NESTEROV = {"momentum": 0.9, "nesterov": True}

_PAIRS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}, _AS_SGD),
    "sgd-momentum": (torch.optim.SGD, _MOMENTUM, {**_AS_SGD, **_MOMENTUM}),
    "sgd-nesterov": (torch.optim.SGD, _NESTEROV, {**_AS_SGD, **_NESTEROV}),
    "adagrad": (
        torch.optim.Adagrad,
        {"eps": 1e-6},
        {"grafting": "adagrad", "betas": (0.0, 0.99), "grafting_eps": 1e-6},
    ),
    "rmsprop": (torch.optim.RMSprop, _RMSPROP, _AS_RMSPROP),
    "rmsprop-momentum": (
        torch.optim.RMSprop,
        {**_RMSPROP, **_MOMENTUM},
        {**_AS_RMSPROP, **_MOMENTUM},
    ),
    "adam": (torch.optim.Adam, _ADAM, _AS_ADAM),
    "adam-own-beta2": (
        torch.optim.Adam,
        {"betas": (0.9, 0.95), "eps": 1e-5},
        {
            **{"grafting": "adam", "betas": (0.9, 0.999)},
            **{"grafting_beta2": 0.95, "grafting_eps": 1e-5},
        },
    ),
    "adamw": (torch.optim.AdamW, _ADAM, _AS_ADAM),
}
# name: (torch's class, its arguments, Shampoo's)
TWINS = {
    name: (theirs, hyper, {**ours, "decoupled_weight_decay": theirs is torch.optim.AdamW})
    for name, (theirs, hyper, ours) in _PAIRS.items()
}
