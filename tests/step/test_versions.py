"""Version counters: a backward pass that would use weights from before a step is refused."""

import math
from typing import Any

import pytest
import torch
from ranks import Ranks
from tape import Tape, record_tape
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

from shampoo import Replay, Shampoo
from shampoo.step import capture

MODIFIED = "modified (by an )?inplace"


def use(param: Tensor) -> Tensor:
    """A result whose backward pass needs the weights."""
    return (param * param).sum()


def stays_differentiable(loss: Tensor) -> bool:
    try:
        loss.backward()
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize(
    ("dtype", "hyper"),
    [
        (torch.float32, {}),
        (torch.float64, {"preconditioner_dtype": torch.float64}),
        (torch.float16, {"momentum": 0.9}),
        (torch.bfloat16, {"stochastic_rounding": True}),
        (torch.float32, {"grafting": "lamb", "weight_decay": 0.1}),
        (torch.float32, {"capturable": True}),
        (torch.float32, {"weight_decay": 0.1, "decoupled_weight_decay": False}),
        (torch.float32, {"large_dim_method": "adagrad", "max_preconditioner_dim": 2}),
    ],
)
def test_a_step_refuses_what_was_saved_before_it(dtype, hyper):
    params = [
        Parameter(torch.ones(4, 3, dtype=dtype)),
        Parameter(torch.ones(2, 3, 2, 2, dtype=dtype).to(memory_format=torch.channels_last)),
        Parameter(torch.ones(6, 8, dtype=dtype)[::2, ::2].detach()),  # with gaps
        Parameter(torch.ones(5, dtype=dtype)),
        Parameter(torch.ones((), dtype=dtype)),
    ]
    opt = Shampoo(params, **hyper)
    for step in range(3):
        before = [param._version for param in params]
        losses = [use(param) for param in params]
        for index, param in enumerate(params):
            param.grad = None if index == 3 else torch.ones_like(param)
        opt.step()
        moved = [p._version > v for p, v in zip(params, before, strict=True)]
        assert moved == [True, True, True, False, True], step
        assert [stays_differentiable(loss) for loss in losses] == [not each for each in moved]


def test_the_second_loss_of_a_gan_is_refused_as_by_torch():
    for kind in (torch.optim.AdamW, Shampoo):
        model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
        opt = kind(model.parameters(), lr=0.1)
        out = torch.ones(3, 8)
        first, second = model(out).square().mean(), model(out).sin().mean()
        opt.step(lambda loss=first: loss.backward())
        with pytest.raises(RuntimeError, match=MODIFIED):
            second.backward()


def test_what_changes_nothing_counts_nothing():
    param = Parameter(torch.ones(3, 3))
    opt = Shampoo([param])
    loss = use(param)
    for grad in (None, torch.zeros(3, 3), torch.full((3, 3), torch.nan)):
        param.grad = grad
        opt.step()
    assert param._version == 0
    loss.backward()
    assert torch.isfinite(torch.autograd.grad(use(param), param)[0]).all()


def test_replayed_steps_count_too(monkeypatch):
    monkeypatch.setattr(capture, "is_capturing", lambda: Tape.recording)
    trained, frozen = Parameter(torch.ones(4, 4)), Parameter(torch.ones(4, 4), requires_grad=False)
    trained.grad = torch.ones(4, 4)
    opt = Shampoo([trained, frozen], capturable=True, start_preconditioning_step=math.inf)
    replay = Replay(opt, opt.step, record_tape)
    for _ in range(4):  # eager, captured, replayed twice
        loss, before = use(trained), trained.detach().clone()
        replay()
        assert not torch.equal(trained, before)
        assert not stays_differentiable(loss)
    assert frozen._version == 0


@pytest.mark.parametrize("inside", [False, True])
def test_inference_tensors_move_where_torch_moves_them(inside):
    said = []
    for kind in (torch.optim.SGD, Shampoo):
        with torch.inference_mode():
            param = Parameter(torch.ones(3, 3))
        param.grad = torch.ones(3, 3)
        opt = kind([param])
        try:
            with torch.inference_mode(inside):
                opt.step()
            said.append("moved")
        except RuntimeError as error:
            said.append(str(error)[:50])
    assert said[0] == said[1]
    assert torch.equal(param, torch.ones(3, 3)) != inside
    assert bool(opt.state[param]) == inside


def _distributed(rank: int, sharing: dict[str, Any]) -> list[tuple[str, bool, bool]]:
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for placement in (Shard(0), Shard(1), Replicate(), None):
        whole = torch.ones(4, 6)
        param, grad = Parameter(whole.clone()), whole.clone()
        if placement is not None:
            param = Parameter(distribute_tensor(whole, mesh, [placement]))
            grad = distribute_tensor(grad, mesh, [placement])
        opt = Shampoo([param], max_preconditioner_dim=2, **sharing)
        part = param.to_local() if isinstance(param, DTensor) else param
        losses = [use(param), use(part), use(part.detach().requires_grad_(True))]
        param.grad = grad
        opt.step()
        found.append((str(placement), *(stays_differentiable(loss) for loss in losses)))
    return found


@pytest.mark.parametrize("sharing", [{}, {"num_trainers_per_group": 1}, {"overlap": True}])
def test_dtensors_and_their_parts_count_on_all_ranks(ranks: Ranks, sharing):
    for found in ranks.returns(_distributed, 2, sharing):
        assert found == [(name, False, False, False) for name, *_ in found]
        assert len(found) == 4
