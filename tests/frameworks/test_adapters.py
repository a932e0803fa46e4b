"""Weights of other kinds: peft's LoRA and TRL on it, torchao's quantized and float8 training."""

import declared_ops  # noqa: F401
import peft
import pytest
import torch
from datasets import Dataset
from small import ARGUMENTS, batches, model, weights
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.prototype.quantized_training import int8_weight_only_quantized_training
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from shampoo import Shampoo
from shampoo.integrations.transformers import ShampooCallback, optimizer_cls_and_kwargs

pytestmark = pytest.mark.frameworks


def trained(module, optimizer, part):
    for tokens, labels in part:
        optimizer.zero_grad()
        cross_entropy(module(tokens), labels).backward()
        optimizer.step()


def is_resumed_to_the_bit(built):
    """Whether a run on weights that ``built()`` makes goes on where its state was saved."""
    part = batches(8)
    module = built()
    optimizer = Shampoo(module.parameters(), **ARGUMENTS)
    trained(module, optimizer, part[:4])
    other = built()
    other.load_state_dict(module.state_dict())
    again = Shampoo(other.parameters(), **ARGUMENTS)
    again.load_state_dict(optimizer.state_dict())
    before = weights(module)
    trained(module, optimizer, part[4:])
    trained(other, again, part[4:])
    moved = any(not torch.equal(*pair) for pair in zip(before, weights(module), strict=True))
    return moved and all(map(torch.equal, weights(module), weights(other)))


def with_adapters():
    torch.manual_seed(0)
    return peft.get_peft_model(model(), peft.LoraConfig(r=4, target_modules=["first", "second"]))


def test_adapters_resume_to_the_bit():
    assert is_resumed_to_the_bit(with_adapters)


def test_adapters_take_at_most_the_stated_multiple_of_adamws_memory():
    torch.manual_seed(0)
    wide = torch.nn.Sequential(torch.nn.Linear(1024, 512))
    module = peft.get_peft_model(wide, peft.LoraConfig(r=8, target_modules=["0"]))
    optimizer = Shampoo([param for param in module.parameters() if param.requires_grad])
    adamw = 8 * sum(param.numel() for param in module.parameters() if param.requires_grad)
    assert sum(param.requires_grad for param in module.parameters()) == 2
    assert optimizer.explain().state_bytes <= 5 * adamw
    assert all("adam:" not in row.rule for row in optimizer.explain().tensors)


def quantization_aware():
    module = model()
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=16)
    quantize_(module, QATConfig(weight_config=weight, step="prepare"))
    assert type(module.second) is not torch.nn.Linear
    return module


def in_float8():
    config = Float8LinearConfig(emulate=True)
    module = convert_to_float8_training(
        model(), config=config, module_filter_fn=lambda _, name: name in ("first", "second")
    )
    assert type(module.second) is not torch.nn.Linear
    return module


@pytest.mark.parametrize("built", [quantization_aware, in_float8])
def test_training_that_quantizes_in_the_forward_pass_resumes_to_the_bit(built):
    assert is_resumed_to_the_bit(built)


def test_quantized_weights_are_refused_where_they_would_be_trained():
    module = model()
    quantize_(module, int8_weight_only_quantized_training())
    with pytest.raises(RuntimeError, match=r"first\.weight: a Int8.*values in torch\.int8"):
        Shampoo(module.named_parameters())
    module.requires_grad_(False)
    module.norm.requires_grad_(True)
    Shampoo(module.named_parameters())


def sft_trainer(folder):
    torch.manual_seed(0)
    words = {word: index for index, word in enumerate(("[PAD]", "[EOS]", "[UNK]", *"abcd"))}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    args = SFTConfig(
        folder,
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        max_length=16,
    )
    adapted = peft.get_peft_model(
        LlamaForCausalLM(config), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    return SFTTrainer(
        adapted,
        args=args,
        train_dataset=Dataset.from_dict({"text": ["a b c d", "b c d a", "c d", "d a b"] * 4}),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(
            adapted, args, max_preconditioner_dim=16, precondition_frequency=2
        ),
        callbacks=[ShampooCallback()],
    )


def test_sft_on_adapters_resumes_to_the_bit(tmp_path):
    straight = sft_trainer(str(tmp_path))
    straight.train()
    resumed = sft_trainer(str(tmp_path))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert all(map(torch.equal, weights(resumed.model), weights(straight.model)))
