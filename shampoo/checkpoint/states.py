"""The state of model and optimizer by names, as ``torch.distributed.checkpoint`` moves it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.optim import Optimizer

from shampoo.checkpoint.ranks import is_distributed
from shampoo.errors import ShampooError


def states_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What is saved, and what is loaded into."""
    with _set_aside_gradients(optimizer):
        model_state, optimizer_state = get_state_dict(model, optimizer)
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
def _set_aside_gradients(optimizer: Optimizer) -> Iterator[None]:
    """While there are any, DCP would leave a state empty that no step has filled yet."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    grads = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        yield
    finally:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
