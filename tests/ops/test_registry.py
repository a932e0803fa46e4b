"""The records of the ops: that they agree with what they describe, and what a call costs."""

import importlib
import inspect
import sys

import pytest
import torch
from op_arguments import good_arguments

from shampoo import ops
from shampoo.ops import registry
from shampoo.ops.registry import OPS, Triton


@pytest.fixture(params=OPS.values(), ids=lambda op: op.name)
def op(request):
    return request.param


def test_a_reference_has_the_arguments_of_the_schema(op):
    assert op.arguments == tuple(inspect.signature(op.reference).parameters)
    for overload in op.schemas:
        schema = getattr(op.packet, overload or "default")._schema
        assert op.arguments == tuple(argument.name for argument in schema.arguments)


def test_a_kernel_in_triton_and_its_test_have_the_arguments_of_the_schema(op):
    pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")
    for kernel in (kernel for kernel in op.kernels if isinstance(kernel, Triton)):
        launcher, supports = op.load("triton")
        assert launcher is getattr(
            importlib.import_module(f"shampoo.kernels.triton.{kernel.module}"), op.name
        )
        given = inspect.signature(launcher).parameters.values()
        assert op.arguments == tuple(each.name for each in given if each.kind != each.KEYWORD_ONLY)
        assert op.arguments == tuple(inspect.signature(supports).parameters)


def test_subject_and_moving_numbers_are_arguments(op):
    assert op.subject
    assert {*op.subject, *op.moving} <= {*op.arguments}
    numbers = {each.name: str(each.type) for each in op.packet.default._schema.arguments}
    assert {numbers[name] for name in op.moving} <= {"float"}


def test_help_shows_every_argument_where_it_comes_from_and_what_may_move(op):
    text = inspect.getdoc(getattr(ops, op.name))
    for name in op.arguments:
        assert f"    {name}: " in text
    assert op.schema in text
    assert op.reference.__module__ in text
    assert ("Moving numbers: " + ", ".join(op.moving) in text) == bool(op.moving)


def test_every_op_is_public():
    assert {name for name in ops.__all__ if name.endswith("_")} == set(OPS)


def test_an_op_names_the_kernels_that_it_has(op):
    with pytest.raises(ValueError, match=rf"kind='metal' for {op.name}. Must be one of \('ref"):
        op.load("metal")


@pytest.mark.parametrize("by_name", [False, True])
def test_with_floats_a_call_is_one_frame_before_torch(op, by_name, monkeypatch):
    """Every optimizer step pays for what stands between it and torch."""
    given = vars(good_arguments())[op.name]
    calls = []

    def trace(frame, event, _):
        if event == "call":
            calls.append(frame.f_code.co_filename)

    # The references are Python too: what torch calls does not count.
    with torch.library._scoped_library("shampoo", "IMPL") as library:
        if not ops.has_kernel(op.name, "CPU"):
            library.impl(op.name, lambda *_: None, "CPU")
        call = getattr(ops, op.name)
        sys.setprofile(trace)
        try:
            call(**given) if by_name else call(*given.values())
        finally:
            sys.setprofile(None)
    ours = [file for file in calls if file == registry.__file__]
    assert len(ours) == bool(op.moving)
    assert calls[: len(ours)] == ours


def test_one_tensor_among_the_numbers_makes_all_of_them_tensors():
    factor, grad = torch.eye(4).repeat(2, 1, 1), torch.randn(2, 4, 3)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace != "shampoo":
                return func(*args, **(kwargs or {}))
            seen.append((func, args[3:], kwargs or {}))

    weight = torch.tensor(0.1, dtype=torch.float64)
    with Watch():
        ops.gram_ema_([factor], [grad], [0], 0.9, weight)
        ops.gram_ema_([factor], [grad], [0], 0.9, weight=weight)
        ops.gram_ema_([factor], [grad], [0], 0.9, 0.1)
    packet = torch.ops.shampoo.gram_ema_
    assert [func for func, _, _ in seen] == [packet.Tensor, packet.Tensor, packet.default]
    for _, args, kwargs in seen[:2]:
        numbers = [*args, *kwargs.values()]
        assert [float(number) for number in numbers] == [0.9, 0.1]
        assert all(number.dtype == torch.float64 and number.dim() == 0 for number in numbers)


def test_stacks_that_are_not_told_apart_are_refused():
    grads = [torch.ones(2, 3, 4), torch.ones(1, 5)]
    outs, norms = [torch.empty_like(grad) for grad in grads], [torch.empty(2), torch.empty(1)]
    roots = [torch.ones(2, 3), torch.ones(2, 4), torch.ones(1, 5)]
    op = ops.OPS["precondition_"]
    assert [call[3] for call in op.stacks_of([outs, norms, grads, roots])] == [roots[:2], roots[2:]]
    for wrong in (roots[:2], [*roots, None]):
        with pytest.raises(ValueError, match=f"Invalid roots: {len(wrong)}.*. Must be 3"):
            op.stacks_of([outs, norms, grads, wrong])
        with pytest.raises(ValueError, match=f"Invalid roots: {len(wrong)}.*. Must be 3"):
            op.reference(outs, norms, grads, wrong)
    with pytest.raises(
        ValueError, match=r"Invalid norms: 1 entries\. Must be 2, one for each stack"
    ):
        op.stacks_of([outs, norms[:1], grads, roots])
