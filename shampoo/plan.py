"""Which parameters an optimizer moves and where their blocks lie.

A plan is built lazily, at the first step or by a load that brings state, because frameworks replace
parameters after construction; it is never trusted without :meth:`Plan.is_current`. Building one is
local and deterministic: groups, parameters and blocks in their order decide everything.
"""

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo.errors import BlockGridMismatchError
from shampoo.grafting import GRAFTING
from shampoo.hyperparameters import Geometry, Hyperparameters
from shampoo.layout import ADAGRAD, Layout
from shampoo.segments import Selection, select
from shampoo.solver import check_method
from shampoo.stacks import MOMENTS, Arena

logger = logging.getLogger(__name__)

# Elements of a segment. On a CPU the gradient, its direction and the moments of a segment should
# stay in the last level cache between the passes over them; on a GPU launches should be few.
CPU_SEGMENT = 1 << 20
GPU_SEGMENT = 1 << 24
_PATTERNS = 16  # of present gradients, whose selections are kept

State = MutableMapping[Tensor, dict[str, Any]]
Published = list[tuple[Tensor, str, Tensor]]


@dataclass(frozen=True)
class Member:
    """One planned parameter."""

    group: int
    position: int
    name: str


@dataclass(frozen=True)
class _Seen:
    """What a parameter was when the plan was built."""

    param: Tensor
    planned: bool
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size

    def still(self, param: Tensor) -> bool:
        if self.param is not param:
            return False
        if not self.planned:
            return not _is_trained(param)
        is_same = param.device == self.device and param.dtype == self.dtype
        return is_same and param.shape == self.shape


def _is_trained(param: Tensor) -> bool:
    return param.numel() > 0 and (param.requires_grad or param.grad is not None)


def check_parameter(param: Tensor, name: str) -> None:
    """Refuses what cannot be cut into blocks, naming the parameter and the remedy.

    Raises:
        RuntimeError: for a complex or sharded parameter.
    """
    if param.is_complex():
        raise RuntimeError(
            f"Shampoo does not support complex parameters ({name}). Optimize"
            " torch.view_as_real(parameter) instead."
        )
    if hasattr(param, "device_mesh"):
        raise RuntimeError(
            f"Shampoo does not support DTensor parameters yet ({name}): its blocks would be cut"
            " from a shard. Train without fully_shard or tensor parallelism, for example with"
            " DistributedDataParallel."
        )
    if getattr(param, "_fsdp_flattened", False) or hasattr(param, "_is_flat_param"):
        raise RuntimeError(
            f"Shampoo got a flat parameter of {param.numel()} elements ({name}). FSDP1 and"
            " DeepSpeed ZeRO >= 1 hide the shapes of matrices: use DistributedDataParallel."
        )


def parameter_name(group: Mapping[str, Any], group_index: int, position: int) -> str:
    """The name a user knows the parameter by, or where it stands."""
    names = group.get("param_names")
    if names is not None:
        return str(names[position])
    shape = tuple(group["params"][position].shape)
    return f"parameter {position} of group {group_index}, shape {shape}"


class Plan:
    """The arenas of all parameter groups; publishes their state.

    Args:
        groups: ``optimizer.param_groups``.
        state: ``optimizer.state``. What it holds for a planned parameter is copied into the arenas,
            and replaced by views of them.
        device: where to put state instead of beside the parameters; ``"meta"`` makes a plan whose
            views have shapes and dtypes only.

    Raises:
        BlockGridMismatchError: if a tensor of ``state`` does not fit its block.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], state: State, device: str | None = None
    ) -> None:
        self.members: list[Member] = []
        self.arenas: list[Arena] = []
        self._geometries = [Geometry.of(group) for group in groups]
        self._seen: list[list[_Seen]] = []
        self._workspaces: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._selections: dict[tuple[bool, ...], list[Selection]] = {}
        arenas: dict[tuple[int, str, torch.dtype, torch.device, int, int], Arena] = {}
        params: list[Tensor] = []
        for index, (group, geometry) in enumerate(zip(groups, self._geometries, strict=True)):
            seen, capturable = [], geometry.capturable
            for position, param in enumerate(group["params"]):
                planned = _is_trained(param) or (param.numel() > 0 and bool(state.get(param)))
                seen.append(_Seen(param, planned, param.device, param.dtype, param.shape))
                if not planned:
                    continue
                name = parameter_name(group, index, position)
                check_parameter(param, name)
                layout = Layout.of(param.shape, geometry)
                place = torch.device(device) if device else param.device
                taken = int(state[param]["step"]) if "step" in state.get(param, {}) else 0
                step = int(state.get(param, {}).get("calls", taken)) if capturable else taken
                wide = torch.promote_types(param.dtype, geometry.dtype)
                key = (index, layout.rule, wide, place, step, taken)
                if key not in arenas:
                    staggered = geometry.refresh_schedule == "staggered"
                    arenas[key] = Arena(
                        index, layout.rule, geometry.dtype, wide, place, step, staggered, capturable
                    )
                arenas[key].add(len(self.members), layout, _segment_limit(place))
                self.members.append(Member(index, position, name))
                params.append(param)
            self._seen.append(seen)
        self.arenas = list(arenas.values())
        published: Published = []
        for arena in self.arenas:
            group = groups[arena.group]
            arena.allocate(_moments_of(arena, group, params, state))
            views = self._fill(arena, params, state, MOMENTS)
            if arena.is_staggered and _brings(arena, params, state, "slot"):
                arena.period = group.get("extra", {}).get("refresh_period")
            for factors in arena.factor_stacks:
                factors.mark_rooted()
            published += views
        # Only now, when all of it is known to fit: a plan that cannot be built leaves no trace.
        for param in params:
            state[param] = {}
        for param, name, view in published:
            state[param][name] = view

    def is_current(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the plan still describes these groups: same parameters, same geometry."""
        if len(groups) != len(self._seen):
            return False
        for group, geometry, seen in zip(groups, self._geometries, self._seen, strict=True):
            params = group["params"]
            if len(params) != len(seen) or Geometry.of(group) != geometry:
                return False
            if not all(before.still(param) for before, param in zip(seen, params, strict=True)):
                return False
        return True

    @property
    def is_fresh(self) -> bool:
        """Whether no block has taken a step yet."""
        return all(arena.step == 0 for arena in self.arenas)

    def params(self, groups: Sequence[dict[str, Any]]) -> list[Tensor]:
        """The planned parameters, in plan order."""
        return [groups[member.group]["params"][member.position] for member in self.members]

    def add_missing_moments(
        self,
        groups: Sequence[dict[str, Any]],
        hyperparameters: Sequence[Hyperparameters],
        state: State,
    ) -> None:
        """Makes the buffers that a change of betas or momentum has called for since the build."""
        for arena in self.arenas:
            values = hyperparameters[arena.group]
            for name, needed in (
                ("exp_avg", values.has_exp_avg),
                ("momentum", values.momentum > 0),
            ):
                if needed and name not in arena.moments:
                    arena.add_moment(name)
                    for param, key, view in self._fill(arena, self.params(groups), state, (name,)):
                        state[param][key] = view
                    self._selections.clear()

    def check_methods(self, hyperparameters: Sequence[Hyperparameters]) -> None:
        """Raises ValueError if a root method cannot take the power that it would meet."""
        for arena in self.arenas:
            values = hyperparameters[arena.group]
            for order in {factors.order for factors in arena.factor_stacks}:
                check_method(values.root_method, values.root_power(order))

    def assign_slots(
        self, groups: Sequence[dict[str, Any]], hyperparameters: Sequence[Hyperparameters]
    ) -> None:
        """Spreads the refreshes of staggered groups anew if their period is not the one it was."""
        for arena in self.arenas:
            period = hyperparameters[arena.group].precondition_frequency
            if arena.is_staggered and arena.period != period:
                arena.assign_slots(period)
                groups[arena.group]["extra"]["refresh_period"] = period
                self._selections.clear()

    def select(self, present: tuple[bool, ...]) -> list[Selection]:
        """The segments of every arena in which some parameter has a gradient."""
        if present not in self._selections:
            if len(self._selections) >= _PATTERNS:
                self._selections.pop(next(iter(self._selections)))
            self._selections[present] = [
                select(
                    arena,
                    present,
                    self._workspace(arena),
                    _segment_limit(arena.device),
                    shared=not self.is_layerwise(arena),
                )
                for arena in self.arenas
            ]
        return self._selections[present]

    def is_layerwise(self, arena: Arena) -> bool:
        """Whether directions are rescaled over whole parameters: LARS and LAMB."""
        grafting = GRAFTING[self._geometries[arena.group].grafting]
        return grafting.layerwise and arena.rule != ADAGRAD

    def _workspace(self, arena: Arena) -> Tensor:
        """``[2, W]``, shared by all arenas of a device and dtype."""
        sharers = [
            other
            for other in self.arenas
            if (other.device, other.dtype) == (arena.device, arena.dtype)
        ]
        needed = max(
            other.numel
            if self.is_layerwise(other)
            else min(other.numel, max(_segment_limit(other.device), other.largest_tile))
            for other in sharers
        )
        key = (arena.device, arena.dtype)
        if key not in self._workspaces:
            self._workspaces[key] = torch.empty(2, needed, dtype=arena.dtype, device=arena.device)
        return self._workspaces[key]

    def _fill(
        self, arena: Arena, params: Sequence[Tensor], state: State, moments: Sequence[str]
    ) -> Published:
        """Copies what ``state`` holds into the arena; returns the views to publish in its place."""
        published: Published = []
        for member, key, view in arena.views(moments):
            param = params[member]
            value = state.get(param, {}).get(key)
            if value is not None and value is not view:
                if value.shape != view.shape:
                    raise BlockGridMismatchError(
                        f"{self.members[member].name}: {key} has shape {tuple(value.shape)}, but"
                        f" this optimizer cuts it to {tuple(view.shape)}. The shape of the"
                        " parameter, max_preconditioner_dim and the other arguments that decide"
                        " the blocks cannot change once training has begun: set them back, or"
                        " build a new optimizer."
                    )
                view.copy_(value)
            published.append((param, key, view))
        return published


def _segment_limit(device: torch.device) -> int:
    return CPU_SEGMENT if device.type in ("cpu", "meta") else GPU_SEGMENT


def _moments_of(
    arena: Arena, group: dict[str, Any], params: Sequence[Tensor], state: State
) -> list[str]:
    """The buffers an arena needs: by its group's values, or because a checkpoint brings them."""
    is_needed = {
        "exp_avg": Hyperparameters.read(group).has_exp_avg,
        "exp_avg_sq": arena.rule == ADAGRAD or GRAFTING[group["grafting"]].second_moment,
        "momentum": float(group["momentum"]) > 0,
    }
    return [
        name for name in MOMENTS if is_needed[name] or _brings(arena, params, state, f".{name}")
    ]


def _brings(arena: Arena, params: Sequence[Tensor], state: State, part: str) -> bool:
    """Whether the state of some parameter of the arena has a key that contains ``part``."""
    return any(part in key for member in arena.members for key in state.get(params[member], {}))
