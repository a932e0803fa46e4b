"""Parameters as an optimizer finds them: what each is called, is it there once, can it be trained.

Messages are read by people who know their model: by its names, or else by where they put what.
"""

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shampoo.distributed.shard_regions import check_placements, local_tensor

_FEW = 3  # duplicates that a message names


def parameter_name(group: Mapping[str, Any], group_index: int, position: int) -> str:
    """The name a user knows the parameter by, or where it stands."""
    names = group.get("param_names")
    if names is not None:
        return str(names[position])
    shape = tuple(group["params"][position].shape)
    return f"parameter {position} of group {group_index}, shape {shape}"


def check_distinct(groups: Sequence[Mapping[str, Any]], first: int = 0) -> None:
    """Refuses a parameter that stands in two places: it would move twice in a step.

    Args:
        groups: their ``"params"`` are tensors, or names with tensors.
        first: index of the first of them among all groups.

    Raises:
        ValueError: naming such parameters and their places.
    """
    seen: dict[Tensor, str] = {}
    found = []
    for index, group in enumerate(groups, first):
        names = group.get("param_names")
        for position, entry in enumerate(group["params"]):
            name, param = entry if isinstance(entry, tuple) else (None, entry)
            if not isinstance(param, Tensor):
                continue  # torch says what is wrong with it
            name = names[position] if names is not None else name
            place = f"position {position} of group {index}" + (f" ({name})" if name else "")
            if param in seen:
                found.append(
                    f"the parameter of shape {tuple(param.shape)} at {place} is the one at"
                    f" {seen[param]}"
                )
            seen.setdefault(param, place)
    if found:
        more = f", and {len(found) - _FEW} more" if len(found) > _FEW else ""
        raise ValueError(
            f"Invalid duplicate parameters: {'; '.join(found[:_FEW])}{more}. Each must be there"
            " once, or a step would move it twice: pass list(dict.fromkeys(parameters)), or leave"
            " shared ones out where they come again."
        )


_ATTRIBUTES = operator.attrgetter("device", "dtype", "shape")


class SeenParams:
    """The parameters of a group as they were when a plan was built of them.

    Every step asks of every parameter if it still is what it was, so nothing here loops in Python.

    Args:
        params: of the group.
        are_planned: for every one, whether it is in the plan.

    Attributes:
        planned: those that are.
    """

    def __init__(self, params: Sequence[Tensor], are_planned: Sequence[bool]) -> None:
        self.planned = list(itertools.compress(params, are_planned))
        self._params = list(params)
        self._others = [p for p, is_in in zip(params, are_planned, strict=True) if not is_in]
        self._attributes = list(map(_ATTRIBUTES, self.planned))

    def still(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the same, and would be planned alike."""
        return (
            len(params) == len(self._params)
            and all(map(operator.is_, params, self._params))
            and list(map(_ATTRIBUTES, self.planned)) == self._attributes
            and not any(map(is_trained, self._others))
        )


def is_trained(param: Tensor) -> bool:
    """Whether an optimizer moves a parameter."""
    return param.numel() > 0 and (param.requires_grad or param.grad is not None)


def flat_error(what: str) -> RuntimeError:
    """For what has lost the shapes of its parameters."""
    return RuntimeError(
        f"Shampoo got {what}. FSDP1 and DeepSpeed ZeRO >= 1 (or its fp16 and bf16) hide the shapes"
        " of matrices: use fully_shard (FSDP2), DistributedDataParallel, or DeepSpeed with"
        ' "zero_optimization": {"stage": 0}, in float32 or under torch.autocast.'
    )


def check_parameter(param: Tensor, name: str) -> None:
    """Refuses what cannot be cut into blocks, naming the parameter and the remedy.

    Raises:
        RuntimeError: for a complex, flat or quantized parameter, or a DTensor with Partial
            placements.
    """
    if param.is_complex():
        raise RuntimeError(
            f"Shampoo does not support complex parameters ({name}). Optimize"
            " torch.view_as_real(parameter) instead."
        )
    check_placements(param, name)
    if getattr(param, "_fsdp_flattened", False) or hasattr(param, "_is_flat_param"):
        raise flat_error(f"a flat parameter of {param.numel()} elements ({name})")
    if is_trained(param):  # frozen ones, under adapters, may be what they like
        _check_quantized(local_tensor(param), name)


# Of a subclass that wraps tensors, those that a step can write an update into.
_WRITABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def _check_quantized(param: Tensor, name: str) -> None:
    """Refuses a subclass of tensors that keeps its values in fewer bits than it shows."""
    if not is_traceable_wrapper_subclass(param):
        return
    attributes, _ = param.__tensor_flatten__()
    kept = {getattr(param, attribute).dtype for attribute in attributes}
    if not kept <= _WRITABLE:
        kinds = ", ".join(sorted(map(str, kept - _WRITABLE)))
        raise RuntimeError(
            f"Shampoo does not support quantized parameters ({name}: a {type(param).__name__} with"
            f" values in {kinds}). Quantize in the forward pass alone, which leaves the weights in"
            " floating point (quantization-aware or float8 training), or give this parameter an"
            " optimizer of its own: torch.optim.AdamW(..., foreach=False)."
        )
