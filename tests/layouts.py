"""Small models under the layouts of distributed training, and runs of them that end in a digest.

Gradients are drawn whole, from a generator seeded by the step, and then placed like their
parameters: every world size and layout is given the same ones (distributed.md section 9).
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo import Shampoo

STEPS = 20


class Block(nn.Module):
    """A transformer block with an embedding in front; no side is a multiple of the block size."""

    def __init__(self, width: int = 22, hidden: int = 37) -> None:
        super().__init__()
        self.embedding = nn.Embedding(19, width)
        self.before_attention = nn.LayerNorm(width)
        self.query, self.key, self.value, self.mixed = (nn.Linear(width, width) for _ in range(4))
        self.before_mlp = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        y = self.before_attention(x)
        y = nn.functional.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y))
        x = x + self.mixed(y)
        x = x + self.down(nn.functional.gelu(self.up(self.before_mlp(x))))
        return x @ self.embedding.weight.T


class Convolutions(nn.Module):
    """Filters that merge to matrices and to rank 3, one of 3 rows, a vector of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 7, 3), nn.Conv2d(7, 10, (5, 3))
        self.norm = nn.GroupNorm(5, 10)
        self.few, self.last = nn.Linear(10, 3), nn.Linear(3, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.relu(self.first(images))
        x = nn.functional.relu(self.norm(self.second(x)))
        return self.last(self.few(x.mean((2, 3))).sin())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformer": Block,
    "even": lambda: Block(hidden=36),  # torch cannot run linear layers cut unevenly
    "convolutions": Convolutions,
}


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Attributes:
        second: hyper-parameters of a second group, which gets every third parameter.
        frozen: a parameter that is not trained.
        is_sparse: whether a gradient is None in every fifth step of each parameter.
    """

    model: str
    hyper: Mapping[str, Any] = field(default_factory=dict)
    second: Mapping[str, Any] | None = None
    dtype: torch.dtype = torch.float32
    frozen: str | None = None
    is_sparse: bool = True

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model = MODELS[self.model]().to(self.dtype)
        if self.frozen is not None:
            model.get_parameter(self.frozen).requires_grad_(False)
        return model

    def optimizer(self, params: Iterable[nn.Parameter], **sharing: Any) -> Shampoo:
        params = list(params)
        groups: list[dict[str, Any]] = [{"params": params}]
        if self.second is not None:
            chosen = params[1::3]
            rest = [param for index, param in enumerate(params) if index % 3 != 1]
            groups = [{"params": rest}, {"params": chosen, **self.second}]
        common = {"lr": 0.02, "max_preconditioner_dim": 8, "precondition_frequency": 4}
        common["large_dim_method"] = "blocking"  # thin parameters have many blocks to divide
        return Shampoo(groups, **{**common, **self.hyper, **sharing})


DECAY = {"weight_decay": 0.1}
CASES = {
    "transformer": Case(
        "transformer",
        {"momentum": 0.9, **DECAY},
        {"lr": 0.05, "betas": (0.0, 0.9)},
        frozen="up.bias",
    ),
    "bf16": Case("transformer", {"momentum": 0.9, "nesterov": True, **DECAY}, dtype=torch.bfloat16),
    "convolutions": Case(
        "convolutions",
        {"decoupled_weight_decay": False, "maximize": True, **DECAY},
        {"precondition_frequency": 3, "grafting": "sgd", "max_preconditioner_dim": 5},
        frozen="second.bias",
    ),
    "layerwise": Case("convolutions", {"grafting": "lamb", **DECAY}, {"grafting": "lars"}),
    "no graft": Case(
        "convolutions", {"grafting": "none", "betas": (0.9, 1.0), "merge_dims": "none"}
    ),
    "float64": Case("transformer", {"momentum": 0.9}, dtype=torch.float64),
}


def inject(params: Iterable[nn.Parameter], step: int, is_sparse: bool = True) -> None:
    """Gives every trained parameter its part of the gradient of a step."""
    generator = torch.Generator().manual_seed(step)
    for index, param in enumerate(params):
        whole = torch.randn(param.shape, generator=generator).to(param.dtype)
        is_absent = is_sparse and (step + index) % 5 == 4
        if not param.requires_grad or is_absent:
            param.grad = None
        elif isinstance(param, DTensor):
            mesh, placements = param.device_mesh, param.placements
            param.grad = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        else:
            param.grad = whole


def train(case: Case, model: nn.Module, steps: int = STEPS, **sharing: Any) -> Shampoo:
    """Some steps on injected gradients."""
    params = list(model.parameters())
    optimizer = case.optimizer(params, **sharing)
    for step in range(steps):
        inject(params, step, case.is_sparse)
        optimizer.step()
    return optimizer


def whole(tensor: Tensor) -> Tensor:
    """All of a parameter, wherever its parts are."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def digest(params: Iterable[Tensor]) -> str:
    """SHA-256 of the bytes of whole parameters."""
    total = hashlib.sha256()
    for param in params:
        total.update(whole(param).contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def replicated(model: nn.Module) -> nn.Module:
    """As under DDP: every rank has all of it."""
    return model


def fsdp2(model: nn.Module) -> nn.Module:
    """Rows of every parameter over all ranks."""
    return fully_shard(model, mesh=_mesh((dist.get_world_size(),)))


def fsdp2_columns(model: nn.Module) -> nn.Module:
    """The second dimension over all ranks, where it divides."""
    world = dist.get_world_size()

    def place(param: nn.Parameter) -> Shard | None:
        return Shard(1) if param.ndim > 1 and param.shape[1] % world == 0 else None

    return fully_shard(model, mesh=_mesh((world,)), shard_placement_fn=place)


def hsdp(model: nn.Module) -> nn.Module:
    """Two replicas of shards over two ranks."""
    return fully_shard(model, mesh=_mesh((2, 2)))


def tensor_parallel_fsdp2(model: nn.Module) -> nn.Module:
    """Linear layers over pairs of ranks, then everything over pairs of pairs.

    What tensor parallelism leaves alone, LayerNorm for one, lives on ranks (0, 2) and on (1, 3).
    """
    mesh = _mesh((2, 2))
    outer, inner = mesh.mesh_dim_names or ()
    styles = {name: ColwiseParallel() for name in ("query", "key", "value", "up", "few")} | {
        name: RowwiseParallel() for name in ("mixed", "down", "last")
    }
    here = {name: style for name, style in styles.items() if hasattr(model, name)}
    parallelize_module(model, mesh[inner], here)
    return fully_shard(model, mesh=mesh[outer])


_numbers = itertools.count()


def _mesh(shape: tuple[int, ...]) -> DeviceMesh:
    # Named anew: torch takes meshes of equal names for each other, and would use the process groups
    # of an earlier job.
    number = next(_numbers)
    names = tuple(f"{name}{number}" for name in ("outer", "inner")[-len(shape) :])
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


LAYOUTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "replicated": replicated,
    "fsdp2": fsdp2,
    "fsdp2 columns": fsdp2_columns,
    "hsdp": hsdp,
    "tensor parallel": tensor_parallel_fsdp2,
}

Run = tuple[str, Mapping[str, Any]]  # a layout, and the arguments that say who shares the work


def digests(
    rank: int, runs: Mapping[str, Run], cases: Mapping[str, Case]
) -> dict[tuple[str, str], str]:
    """A job for ranks: parameters after training every case in every run."""
    found = {}
    for name, case in cases.items():
        for run, (layout, sharing) in runs.items():
            model = LAYOUTS[layout](case.build())
            train(case, model, **sharing)
            found[run, name] = digest(model.parameters())
    return found


def batch(model: str, seed: int) -> tuple[Tensor, Tensor]:
    """An input of a model and what it should make of it."""
    generator = torch.Generator().manual_seed(seed)
    if model != "convolutions":
        tokens = torch.randint(19, (4, 9), generator=generator)
        return tokens, tokens
    return torch.randn(6, 3, 9, 9, generator=generator), torch.randn(6, 1, generator=generator)


def fit(name: str, model: nn.Module, optimizer: Shampoo, seed: int) -> list[float]:
    """Ten steps by backward on the batch of a seed; the losses."""
    losses = []
    given, wanted = batch(name, seed)
    for _ in range(10):
        found = model(given)
        if name != "convolutions":
            loss = nn.functional.cross_entropy(found.flatten(0, 1).float(), wanted.flatten())
        else:
            loss = nn.functional.mse_loss(found, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Collectives(TorchDispatchMode):
    """Records which collective runs among which ranks, and the elements of its result.

    CommDebugMode counts, but does not say among whom.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[int, ...], int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if _is_group(arg))
            result = args[0][0] if isinstance(args[0], list) else args[0]
            name = func.overloadpacket.__name__.strip("_")
            ranks = tuple(dist.get_process_group_ranks(group))
            self.calls.append((name, ranks, result.numel()))
        return func(*args, **(kwargs or {}))


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


def one_step(rank: int, layout: str, case: Case, sharing: Mapping[str, Any]) -> Any:
    """A job: what CommDebugMode counts in the third step, and who talks to whom in it."""
    model = LAYOUTS[layout](case.build())
    optimizer = train(case, model, 2, **sharing)
    inject(model.parameters(), 2, case.is_sparse)
    with CommDebugMode() as counted, Collectives() as seen:
        optimizer.step()
    counts = {
        key.__name__.strip("_"): count for key, count in counted.get_comm_counts().items() if count
    }
    return counts, seen.calls


def state_bytes(rank: int, layout: str, case: Case, sharing: Mapping[str, Any]) -> Any:
    """A job: every state tensor's bytes by parameter and key, and those of their storages."""
    model = LAYOUTS[layout](case.build())
    optimizer = train(case, model, 5, **sharing)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    tensors = {
        (index, key): value
        for index, param in enumerate(params)
        for key, value in optimizer.state.get(param, {}).items()
    }
    storages = {value.untyped_storage().data_ptr(): value for value in tensors.values()}
    return (
        {name: value.nbytes for name, value in tensors.items()},
        sum(value.untyped_storage().nbytes() for value in storages.values()),
    )
