"""Who asks for a state: the frameworks that a warning and a refusal name."""

import subprocess
import sys

import pytest
import torch

from shampoo import Shampoo
from shampoo.state.inquiry import remedy_of_caller


def called_in(module, function, *arguments):
    """What a function returns to a caller in a module of that name."""
    names = {"__name__": module}
    exec("def call(function, *arguments):\n    return function(*arguments)", names)
    return names["call"](function, *arguments)


def test_the_framework_that_saves_names_its_integration():
    assert remedy_of_caller() is None
    assert called_in("accelerated.optimizer", remedy_of_caller) is None
    remedy = called_in("accelerate.optimizer", remedy_of_caller)
    assert "shampoo.integrations.accelerate.attach" in remedy
    # The Trainer saves through what Accelerate has wrapped.
    within = called_in("transformers.trainer", called_in, "accelerate.optimizer", remedy_of_caller)
    assert "shampoo.integrations.transformers.ShampooCallback" in within


@pytest.mark.parametrize(
    ("module", "is_refused"),
    [
        ("deepspeed.runtime.zero.stage_1_and_2", True),
        ("deepspeed.runtime.bf16_optimizer", True),
        ("deepspeed.runtime.fp16.fused_optimizer", True),
        ("deepspeed.runtime.engine", False),
    ],
)
def test_parameters_that_deepspeed_has_flattened_are_refused(module, is_refused):
    param = torch.nn.Parameter(torch.ones(12))
    param.grad = torch.ones(12)
    optimizer = Shampoo([param], lr=0.1)
    if is_refused:
        with pytest.raises(RuntimeError, match=f'{module}.*"stage": 0'):
            called_in(module, optimizer.step)
        assert torch.equal(param, torch.ones(12))
        assert not optimizer.state
    else:
        called_in(module, optimizer.step)
        assert not torch.equal(param, torch.ones(12))


def test_the_package_imports_no_framework():
    names = ["accelerate", "transformers", "lightning", "torchtitan", "timm"]
    script = f"import sys, shampoo; sys.exit(str([n for n in {names} if n in sys.modules] or ''))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.strip() == ""


def test_an_integration_without_its_framework_says_what_to_install():
    script = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'timm': raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "try: import shampoo.integrations.timm\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "shampoo.integrations.timm needs timm: pip install timm" in done.stdout, done.stderr
