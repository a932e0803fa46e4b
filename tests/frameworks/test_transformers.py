"""The Trainer of transformers: every kind of save is whole, and resumes to the bit."""

from pathlib import Path

import declared_ops  # noqa: F401
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from small import ARGUMENTS, data, each, heard, weights
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from shampoo import Shampoo
from shampoo.integrations.transformers import ShampooCallback, optimizer_cls_and_kwargs

pytestmark = pytest.mark.frameworks

STEPS = 12
STEPWISE = {"save_strategy": "steps", "save_steps": 4}


class Sentences(torch.utils.data.Dataset):
    def __init__(self):
        self._tokens, self._labels = data(64).tensors

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, index):
        return {"input_ids": self._tokens[index], "labels": self._labels[index]}


def trainer(folder, callbacks, mode="groups", **options):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    torch.manual_seed(0)
    module = BertForSequenceClassification(
        BertConfig(
            vocab_size=10,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            num_labels=4,
        )
    )
    args = TrainingArguments(
        folder,
        **{"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 3e-3, **options},
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    arguments = {name: ARGUMENTS[name] for name in list(ARGUMENTS)[2:]}
    built = {}
    if mode == "groups":
        built["optimizer_cls_and_kwargs"] = optimizer_cls_and_kwargs(module, args, **arguments)
    elif mode == "class":
        built["optimizer_cls_and_kwargs"] = (Shampoo, {"lr": args.learning_rate, **arguments})
    else:
        built["optimizers"] = (Shampoo(module, lr=3e-3, weight_decay=0.01, **arguments), None)
    evaluated = {"eval_dataset": Sentences()} if "eval_strategy" in options else {}
    return Trainer(
        module, args, train_dataset=Sentences(), callbacks=callbacks, **built, **evaluated
    )


def trained(rank, folder, options, mode, callbacks, checkpoint=None):
    made = trainer(folder, callbacks, mode, **options)
    made.train(resume_from_checkpoint=checkpoint)
    return made


def compared(rank, folder, options, mode="groups", is_asked=False):
    """A run, and one that goes on from its first checkpoint: how many bits differ."""
    asks = [Asks()] if is_asked else []
    expected = weights(trained(rank, folder, options, mode, [*asks, ShampooCallback()]).model)
    checkpoint = _checkpoints(folder)[0]
    step = int(checkpoint.rpartition("-")[2])
    resumed = trained(rank, folder, options, mode, [*asks, ShampooCallback()], checkpoint)
    assert resumed.state.global_step > step
    assert all(map(torch.equal, weights(resumed.model), expected))
    return [each.sum().item() for each in expected]


def _checkpoints(folder):
    return sorted(
        map(str, Path(folder).glob("checkpoint-*")), key=lambda name: int(name[-2:].strip("-"))
    )


RESUMED = {
    "alone": (STEPWISE,),
    "steps": (STEPWISE,),
    "class": (STEPWISE, "class"),
    "optimizer": (STEPWISE, "optimizer"),
    "bf16": ({**STEPWISE, "bf16": True, "gradient_accumulation_steps": 2},),
    # 64 sentences are 8 steps of two ranks; it ends in the middle of an epoch.
    "epoch": ({"save_strategy": "epoch"},),
    "best": (
        {
            "save_strategy": "best",
            "eval_strategy": "steps",
            "eval_steps": 4,
            "metric_for_best_model": "loss",
        },
    ),
    "asked": ({"save_strategy": "no", "max_steps": 5}, "groups", True),
}


@pytest.fixture(scope="module")
def outcomes(ranks, tmp_path_factory):
    """Of every case, what each rank has to say."""
    alone = {"alone": RESUMED["alone"]}
    among = {name: case for name, case in RESUMED.items() if name != "alone"}
    found = {}
    for world, function, cases in ((1, compared, alone), (2, compared, among), (2, others, OTHERS)):
        folder = str(tmp_path_factory.mktemp("runs"))
        for by_case in ranks.returns(each, world, folder, function, cases):
            for name, outcome in by_case.items():
                found.setdefault(name, []).append(outcome)
    return found


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_is_resumed_to_the_bit(outcomes, case):
    first, *other = outcomes[case]
    assert isinstance(first, list), first
    assert all(each == first for each in other)


class Asks(TrainerCallback):
    """Asks for a save in a step that nothing else saves in."""

    def on_step_end(self, args, state, control, **others):
        control.should_save = control.should_save or state.global_step == 3


def others(rank, folder, what, *values):
    if what == "groups":
        made = trainer(folder, [])
        made.create_optimizer()
        found = {
            group["name"]: (group["precondition"], group["weight_decay"], group["lr"])
            for group in made.optimizer.param_groups
        }
        assert len(made.optimizer.param_groups) == len(found)
        return found
    if what == "refused":
        return trained(rank, folder, {values[0]: True}, "groups", [ShampooCallback()])
    if what == "lost":
        options = {"save_strategy": "no", "max_steps": 5}
        return trained(rank, folder, options, "groups", [ShampooCallback(), Asks()])
    with heard() as lines:
        trained(rank, folder, {**STEPWISE, "max_steps": 4}, "groups", [])
    return "\n".join(lines)


OTHERS = {
    "groups": ("groups",),
    "save_on_each_node": ("refused", "save_on_each_node"),
    "enable_jit_checkpoint": ("refused", "enable_jit_checkpoint"),
    "lost": ("lost",),
    "warned": ("warned",),
}


def test_groups_are_shampoos_with_the_trainers_rate_and_decay(outcomes):
    found = outcomes["groups"][0]
    assert found["embeddings"] == (False, 0.01, 3e-3)
    assert found["vectors"] == (True, 0.0, 3e-3)
    assert found["matrices"] == (True, 0.01, 3e-3)


def test_a_save_that_could_not_be_made_whole_raises(outcomes):
    for error in outcomes["lost"]:
        assert error.startswith("RuntimeError: checkpoint-3 lacks blocks")


@pytest.mark.parametrize("name", ["save_on_each_node", "enable_jit_checkpoint"])
def test_saves_on_ranks_that_gather_nothing_are_refused(outcomes, name):
    for error in outcomes[name]:
        assert error.startswith(f"ValueError: Invalid {name}=True")


def test_without_the_callback_a_warning_names_it(outcomes):
    assert "shampoo.integrations.transformers.ShampooCallback" in outcomes["warned"][0]
