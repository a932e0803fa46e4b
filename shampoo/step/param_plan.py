"""Which parameters an optimizer moves, how each is cut into blocks, and who owns these."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shampoo.blocks.blocking import Tile
from shampoo.blocks.layout import Geometry, Layout
from shampoo.blocks.ownership import Owners, Share, Team, divide
from shampoo.blocks.publication import State
from shampoo.blocks.state_keys import is_own
from shampoo.distributed.process_groups import ProcessGroups
from shampoo.dtensor import is_dtensor
from shampoo.preconditioner.choice import cost_of, layout_of
from shampoo.step.parameters import SeenParams, check_parameter, is_trained, parameter_name


@dataclass(frozen=True)
class PlannedParam:
    """One planned parameter.

    ``owners`` are those of its blocks: positions in its team, row-major in its grid of blocks.
    """

    group: int
    position: int
    name: str
    layout: Layout
    team: Team
    owners: tuple[int, ...]

    def blocks(self) -> Iterator[tuple[int, Tile]]:
        """The index of every block in the grid of the parameter, and its tile, alone in it."""
        for tile in self.layout.tiles:
            yield from zip(tile.block_indices(), tile.split(1), strict=True)


def plan_params(
    groups: Sequence[dict[str, Any]],
    geometries: Sequence[Geometry],
    state: State,
    process_groups: ProcessGroups,
    kept: Mapping[Tensor, Owners] | None,
) -> tuple[list[PlannedParam], list[SeenParams]]:
    """Finds the parameters to move, and the owners of their blocks.

    Args:
        groups: ``optimizer.param_groups``.
        geometries: of the groups.
        state: ``optimizer.state``; what has state of ours is moved again.
        process_groups: who shares the work.
        kept: owners of blocks in an earlier plan, which stay.

    Returns:
        The parameters to move, in order, and of every group what it looked like.

    Raises:
        RuntimeError: for parameters that cannot be cut into blocks.
    """
    found: list[tuple[int, int, str, Tensor, Layout]] = []
    seen: list[SeenParams] = []
    for index, (group, geometry) in enumerate(zip(groups, geometries, strict=True)):
        are_planned = []
        for position, param in enumerate(group["params"]):
            has_state = param.numel() > 0 and any(map(is_own, state.get(param) or ()))
            planned = is_trained(param) or has_state
            are_planned.append(planned)
            if planned:
                name = parameter_name(group, index, position)
                check_parameter(param, name)
                layout = layout_of(param.shape, geometry)
                found.append((index, position, name, param, layout))
        seen.append(SeenParams(group["params"], are_planned))
    process_groups.settle_trainers(
        sum(layout.blocks for *_, param, layout in found if not is_dtensor(param))
    )
    shares = [
        Share(
            index,
            param,
            layout,
            process_groups.team_of(param),
            int(groups[index]["precondition_frequency"]),
            functools.partial(cost_of, layout),
        )
        for index, _, _, param, layout in found
    ]
    owners = divide(shares, kept)
    planned_params = [
        PlannedParam(index, position, name, layout, share.team, tuple(owned))
        for (index, position, name, _, layout), share, owned in zip(
            found, shares, owners, strict=True
        )
    ]
    return planned_params, seen
