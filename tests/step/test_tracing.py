"""Steps under torch.compile run as they are; steps of fake tensors run without a kernel."""

import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import Parameter
from trajectory import assert_same_bits, snapshot

from shampoo import Shampoo
from shampoo.ops import jit
from shampoo.step import tracing

HYPER: dict[str, Any] = {"max_preconditioner_dim": 4, "precondition_frequency": 2, "lr": 0.05}
BATCH = torch.linspace(-1, 1, 12).view(2, 6)
STEPS = 6
RAN_EAGERLY = "what a Shampoo step does depends on values"


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(**hyper: Any) -> tuple[nn.Module, Shampoo]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, Shampoo(model.named_parameters(), **{**HYPER, **hyper})


def step_alone(model: nn.Module, opt: Shampoo, wrap: Callable[[Any], Any]) -> Callable[[], Any]:
    step = wrap(opt.step)

    def train() -> None:
        opt.zero_grad()
        model(BATCH).square().sum().backward()
        step()

    return train


def whole(model: nn.Module, opt: Shampoo, wrap: Callable[[Any], Any]) -> Callable[[], Any]:
    def train() -> Tensor:
        opt.zero_grad()
        loss = model(BATCH).square().sum()
        loss.backward()
        opt.step()
        return loss * 2

    return wrap(train)


def by_closure(model: nn.Module, opt: Shampoo, wrap: Callable[[Any], Any]) -> Callable[[], Any]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(BATCH).square().sum()
        loss.backward()
        return loss

    def train() -> Tensor:
        return opt.step(closure)

    return wrap(train)


def scheduled(model: nn.Module, opt: Shampoo, wrap: Callable[[Any], Any]) -> Callable[[], Any]:
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    train = step_alone(model, opt, wrap)

    def both() -> None:
        train()
        scheduler.step()

    return both


class Counting(Shampoo):
    """Takes note of its steps."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.param_groups[0]["noted"] = self.param_groups[0].get("noted", 0) + 1
        return loss


@pytest.mark.parametrize("way", [step_alone, whole, by_closure, scheduled])
def test_compiled_callers_take_the_steps_of_eager_ones(way, caplog, recwarn):
    runs = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="eager")):
        model, opt = make()
        seen: list[str] = []
        opt.register_step_pre_hook(lambda *_, seen=seen: seen.append("before"))
        opt.register_step_post_hook(lambda *_, seen=seen: seen.append("after"))
        train = way(model, opt, wrap)
        for _ in range(STEPS):
            train()
        assert seen == ["before", "after"] * STEPS
        runs.append(snapshot(opt))
    assert_same_bits(runs[1], runs[0])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [str(each.message) for each in recwarn if "dynamo" in str(each.message)]
    assert any(RAN_EAGERLY in reason for reason in counters["graph_break"])
    assert counters["frames"]["total"] <= 12


def test_a_step_of_a_subclass_runs_eagerly_too():
    model, _ = make()
    opt = Counting(model.parameters(), **HYPER)
    train = whole(model, opt, lambda f: torch.compile(f, backend="eager"))
    for _ in range(3):
        train()
    assert opt.param_groups[0]["noted"] == 3
    assert any(RAN_EAGERLY in reason for reason in counters["graph_break"])


@pytest.mark.skipif(not jit.compiler_version(), reason="no C++ compiler: nothing can be built")
def test_the_inductor_leaves_the_step_alone():
    runs = []
    for wrap in (lambda f: f, torch.compile):
        model, opt = make()
        train = step_alone(model, opt, wrap)
        for _ in range(3):
            train()
        runs.append(snapshot(opt))
    assert_same_bits(runs[1], runs[0])


def test_fullgraph_says_why_it_cannot():
    model, opt = make()
    model(BATCH).sum().backward()
    before = snapshot(opt)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=RAN_EAGERLY):
        torch.compile(opt.step, backend="eager", fullgraph=True)()
    assert_same_bits(snapshot(opt), before)


def test_importing_the_package_imports_no_compiler():
    found = "import sys, shampoo; print('torch._dynamo' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"


VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "momentum": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "coupled": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "no filter": {"betas": (0.0, 0.9)},
    "lamb": {"grafting": "lamb", "weight_decay": 0.1},
    "no grafting": {"grafting": "none"},
    "eigh": {"root_method": "eigh"},
    "newton": {"root_method": "coupled_newton"},
    "double": {"preconditioner_dtype": torch.float64},
    "diagonal": {"large_dim_method": "diagonal"},
    "adagrad": {"large_dim_method": "adagrad"},
    "staggered": {"refresh_schedule": "staggered", "precondition_frequency": 3},
    "guarded": {"max_root_failures": 1, "nonfinite": "raise"},
    "capturable": {"capturable": True},
}


def shapes_of_state(dtype: torch.dtype, hyper: dict[str, Any]) -> tuple[Any, Any]:
    """After each of a few steps what every state tensor is, and the schedule of the optimizer."""
    torch.manual_seed(5)
    params = [Parameter(torch.randn(s).to(dtype)) for s in ((9, 7), (5,), (3, 4, 2), ())]
    opt = Shampoo(params, **{**HYPER, **hyper})
    found = []
    for step in range(STEPS):
        for index, param in enumerate(params):
            param.grad = None if (step + index) % 4 == 3 else torch.randn(param.shape).to(dtype)
        opt.step()
        found.append(
            {
                (index, key): (value.shape, value.dtype, value.untyped_storage().nbytes())
                for index, param in enumerate(params)
                for key, value in opt.state[param].items()
            }
        )
        if isinstance(params[0], FakeTensor):
            assert all(isinstance(v, FakeTensor) for p in params for v in opt.state[p].values())
    with tracing.answering(params):
        return found, opt._plan.counts()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fake_step_makes_the_state_of_a_real_one(variant, dtype):
    real = shapes_of_state(dtype, VARIANTS[variant])
    with FakeTensorMode():
        fake = shapes_of_state(dtype, VARIANTS[variant])
    assert fake == real


def test_fake_refreshes_come_when_real_ones_do(monkeypatch):
    from shampoo.roots import size_classes

    calls: list[list[int]] = []
    refresh = size_classes.refresh_roots_

    def counted(root: Tensor, *rest: Any, **how: Any) -> None:
        calls[-1].append(len(root))
        refresh(root, *rest, **how)

    monkeypatch.setattr(size_classes, "refresh_roots_", counted)
    runs = []
    for mode in (torch.no_grad, FakeTensorMode):
        calls = []
        with mode():
            params = [Parameter(torch.ones(9, 7)), Parameter(torch.ones(4, 4))]
            opt = Shampoo(params, **{**HYPER, **VARIANTS["staggered"]})
            for _ in range(8):
                for param in params:
                    param.grad = torch.ones_like(param)
                calls.append([])
                opt.step()
        runs.append(calls)
    assert runs[0] == runs[1]
    assert any(runs[0])


def test_fake_parameters_may_leave_their_mode():
    with FakeTensorMode():
        param = Parameter(torch.ones(6, 6))
        grad = torch.ones(6, 6)
        opt = Shampoo([param], **HYPER)
    for _ in range(4):
        param.grad = grad
        opt.step()
    assert all(isinstance(value, FakeTensor) for value in opt.state[param].values())
    assert param._version == 4


def test_real_steps_after_fake_ones_are_real():
    with FakeTensorMode():
        shapes_of_state(torch.float32, {})
    twins = []
    for _ in range(2):
        model, opt = make()
        train = step_alone(model, opt, lambda f: f)
        for _ in range(4):
            train()
        twins.append(snapshot(opt))
        with FakeTensorMode():
            shapes_of_state(torch.float32, {"root_method": "eigh"})
    assert_same_bits(*twins)


def test_the_memory_tracker_of_torch_counts_the_state():
    mem_tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16))
        opt = Shampoo(model.parameters(), precondition_frequency=2)
        tracker = mem_tracker.MemTracker()
        tracker.track_external(model, opt)
        sizes = []
        with tracker:
            for _ in range(4):
                model(torch.ones(8, 64)).sum().backward()
                opt.step()
                opt.zero_grad()
                tracker.reset_mod_stats()
                found = tracker.get_tracker_snapshot("current")[torch.device("cpu")]
                sizes.append(found[mem_tracker._MemRefType.OPT])
        state = [v for entry in opt.state.values() for v in entry.values()]
    storages = {v.untyped_storage()._cdata: v.untyped_storage().nbytes() for v in state}
    factors = 2 * 4 * sum(n * n for n in (64, 32, 32, 16))
    moments = 2 * 4 * sum(p.numel() for p in model.parameters())
    assert factors + moments <= sum(storages.values()) <= 1.01 * (factors + moments) + 256
    # What a step works in stays with the optimizer too: a gradient and a direction.
    assert sum(storages.values()) <= sizes[0] <= sum(storages.values()) + moments + 256
    assert len(set(sizes)) == 1, "a step leaves nothing behind"
