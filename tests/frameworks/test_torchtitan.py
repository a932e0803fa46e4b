"""torchtitan: its container and its flat states, through torch.distributed.checkpoint."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small import ARGUMENTS, batches, each, model, weights
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torchtitan.components.optimizer import ParamGroupConfig

from shampoo import Shampoo
from shampoo.integrations.torchtitan import ShampooContainer, shampoo_group

pytestmark = pytest.mark.frameworks


def built(layout):
    module = model()
    if layout == "fsdp2":
        fully_shard(module)
    elif layout == "ddp":
        module = DistributedDataParallel(module)
    config = ShampooContainer.Config(
        param_groups=[
            ParamGroupConfig(pattern="norm", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3}),
            shampoo_group("embed", **ARGUMENTS, precondition=False),
            shampoo_group(".*", **ARGUMENTS),
        ],
        implementation="foreach",
    )
    return module, config.build(model_parts=[module])


def trained(module, optimizers, part):
    for tokens, labels in part:
        optimizers.zero_grad()
        cross_entropy(module(tokens), labels).backward()
        optimizers.step()


def run(rank, folder, layout):
    part = batches(8, rank, torch.distributed.get_world_size())
    module, optimizers = built(layout)
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW, Shampoo]
    trained(module, optimizers, part[:4])
    dcp.save({"model": get_model_state_dict(module), "optimizer": optimizers}, checkpoint_id=folder)
    trained(module, optimizers, part[4:])
    expected = weights(module)
    module, optimizers = built(layout)
    state = {"model": get_model_state_dict(module), "optimizer": optimizers}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(module, state["model"])
    trained(module, optimizers, part[4:])
    assert all(map(torch.equal, weights(module), expected))
    return [value.sum().item() for value in expected]


@pytest.mark.parametrize(("world", "layouts"), [(1, ["plain"]), (2, ["ddp", "fsdp2"])])
def test_a_run_is_resumed_to_the_bit(ranks, tmp_path, world, layouts):
    cases = {layout: (layout,) for layout in layouts}
    first, *others = ranks.returns(each, world, str(tmp_path), run, cases)
    for layout in layouts:
        assert isinstance(first[layout], list), first[layout]
        assert all(other[layout] == first[layout] for other in others)
