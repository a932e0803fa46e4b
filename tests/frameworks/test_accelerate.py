"""Accelerate: resume by its own save_state and load_state, on one rank and on two."""

import copy

import declared_ops  # noqa: F401
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import ProjectConfiguration
from small import ARGUMENTS, assert_equal, batches, data, heard, launched, model, weights
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from shampoo import IncompleteCheckpointError, Shampoo
from shampoo.integrations.accelerate import attach

pytestmark = pytest.mark.frameworks

STEPS, SAVED = 12, 6  # batches of an epoch; two of them make a step


def _prepared(mixed_precision="no", **options):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=2, mixed_precision=mixed_precision, **options
    )
    module = model()
    optimizer = Shampoo(module.parameters(), **ARGUMENTS)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    return (accelerator, *accelerator.prepare(module, optimizer, scheduler))


def _train(prepared, part):
    accelerator, module, optimizer, scheduler = prepared
    for tokens, labels in part:
        with accelerator.accumulate(module):
            accelerator.backward(cross_entropy(module(tokens), labels))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def straight(rank, world, folder, is_attached, mixed_precision):
    with launched(rank):
        prepared = _prepared(mixed_precision)
        if is_attached:
            attach(prepared[0])
        part = batches(STEPS, rank, world)
        _train(prepared, part[:SAVED])
        prepared[0].save_state(folder)
        _train(prepared, part[SAVED:])
        return weights(prepared[1])


def resumed(rank, world, folder, mixed_precision):
    with launched(rank):
        prepared = _prepared(mixed_precision)
        prepared[0].load_state(folder)
        _train(prepared, batches(STEPS, rank, world)[SAVED:])
        return weights(prepared[1])


def loaded(rank, folder):
    with launched(rank):
        _prepared()[0].load_state(folder)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_is_resumed_to_the_bit(ranks, tmp_path, world, mixed_precision):
    folder = str(tmp_path)
    expected = ranks.returns(straight, world, world, folder, True, mixed_precision)
    assert_equal(ranks.returns(resumed, world, world, folder, mixed_precision), expected)


def _warned(rank, world, folder):
    with heard() as lines:
        straight(rank, world, folder, False, "no")
    return "\n".join(lines)


def test_without_the_hook_a_warning_names_it_and_nothing_loads(ranks, tmp_path):
    said = ranks.returns(_warned, 2, 2, str(tmp_path))
    assert all("call shampoo.integrations.accelerate.attach" in lines for lines in said)
    [_, second] = ranks.run(loaded, 2, str(tmp_path))  # the first finds its own blocks
    assert isinstance(second, IncompleteCheckpointError)


def forwards(rank):
    with launched(rank):
        accelerator, module, optimizer, scheduler = _prepared()
        assert not hasattr(optimizer, "explain")
        attach(accelerator)
        assert optimizer.skipped_steps == 0
        assert len(optimizer.explain().tensors) == len(list(module.parameters()))
        assert isinstance(optimizer, torch.optim.Optimizer)
        _train((accelerator, module, optimizer, scheduler), batches(2))
        assert copy.copy(optimizer).optimizer is optimizer.optimizer


def test_what_is_wrapped_shows_our_names(ranks):
    ranks.returns(forwards, 1)


def refused(rank):
    with launched(rank):
        options = ProjectConfiguration(project_dir=".", save_on_each_node=True)
        attach(_prepared(project_config=options)[0])


def test_nodes_that_save_for_themselves_are_refused(ranks):
    [error, _] = ranks.run(refused, 2)
    assert isinstance(error, ValueError)
    assert "save_on_each_node" in str(error)


def loads(rank):
    """A prepared loader, whose order Accelerate keeps."""
    with launched(rank):
        prepared = _prepared()
        attach(prepared[0])
        loader = prepared[0].prepare(DataLoader(data(64), batch_size=8, shuffle=True))
        _train(prepared, loader)
        return weights(prepared[1])


def test_ranks_with_a_prepared_loader_stay_alike(ranks):
    first, second = ranks.returns(loads, 2)
    assert all(map(torch.equal, first, second))
