"""Arguments that every op takes."""

from types import SimpleNamespace

import torch
from torch import Tensor


def good_arguments() -> SimpleNamespace:
    """Arguments that every op takes: two blocks of [2, 3] from one matrix."""
    rows = torch.tensor([[0, 0, 4, 3, 0, 0, 2, 1, 2, 3]])

    def make_flat() -> Tensor:
        return torch.rand(12)

    gather = {
        "out": make_flat(),
        "sources": [torch.randn(4, 3)],
        "tiles": rows,
        "alpha": 0.5,
        "accumulate": False,
    }
    moments = {
        "grad": make_flat(),
        "exp_avg": make_flat(),
        "exp_avg_sq": make_flat(),
        "direction": make_flat(),
        "norm": torch.rand(2),
        "sources": [torch.randn(4, 3)],
        "tiles": rows,
        "alpha": 0.5,
        "accumulate": False,
        "beta1": 0.9,
        "correction1": 0.1,
        "beta2": 0.99,
        "weight2": 0.01,
        "correction2": 0.01,
        "eps": 1e-8,
        "normalized": False,
        "ahead": make_flat(),
    }
    update = {
        "params": [torch.randn(4, 3)],
        "momentum": make_flat(),
        "direction": make_flat(),
        "scale": torch.rand(2),
        "tiles": rows,
        "lr": 0.1,
        "weight_decay": 0.1,
        "mu": 0.9,
        "nesterov": True,
        "seed": 5,
        "step": 3.0,
    }
    scale = {
        "scale": torch.empty(3),
        "norm": torch.rand(3),
        "length": torch.rand(3),
        "is_own": torch.tensor([True, False, True]),
        "correction": 0.9,
        "grafted": True,
        "most": 1e30,
        "accepted": torch.tensor(True),
    }
    gram = {
        "factors": [torch.eye(4).repeat(2, 1, 1), torch.eye(2)[None]],
        "grads": [torch.randn(2, 4, 3), torch.randn(1, 5, 2)],
        "modes": [0, 1],
        "beta": 0.9,
        "weight": 0.1,
    }
    roots = [torch.eye(4).repeat(2, 1, 1), torch.eye(3).repeat(2, 1, 1), torch.eye(5)[None]]
    precondition = {
        "outs": [torch.empty(2, 4, 3), torch.empty(1, 5)],
        "norms": [torch.empty(2), torch.empty(1)],
        "grads": [torch.randn(2, 4, 3), torch.randn(1, 5)],
        "roots": roots,
    }
    stack = torch.randn(2, 4, 4)
    eigh = {
        "values": torch.empty(2, 4),
        "vectors": torch.empty(2, 4, 4),
        "stack": stack + stack.mT,
    }
    factor = torch.eye(4).repeat(2, 1, 1)
    ridge = torch.ones(2, dtype=torch.float64)
    root = {
        "root": torch.empty(2, 4, 4),
        "ridge": ridge.clone(),
        "factor": factor,
        "p": 4,
        "eps": 0.0,
        "relative_eps": 1e-2,
        "schedule": [2.1, -3.8, 2.7, 0.0, 0.0, 1.25, -0.25, 0.0, 0.0, 0.0],
    }
    check = {
        "ok": torch.empty(2, dtype=torch.bool),
        "root": factor.clone(),
        "factor": factor,
        "ridge": ridge,
        "p": 4.0,
        "sizes": None,
    }
    of_class = dict(list(root.items())[:3])
    of_class |= {"sizes": torch.tensor([4, 2], dtype=torch.int32), **root}
    of_class["root"], of_class["factor"] = torch.zeros(2, 4, 4), factor.clone()
    of_class["factor"][1, 2:] = 0
    diagonal = {
        "root": torch.randn(2, 4, 4),
        "ridge": ridge.clone(),
        "factor": factor,
        "p": 4.0,
        "eps": 0.0,
        "relative_eps": 1e-2,
    }
    keep = {
        "root": torch.zeros(2, 4, 4),
        "outcome": torch.empty(2, dtype=torch.uint8),
        "failures": torch.zeros(2, dtype=torch.int32),
        "ready": torch.empty(2, dtype=torch.bool),
        "candidate": factor.clone(),
        "ok": torch.tensor([True, False]),
        "accepted": torch.tensor(True),
    }
    magnitudes = {
        "out": torch.empty(2, dtype=torch.float64),
        "tensors": [torch.randn(4, 3), torch.randn(5)],
    }
    return SimpleNamespace(
        gather_blocks_=gather,
        graft_moments_=moments,
        update_blocks_=update,
        graft_scale_=scale,
        gram_ema_=gram,
        precondition_=precondition,
        eigh_=eigh,
        magnitudes_=magnitudes,
        minimax_root_=root,
        minimax_small_root_=root,
        minimax_class_root_=of_class,
        diagonal_root_=diagonal,
        check_roots_=check,
        keep_roots_=keep,
    )
