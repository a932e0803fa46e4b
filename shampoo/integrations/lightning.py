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
    """Logs how many steps each Shampoo has skipped because a gradient was not finite.

    In the rhythm of ``log_every_n_steps``, as ``shampoo/skipped_steps``; where a module has several
    optimizers, with their index behind it. On a GPU this waits for the last step.
    """

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        """Called by Lightning on all ranks."""
        if not trainer.loggers or trainer.global_step % trainer.log_every_n_steps != 0:
            return
        found = [each for each in map(innermost, trainer.optimizers) if each is not None]
        for index, optimizer in enumerate(found):
            place = f"/{index}" if len(found) > 1 else ""
            module.log(f"shampoo/skipped_steps{place}", float(optimizer.skipped_steps))
