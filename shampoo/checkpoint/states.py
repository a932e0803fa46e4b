"""The state of model and optimizer by names, as ``torch.distributed.checkpoint`` moves it."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.optim import Optimizer

from shampoo.checkpoint.ranks import is_distributed
from shampoo.errors import ShampooError, shown


def listed(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """One optimizer or several, as several.

    Raises:
        ValueError: for none, for what is no optimizer, and for a parameter that two of them have:
            its two states would lie under one name.
    """
    given = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    is_right = isinstance(given, Sequence) and all(isinstance(each, Optimizer) for each in given)
    if not is_right or not given:
        raise ValueError(
            f"Invalid optimizer={shown(optimizer)}. Must be an optimizer, or a list of one or more."
        )
    seen: dict[Tensor, int] = {}
    for index, each in enumerate(given):
        for param in _params_of(each):
            if seen.setdefault(param, index) != index:
                raise ValueError(
                    f"Invalid optimizer: a parameter of shape {tuple(param.shape)} is in number"
                    f" {seen[param]} and in number {index}. Must be in one of them."
                )
    return list(given)


def states_of(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """What is saved, and what is loaded into."""
    with _set_aside_gradients(optimizers):
        model_state, optimizer_state = get_state_dict(model, optimizers)
    return {"model": model_state, "optimizer": optimizer_state}


def transfer(move: Callable[..., Any], states: dict[str, Any], **how: Any) -> None:
    """Between the tensors of ``states`` and files.

    Raises:
        ShampooError: on all ranks, if one has raised that.
        CheckpointException: torch's, a BaseException, for other errors.
    """
    with warnings.catch_warnings():
        # On one process it guesses what no_dist has told it.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            move(states, no_dist=not is_distributed(), **how)
        except CheckpointException as error:
            for _, (reason, _) in sorted(error.failures.items()):
                if isinstance(reason, ShampooError):
                    raise reason from error
            raise


@contextmanager
def _set_aside_gradients(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """While there are any, DCP would leave a state empty that no step has filled yet."""
    params = [param for optimizer in optimizers for param in _params_of(optimizer)]
    grads = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        yield
    finally:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad


def _params_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]
