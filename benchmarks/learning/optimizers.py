"""The optimizers that are compared: a row each, from a model, a rate and what else is tuned."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import Together
from shampoo import Shampoo, groups

Build = Callable[[nn.Module, float, float, Mapping[str, Any]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Row:
    """An optimizer of the comparison.

    Attributes:
        title: in tables and plots.
        build: from the model, the rate, the weight decay and other arguments.
        rate: about where the best one lies; a search starts here.
        arguments: of the optimizer, which a trial may override.
        variations: that its tuning tries at the best rate, arguments and what they become; None if
            only the rate is tuned, and neither decay nor warm-up: its defaults are what is judged.
        package: that must be there.
    """

    title: str
    build: Build
    rate: float
    arguments: dict[str, Any] = field(default_factory=dict)
    variations: tuple[dict[str, Any], ...] | None = None
    package: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is this package, whose defaults are what is judged."""
        return self.build in (shampoo, transferred)


def _parts(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices that matrix methods are for, and all the rest."""
    found = groups(model)
    matrices = [p for g in found if g["name"] == "matrices" for _, p in g["params"]]
    return matrices, [p for g in found if g["name"] != "matrices" for _, p in g["params"]]


def adamw(model: nn.Module, rate: float, decay: float, more: Mapping[str, Any]) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, fused=True, **more)


def sgd(model: nn.Module, rate: float, decay: float, more: Mapping[str, Any]) -> Any:
    # A hundredth: what decay takes off a weight is proportional to the rate, and rates of SGD are
    # about a hundred times those of Adam.
    return torch.optim.SGD(
        model.parameters(), lr=rate, nesterov=True, weight_decay=0.01 * decay, **more
    )


class Flattened(torch.optim.Optimizer):
    """torch's Muon, which takes matrices alone, on convolutions seen as ``[out, in * k * k]``."""

    def __init__(self, params: list[Tensor], **arguments: Any) -> None:
        self.pairs = [(p, p.detach().view(len(p), -1)) for p in params]
        self.muon = torch.optim.Muon([view for _, view in self.pairs], **arguments)
        super().__init__(self.muon.param_groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param, view in self.pairs:
            view.grad = None if param.grad is None else param.grad.view_as(view)
        self.muon.step(closure)


def muon(model: nn.Module, rate: float, decay: float, more: Mapping[str, Any]) -> Any:
    """torch's Muon, AdamW for what is no matrix, an embedding or a head of many outputs.

    ``hidden_only`` is an argument of this comparison: whether what first meets the input, and what
    makes the output, is AdamW's too where it is a matrix or a convolution.
    """
    matrices, rest = _parts(model)
    arguments = {"weight_decay": decay, "adjust_lr_fn": "match_rms_adamw", **more}
    if arguments.pop("hidden_only", False):
        names = {group["name"] for group in groups(model)}
        first, last = "embeddings" not in names, "heads" not in names
        rest += matrices[: int(first)] + matrices[len(matrices) - int(last) :]
        matrices = matrices[int(first) : len(matrices) - int(last)]
    others = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=decay, fused=True)
    return Together([Flattened(matrices, lr=rate, **arguments), others])


class RoundedRoots(Shampoo):
    """Roots that are as exact as bfloat16: what stands in the state is what trains."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for state in self.state.values():
            for name, value in state.items():
                if ".root" in name:
                    value.copy_(value.bfloat16())
        return result


def shampoo(model: nn.Module, rate: float, decay: float, more: Mapping[str, Any]) -> Any:
    """This package; ``embeddings`` and ``bfloat16_roots`` are arguments of studies alone."""
    arguments = dict(more)
    found = groups(model)
    if arguments.pop("embeddings", False):
        for group in found:
            group["precondition"] = True
    kind = RoundedRoots if arguments.pop("bfloat16_roots", False) else Shampoo
    return kind(found, lr=rate, weight_decay=decay, **arguments)


def transferred(model: nn.Module, rate: float, decay: float, more: Mapping[str, Any]) -> Any:
    """muP's rates from width 64 on."""
    found = groups(model, lr=rate, weight_decay=decay, transfer="mup", base_width=64)
    return Shampoo(found, lr=rate, weight_decay=decay, **more)


def official(model: nn.Module, rate: float, decay: float, more: Mapping[str, Any]) -> Any:
    """The official package with Adam grafting, its default root."""
    package = importlib.import_module("distributed_shampoo")
    names = ("AdamPreconditionerConfig", "AdamGraftingConfig")  # the newer one first
    config = next(getattr(package, name) for name in names if hasattr(package, name))
    matrices, rest = _parts(model)
    beta2 = more.get("betas", (0.9, 0.999))[1]
    arguments = {
        "betas": (0.9, 0.999),
        "max_preconditioner_dim": 1024,
        "precondition_frequency": 10,
        "start_preconditioning_step": 10,
        "epsilon": 1e-8,
        **more,
    }
    ours = package.DistributedShampoo(
        matrices,
        lr=rate,
        weight_decay=decay,
        grafting_config=config(beta2=beta2, epsilon=1e-8),
        **arguments,
    )
    others = torch.optim.AdamW(rest, lr=rate, weight_decay=decay, betas=(0.9, beta2), fused=True)
    return Together([ours, others])


def soap(model: nn.Module, rate: float, decay: float, more: Mapping[str, Any]) -> Any:
    """pytorch_optimizer's SOAP."""
    package = importlib.import_module("pytorch_optimizer")
    matrices, rest = _parts(model)
    arguments = {"betas": (0.95, 0.95), "precondition_frequency": 10, **more}
    theirs = package.SOAP(matrices, lr=rate, weight_decay=decay, **arguments)
    others = torch.optim.AdamW(rest, lr=rate, weight_decay=decay, betas=(0.9, 0.95), fused=True)
    return Together([theirs, others])


_BETAS = ({"betas": (0.9, 0.95)}, {"betas": (0.95, 0.99)})
_F = "precondition_frequency"

ROWS: dict[str, Row] = {
    "adamw": Row("AdamW", adamw, 2e-3, {}, _BETAS),
    "sgd": Row("SGD-Nesterov", sgd, 0.1, {"momentum": 0.9}, ({"momentum": 0.95},)),
    "muon": Row("Muon", muon, 8e-3, {}, ({"momentum": 0.9}, {"hidden_only": True})),
    "shampoo": Row("Shampoo", shampoo, 8e-3),
    "shampoo-transfer": Row("Shampoo, muP", transferred, 8e-3),
    "shampoo-f1": Row("Shampoo, f = 1", shampoo, 8e-3, {_F: 1}),
    # With roots this old a factor must remember for longer: f (1 - beta2) = 0.5, as by default.
    "shampoo-f50": Row(
        "Shampoo, f = 50, beta2 = 0.99", shampoo, 8e-3, {_F: 50, "betas": (0.9, 0.99)}
    ),
    "shampoo-paper": Row("Shampoo, p = 2 o", shampoo, 4e-3, {"exponent": "paper"}),
    "kl_shampoo": Row("KL-Shampoo", shampoo, 8e-3, {"preconditioner": "kl_shampoo"}),
    "kl_shampoo-none": Row(
        "KL-Shampoo, no graft",
        shampoo,
        8e-3,
        {"preconditioner": "kl_shampoo", "grafting": "none"},
    ),
    "shampoo-none": Row("Shampoo, no graft", shampoo, 8e-3, {"grafting": "none"}),
    # As docs/tuning.md has it for those who come from SGD: steps of the length that SGD's have.
    "shampoo-sgd": Row(
        "Shampoo, SGD graft, p = 2 o",
        shampoo,
        0.1,
        {
            "grafting": "sgd",
            "exponent": "paper",
            "betas": (0.0, 0.999),
            "momentum": 0.9,
            "nesterov": True,
        },
    ),
    "official": Row("official Shampoo", official, 4e-3, {}, _BETAS, "distributed_shampoo"),
    "soap": Row("SOAP of pytorch_optimizer", soap, 8e-3, {}, _BETAS, "pytorch_optimizer"),
}


def why_absent(name: str) -> str:
    """Why an optimizer cannot be imported, without importing it; empty if it may be."""
    package = ROWS[name].package
    if package is None or importlib.util.find_spec(package):
        return ""
    return f"{ROWS[name].title}: {package} is not installed"
