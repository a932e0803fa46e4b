"""Accelerate: ``save_state`` saves the blocks of all ranks, and what it wraps shows our names. ::

    from accelerate import Accelerator
    from shampoo import Shampoo
    from shampoo.integrations.accelerate import attach

    accelerator = Accelerator()
    model = torch.nn.Linear(4, 4)
    model, optimizer = accelerator.prepare(model, Shampoo(model, lr=1e-3))
    attach(accelerator)
    ...
    accelerator.save_state("checkpoint")  # on all ranks, as ever
    print(optimizer.explain())

Under DistributedDataParallel Accelerate writes what ``state_dict()`` says on its main process,
which owns some of the blocks. Under FSDP2 it uses torch.distributed.checkpoint, and all ranks
save.
"""

from typing import Any

from shampoo.integrations import framework, innermost

_accelerate = framework("accelerate")
_Accelerated: Any = framework("accelerate.optimizer").AcceleratedOptimizer


class ForwardingOptimizer(_Accelerated):  # type: ignore[misc]
    """An ``AcceleratedOptimizer`` on which everything of the optimizer in it can be called."""

    def __getattr__(self, name: str) -> Any:
        """Called for what the wrapper has not."""
        if name == "optimizer":  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self.optimizer, name)


def attach(accelerator: Any) -> Any:
    """Makes the checkpoints of an ``Accelerator`` whole, and lets its optimizers forward.

    Call it on all ranks, after ``prepare()``. What is prepared later is saved whole too, but does
    not forward.

    Args:
        accelerator: an ``accelerate.Accelerator``.

    Returns:
        What ``register_save_state_pre_hook`` returns: its ``remove()`` lets ``save_state`` be.

    Raises:
        ValueError: if every node is to save for itself, since one rank gathers what is saved.
    """
    if accelerator.project_configuration.save_on_each_node and accelerator.num_processes > 1:
        raise ValueError(
            "Invalid save_on_each_node=True. Must be False with Shampoo on several ranks: the state"
            " is gathered on the main process. Save to a folder that all nodes see."
        )

    def gather(models: Any, weights: Any, folder: str) -> None:
        if accelerator.distributed_type == _accelerate.DistributedType.FSDP:
            return  # saved by all ranks, before this
        for prepared in accelerator._optimizers:
            optimizer = innermost(prepared)
            if optimizer is not None:
                optimizer.consolidate_state_dict()

    for prepared in accelerator._optimizers:
        if type(prepared) is _Accelerated and innermost(prepared) is not None:
            prepared.__class__ = ForwardingOptimizer
    return accelerator.register_save_state_pre_hook(gather)
