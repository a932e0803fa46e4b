"""The Trainer of transformers, and those built on it: whole checkpoints, and Shampoo's groups. ::

    from transformers import Trainer
    from shampoo.integrations.transformers import ShampooCallback, optimizer_cls_and_kwargs

    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, args),
        callbacks=[ShampooCallback()],
    )
    trainer.train(resume_from_checkpoint=True)

Under DistributedDataParallel the Trainer saves what ``state_dict()`` says on its first process,
which owns some of the blocks: the callback gathers all of them there before.
"""

from typing import Any

from torch import nn

from shampoo.integrations import framework, innermost, undecayed_vectors
from shampoo.optimizer import Shampoo

_transformers = framework("transformers")
_accelerate = framework("accelerate")
_Callback: Any = _transformers.TrainerCallback


class ShampooCallback(_Callback):  # type: ignore[misc]
    """Makes checkpoints of every kind whole: by steps, by epochs, the best ones, the last one.

    With ``save_strategy="best"`` the Trainer decides after an evaluation whether it saves, and
    asks nobody: the state is then gathered after each one. Other callbacks that ask for a save must
    stand before this one; one that stands behind it raises when its checkpoint has been written.
    """

    _gathered = -1  # in which step

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Refuses, by a ValueError, what would save on ranks that have nothing gathered."""
        self._gathered = -1
        for name, why in (
            ("save_on_each_node", "the state is gathered on the first process"),
            ("enable_jit_checkpoint", "it saves on a signal, which finds ranks in different steps"),
        ):
            if args.world_size > 1 and getattr(args, name, False):
                raise ValueError(f"Invalid {name}=True. Must be False on several ranks: {why}.")

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Gathers for ``save_strategy="steps"`` and the end of training."""
        self._gather(control.should_save, state, others["optimizer"])

    on_epoch_end = on_step_end  # for save_strategy="epoch"

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Gathers for ``save_strategy="best"``."""
        is_asked = control.should_save or args.save_strategy == "best"
        self._gather(is_asked, state, others["optimizer"])

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Raises a RuntimeError, on all ranks, if what was saved has not been gathered."""
        is_ours = innermost(others["optimizer"]) is not None
        is_lost = args.world_size > 1 and is_ours and not _is_sharded()
        if is_lost and self._gathered != state.global_step and not args.save_only_model:
            raise RuntimeError(
                f"checkpoint-{state.global_step} lacks blocks of Shampoo: another callback asked"
                " for it after ShampooCallback. Let ShampooCallback be the last of the callbacks."
            )

    def _gather(self, is_asked: bool, state: Any, wrapped: Any) -> None:
        optimizer = innermost(wrapped) if is_asked and not _is_sharded() else None
        if optimizer is not None and self._gathered != state.global_step:
            optimizer.consolidate_state_dict()
            self._gathered = state.global_step


def _is_sharded() -> bool:
    """Whether all ranks save, by torch.distributed.checkpoint."""
    state = _accelerate.state.AcceleratorState()
    return bool(state.distributed_type == _accelerate.DistributedType.FSDP)


def optimizer_cls_and_kwargs(
    model: nn.Module, args: Any, **arguments: Any
) -> tuple[type[Shampoo], dict[str, Any]]:
    """The Trainer's argument of this name, for one Trainer.

    Its rate and decay are those of ``args``; biases and norms are not decayed, as the Trainer has
    it, and embeddings and output heads follow the grafted method, as :func:`shampoo.groups` has it.

    Args:
        model: what is trained; with PEFT, after its adapters are there.
        args: the ``TrainingArguments``.
        arguments: of :class:`shampoo.Shampoo`, in the place of those.
    """
    given = {"lr": args.learning_rate, "weight_decay": args.weight_decay, **arguments}
    return Shampoo, {"params": undecayed_vectors(model), **given}
