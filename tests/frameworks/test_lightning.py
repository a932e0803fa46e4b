"""Lightning's Trainer and Fabric: their own checkpoints, under DDP and ModelParallelStrategy."""

import csv
from types import SimpleNamespace

import declared_ops  # noqa: F401
import lightning
import pytest
import torch
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallel
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from small import ARGUMENTS, batches, data, each, model, weights
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from shampoo import Shampoo
from shampoo.integrations import innermost
from shampoo.integrations.lightning import ShampooMonitor

pytestmark = pytest.mark.frameworks


class Module(lightning.LightningModule):
    def __init__(self, is_sharded):
        super().__init__()
        self.model, self.is_sharded = model(), is_sharded

    def configure_model(self):
        if self.is_sharded:
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, index):
        return cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = Shampoo(self.model.parameters(), **ARGUMENTS)
        optimizer.record_metrics(every=2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 3e-3, total_steps=40, cycle_momentum=False
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def fitted(folder, strategy, checkpoint=None):
    """Two epochs of 6 steps, from the start or from the checkpoint of the first."""
    world = torch.distributed.get_world_size()
    is_sharded = strategy == "model_parallel"
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=ModelParallelStrategy(world, 1) if is_sharded else strategy,
        max_epochs=2,
        logger=False if checkpoint else CSVLogger(folder, version=0),
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1),
            ShampooMonitor(),
        ],
    )
    module = Module(is_sharded)
    loader = DataLoader(data(48 * world), batch_size=8)
    trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == 12
    return weights(module.model), trainer.optimizers[0].metrics()


def trainer_run(rank, folder, strategy):
    expected, metrics = fitted(folder, strategy)
    found, again = fitted(folder, strategy, f"{folder}/epoch=0.ckpt")
    assert all(map(torch.equal, found, expected))
    assert metrics.keys() == again.keys()
    with open(f"{folder}/lightning_logs/version_0/metrics.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert int(last["step"]) == 11
    assert len(metrics) > 10
    logged = {key: float(last[key]) for key in metrics}
    assert logged == pytest.approx(metrics, rel=1e-6)  # which loggers take in float32
    return [value.sum().item() for value in expected]


def fabric_state(strategy):
    world = torch.distributed.get_world_size()

    def parallelize(module, mesh):
        return fully_shard(module, mesh=mesh["data_parallel"])

    is_sharded = strategy == "model_parallel"
    if is_sharded:
        strategy = FabricModelParallel(parallelize, world, 1)
    fabric = lightning.Fabric(accelerator="cpu", devices=world, strategy=strategy)
    fabric.launch()
    module = fabric.setup_module(model())
    optimizer = fabric.setup_optimizers(Shampoo(module.parameters(), **ARGUMENTS))
    assert optimizer.optimizer is innermost(optimizer)  # its wrapper derives from Shampoo
    assert len(optimizer.optimizer.explain().tensors) == len(list(module.parameters()))
    return fabric, {"model": module, "optimizer": optimizer}


def fabric_train(fabric, state, part):
    for tokens, labels in part:
        fabric.backward(cross_entropy(state["model"](tokens), labels))
        state["optimizer"].step()
        state["optimizer"].zero_grad()


def fabric_run(rank, folder, strategy):
    part = batches(8, rank, torch.distributed.get_world_size())
    fabric, state = fabric_state(strategy)
    fabric_train(fabric, state, part[:4])
    fabric.save(f"{folder}/saved", state)
    fabric_train(fabric, state, part[4:])
    expected = weights(state["model"])
    fabric, state = fabric_state(strategy)
    fabric.load(f"{folder}/saved", state)
    fabric_train(fabric, state, part[4:])
    assert all(map(torch.equal, weights(state["model"]), expected))
    return [value.sum().item() for value in expected]


@pytest.mark.parametrize("run", [trainer_run, fabric_run])
@pytest.mark.parametrize(
    ("world", "strategies"), [(1, ["auto"]), (2, ["ddp", "model_parallel"])], ids=["one", "two"]
)
def test_a_run_is_resumed_to_the_bit(ranks, tmp_path, run, world, strategies):
    cases = {strategy: (strategy,) for strategy in strategies}
    first, *others = ranks.returns(each, world, str(tmp_path), run, cases)
    for strategy in strategies:
        assert isinstance(first[strategy], list), first[strategy]
        assert all(other[strategy] == first[strategy] for other in others)


class Optimizers:
    """What a monitor sees of a trainer in the middle of a run, and of the module it logs to."""

    def __init__(self, *optimizers, is_recorded_elsewhere=False):
        self.optimizers, self.loggers = optimizers, [None]
        self.global_step, self.log_every_n_steps = 4, 2
        self.strategy = SimpleNamespace(
            reduce_boolean_decision=lambda here, all: here or is_recorded_elsewhere
        )
        self.logged = {}

    def log_dict(self, numbers):
        self.logged |= numbers

    def seen(self):
        ShampooMonitor().on_train_batch_end(self, self, None, None, 3)
        return self.logged


def test_the_monitor_logs_what_is_recorded():
    module = model()
    first, second = (Shampoo(part.parameters(), lr=0.1) for part in (module.first, module.out))
    second.record_metrics()
    for param in module.parameters():
        param.grad = torch.ones_like(param)
    first.step()
    second.step()
    assert Optimizers(first).seen() == {"shampoo/skipped_steps": 0.0}
    assert Optimizers(second).seen() == second.metrics()
    others = [torch.optim.SGD(module.norm.parameters(), lr=0.1)]
    behind = {f"{key}/1": value for key, value in second.metrics().items()}
    seen = Optimizers(first, *others, second).seen()
    assert seen == {"shampoo/skipped_steps/0": 0.0, **behind}
    with pytest.raises(RuntimeError, match="record_metrics"):
        Optimizers(first, is_recorded_elsewhere=True).seen()
    between = Optimizers(second)
    between.global_step = 5
    assert between.seen() == {}
