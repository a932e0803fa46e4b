"""Plan before you train: memory, balance, traffic and time on any number of ranks.

Nothing is allocated and nothing is communicated: the plan is the one the optimizer makes, from the
same shapes, the same cuts and the same owners, evaluated with a
:class:`~shampoo.blocks.cost.CostModel`.
"""

import fnmatch
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from shampoo.blocks.cost import CostModel
from shampoo.distributed.process_groups import ProcessGroups, trainers_per_group
from shampoo.errors import shown
from shampoo.groups import groups as groups_of
from shampoo.hyperparameters import Hyperparameters, dtype_name
from shampoo.optimizer import Shampoo
from shampoo.planner.bounds import (
    MOST_BLOCKS,
    Shapes,
    check_bandwidth,
    check_candidates,
    check_counts,
    check_dtype,
    check_layout,
    check_tensors,
    tensors_of,
)
from shampoo.planner.forecast import Groups, Setting, Tensor, forecast
from shampoo.planner.report import PlanReport
from shampoo.preconditioner.choice import kind_of, layout_of
from shampoo.step.thin import describe, thin_among

BLOCK_CANDIDATES = (512, 1024, 2048, 4096)
_SMALL_MESSAGE = 64 << 10  # bytes, below which latency rather than bandwidth decides
_BALANCED = 1.1  # largest over mean compute that a recommended block size may have


class _Role(NamedTuple):
    """The tensors of one parameter group."""

    name: str
    is_preconditioned: bool
    tensors: list[Tensor]


def plan(
    model_or_shapes: nn.Module | Shapes,
    world_size: int,
    *,
    layout: str = "ddp",
    num_trainers_per_group: int = -1,
    replicas: int = 1,
    grafted_only: Sequence[str] = (),
    parameter_dtype: torch.dtype = torch.float32,
    communication_dtype: torch.dtype | None = None,
    devices_per_node: int = 8,
    island_bandwidth: float = 350e9,
    network_bandwidth: float = 40e9,
    cost_model: CostModel | None = None,
    block_candidates: Sequence[int] = BLOCK_CANDIDATES,
    **arguments: Any,
) -> PlanReport:
    """What Shampoo would hold, send and take on ``world_size`` ranks.

    Blocks, owners and bytes are those of the optimizer; seconds are predictions, in which all of
    the exchange counts as if nothing hid it, but the latency of messages does not.

    Args:
        model_or_shapes: a module, on any device, ``meta`` included, of which the parameters that
            require a gradient count, in the groups of :func:`shampoo.groups`, as ``Shampoo(model)``
            has them: embeddings, heads and positional tables by the grafted method alone, which a
            note of the report says; or shapes, by name or in a row, all of them preconditioned.
        world_size: ranks, >= 1.
        layout: ``"ddp"``: parameters are replicated; ``"fsdp2"``: their rows are sharded over all
            ranks; ``"hsdp"``: sharded, in ``replicas`` copies.
        num_trainers_per_group: under DDP, consecutive ranks that share the blocks; -1: those of a
            node, or fewer if there are few blocks. Sharded layouts share over all ranks.
        replicas: of HSDP; divides ``world_size``.
        grafted_only: patterns (``fnmatch``) of names whose tensors have ``precondition=False``,
            for embeddings among shapes, say; beside those that a module's groups leave out.
        parameter_dtype: of parameters and gradients, where shapes are given.
        communication_dtype: of directions on the wire, float32, bfloat16 or float16; None for
            that in which they are computed.
        devices_per_node: ranks joined by fast links.
        island_bandwidth: bytes a second that a rank receives inside a node.
        network_bandwidth: the same across nodes.
        cost_model: of the machine, for seconds; None for the nominal one. Owners are those of the
            nominal one in any case.
        block_candidates: of ``recommended_block``: the largest that leaves compute balanced
            (within 1.1), has four blocks an owner, and whose mean step is predicted to cost no more
            than the one asked for; failing that, the one with the shortest mean step. Empty
            recommends what was asked for.
        **arguments: of :class:`~shampoo.Shampoo`, checked as it checks them. A
            ``max_preconditioner_dim`` of ``"auto"``, its default, is that of an accelerator, 1024,
            on whatever device a module is: for a plan of CPUs name 256.

    Raises:
        ValueError: for a value out of range, naming it, its bound and the remedy.
        TypeError: for an argument that Shampoo does not have.
    """
    values = _hyperparameters(arguments)
    check_counts(world_size=world_size, replicas=replicas, devices_per_node=devices_per_node)
    check_candidates(block_candidates)
    check_layout(layout, world_size, replicas)
    check_bandwidth("island_bandwidth", island_bandwidth)
    check_bandwidth("network_bandwidth", network_bandwidth)
    check_dtype(parameter_dtype)
    ProcessGroups(None, num_trainers_per_group, communication_dtype)  # checks them
    roles = _roles(model_or_shapes, parameter_dtype)
    groups = _groups(roles, values, grafted_only)
    _check_kinds(groups)
    if (blocks := _count_blocks(groups)) > MOST_BLOCKS:
        raise ValueError(
            f"Invalid max_preconditioner_dim={values.geometry.max_preconditioner_dim}. Must be"
            f" longer: it cuts {blocks:,} blocks, of which a plan has at most {MOST_BLOCKS:,}."
        )
    trainers = _trainers(groups, world_size, devices_per_node)
    owners = world_size if layout != "ddp" else trainers(num_trainers_per_group)
    setting = Setting(
        layout=layout,
        world_size=world_size,
        owners=owners,
        shards=1 if layout == "ddp" else world_size // replicas,
        communication_dtype=communication_dtype,
        devices_per_node=devices_per_node,
        island_bandwidth=island_bandwidth,
        network_bandwidth=network_bandwidth,
        cost_model=cost_model or CostModel(),
    )
    report = forecast(groups, setting)
    return replace(
        report,
        recommended_block=_recommend_block(groups, setting, report, block_candidates),
        recommended_group=trainers(-1),
        notes=(
            *_notes(report, num_trainers_per_group, devices_per_node),
            *_note_of_roles(roles),
            *_note_of_thin(groups),
        ),
    )


def _notes(report: PlanReport, asked_group: int, devices_per_node: int) -> Iterator[str]:
    """What the numbers alone do not say."""
    world_size, owners = report.world_size, report.owners
    if report.layout == "ddp":
        if asked_group > world_size:
            yield f"num_trainers_per_group={asked_group} is more than the world"
        elif asked_group == -1 and owners < min(devices_per_node, world_size):
            yield (
                f"groups are smaller than a node: they must divide {world_size} ranks and have"
                f" four of the {report.blocks} blocks an owner"
            )
        return
    # Two exchanges a step, each with a message for every owner.
    message = sum(report.traffic_bytes) / (2 * owners**2)
    if 0 < message < _SMALL_MESSAGE:
        yield (
            f"an all-to-all has {message:.0f} bytes for a peer: it takes longer than predicted,"
            " since latency is not modelled"
        )


def _note_of_roles(roles: Sequence[_Role]) -> list[str]:
    """What of a module is not preconditioned."""
    plain = [
        f"{role.name} ({len(role.tensors)}, {sum(tensor.numel for tensor in role.tensors):,}"
        " elements)"
        for role in roles
        if not role.is_preconditioned
    ]
    method = "by the grafted method alone, as in Shampoo(model)"
    return [f"{', '.join(plain)}: {method}"] if plain else []


def _note_of_thin(groups: Groups) -> list[str]:
    """What the optimizer would warn of."""
    found = []
    for values, tensors in groups:
        named = [(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors]
        found += thin_among(named, values)
    return [describe(found)] if found else []


def _hyperparameters(arguments: Mapping[str, Any]) -> Hyperparameters:
    parameters = inspect.signature(Shampoo).parameters.values()
    group = {p.name: p.default for p in parameters if p.default is not p.empty}
    for name in arguments:
        if name not in group:
            raise TypeError(f"plan() got {name!r}, which is not an argument of Shampoo.")
    group |= arguments
    group["preconditioner_dtype"] = dtype_name(group["preconditioner_dtype"])
    return Hyperparameters.read(group)


def _roles(model_or_shapes: nn.Module | Shapes, dtype: torch.dtype) -> list[_Role]:
    """What is trained, in the groups that the optimizer has of it."""
    if isinstance(model_or_shapes, nn.Module):
        names = {param: name for name, param in model_or_shapes.named_parameters()}
        roles = [
            _Role(
                group["name"],
                group["precondition"],
                [
                    Tensor(names[param], tuple(param.shape), param.dtype)
                    for _, param in group["params"]
                    if param.requires_grad and param.numel() > 0
                ],
            )
            for group in groups_of(model_or_shapes)
        ]
    else:
        found = tensors_of(model_or_shapes, dtype)
        roles = [_Role("", True, [tensor for tensor in found if tensor.numel > 0])]
    roles = [role for role in roles if role.tensors]
    check_tensors([tensor for role in roles for tensor in role.tensors])
    return roles


def _groups(roles: Sequence[_Role], values: Hyperparameters, patterns: Sequence[str]) -> Groups:
    """The parameter groups of the optimizer, and then one of what patterns take out of them."""
    tensors = [tensor for role in roles for tensor in role.tensors]
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    for pattern in patterns:
        is_words = isinstance(pattern, str)
        if not is_words or not any(fnmatch.fnmatchcase(t.name, pattern) for t in tensors):
            raise ValueError(
                f"Invalid grafted_only={shown(pattern)}. Must match a name, such as"
                f" {shown(tensors[0].name)}."
            )

    def is_taken(tensor: Tensor) -> bool:
        return any(fnmatch.fnmatchcase(tensor.name, pattern) for pattern in patterns)

    plain = replace(values, geometry=replace(values.geometry, precondition=False))
    groups = [
        (values if role.is_preconditioned else plain, [t for t in role.tensors if not is_taken(t)])
        for role in roles
    ]
    groups.append((plain, list(filter(is_taken, tensors))))
    return [(group, members) for group, members in groups if members]


def _check_kinds(groups: Groups) -> None:
    """What the optimizer asks of values before it takes parameters."""
    for values, tensors in groups:
        for tensor in tensors:
            layout = layout_of(tensor.shape, values.geometry)
            kind_of(layout).check(values, layout.order)


def _count_blocks(groups: Groups) -> int:
    return sum(
        layout_of(tensor.shape, values.geometry).blocks
        for values, tensors in groups
        for tensor in tensors
    )


def _trainers(groups: Groups, world_size: int, node: int) -> Callable[[int], int]:
    """What ``num_trainers_per_group`` comes to, as the optimizer decides it."""
    blocks = _count_blocks(groups)
    return lambda asked: trainers_per_group(asked, world_size, min(node, world_size), blocks)


def _recommend_block(
    groups: Groups, setting: Setting, asked: PlanReport, candidates: Sequence[int]
) -> int:
    best, shortest = 0, (asked.together.mean, asked.max_preconditioner_dim)
    for block in sorted({*candidates, asked.max_preconditioner_dim} if candidates else ()):
        cut = [(_with_block(values, block), tensors) for values, tensors in groups]
        if _count_blocks(cut) > MOST_BLOCKS:
            continue
        report = asked if block == asked.max_preconditioner_dim else forecast(cut, setting)
        mean = report.together.mean
        shortest = min(shortest, (mean, block))
        is_balanced = report.compute_imbalance <= _BALANCED
        has_enough = report.factored_blocks >= 4 * report.owners
        if is_balanced and has_enough and mean <= asked.together.mean:
            best = block
    if candidates:
        return best or shortest[1]
    return asked.max_preconditioner_dim


def _with_block(values: Hyperparameters, block: int) -> Hyperparameters:
    return replace(values, geometry=replace(values.geometry, max_preconditioner_dim=block))
