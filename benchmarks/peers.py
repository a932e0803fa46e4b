"""Other optimizers for the same step: torch's Muon, and packages that may be installed.

Each package is one entry of ``PEERS``. What it cannot import or run is text in a row, never an
error of the run. Embeddings go to fused AdamW beside every one of them, as they go to the grafted
method beside Shampoo.
"""

import importlib
import importlib.util
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Factory, Groups, adamw, betas
from shampoo import Shampoo


class Together(torch.optim.Optimizer):
    """Several optimizers that step as one, each over parameters of its own."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.state = defaultdict(dict, {index: part.state for index, part in enumerate(parts)})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step(closure)


def beside_adamw(
    build: Callable[[list[Tensor]], torch.optim.Optimizer], groups: Groups
) -> Together:
    """``build`` for what is preconditioned, fused AdamW for the groups that are not."""
    apart = [group for group in groups if not group.get("precondition", True)]
    kept = [p for group in groups if group.get("precondition", True) for p in group["params"]]
    return Together([build(kept), *([adamw("fused")(apart)] if apart else [])])


def shampoo(groups: Groups, *, block: int, refresh: int) -> torch.optim.Optimizer:
    """This package with its defaults."""
    chosen = {"max_preconditioner_dim": block, "precondition_frequency": refresh}
    return Shampoo(groups, betas=betas(refresh), **chosen)


def muon(groups: Groups, *, block: int, refresh: int) -> torch.optim.Optimizer:
    """torch's Muon, convolutions as the matrices they are, vectors by fused AdamW."""

    def build(params: list[Tensor]) -> Together:
        matrices = []
        for param in (param for param in params if param.dim() > 1):
            view = param.view(len(param), -1)
            assert param.grad is not None
            view.grad = param.grad.view(len(param), -1)
            matrices.append(view)
        vectors = [param for param in params if param.dim() <= 1]
        rest = [adamw("fused")([{"params": vectors}])] if vectors else []
        return Together([torch.optim.Muon(matrices), *rest])

    return beside_adamw(build, groups)


def distributed_shampoo(groups: Groups, *, block: int, refresh: int) -> torch.optim.Optimizer:
    """The official package, Adam grafting, its default root."""
    package = importlib.import_module("distributed_shampoo")
    names = ("AdamPreconditionerConfig", "AdamGraftingConfig")  # the newer one first
    config = next(getattr(package, name) for name in names if hasattr(package, name))

    def build(params: list[Tensor]) -> torch.optim.Optimizer:
        return package.DistributedShampoo(  # type: ignore[no-any-return]
            params,
            lr=1e-3,
            betas=(0.9, 0.999),
            epsilon=1e-8,
            max_preconditioner_dim=block,
            precondition_frequency=refresh,
            start_preconditioning_step=refresh,
            grafting_config=config(beta2=0.999, epsilon=1e-8),
        )

    return beside_adamw(build, groups)


def dash(groups: Groups, *, block: int, refresh: int, scaling: str, half: bool) -> Any:
    """DASH, all blocks of a device stacked, coupled Newton: its fastest published settings.

    It wants a side of every matrix to be a multiple of its block: the largest such one is taken.
    Vectors of different lengths make it raise: they go to AdamW.
    """
    package = importlib.import_module("ista_daslab_optimizers.dash")
    kept = [p for group in groups if group.get("precondition", True) for p in group["params"]]
    matrices = [param for param in kept if param.squeeze().dim() > 1]
    shapes = [param.squeeze().flatten(1).shape for param in matrices]
    block = next(
        size
        for size in range(block, 0, -1)
        if all(rows % size == 0 or cols % size == 0 for rows, cols in shapes)
    )
    config = package.DashConfig(
        inv_root_method=package.DashInverseRootMethodType.CN,
        matrix_scaling_type=getattr(package.DashMatrixScalingType, scaling),
        matmul_dtype=torch.float16 if half else torch.float32,
        inv_root_freq=refresh,
        block_size=block,
    )

    def build(params: list[Tensor]) -> torch.optim.Optimizer:
        return package.DashGpu(  # type: ignore[no-any-return]
            [{"params": params}], lr=1e-3, weight_decay=0.0, config=config
        )

    vectors = [param for param in kept if param.squeeze().dim() <= 1]
    rest = [group for group in groups if not group.get("precondition", True)]
    apart = [{"params": vectors, "precondition": False}] if vectors else []
    return beside_adamw(build, [{"params": matrices}, *apart, *rest])


def heavyball_soap(groups: Groups, *, block: int, refresh: int) -> torch.optim.Optimizer:
    """HeavyBall's SOAP: it has no classic Shampoo, and no blocks, only a largest size."""
    package = importlib.import_module("heavyball")

    def build(params: list[Tensor]) -> torch.optim.Optimizer:
        return package.SOAP(  # type: ignore[no-any-return]
            params,
            lr=1e-3,
            precondition_frequency=refresh,
            max_precond_dim=max(block, 2048),
            use_precond_schedule=False,
        )

    return beside_adamw(build, groups)


def pytorch_optimizer_dash(groups: Groups, *, block: int, refresh: int) -> torch.optim.Optimizer:
    """pytorch_optimizer's DASH, batched within one tensor."""
    package = importlib.import_module("pytorch_optimizer")

    def build(params: list[Tensor]) -> torch.optim.Optimizer:
        return package.DASH(  # type: ignore[no-any-return]
            params, lr=1e-3, block_size=block, precondition_frequency=refresh
        )

    return beside_adamw(build, groups)


def fused_adamw(groups: Groups, *, block: int, refresh: int) -> torch.optim.Optimizer:
    """torch's AdamW(fused=True) for everything: what ratios are taken to."""
    return adamw("fused")(groups)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw-fused": fused_adamw,
    "muon": muon,
    "shampoo": shampoo,
    "distributed_shampoo": distributed_shampoo,
    "ista_daslab_optimizers": partial(dash, scaling="FRO", half=False),
    "ista_daslab_optimizers-fp16": partial(dash, scaling="FRO", half=True),
    "heavyball": heavyball_soap,
    "pytorch_optimizer": pytorch_optimizer_dash,
}
PEERS = tuple(OPTIMIZERS)[3:]


def factory(name: str, block: int, refresh: int) -> Factory:
    """The constructor of an entry of ``OPTIMIZERS``, from parameter groups."""
    return partial(OPTIMIZERS[name], block=block, refresh=refresh)


def why_absent(name: str) -> str:
    """Why a peer cannot be imported, without importing it; empty if it may be."""
    package = name.partition("-")[0]
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"
