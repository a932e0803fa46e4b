"""What the op table sends to the kernels in Triton, for an op and for its overload."""

import copy

import pytest
import torch
from comparison import symmetric
from op_arguments import good_arguments

from shampoo.kernels.reference import ops as reference
from shampoo.ops import OPS, backends
from shampoo.ops import routes as of_routes
from shampoo.ops.routes import routes_of

NOTHING: backends.Table = {"cpu": {}, "cuda": {}}
ROUTED = [op for op in OPS.values() if "triton" in op.kinds("cuda")]


def numbers(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype).unbind()


@pytest.mark.parametrize("op", ROUTED, ids=lambda op: op.name)
def test_every_kernel_has_the_routes_of_its_op(op):
    routes = routes_of(op, "triton", NOTHING, {"triton"})
    assert set(routes) == {op.full_name(overload) for overload in op.schemas}
    given = list(vars(good_arguments())[op.name].values())
    expected = copy.deepcopy(given)
    routes[op.name](*given)
    op.reference(*expected)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_numbers_may_lie_on_the_device(backend):
    # Tensors of a CPU belong to a card without a name.
    rows = [{"size": 20, "kernel": "triton"}, {"size": 99, "kernel": "reference"}]
    table = {"cpu": {}, "cuda": {"": {"ops": {"gram_ema_": {"float32": rows}}}}}
    routes = routes_of(OPS["gram_ema_"], backend, table, {"triton"})
    # Only the kernel leaves out what is below the diagonal.
    below = torch.full((20, 20), torch.nan).tril(-1)
    factor, grad = symmetric(2, 20) + below, torch.randn(2, 20, 7)
    expected = factor.clone()
    routes["gram_ema_"]([expected], [grad], [0], 0.9, 0.1)
    routes["gram_ema_.Tensor"]([factor], [grad], [0], *numbers(0.9, 0.1))
    assert expected.isfinite().all()
    assert torch.equal(factor, expected)
    large = symmetric(2, 21)
    large[:, 1, 0] = torch.nan
    routes["gram_ema_.Tensor"]([large], [torch.randn(2, 21, 7)], [0], *numbers(0.9, 0.1))
    assert large[:, 1, 0].isnan().all() == (backend == "auto")


def test_a_kernel_is_chosen_for_each_stack_of_a_call():
    rows = [{"size": 20, "kernel": "triton"}, {"size": 99, "kernel": "reference"}]
    table = {"cpu": {}, "cuda": {"": {"ops": {"gram_ema_": {"float32": rows}}}}}
    routes = routes_of(OPS["gram_ema_"], "auto", table, {"triton"})
    sizes = [20, 21, 7, 20]
    # Only the kernel leaves out what is below the diagonal.
    factors = [symmetric(2, n) + torch.full((n, n), torch.nan).tril(-1) for n in sizes]
    grads = [torch.randn(2, n, 5) for n in sizes]
    diagonal, blocks = torch.rand(2, 5), torch.randn(2, 5, 3)
    expected = diagonal.clone()
    together = [*factors, diagonal], [*grads, blocks], [0] * 5
    routes["gram_ema_"](*together, 0.9, 0.1)
    reference.gram_ema_([expected], [blocks], [0], 0.9, 0.1)
    assert [bool(factor.isfinite().all()) for factor in factors] == [True, False, True, True]
    assert torch.equal(diagonal, expected)
    routes = routes_of(OPS["precondition_"], "triton", NOTHING, {"triton"})
    shapes = [(6, 5), (4,), (3, 4, 5), (2, 7)]
    grads = [torch.randn(2, *shape) for shape in shapes]
    roots = [symmetric(2, n) for shape in shapes for n in shape]
    roots[2] = None  # which the kernel does not take
    results = []
    for run in (routes["precondition_"], reference.precondition_):
        outs, norms = [torch.full_like(grad, torch.nan) for grad in grads], [torch.empty(2)] * 4
        norms = [norm.clone() for norm in norms]
        run(outs, norms, grads, roots)
        results.append((outs, norms))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert torch.equal(results[0][0][1], grads[1])


def test_a_launch_has_blocks_of_one_dtype():
    run = routes_of(OPS["precondition_"], "triton", NOTHING, {"triton"})["precondition_"]
    grads = [torch.randn(2, 6, 5).to(dtype) for dtype in (torch.bfloat16, torch.float32)] * 2
    roots = [symmetric(2, n) for _ in grads for n in (6, 5)]
    outs = [torch.full((2, 6, 5), torch.nan) for _ in grads]
    norms = [torch.empty(2) for _ in grads]
    run(outs, norms, grads, roots)
    for at, (out, grad) in enumerate(zip(outs, grads, strict=True)):
        alone = torch.empty_like(out)
        run([alone], [torch.empty(2)], [grad], roots[2 * at : 2 * at + 2])
        assert torch.equal(out, alone)


def test_what_the_kernel_does_not_take_is_left_to_the_reference():
    routes = routes_of(OPS["gram_ema_"], "triton", NOTHING, {"triton"})
    full, grad = symmetric(2, 20), torch.randn(2, 20, 7)
    for factor, values in (
        (full.diagonal(dim1=1, dim2=2).contiguous(), numbers(0.9, 0.1)),
        (full.double(), numbers(0.9, 0.1)),
        (full.clone(), numbers(0.9, 0.1, dtype=torch.float32)),
    ):
        expected, blocks = factor.clone(), grad.to(factor.dtype)
        reference.gram_ema_([expected], [blocks], [0], *values)
        routes["gram_ema_.Tensor"]([factor], [blocks], [0], *values)
        assert torch.equal(factor, expected)


def test_what_is_chosen_is_kept_for_the_same_layouts_alone(monkeypatch):
    """After a call that the kernel takes: each differs in one thing that it does not take."""
    monkeypatch.setattr(of_routes, "_MOST_LAYOUTS", 3)  # and the oldest are forgotten
    run = routes_of(OPS["gram_ema_"], "triton", NOTHING, {"triton"})["gram_ema_.Tensor"]
    below = torch.full((20, 20), torch.nan).tril(-1)  # which only the kernel leaves out

    def is_taken(factor, grads, given):
        run([factor], [grads], [0], *given)
        return bool(factor.isfinite().all())

    for _ in range(2):
        taken = symmetric(2, 20) + below, torch.randn(2, 20, 7), numbers(0.9, 0.1)
        assert is_taken(*taken)
        double = (symmetric(2, 20) + below).double(), torch.randn(2, 20, 7).double()
        assert not is_taken(*double, numbers(0.9, 0.1))
        single = numbers(0.9, 0.1, dtype=torch.float32)
        assert not is_taken(symmetric(2, 20) + below, torch.randn(2, 20, 7), single)
        with pytest.raises(ValueError, match=r"Invalid modes: 2 entries\. Must be 1"):
            run([taken[0]], [taken[1]], [0, 0], *numbers(0.9, 0.1))
