"""timm: its factory, without a momentum nobody asked for; Lookahead and the average of weights."""

import argparse

import declared_ops  # noqa: F401
import pytest
import timm
import torch
from small import batches, model
from timm.optim import create_optimizer, create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy

from shampoo import Shampoo
from shampoo.integrations.timm import param_groups, register

pytestmark = pytest.mark.frameworks

CUT = {"max_preconditioner_dim": 16, "precondition_frequency": 3}


@pytest.fixture(autouse=True)
def _registered():
    register()


def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=32, num_heads=2, num_classes=4
    )


def test_the_factory_gives_no_momentum_and_keeps_eps():
    found = create_optimizer_v2(vit(), "shampoo", lr=1e-3, weight_decay=0.05, momentum=0.9)
    assert type(found) is Shampoo
    assert [group["weight_decay"] for group in found.param_groups] == [0.0, 0.05]
    assert all(group["momentum"] == 0.0 for group in found.param_groups)
    said = {"opt": "shampoo", "lr": 1e-3, "weight_decay": 0.05, "momentum": 0.9, "opt_eps": 1e-8}
    found = create_optimizer(argparse.Namespace(**said, opt_betas=(0.9, 0.99)), vit())
    assert {(g["momentum"], g["eps"], g["betas"]) for g in found.param_groups} == {
        (0.0, 1e-12, (0.9, 0.99))
    }
    register("heavy", momentum=0.8, precondition_frequency=5)
    asked = create_optimizer(argparse.Namespace(**{**said, "opt": "heavy"}), vit())
    assert {(g["momentum"], g["precondition_frequency"]) for g in asked.param_groups} == {(0.8, 5)}


def test_what_timm_would_split_or_drop_is_refused():
    with pytest.raises(ValueError, match="Must have no '_'"):
        register("distributed_shampoo")
    with pytest.raises(ValueError, match="timm drops it"):
        register(eps=1e-6)


def test_groups_are_shampoos_with_timms_decay():
    module = vit()
    found = create_optimizer_v2(
        module, "shampoo", lr=1e-3, weight_decay=0.05, param_group_fn=param_groups
    )
    by_name = {name: group for group in found.param_groups for name in group["param_names"]}
    assert set(by_name) == {name for name, _ in module.named_parameters()}
    decayed = {name for name, group in by_name.items() if group["weight_decay"] != 0}
    plain = create_optimizer_v2(module, "adamw", lr=1e-3, weight_decay=0.05)
    theirs = {id(p) for g in plain.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {name for name, p in module.named_parameters() if id(p) in theirs}
    assert not by_name["pos_embed"]["precondition"]


def trained(module, optimizer, ema, part):
    for tokens, labels in part:
        optimizer.zero_grad()
        cross_entropy(module(tokens), labels).backward()
        optimizer.step()
        ema.update(module)


@pytest.mark.parametrize("name", ["shampoo", "lookahead_shampoo"])
def test_a_run_is_resumed_to_the_bit(tmp_path, name):
    def built():
        module = model()
        optimizer = create_optimizer_v2(module, name, lr=3e-3, weight_decay=0.01, **CUT)
        return module, optimizer, ModelEmaV3(module, decay=0.9)

    part = batches(16)
    module, optimizer, ema = built()
    trained(module, optimizer, ema, part[:8])  # Lookahead's slow weights are of step 6
    states = [module.state_dict(), optimizer.state_dict(), ema.state_dict()]
    torch.save(states, tmp_path / "saved.pt")
    trained(module, optimizer, ema, part[8:])
    resumed = built()
    for each, state in zip(resumed, torch.load(tmp_path / "saved.pt"), strict=True):
        each.load_state_dict(state)
    trained(*resumed, part[8:])
    for mine, theirs in ((resumed[0], module), (resumed[2], ema)):
        assert all(map(torch.equal, mine.state_dict().values(), theirs.state_dict().values()))
    slow = {key for entries in optimizer.state_dict()["state"].values() for key in entries}
    assert ("lookahead_slow_buff" in slow) == name.startswith("lookahead")
