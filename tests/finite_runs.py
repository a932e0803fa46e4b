"""What ranks run for tests/step/test_finite.py: gradients of any size, all state looked at."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Parameter

from shampoo import Shampoo

POWERS = (-19.0, -19.0, 0.0, 17.0, 14.0, 30.0, -42.0, 0.0, -30.0, 10.0, 0.0, 0.0)
# Gradients of 1e-19 at first: roots of 1e38, which a gradient of 1 then meets.
NO_GRAFT = {
    "grafting": "none", "exponent": 1, "eps": 1e-38, "relative_eps": 0.0, "betas": (0, 0.9)
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "no graft": NO_GRAFT,
    "no graft, momentum": {**NO_GRAFT, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "lars": {"grafting": "lars", "momentum": 0.9},
    "lamb": {"grafting": "lamb", "weight_decay": 0.1},
    "sgd": {"grafting": "sgd"},
    "coupled": {"grafting": "adagrad", "decoupled_weight_decay": False, "weight_decay": 0.1},
}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wild_run(
    rank: int, case: str, is_sharded: bool = False, **sharing: Any
) -> tuple[list[Tensor], int, list[str]]:
    """Parameters at the end, skipped steps, and what was not finite at any step."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(6, 4, generator=generator)) for _ in range(2)]
    if is_sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        params = [Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in params]
    hyper = {"lr": 1e-3, "max_preconditioner_dim": 3, "precondition_frequency": 2, **CASES[case]}
    opt = Shampoo(params, **hyper, **sharing)
    bad = []
    for t, power in enumerate(POWERS):
        for i, param in enumerate(params):
            generator = torch.Generator().manual_seed(10 * t + i)
            grad = torch.randn(6, 4, generator=generator)
            grad = (grad.double() * 10.0**power).float() if i == 0 else grad
            param.grad = distribute_tensor(grad, mesh, [Shard(0)]) if is_sharded else grad
        if case == "coupled" and t == len(POWERS) - 2:
            with torch.no_grad():  # of the shard of one rank: all must hear of it
                local = params[1].to_local() if is_sharded else params[1]
                if not is_sharded or rank == 0:
                    local[0, 0] = 1e20
        opt.step()
        for param in params:
            bad += [f"{t} {key}" for key, v in opt.state[param].items() if not v.isfinite().all()]
        bad += [f"{t} parameter" for param in params if not whole(param.detach()).isfinite().all()]
    return [whole(param.detach()).clone() for param in params], opt.skipped_steps, bad


def half_run(rank: int) -> tuple[list[Tensor], int, list[str]]:
    """SGD's directions, as long as the gradients are, sent in float16."""
    return wild_run(rank, "sgd", communication_dtype=torch.float16, num_trainers_per_group=2)
