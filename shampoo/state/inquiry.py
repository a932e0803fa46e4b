"""What torch.distributed.checkpoint wants of a state, which it does not say when it asks for it.

``get_state_dict`` and ``set_state_dict`` call ``state_dict()`` and ``load_state_dict()`` of an
optimizer without their options. For a state that lies on one rank each, those decide everything:
with ``full_state_dict=True`` torch gathers what is a DTensor, and would take one rank's blocks for
the whole. So the options are read where torch keeps them, in the frames of its functions. A torch
that keeps them elsewhere is answered as any other caller: by the blocks of this rank, of which no
load makes a whole.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import Tensor

_PACKAGE = "torch.distributed.checkpoint"
_MODULE = "torch.distributed.checkpoint.state_dict"
_SAVE, _LOAD = "_get_optim_state_dict", "_load_optim_state_dict"
_UNFLATTEN = "_unflatten_optim_state_dict"

# Frameworks that save what one rank says, and what makes them save all; the Trainer of the first
# works with the second.
_REMEDIES = {
    "transformers": "give the Trainer the callback"
    " shampoo.integrations.transformers.ShampooCallback()",
    "accelerate": "call shampoo.integrations.accelerate.attach(accelerator) after prepare()",
}


@dataclass(frozen=True)
class Inquiry:
    """Who asks for a state, or brings one.

    Attributes:
        is_by_checkpoint: torch.distributed.checkpoint, for which every rank saves what it owns.
        is_full: it wants, or brings, the state of all ranks.
        is_to_fill: it wants the names of what it then loads, to put values under them.
        on_first_rank: it keeps the state of all ranks on the first rank alone, in host memory.
        is_broadcast: the first rank alone has brought it.
        on_host: it moves what it gets to host memory.
        file: with ``is_to_fill``, what it loads, where this rank has it.
        brought: of that the state of each parameter.
    """

    is_by_checkpoint: bool = False
    is_full: bool = False
    is_to_fill: bool = False
    on_first_rank: bool = False
    is_broadcast: bool = False
    on_host: bool = False
    file: Mapping[str, Any] = field(default_factory=dict)
    brought: Mapping[Tensor, Mapping[str, Any]] = field(default_factory=dict)


def inquiry() -> Inquiry:
    """The one in which the caller is called."""
    frames = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module == _PACKAGE or module.startswith(f"{_PACKAGE}."):
            frames.append(frame)
        frame = frame.f_back
    by_name = {
        frame.f_code.co_name: frame
        for frame in reversed(frames)
        if frame.f_globals["__name__"] == _MODULE
    }
    asking = by_name.get(_LOAD, by_name.get(_SAVE))
    options = None if asking is None else asking.f_locals.get("info")
    if options is None:
        return Inquiry(is_by_checkpoint=bool(frames))
    on_host = bool(getattr(options, "cpu_offload", False))
    # While torch fills the names of a load, it has turned this option off for its own purposes.
    is_to_fill = _LOAD in by_name and _SAVE in by_name
    file = (is_to_fill and by_name[_LOAD].f_locals.get("optim_state_dict")) or {}
    is_full = is_to_fill or bool(getattr(options, "full_state_dict", False))
    return Inquiry(
        is_by_checkpoint=True,
        is_full=is_full,
        is_to_fill=is_to_fill,
        on_first_rank=is_full and on_host and _LOAD not in by_name,
        is_broadcast=is_full and bool(getattr(options, "broadcast_from_rank0", False)),
        on_host=on_host,
        file=file,
        brought=_brought(file, getattr(options, "fqn_param_mapping", {})),
    )


def flattened_file() -> Mapping[str, Any] | None:
    """A flattened state that the caller of the caller takes apart, None for any other caller.

    torch looks in it for the names that it finds in the groups of an optimizer, and fails on one
    that a version before did not have.
    """
    frame = sys._getframe(2)
    if frame.f_code.co_name != _UNFLATTEN or frame.f_globals.get("__name__") != _MODULE:
        return None
    file = frame.f_locals.get("state_dict")
    return file if isinstance(file, Mapping) else None


def remedy_of_caller() -> str | None:
    """What makes the framework that asks for a state save all of it; None for any other caller."""
    packages = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        packages.add(str(frame.f_globals.get("__name__", "")).partition(".")[0])
        frame = frame.f_back
    return next((remedy for name, remedy in _REMEDIES.items() if name in packages), None)


# Modules that put flat copies of all parameters into the groups of an optimizer.
_FLATTENING = ("deepspeed.runtime.zero", "deepspeed.runtime.bf16", "deepspeed.runtime.fp16.fused")


def flattening_caller() -> str | None:
    """The module among the callers that has flattened the parameters, which bear no mark of it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(_FLATTENING):
            return module
        frame = frame.f_back
    return None


def _brought(file: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[Tensor, Mapping[str, Any]]:
    """The state of each parameter; ``names`` has their names, and the other way round."""
    state = file.get("state", {})
    return {
        param: state[name]
        for param, all_names in names.items()
        if isinstance(param, Tensor)
        for name in all_names
        if isinstance(state.get(name), Mapping)
    }
