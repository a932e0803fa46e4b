"""One parameter as an optimizer finds it: can it be trained, is it, and is it what it was?"""

import itertools
import operator
from collections.abc import Sequence

from torch import Tensor

from shampoo.regions import check_placements

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


def check_parameter(param: Tensor, name: str) -> None:
    """Refuses what cannot be cut into blocks, naming the parameter and the remedy.

    Raises:
        RuntimeError: for a complex or flat parameter, or a DTensor with Partial placements.
    """
    if param.is_complex():
        raise RuntimeError(
            f"Shampoo does not support complex parameters ({name}). Optimize"
            " torch.view_as_real(parameter) instead."
        )
    check_placements(param, name)
    if getattr(param, "_fsdp_flattened", False) or hasattr(param, "_is_flat_param"):
        raise RuntimeError(
            f"Shampoo got a flat parameter of {param.numel()} elements ({name}). FSDP1 and"
            " DeepSpeed ZeRO >= 1 hide the shapes of matrices: use fully_shard (FSDP2) or"
            " DistributedDataParallel."
        )
