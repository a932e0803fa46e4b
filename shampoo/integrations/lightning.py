"""Lightning: what steps do, in its loggers; checkpoints are whole without help. ::

    import lightning
    from shampoo.integrations.lightning import ShampooMonitor

    trainer = lightning.Trainer(callbacks=[ShampooMonitor()])

Trainer and Fabric call ``consolidate_state_dict()`` on all ranks before they save, and
``ModelParallelStrategy`` saves with torch.distributed.checkpoint. In a LightningModule,
``self.optimizers().optimizer`` is the Shampoo; a Fabric optimizer shows all its names itself.
"""

from typing import Any

from shampoo.integrations import framework, innermost

_Callback: Any = framework("lightning").Callback


class ShampooMonitor(_Callback):  # type: ignore[misc]
    """Logs what the steps of each Shampoo are like, in the rhythm of ``log_every_n_steps``.

    That is all of ``metrics()`` (metrics.md) of an optimizer that records them, and
    ``shampoo/skipped_steps`` of one that does not. Where a module has several Shampoos, their index
    stands behind each key. To record, call ``optimizer.record_metrics(every=...)`` in
    ``configure_optimizers``, with ``log_every_n_steps`` or a divisor of it. On a GPU this waits for
    the last step.
    """

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        """Called by Lightning on all ranks; a RuntimeError if some of them record and some not."""
        if not trainer.loggers or trainer.global_step % trainer.log_every_n_steps != 0:
            return
        found = [each for each in map(innermost, trainer.optimizers) if each is not None]
        for index, optimizer in enumerate(found):
            numbers = {"shampoo/skipped_steps": float(optimizer.skipped_steps)}
            is_recording = optimizer._recorder is not None
            # All ranks ask for metrics or none does, since they are added up over ranks.
            if trainer.strategy.reduce_boolean_decision(is_recording, all=False):
                numbers |= optimizer.metrics()
            place = f"/{index}" if len(found) > 1 else ""
            module.log_dict({f"{key}{place}": value for key, value in numbers.items()})
