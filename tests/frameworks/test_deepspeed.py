"""DeepSpeed: stage 0 trains and resumes; what flattens parameters is refused."""

import deepspeed
import pytest
import torch
from small import ARGUMENTS, batches, each, model, weights
from torch.nn.functional import cross_entropy

from shampoo import Shampoo

pytestmark = pytest.mark.frameworks


# An op for processes that share memory, which DeepSpeed would build for minutes; gloo needs none.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def initialized(stage):
    module = model()
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    engine, optimizer, *_ = deepspeed.initialize(
        model=module,
        optimizer=Shampoo(module.parameters(), **ARGUMENTS),
        config=config,
        dist_init_required=False,
    )
    return engine, optimizer


def trained(engine, part):
    for tokens, labels in part:
        engine.backward(cross_entropy(engine(tokens), labels))
        engine.step()


def run(rank, folder, stage):
    part = batches(8, rank, torch.distributed.get_world_size())
    engine, optimizer = initialized(stage)
    trained(engine, part[:4])
    optimizer.consolidate_state_dict()
    engine.save_checkpoint(folder)
    trained(engine, part[4:])
    expected = weights(engine.module)
    engine, _ = initialized(stage)
    engine.load_checkpoint(folder)
    trained(engine, part[4:])
    assert all(map(torch.equal, weights(engine.module), expected))
    return [each.sum().item() for each in expected]


@pytest.mark.parametrize("world", [1, 2])
def test_stage_0_resumes_and_others_are_refused(ranks, tmp_path, world):
    cases = {"0": (0,), "1": (1,), "2": (2,), "3": (3,)}
    first, *others = ranks.returns(each, world, str(tmp_path), run, cases)
    assert isinstance(first["0"], list), first["0"]
    assert all(other["0"] == first["0"] for other in others)
    for stage in ("1", "2", "3"):
        assert first[stage].startswith("RuntimeError: Shampoo got what deepspeed.runtime.zero.")
        assert '{"stage": 0}' in first[stage]
