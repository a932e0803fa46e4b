"""The groups of a model: what each parameter is taken for, by whatever wraps it, and overrides."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from grouped_models import GPT, HYPER, Adapted, ViT, build, fit, group_of, named
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from trajectory import assert_same_bits

import shampoo
from shampoo import Shampoo


def matrices_of(prefix: str) -> list[str]:
    return [f"{prefix}.{name}.weight" for name in ("attention", "up", "down")]


def vectors_of(prefix: str) -> list[str]:
    return [
        *(f"{prefix}.norm.weight", f"{prefix}.norm.bias"),
        *(f"{prefix}.{name}.bias" for name in ("attention", "up", "down")),
    ]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model(tied: bool, device: str):
    with torch.device(device):
        model = GPT(tied)
    tables = {"heads": ["wte.weight"]} if tied else {"embeddings": ["wte.weight"]}
    assert named(model) == {
        **tables,
        **({} if tied else {"heads": ["lm_head.weight"]}),
        "positional": ["wpe.weight"],
        "vectors": [name for i in range(2) for name in vectors_of(f"h.{i}")],
        "matrices": [name for i in range(2) for name in matrices_of(f"h.{i}")],
    }
    assert [group["name"] for group in shampoo.groups(model)][-2:] == ["vectors", "matrices"]


def test_a_head_tied_after_it_was_built_or_named_first():
    model = nn.Module()
    model.head, model.embed = nn.Linear(4, 9), nn.Embedding(9, 4)
    model.head.weight = model.embed.weight
    assert group_of(model) == {"head.weight": "heads", "head.bias": "vectors"}
    model = GPT(tied=False)
    assert group_of(model)["wte.weight"] == "embeddings"
    model.lm_head.weight = model.wte.weight
    assert group_of(model)["wte.weight"] == "heads"


def test_a_vision_model():
    assert named(ViT()) == {
        "positional": ["cls_token", "pos_embed"],
        "vectors": [
            name
            for name, param in ViT().named_parameters()
            if param.dim() == 1 and name not in ("cls_token", "pos_embed")
        ],
        "matrices": [
            "patches.weight",
            "encoder.self_attn.in_proj_weight",
            "encoder.self_attn.out_proj.weight",
            *("encoder.linear1.weight", "encoder.linear2.weight", "head.weight"),
        ],
    }
    assert group_of(ViT(classes=10_000))["head.weight"] == "matrices"
    assert group_of(ViT(classes=10_001))["head.weight"] == "heads"


def test_convolutions_norms_bags_and_tensors_of_one_row():
    model = nn.ModuleDict(
        {
            "bag": nn.EmbeddingBag(30, 4),
            "conv": nn.Conv2d(3, 8, 3),
            "up": nn.ConvTranspose2d(8, 4, 2),
            "norm": nn.BatchNorm2d(8),
            "scale": nn.Linear(5, 1),
        }
    )
    assert group_of(model) == {
        "bag.weight": "embeddings",
        **{"conv.weight": "matrices", "conv.bias": "vectors"},
        **{"up.weight": "matrices", "up.bias": "vectors"},
        **{"norm.weight": "vectors", "norm.bias": "vectors"},
        **{"scale.weight": "vectors", "scale.bias": "vectors"},
    }


@pytest.mark.parametrize("vocabulary", [16, 48, 64])
def test_a_vocabulary_as_large_as_a_width_makes_a_head_of_the_last_layer_alone(vocabulary: int):
    """16 are the features, 48 what attention makes of them, 64 what is inside a layer."""
    found = named(GPT(tied=False, vocabulary=vocabulary))
    assert found["heads"] == ["lm_head.weight"]
    assert len(found["matrices"]) == 6


def test_a_classifier_is_no_head_for_having_as_many_outputs_as_there_are_token_types():
    model = nn.Module()
    model.word_embeddings, model.token_type_embeddings = nn.Embedding(99, 8), nn.Embedding(2, 8)
    model.position_embeddings = nn.Embedding(5, 8)
    model.classifier, model.second = nn.Linear(8, 2), nn.Linear(8, 5)
    found = group_of(model)
    assert found["token_type_embeddings.weight"] == "embeddings"
    assert found["position_embeddings.weight"] == "positional"
    assert found["classifier.weight"] == found["second.weight"] == "matrices"


def test_one_head_for_each_of_several_vocabularies():
    model = nn.Module()
    model.source, model.target = nn.Embedding(50, 8), nn.Embedding(60, 8)
    model.hidden = nn.Linear(8, 8)
    model.first, model.second = nn.Linear(8, 60), nn.Linear(8, 50)
    assert named(model)["heads"] == ["first.weight", "second.weight"]


@pytest.mark.parametrize(
    "name",
    [
        "pos",
        "pos_embed",
        "posEmbed",
        "wpe",
        "position_embeddings",
        "absolute_pos_2",
        "posemb",
        "pe",
    ],
)
def test_positional_tables_are_known_by_their_names(name: str):
    model, table, layer = nn.Module(), nn.Module(), nn.Module()
    model.add_module(name, nn.Embedding(7, 4))
    assert group_of(model) == {f"{name}.weight": "positional"}
    layer.register_parameter(name, nn.Parameter(torch.zeros(7, 4)))
    assert group_of(layer) == {name: "positional"}
    table.add_module(name, layer)
    layer.register_parameter(name, None)
    layer.table = nn.Parameter(torch.zeros(7, 4))
    assert group_of(table) == {f"{name}.table": "positional"}


@pytest.mark.parametrize("name", ["compose", "posterior", "spelling", "cursor", "typed"])
def test_parts_of_words_are_no_names(name: str):
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.zeros(7, 4)))
    model.add_module(f"{name}_table", nn.Embedding(7, 4))
    assert group_of(model) == {name: "matrices", f"{name}_table.weight": "embeddings"}


def test_layers_that_project_positions_are_matrices():
    model = nn.Module()
    model.linear_pos, model.pos_conv = nn.Linear(4, 4), nn.Conv1d(4, 4, 3)
    model.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
    found = group_of(model)
    assert found["linear_pos.weight"] == found["pos_conv.weight"] == "matrices"
    assert found["relative_position_bias_table"] == "positional"


def test_attention_adapters_and_frozen_parameters():
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True)
    found = group_of(attention)
    for each in ("q", "k", "v"):
        assert found[f"{each}_proj_weight"] == "matrices"
    assert found["bias_k"] == "vectors"
    adapted = group_of(Adapted(8))
    assert adapted["base.weight"] == adapted["lora_A.weight"] == "matrices"
    assert adapted["base.bias"] == "vectors"


def test_parametrized_weights_are_those_of_their_layers():
    model = GPT(tied=False)
    parametrizations.weight_norm(model.h[0].up)
    parametrizations.spectral_norm(model.lm_head)
    parametrizations.spectral_norm(model.wte)
    found = group_of(model)
    inside = "parametrizations.weight.original"
    assert found[f"h.0.up.{inside}0"] == "vectors"
    assert found[f"h.0.up.{inside}1"] == "matrices"
    assert found[f"lm_head.{inside}"] == "heads"
    assert found[f"wte.{inside}"] == "embeddings"


def test_what_has_no_shape_yet_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"Invalid model: 1\.weight has no shape yet\. Must have"):
        shampoo.groups(model)
    with pytest.raises(TypeError, match=r"groups\(\) needs a torch\.nn\.Module, got generator"):
        shampoo.groups(model.parameters())


def test_names_are_those_of_the_model_inside_of_wrappers():
    model = GPT()
    expected = named(model)
    assert named(torch.compile(model)) == expected
    model.h[0] = torch.compile(model.h[0])
    assert named(model) == expected
    assert named(nn.DataParallel(torch.compile(model))) == expected
    own = nn.Module()
    own.module = nn.Linear(2, 2)
    assert set(group_of(own)) == {"module.weight", "module.bias"}  # its author's name


def wrapped(rank: int, how: str) -> tuple[dict[str, list[str]], bool, dict[str, Tensor]]:
    """A job: names by group; whether parameters are DTensors; the model after three steps."""
    torch.manual_seed(0)
    model: nn.Module = GPT()
    if how == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.h:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    found = named(model)
    optimizer = Shampoo(model, lr=0.01, precondition_frequency=1, max_preconditioner_dim=16)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(37, (4, 8), generator=generator)
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()
    whole = {
        name.removeprefix("module."): param.full_tensor() if isinstance(param, DTensor) else param
        for name, param in model.named_parameters()
    }
    is_sharded = isinstance(next(model.parameters()), DTensor)
    return found, is_sharded, {name: param.detach().clone() for name, param in whole.items()}


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_models_of_several_ranks(ranks: Ranks, how: str):
    expected = named(GPT())
    [(_, _, alone)] = ranks.returns(wrapped, 1, how)
    for found, is_sharded, weights in ranks.returns(wrapped, 2, how):
        assert found == expected
        assert is_sharded == (how == "fsdp2")
        for name, param in alone.items():
            torch.testing.assert_close(weights[name], param, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "moved"),
    [
        ({"embeddings": ["h.0.up"]}, {"h.0.up.weight": "embeddings"}),
        ({"embeddings": "h.0.up"}, {"h.0.up.weight": "embeddings"}),
        ({"heads": ["up"]}, {"h.0.up.weight": "heads", "h.1.up.weight": "heads"}),
        ({"heads": ["h.1.*.bias"]}, {f"h.1.{n}.bias": "heads" for n in ("attention", "up", "down")}
         | {"h.1.norm.bias": "heads"}),
        ({"matrices": ["lm_head", "wte"]},
         {"lm_head.weight": "matrices", "wte.weight": "matrices"}),
        ({"vectors": ["h.?.down.weight"]}, {f"h.{i}.down.weight": "vectors" for i in range(2)}),
        ({"positional": ["h.0.up.bias"]}, {"h.0.up.bias": "positional"}),
        ({"matrices": ["h.0"]}, {}),
        ({"heads": ["wte"], "embeddings": ["lm_head.weight"]},
         {"wte.weight": "heads", "lm_head.weight": "embeddings"}),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_guess_can_be_put_right(overrides: dict[str, Any], moved: dict[str, str]):
    model = GPT(tied=False)
    assert group_of(model, **overrides) == {**group_of(model), **moved}


def test_modules_and_parameters_can_be_named_themselves():
    model = GPT(tied=False)
    guessed = group_of(model)
    assert group_of(model, heads=[model.h[0].up]) == {**guessed, "h.0.up.weight": "heads"}
    assert group_of(model, heads=model.h[1]) == {
        **guessed,
        **dict.fromkeys(matrices_of("h.1"), "heads"),
    }
    moved = {**guessed, "h.0.up.bias": "embeddings"}
    assert group_of(model, embeddings=[model.h[0].up.bias]) == moved
    tied = GPT()
    assert group_of(tied, matrices=[tied.lm_head])["wte.weight"] == "matrices"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads": ["score"]}, r"Invalid heads='score'\. Must match .* such as 'wte\.weight'"),
        ({"embeddings": ["norm"]}, "Invalid embeddings='norm'. Must match .* no vector"),
        ({"positional": [nn.Linear(2, 2)]}, "Invalid positional='Linear'. Must match"),
        ({"heads": ["up"], "vectors": ["h.0.up"]}, "h.0.up.weight is claimed by heads too"),
        ({"inputs": ["up"]}, 'Invalid inputs=.*Must be left out unless transfer="mup"'),
        ({"width": 3}, 'Invalid width=3. Must be left out unless transfer="mup"'),
        ({"base_width": 3}, 'Invalid base_width=3. Must be left out unless transfer="mup"'),
    ],
    ids=str,
)
def test_names_that_match_nothing_and_other_mistakes(overrides: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        shampoo.groups(GPT(), **overrides)
    with pytest.raises(TypeError, match="takes names, patterns, modules and parameters, not int"):
        shampoo.groups(GPT(), heads=[3])


def by_hand(model: GPT) -> list[dict[str, Any]]:
    """The groups that README told users to write before there were any to be had."""
    tables = [model.wte.weight, model.wpe.weight]
    rest = [param for param in model.parameters() if not any(param is each for each in tables)]
    return [{"params": rest}, {"params": tables, "precondition": False}]


def test_a_model_in_place_of_parameters_is_its_groups():
    first, second, third = build(), build(), build()
    opt = Shampoo(first, **HYPER)
    assert [group["name"] for group in opt.param_groups] == [
        *("heads", "positional", "vectors", "matrices")
    ]
    assert opt.param_groups[1]["param_names"] == ["wpe.weight"]
    found = fit(first, opt)
    assert_same_bits(found, fit(second, Shampoo(shampoo.groups(second), **HYPER)))
    assert_same_bits(found, fit(third, Shampoo(by_hand(third), **HYPER)))
    plain = build()
    other = fit(plain, Shampoo(plain.parameters(), **HYPER))
    assert not torch.equal(found[0, "wte.weight"], other[0, "wte.weight"])


def test_an_argument_turns_preconditioning_off_for_all_of_a_model():
    first, second = build(), build()
    opt = Shampoo(first, precondition=False, **HYPER)
    assert not any(group["precondition"] for group in opt.param_groups)
    found = fit(first, opt)
    plain = Shampoo(second.parameters(), precondition=False, **HYPER)
    assert_same_bits(found, fit(second, plain))


def test_optimizers_of_torch_take_the_groups():
    first, second = build(False), build(False)
    opt = torch.optim.AdamW(shampoo.groups(first, lr=0.01, weight_decay=0.1))
    assert [group["lr"] for group in opt.param_groups] == [0.01] * 5
    assert opt.param_groups[0]["param_names"] == ["wte.weight"]
    expected = fit(second, torch.optim.AdamW(second.parameters(), lr=0.01, weight_decay=0.1))
    assert_same_bits(fit(first, opt), expected)


def test_messages_use_the_names_of_the_model():
    model = build()
    opt = Shampoo(model, nonfinite="raise")
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    model.h[1].up.weight.grad[0, 0] = torch.nan
    with pytest.raises(shampoo.NonFiniteGradientError, match=r"h\.1\.up\.weight"):
        opt.step()


def test_a_model_is_saved_and_goes_on_bit_for_bit(tmp_path):
    first, second, third = build(), build(), build()
    opt, loaded, flat = (Shampoo(model, **HYPER) for model in (first, second, third))
    fit(first, opt)
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [group["name"] for group in loaded.param_groups] == [
        group["name"] for group in opt.param_groups
    ]
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    set_optimizer_state_dict(
        third, flat, get_optimizer_state_dict(first, opt, options=options), options=options
    )
    for model in (second, third):
        model.load_state_dict(first.state_dict())
    found = fit(first, opt)
    assert_same_bits(found, fit(second, loaded))
    assert_same_bits(found, fit(third, flat))


def test_an_empty_model_is_refused_as_torch_does():
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        Shampoo(nn.ReLU())


def test_no_warning_for_a_model():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Shampoo(GPT(vocabulary=10_001))
        inside = nn.Sequential(nn.Linear(320, 10_001), nn.ReLU(), nn.Linear(10_001, 320))
        Shampoo(inside, large_dim_method="blocking")
