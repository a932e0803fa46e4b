"""What the op table sends to the kernels in Triton, for an op and for its overload."""

import pytest
import torch
from comparison import symmetric
from op_arguments import good_arguments

from shampoo import ops
from shampoo.kernels.reference import ops as reference
from shampoo.ops import backends

NOTHING: backends.Table = {"cpu": {}, "cuda": {}}
ROUTED = [name for name, kinds in backends.KERNELS.items() if "triton" in kinds]


@pytest.fixture(autouse=True)
def _no_routes(monkeypatch):
    """Routes are made, but not registered: only a GPU would take them."""
    monkeypatch.setattr(ops, "_routes", {})
    monkeypatch.setattr(ops, "_register", lambda name, meaning: None)


def numbers(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype).unbind()


@pytest.mark.parametrize("op", ROUTED)
def test_every_kernel_has_the_routes_of_its_op(op):
    ops._route(op, "triton", NOTHING, {"triton"})
    assert set(ops._routes) == set(ops._names[op])
    given, expected = (list(vars(good_arguments())[op].values()) for _ in range(2))
    for i, value in enumerate(given):
        if isinstance(value, torch.Tensor):
            expected[i] = value.clone()
    ops._routes[op](*given)
    ops._meanings[op](*expected)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_numbers_may_lie_on_the_device(backend):
    # Tensors of a CPU belong to a card without a name.
    rows = [{"size": 20, "kernel": "triton"}, {"size": 99, "kernel": "reference"}]
    table = {"cpu": {}, "cuda": {"": {"ops": {"gram_ema_": {"float32": rows}}}}}
    ops._route("gram_ema_", backend, table, {"triton"})
    # Only the kernel leaves out what is below the diagonal.
    below = torch.full((20, 20), torch.nan).tril(-1)
    factor, grad = symmetric(2, 20) + below, torch.randn(2, 20, 7)
    expected = factor.clone()
    ops._routes["gram_ema_"](expected, grad, 0, 0.9, 0.1)
    ops._routes["gram_ema_.Tensor"](factor, grad, 0, *numbers(0.9, 0.1))
    assert expected.isfinite().all()
    assert torch.equal(factor, expected)
    large = symmetric(2, 21)
    large[:, 1, 0] = torch.nan
    ops._routes["gram_ema_.Tensor"](large, torch.randn(2, 21, 7), 0, *numbers(0.9, 0.1))
    assert large[:, 1, 0].isnan().all() == (backend == "auto")


def test_what_the_kernel_does_not_take_is_left_to_the_reference():
    ops._route("gram_ema_", "triton", NOTHING, {"triton"})
    full, grad = symmetric(2, 20), torch.randn(2, 20, 7)
    for factor, values in (
        (full.diagonal(dim1=1, dim2=2).contiguous(), numbers(0.9, 0.1)),
        (full.double(), numbers(0.9, 0.1)),
        (full.clone(), numbers(0.9, 0.1, dtype=torch.float32)),
    ):
        expected, blocks = factor.clone(), grad.to(factor.dtype)
        reference.gram_ema_(expected, blocks, 0, *values)
        ops._routes["gram_ema_.Tensor"](factor, blocks, 0, *values)
        assert torch.equal(factor, expected)
