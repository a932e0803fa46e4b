"""Loops that others write: ignite, skorch, schedulefree."""

import copy
from pathlib import Path

import ignite.distributed
import ignite.engine
import pytest
import schedulefree
import torch
from ignite.handlers import Checkpoint, DiskSaver
from skorch import NeuralNetClassifier
from small import ARGUMENTS, Classifier, batches, data, model, weights
from torch.nn.functional import cross_entropy

from shampoo import Shampoo

pytestmark = pytest.mark.frameworks


def ignite_run(rank, folder, is_resumed):
    """On several ranks a handler gathers the state before Checkpoint writes it on the first."""
    world = torch.distributed.get_world_size()
    ignite.distributed.sync()  # or a process that has had a job still believes in its group
    module = model()
    if world > 1:
        module = torch.nn.parallel.DistributedDataParallel(module)
    optimizer = Shampoo(module.parameters(), **ARGUMENTS)
    engine = ignite.engine.create_supervised_trainer(module, optimizer, cross_entropy)
    objects = {"model": module, "optimizer": optimizer, "trainer": engine}
    part = batches(8, rank, world)
    if is_resumed:
        [file] = Path(folder).glob("*.pt")
        Checkpoint.load_objects(objects, torch.load(file, weights_only=True))
        part = part[4:]
    else:
        saver = Checkpoint(objects, DiskSaver(folder, require_empty=False), n_saved=1)
        every = ignite.engine.Events.ITERATION_COMPLETED(once=4)
        engine.add_event_handler(every, lambda _: optimizer.consolidate_state_dict())
        engine.add_event_handler(every, saver)
    engine.run(part, max_epochs=1, epoch_length=8)
    return weights(module)


@pytest.mark.parametrize("world", [1, 2])
def test_ignite_resumes_to_the_bit(ranks, tmp_path, world):
    expected = ranks.returns(ignite_run, world, str(tmp_path), False)
    found = ranks.returns(ignite_run, world, str(tmp_path), True)
    for here in (*expected, *found):
        assert all(map(torch.equal, here, expected[0]))


def test_skorch_resumes_to_the_bit(tmp_path):
    tokens, labels = data(64).tensors

    def built():
        torch.manual_seed(0)
        net = NeuralNetClassifier(
            Classifier,
            criterion=torch.nn.CrossEntropyLoss,
            optimizer=Shampoo,
            batch_size=8,
            train_split=None,
            verbose=0,
            iterator_train__shuffle=False,
            **{f"optimizer__{name}": value for name, value in ARGUMENTS.items()},
        )
        return net.initialize()

    net = built().partial_fit(tokens, labels).partial_fit(tokens, labels)
    files = {"f_params": tmp_path / "weights.pt", "f_optimizer": tmp_path / "optimizer.pt"}
    net.save_params(**files)
    net.partial_fit(tokens, labels)
    other = built()
    other.load_params(**files)
    other.partial_fit(tokens, labels)
    assert all(map(torch.equal, weights(other.module_), weights(net.module_)))
    assert type(other.optimizer_) is Shampoo


def test_schedule_free_resumes_to_the_bit():
    def built():
        module = model()
        base = Shampoo(module.parameters(), **{**ARGUMENTS, "betas": (0.0, 0.95)})
        return module, schedulefree.ScheduleFreeWrapper(base, momentum=0.9)

    def trained(module, optimizer, part):
        optimizer.train()
        for tokens, labels in part:
            optimizer.zero_grad()
            cross_entropy(module(tokens), labels).backward()
            optimizer.step()

    part = batches(8)
    module, optimizer = built()
    trained(module, optimizer, part[:4])
    other, wrapper = built()
    other.load_state_dict(module.state_dict())
    wrapper.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # or both would swap one z
    wrapper.train_mode = optimizer.train_mode  # it saves no mode: weights are y while it trains
    trained(other, wrapper, part[4:])
    trained(module, optimizer, part[4:])
    assert all(map(torch.equal, weights(other), weights(module)))
    averaged = [optimizer.state[param]["z"].clone() for param in module.parameters()]
    optimizer.eval()
    assert not all(map(torch.equal, weights(module), averaged))
