"""One value under one key of this optimizer's state, as it may come from a file or from a user.

Counts are taken as torch takes them: a Python number, a numpy scalar or a tensor of any dtype and
one element. Everything else must be a tensor of the shape and the dtype that its block has here: a
cast would round what was saved, and nobody would hear of it.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from shampoo.blocks.state_keys import is_count
from shampoo.dtensor import is_dtensor
from shampoo.errors import BlockGridMismatchError

_INTEGERS = (torch.int64, torch.int32)  # in which counts are published


def is_absent(value: Any) -> bool:
    """Whether a value stands for none.

    Where a flattened checkpoint lacks a key, torch's ``set_optimizer_state_dict`` puts a ``{}``.
    """
    return value is None or (isinstance(value, Mapping) and not value)


def as_count(name: str, key: str, value: Any) -> Tensor:
    """A count as the tensor that state publishes, ``[]`` int64 unless it is an integer already.

    Raises:
        BlockGridMismatchError: if it is not one number.
        ValueError: if it is not a whole number >= 0.
    """
    published: Tensor | None = None
    if isinstance(value, Tensor) and value.shape == () and value.dtype in _INTEGERS:
        published = value
    if published is not None and published.device.type != "cpu":
        return published  # as saved: nothing waits for a device
    is_one = isinstance(value, Real) or getattr(value, "shape", None) in ((), (1,))
    try:
        number = float(value.item() if hasattr(value, "item") else value) if is_one else None
    except (TypeError, ValueError, RuntimeError):  # a complex number, a text
        number = None
    if number is None:
        raise BlockGridMismatchError(f"{name}: {key} is {_described(value)}, not one number.")
    if not (number >= 0.0 and number.is_integer()):
        raise ValueError(f"Invalid {key}={number!r} of {name}. Must be a whole number >= 0.")
    if published is not None:
        return published
    return torch.tensor(int(number), dtype=torch.int64, device="cpu")


def check_shape(name: str, key: str, value: Any, view: Tensor) -> None:
    """Refuses what does not fit a block.

    Args:
        name: of the parameter.
        value: the one that came.
        view: the place for it.

    Raises:
        BlockGridMismatchError: with both shapes and the remedy.
    """
    if not isinstance(value, Tensor):
        raise BlockGridMismatchError(f"{name}: {key} is {_described(value)}, not a tensor.")
    if value.shape != view.shape:
        raise BlockGridMismatchError(
            f"{name}: {key} has shape {tuple(value.shape)}, but this optimizer cuts it to"
            f" {tuple(view.shape)}. The shape of the parameter, max_preconditioner_dim and the"
            " other arguments that decide the blocks cannot change once training has begun: set"
            " them back, or build a new optimizer."
        )


def check_value(name: str, key: str, value: Any, view: Tensor) -> Tensor:
    """What of a value can be copied into the place for it: the value, or a count as a tensor.

    Args:
        name: of the parameter.
        value: the one that came.
        view: the place for it; may be on the meta device.

    Raises:
        BlockGridMismatchError: for another shape or floating dtype, with both and the remedy, and
            for what is no plain dense tensor with data.
        ValueError: for a count that is not a whole number >= 0.
    """
    if is_count(key):
        return as_count(name, key, value)
    check_shape(name, key, value, view)
    assert isinstance(value, Tensor)
    is_meta = value.device.type == "meta" != view.device.type
    if is_meta or value.layout != torch.strided or is_dtensor(value):
        kind = "without data, on meta" if is_meta else f"a {type(value).__name__}, {value.layout}"
        raise BlockGridMismatchError(
            f"{name}: {key} is {kind}. Must be a plain dense tensor with data: the block lies on"
            " this rank alone."
        )
    if value.dtype != view.dtype:
        raise BlockGridMismatchError(
            f"{name}: {key} is {value.dtype}, but this optimizer keeps it in {view.dtype}. A cast"
            " would change the run without a word. Give the parameter and preconditioner_dtype the"
            " dtypes with which the state was made, or, where rounding is meant, cast the value"
            f" to {view.dtype} first."
        )
    return value


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    what = f"a {type(value).__name__}"
    return what if shape is None else f"{what} of shape {tuple(shape)}"
