"""What cannot be a step is refused by name, before parameters, state or plan change."""

import copy
import re

import pytest
import torch
from ranks import Ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from trajectory import assert_same_bits, snapshot

from shampoo import Shampoo


class Unchecked(Parameter):
    """Its gradient is what it was given: torch compares what is assigned, not what comes after."""

    grad = None


BAD = {
    "as many elements": (torch.ones(4, 6), r"\(4, 6\), the parameter \(6, 4\).*zero_grad\(\)"),
    "smaller": (torch.ones(2, 2), r"\(2, 2\), the parameter \(6, 4\)"),
    "larger": (torch.ones(60, 40), r"\(60, 40\), the parameter \(6, 4\)"),
    "another rank": (torch.ones(24), r"\(24,\), the parameter \(6, 4\)"),
    "a scalar": (torch.ones(()), r"shape \(\), the parameter \(6, 4\)"),
    "int64": (torch.ones(6, 4, dtype=torch.int64), r"torch.int64, .*torch.float32.*float16"),
    "bool": (torch.ones(6, 4, dtype=torch.bool), r"torch.bool, .*torch.float32"),
    "complex": (torch.ones(6, 4, dtype=torch.complex64), r"torch.complex64, .*torch.float32"),
    "float8": (torch.ones(6, 4).to(torch.float8_e4m3fn), r"torch.float8_e4m3fn, .*torch.float32"),
    "meta": (torch.ones(6, 4, device="meta"), r"is on meta, the parameter on cpu"),
    "sparse": (torch.ones(6, 4).to_sparse(), r"sparse gradients.*SparseAdam"),
}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("bad", BAD)
def test_a_gradient_unlike_its_parameter_is_refused(bad, steps, named):
    torch.manual_seed(1)
    params = [Parameter(torch.randn(5, 5)), Unchecked(torch.randn(6, 4))]
    given = [("first", params[0]), ("second", params[1])] if named else params
    opt = Shampoo(given, precondition_frequency=2, max_preconditioner_dim=4)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn_like(param)
        opt.step()
    before, state = snapshot(opt), copy.deepcopy(opt.state_dict())
    params[0].grad = torch.randn_like(params[0])
    params[1].grad, message = BAD[bad]
    name = "second" if named else "parameter 1 of group 0"
    with pytest.raises(RuntimeError, match=f"(?s){name}") as raised:
        opt.step()
    assert raised.match(f"(?s){message}")
    assert_same_bits(snapshot(opt), before)
    assert opt.state_dict()["param_groups"] == state["param_groups"]
    assert set(opt.state) == (set(params) if steps else set())
    params[1].grad = torch.randn(6, 4)
    opt.step()
    assert next(iter(opt.state[params[1]].values())) == steps + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "grad_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_gradients_may_have_another_floating_dtype(dtype, grad_dtype):
    """The step is that of the same numbers in a dtype that holds them all."""
    torch.manual_seed(2)
    moved = []
    grads = [torch.randn(6, 4).to(torch.bfloat16).to(torch.float16) for _ in range(4)]
    for wide in (grad_dtype, torch.float64):
        param = Unchecked(torch.linspace(-1, 1, 24).view(6, 4).to(torch.float16).to(dtype))
        opt = Shampoo([param], lr=0.1, precondition_frequency=2, max_preconditioner_dim=4)
        for grad in grads:
            param.grad = grad.to(torch.bfloat16).to(wide)
            opt.step()
        moved.append(param.detach())
    assert moved[0].dtype == dtype
    assert torch.equal(moved[0], moved[1])


def test_a_gradient_from_before_a_cut_or_a_growth_is_refused():
    """As pruning and growing do, between steps and in the first one."""
    for old, new in (((6, 4), (4, 6)), ((4,), (512,)), ((16, 16), (2, 2)), ((2, 2), (40, 30))):
        param = Parameter(torch.ones(old))
        param.grad = torch.ones(old)
        param.data = torch.zeros(new)
        opt = Shampoo([param])
        with pytest.raises(RuntimeError, match="of an earlier shape"):
            opt.step()
        assert not param.any()
        param.grad = torch.ones(new)
        opt.step()
        assert param.all()


def test_meta_parameters_say_what_to_do():
    param = Parameter(torch.empty(4, 4, device="meta"))
    opt = Shampoo([("w", param)])
    for grad in (None, torch.empty(4, 4, device="meta")):
        param.grad = grad
        with pytest.raises(
            RuntimeError, match=r"w: it is on device meta.*to_empty.*FakeTensorMode"
        ):
            opt.step()
    assert not opt.state


def test_a_refusal_of_capturable_leaves_the_state_alone():
    params = [Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2))]
    opt = Shampoo([{"params": [param]} for param in params], root_method="minimax")
    for param in params:
        param.grad = torch.ones(2, 2)
    opt.step()
    before, entries = snapshot(opt), [opt.state[param] for param in params]
    opt.param_groups[0]["capturable"] = True
    with pytest.raises(ValueError, match="in some parameter groups only"):
        opt.step()
    assert_same_bits(snapshot(opt), before)
    opt.param_groups[0]["capturable"] = False
    opt.step()
    assert [set(opt.state[param]) for param in params] == [set(entry) for entry in entries]
    assert int(opt.state[params[0]]["step"]) == 2


def _capturable_on_two_ranks(rank: int) -> tuple[str, bool]:
    param = Parameter(torch.ones(2, 2))
    opt = Shampoo([param], root_method="minimax")
    param.grad = torch.ones(2, 2)
    opt.step()
    before, entry = dict(opt.state[param]), opt.state[param]
    opt.param_groups[0]["capturable"] = True
    try:
        opt.step()
    except ValueError as error:
        return str(error), opt.state[param] is entry and entry == before
    return "nothing", False


def test_what_ranks_cannot_capture_leaves_the_state_alone(ranks: Ranks):
    for said, is_same in ranks.returns(_capturable_on_two_ranks, 2):
        assert "capturable=True where 2 ranks step together" in said
        assert is_same


def _refuse(rank: int) -> dict[str, tuple[str, str, bool]]:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.ones(4, 6)

    def cut(tensor: Tensor, placement: Placement | None = None) -> DTensor:
        return distribute_tensor(tensor, mesh, [placement or Shard(0)])

    part = DTensor.from_local(torch.ones(3, 4), mesh, [Shard(0)], shape=(4, 6), stride=(6, 1))
    cases = {
        "another placement": (Parameter(cut(whole)), cut(whole, Shard(1))),
        "replicated": (Parameter(cut(whole)), cut(whole, Replicate())),
        "another part": (Parameter(cut(whole)), part),
        "a DTensor": (Parameter(whole.clone()), cut(whole)),
        "plain": (Parameter(cut(whole)), whole),
        "on one rank": (Parameter(whole.clone()), whole.to_sparse() if rank else whole),
    }
    found = {}
    for name, (param, grad) in cases.items():
        param.grad = grad
        opt = Shampoo([("w", param)])
        try:
            opt.step()
            said = "nothing", ""
        except RuntimeError as error:
            said = type(error).__name__, str(error)
        local = param.to_local() if isinstance(param, DTensor) else param
        # A rank whose own gradients are right has made its state before it hears of the others.
        is_inert = not any(value.any() for value in opt.state[param].values())
        found[name] = (*said, bool((local == 1).all()) and is_inert)
    return found


def test_ranks_refuse_a_gradient_together(ranks: Ranks):
    words = {
        "another placement": r"placements \(Shard\(dim=1\),\) on .*parameter \(Shard\(dim=0\),\)",
        "replicated": r"placements \(Replicate\(\),\) on .*Redistribute it",
        "another part": r"the local part of w has shape \(3, 4\), the parameter \(2, 6\)",
        "a DTensor": r"The gradient of w is a DTensor, the parameter plain",
        "plain": r"The gradient of w is plain, the parameter a DTensor",
        "on one rank": r"rank 1: RuntimeError: Shampoo does not support sparse gradients \(w\)",
    }
    for found in ranks.returns(_refuse, 2):
        for name, (kind, said, is_same) in found.items():
            assert re.search(words[name], said), (name, said)
            assert kind == ("ShampooDistributedError" if name == "on one rank" else "RuntimeError")
            assert is_same, name
