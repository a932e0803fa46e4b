"""``capturable=True``: steps replayed from a tape are the steps that an ordinary optimizer takes.

The tape (``tape.py``) stands for a CUDA graph: what is not on the device is frozen in it.
"""

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from tape import HostReadError, Tape, record_tape
from torch import Tensor
from torch.nn import Parameter
from trajectory import assert_same_bits, snapshot, state_tensors

from shampoo import Replay, Shampoo
from shampoo.step import capture

SHAPES = [(20, 17), (9,), (6, 4, 3), ()]
ARGUMENTS: dict[str, Any] = {
    "max_preconditioner_dim": 8,
    "precondition_frequency": 3,
    "root_method": "minimax",
    "large_dim_method": "blocking",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "decay": {"weight_decay": 0.1},
    "coupled": {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True},
    "momentum": {"weight_decay": 0.1, "momentum": 0.9},
    "nesterov": {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True},
    "no filter": {"betas": (0.0, 0.9)},
    "sums": {"betas": (0.9, 1.0), "grafting": "adagrad"},
    "uncorrected": {"bias_correction": False, "grafting": "rmsprop"},
    "normalized": {"grafting": "adam_normalized"},
    "sgd": {"grafting": "sgd", "momentum": 0.9},
    "no grafting": {"grafting": "none"},
    "lars": {"grafting": "lars", "weight_decay": 0.1},
    "lamb": {"grafting": "lamb", "weight_decay": 0.1, "momentum": 0.9},
    "diagonal": {"large_dim_method": "diagonal"},
    "thin": {"large_dim_method": "auto", "merge_dims": "full", "max_preconditioner_dim": 80},
    "adagrad": {"large_dim_method": "adagrad"},
    "vectors": {"precondition_1d": True, "merge_dims": "full"},
    "late": {"start_preconditioning_step": 7},
    "never": {"start_preconditioning_step": float("inf")},
    "staggered": {"refresh_schedule": "staggered", "precondition_frequency": 4},
    "kl": {"preconditioner": "kl_shampoo"},
    "kl, diagonal": {"preconditioner": "kl_shampoo", "large_dim_method": "diagonal"},
}


@pytest.fixture(autouse=True)
def _tape_is_a_capture(monkeypatch):
    monkeypatch.setattr(capture, "is_capturing", lambda: Tape.recording)


def make(capturable: bool, shapes=SHAPES, dtype=torch.float32, **arguments: Any):
    generator = torch.Generator().manual_seed(3)
    params = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.zeros_like(param)
    return params, Shampoo(params, capturable=capturable, **{**ARGUMENTS, **arguments})


def gradients(params, count: int, bad: tuple[int, ...] = ()) -> list[list[Tensor]]:
    """Gradients of ``count`` steps; those in ``bad`` hold a NaN, an Inf or a huge number."""
    generator = torch.Generator().manual_seed(5)
    history = []
    for step in range(count):
        grads = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]
        if step in bad:
            grads[step % 2].view(-1)[step % 9] = (torch.nan, torch.inf, 1e30)[bad.index(step) % 3]
        history.append(grads)
    return history


def put(params, grads) -> None:
    """Into the same memory, as a replayed backward pass does."""
    for param, grad in zip(params, grads, strict=True):
        param.grad.copy_(grad)


def shared(opt) -> dict:
    """Weights and state, without what only one of the two kinds of optimizer has."""
    return without_calls(snapshot(opt))


def assert_as(capturable, ordinary, variant: str) -> None:
    """Bit for bit, but for products of BLAS with a vector, which depend on its alignment."""
    actual, expected = shared(capturable), shared(ordinary)
    if variant == "vectors":
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    else:
        assert_same_bits(actual, expected)


def without_calls(state: dict) -> dict:
    return {key: value for key, value in state.items() if key[1] != "calls"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_eager_steps_are_the_ordinary_ones(variant):
    theirs, ordinary = make(False, **VARIANTS[variant])
    ours, opt = make(True, **VARIANTS[variant])
    for grads in gradients(ours, 13):
        for params, optimizer in ((theirs, ordinary), (ours, opt)):
            put(params, grads)
            optimizer.step()
        assert_as(opt, ordinary, variant)


def schedule(opt, ordinary, step: int) -> None:
    """Moves learning rate and betas, in place where they are tensors."""
    [group], [twin] = opt.param_groups, ordinary.param_groups
    lr, beta1 = 0.01 * (1 + step % 5), 0.5 + 0.02 * step
    group["lr"].fill_(lr)
    group["betas"][0].fill_(beta1)
    twin["lr"], twin["betas"] = lr, (beta1, twin["betas"][1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_replayed_steps_are_the_ordinary_ones(variant):
    arguments = dict(VARIANTS[variant])
    betas = arguments.pop("betas", (0.9, 0.999))
    theirs, ordinary = make(False, betas=(0.5, betas[1]), **arguments)
    live = tuple(torch.tensor(beta, dtype=torch.float64) for beta in betas)
    lr = torch.tensor(0.0, dtype=torch.float64)
    ours, opt = make(True, lr=lr, betas=live, **arguments)
    replay = Replay(opt, opt.step, record_tape)
    for step, grads in enumerate(gradients(ours, 20)):
        schedule(opt, ordinary, step)
        put(ours, grads)
        put(theirs, grads)
        replay()
        ordinary.step()
        assert_as(opt, ordinary, variant)
    kinds = {"never": 1, "staggered": 4}.get(variant, 2)
    assert len(replay._recorded) == kinds
    assert None not in replay._recorded.values()  # all of them were replayed


@pytest.mark.parametrize("variant", VARIANTS)
def test_skipped_steps_leave_no_trace(variant):
    """With a refresh in every step the schedules agree, though one counts what is skipped."""
    arguments = {**VARIANTS[variant], "precondition_frequency": 1}
    arguments.pop("start_preconditioning_step", None)
    theirs, ordinary = make(False, **arguments)
    ours, opt = make(True, **arguments)
    replay = Replay(opt, opt.step, record_tape)
    bad = (0, 4, 5, 9)
    for step, grads in enumerate(gradients(ours, 12, bad)):
        put(ours, grads)
        put(theirs, grads)
        before = snapshot(opt)
        replay()
        ordinary.step()
        if step > 0:
            assert_as(opt, ordinary, variant)
        if step in bad and step > 0:
            assert_same_bits(shared(opt), without_calls(before))
    assert opt.skipped_steps == ordinary.skipped_steps == len(bad)
    assert opt.skipped_steps == len(bad)  # reading it does not count it again


@pytest.mark.parametrize("is_refresh", [False, True])
@pytest.mark.parametrize("variant", ["coupled", "nesterov", "normalized", "lamb", "diagonal"])
def test_a_bad_gradient_changes_no_bit(variant, is_refresh):
    """In an ordinary step and in one with a refresh, also of gradients that are huge."""
    ours, opt = make(True, **VARIANTS[variant])
    replay = Replay(opt, opt.step, record_tape)
    for grads in gradients(ours, 16):
        put(ours, grads)
        replay()
    while any(slot is not None for slot in opt.coming_refresh()) != is_refresh:
        replay()
    before = snapshot(opt)
    for bad in (torch.nan, -torch.inf, 1e38):
        ours[0].grad.view(-1)[-1] = bad
        replay()
        opt.replayed()
        while any(slot is not None for slot in opt.coming_refresh()) != is_refresh:
            opt.replayed()
        assert_same_bits(shared(opt), without_calls(before))
    assert opt.skipped_steps == 3


def test_zeros_at_first_only_allocate():
    ours, opt = make(True)
    before = snapshot(opt)
    put(ours, [torch.zeros_like(param) for param in ours])
    for _ in range(2):
        opt.step()
    after = snapshot(opt)
    for key, value in before.items():
        assert torch.equal(after[key], value)
    assert all(int(value) == 0 for (_, key), value in state_tensors(opt).items() if key == "step")
    assert opt.skipped_steps == 0
    [grads] = gradients(ours, 1)
    put(ours, grads)
    opt.step()
    put(ours, [torch.zeros_like(param) for param in ours])
    opt.step()
    assert all(int(value) == 2 for (_, key), value in state_tensors(opt).items() if key == "step")


def test_a_beta_on_the_device_may_become_a_plain_sum():
    theirs, ordinary = make(False, betas=(0.9, 0.99), grafting="rmsprop")
    live = torch.tensor([0.9, 0.99], dtype=torch.float64)
    ours, opt = make(True, betas=tuple(live.unbind()), grafting="rmsprop")
    replay = Replay(opt, opt.step, record_tape)
    for step, grads in enumerate(gradients(ours, 12)):
        if step == 6:
            live.copy_(torch.tensor([0.0, 1.0]))
            ordinary.param_groups[0]["betas"] = (0.0, 1.0)
        put(ours, grads)
        put(theirs, grads)
        replay()
        ordinary.step()
        assert_as(opt, ordinary, "defaults")


def test_the_tape_finds_what_is_read():
    """Or the tests above would not tell."""
    x = torch.ones(3)
    for read in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero(), x.tolist):
        with pytest.raises(HostReadError):
            record_tape(read, None)
    params, opt = make(False)
    put(params, gradients(params, 1)[0])
    opt.step()
    with pytest.raises(HostReadError):
        record_tape(opt.step, None)


def test_recording_changes_nothing():
    ours, opt = make(True)
    history = gradients(ours, 3)
    put(ours, history[0])
    opt.step()
    before, kind = snapshot(opt), opt.coming_refresh()
    put(ours, history[1])
    replay, _ = record_tape(opt.step, None)
    assert_same_bits(snapshot(opt), before)
    assert opt.coming_refresh() == kind
    replay()
    assert not torch.equal(ours[0], before[0, "weight"])


def test_a_whole_iteration_is_replayed():
    """Forward, backward and step, with gradients that are made anew in every iteration."""
    results = []
    for capturable in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        lr = torch.tensor(0.05) if capturable else 0.05
        opt = Shampoo(model.parameters(), lr=lr, capturable=capturable, **ARGUMENTS)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 4, 0.5)
        batch, losses = torch.empty(16, 6), []

        def iteration(opt=opt, model=model, batch=batch):
            opt.zero_grad()
            loss = (model(batch) - batch[:, :2].sin()).square().mean()
            loss.backward()
            opt.step()
            return loss

        run = Replay(opt, iteration, record_tape) if capturable else iteration
        for _ in range(15):
            batch.copy_(torch.randn(16, 6))
            losses.append(run().item())
            scheduler.step()
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert results[0][-1] < results[0][0]


def run_replayed(opt, params, history) -> None:
    replay = Replay(opt, opt.step, record_tape)
    for grads in history:
        put(params, grads)
        replay()


@pytest.mark.parametrize("move", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("schedule", ["together", "staggered"])
def test_a_resumed_run_continues_bit_for_bit(move, schedule):
    """Skipped steps moved the schedule of the host away from the count of the device."""
    ours, opt = make(True, refresh_schedule=schedule, precondition_frequency=4)
    history = gradients(ours, 24, bad=(3, 4, 10))
    run_replayed(opt, ours, history[:13])
    if move == "state_dict":
        theirs, resumed = make(True, refresh_schedule=schedule, precondition_frequency=4)
        resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
        for param, source in zip(theirs, ours, strict=True):
            param.data.copy_(source)
    elif move == "deepcopy":
        theirs, resumed = copy.deepcopy((ours, opt))
    else:
        theirs, resumed = pickle.loads(pickle.dumps((ours, opt)))
    for param in theirs:
        param.grad = torch.zeros_like(param)
    assert resumed.skipped_steps == opt.skipped_steps == 3
    assert resumed.coming_refresh() == opt.coming_refresh()
    run_replayed(resumed, theirs, history[13:])
    run_replayed(opt, ours, history[13:])
    assert_same_bits(snapshot(resumed), snapshot(opt))


def test_saving_changes_nothing():
    ours, opt = make(True)
    theirs, saved = make(True)
    for grads in gradients(ours, 12, bad=(2, 5)):
        for params, optimizer in ((ours, opt), (theirs, saved)):
            put(params, grads)
            optimizer.step()
        copy.deepcopy(saved.state_dict())
    assert_same_bits(snapshot(saved), snapshot(opt))
    assert saved.skipped_steps == opt.skipped_steps == 2


def test_capturable_may_be_switched_on_and_off():
    theirs, ordinary = make(False)
    ours, opt = make(False)
    for step, grads in enumerate(gradients(ours, 12)):
        opt.param_groups[0]["capturable"] = 4 <= step < 8
        for params, optimizer in ((theirs, ordinary), (ours, opt)):
            put(params, grads)
            optimizer.step()
        assert_as(opt, ordinary, "defaults")
    assert not any(key == "calls" for _, key in state_tensors(opt))


def test_graphs_are_dropped_with_the_memory_they_know():
    ours, opt = make(True)
    history = gradients(ours, 10)
    replay = Replay(opt, opt.step, record_tape)
    for grads in history:
        put(ours, grads)
        replay()
    recorded = dict(replay._recorded)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    theirs, twin = copy.deepcopy((ours, opt))
    for param, source in zip(theirs, ours, strict=True):
        param.grad = source.grad.clone()
    for _ in range(4):
        replay()
        twin.step()
    assert not set(map(id, recorded.values())) & set(map(id, replay._recorded.values()))
    assert_same_bits(snapshot(opt), snapshot(twin))


def test_what_a_graph_works_on_lives_as_long_as_the_plan():
    """Whatever makes the optimizer ask for other buffers, tables or state."""
    ours, opt = make(True, grafting="lamb")
    opt.add_param_group({"params": [Parameter(torch.ones(9, 8))], "grafting": "adam"})
    [added] = opt.param_groups[1]["params"]
    params = [*ours, added]
    added.grad = torch.ones_like(added)
    put(ours, gradients(ours, 1)[0])
    for _ in range(3):
        opt.step()
    with Tape() as tape:
        opt.step()
    borrowed, kept = tape.borrowed(), [param.grad for param in params]
    del tape
    changes = {"weight_decay": 0.1, "momentum": 0.9, "decoupled_weight_decay": False}
    for name, value in changes.items():
        opt.param_groups[1][name] = value
        opt.step()
    for pattern in range(1, 20):  # more than are remembered
        for bit, (param, grad) in enumerate(zip(params, kept, strict=True)):
            param.grad = grad if pattern >> bit & 1 else None
        opt.step()
    gc.collect()
    assert len(borrowed) > 100
    assert not any(memory.expired() for memory in borrowed)


def test_a_cold_step_cannot_be_captured():
    ours, opt = make(True)
    put(ours, gradients(ours, 1)[0])
    with pytest.raises(RuntimeError, match="take a step on a side stream"):
        record_tape(opt.step, None)
    opt.step()
    ours[0].grad = None  # another set of parameters
    with pytest.raises(RuntimeError, match="same parameters having gradients"):
        record_tape(opt.step, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"nonfinite": "raise"},
            r'Invalid nonfinite=.raise.\. Must be "skip" when capturable=True',
        ),
        ({"root_method": "eigh"}, r"Invalid root_method=.eigh.\. Must be .*minimax"),
        ({"root_method": "auto", "exponent_multiplier": 1.5}, r"exponent_multiplier=1.5"),
        ({"root_method": "auto", "preconditioner_dtype": torch.float64}, "float32.*minimax"),
        ({"root_method": "auto", "relative_eps": 1e-9}, r"relative_eps=1e-09\. Must be >= 1e-07"),
        ({"lr": torch.ones(2)}, "lr"),
    ],
)
def test_what_cannot_be_captured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make(True, **arguments)


def test_tensors_lie_on_the_device_of_the_parameters():
    params, opt = make(True)
    put(params, gradients(params, 1)[0])
    opt.param_groups[0]["betas"] = (0.9, torch.tensor(0.9, device="meta"))
    with pytest.raises(ValueError, match=r"Invalid betas\[1\] on meta. Must be on cpu"):
        opt.step()


def test_all_groups_are_capturable_or_none():
    _, opt = make(True)
    with pytest.raises(ValueError, match="same in all"):
        opt.add_param_group({"params": [Parameter(torch.ones(2))], "capturable": False})
    assert len(opt.param_groups) == 1
    opt.param_groups[0]["capturable"] = False
    with pytest.raises(ValueError, match=r"capturable=False\. Must be True"):
        Replay(opt, opt.step)


def test_auto_is_minimax():
    """Whatever measures fastest: the choice must not depend on what a graph cannot hold."""
    theirs, ordinary = make(False, shapes=[(400, 3)], max_preconditioner_dim=400)
    ours, opt = make(True, shapes=[(400, 3)], max_preconditioner_dim=400, root_method="auto")
    run_replayed(opt, ours, gradients(ours, 8))
    for grads in gradients(theirs, 8):
        put(theirs, grads)
        ordinary.step()
    assert_as(opt, ordinary, "defaults")
