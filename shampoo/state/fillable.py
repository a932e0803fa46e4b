"""The names under which torch's ``set_state_dict`` puts what it loads of a whole state.

With ``full_state_dict=True`` torch asks for ``state_dict()``, replaces the values that the file has
too, and loads the result. Values of a run would stand in for what is missing in the file, without a
word, and torch copies into them before anybody has checked anything. So it gets :class:`Blank`
tensors, which have names and shapes only: one that comes back was not in the file.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo.blocks.ownership import Owners
from shampoo.blocks.state_keys import COUNTS, foreign, is_own
from shampoo.distributed.process_groups import ProcessGroups
from shampoo.dtensor import is_dtensor
from shampoo.step.block_plan import BlockPlan


class Blank(Tensor):
    """A value that a load has to bring; one element of memory, whatever its shape."""


def fillable_state(
    groups: Sequence[dict[str, Any]],
    state: Mapping[Any, Any],
    process_groups: ProcessGroups,
    kept: Mapping[Tensor, Owners] | None,
    on_host: bool,
    brought: Mapping[Tensor, Mapping[str, Any]],
) -> dict[Any, Any]:
    """All that this rank may find in a whole state; does not communicate.

    For the blocks it owns every kind of state there is, called for now or not: the file's
    hyper-parameters decide. Of other owners' blocks the counts, and whatever else has no dimensions
    in the file: torch loads these on every rank, and fails on a name that it has not got from here.

    Args:
        groups: the optimizer's parameter groups.
        state: the optimizer's; what is not ours in it is handed out as it is.
        process_groups: who shares the work.
        kept: owners of blocks that are decided already.
        on_host: make blanks in host memory, where torch has been told to keep all values.
        brought: what the file has of each parameter, where this rank has the file.
    """
    known: MutableMapping[Tensor, dict[str, Any]] = {
        param: {key: value for key, value in entries.items() if is_own(key)}
        for param, entries in state.items()
        if isinstance(param, Tensor)
    }
    plan = BlockPlan(groups, known, process_groups, device="meta", kept=kept, is_partial=True)
    params = plan.planned
    found: dict[Any, Any] = {param: {} for param in params}
    others: list[tuple[Tensor, str, Tensor]] = []
    for arenas_by_rank in plan.all_arenas:
        own = arenas_by_rank[arenas_by_rank[0].team.me]
        for arena in arenas_by_rank:
            arena.allocate()  # of a plan on "meta": costs nothing
            arena.is_staggered = True  # the file's schedule may be
            for member, key, view in arena.views():
                entry = params[member], key, _blank(view, params[member], on_host)
                if arena is own or view.dim() == 0:
                    found[entry[0]][key] = entry[2]
                else:
                    others.append(entry)
    if others and not any(blank.dim() for entries in found.values() for blank in entries.values()):
        # A rank that owns nothing: torch takes the device of all values from what has dimensions.
        param, key, blank = others[0]
        found[param][key] = blank
    for param in params:
        file = brought.get(param, {})
        loose = {key for key, value in file.items() if getattr(value, "ndim", 0) == 0}
        names = (loose | {*COUNTS}) - found[param].keys()
        found[param] |= dict.fromkeys(names, found[param]["step"])
    for param, entries in state.items():
        if param not in found:
            found[param] = entries
        else:
            found[param] |= {key: _apart(value) for key, value in foreign(entries).items()}
    return found


def _blank(view: Tensor, param: Tensor, on_host: bool) -> Tensor:
    device = torch.device("cpu") if on_host else param.device
    single = torch.zeros((), dtype=view.dtype, device=device)
    return single.expand(view.shape).as_subclass(Blank)


def _apart(value: Any) -> Any:
    """A value into which torch may copy before the load is checked."""
    return value.clone() if is_dtensor(value) else value
