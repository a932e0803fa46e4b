"""``precondition_`` with modes that stay as they are, judged by dense products in float64."""

import itertools

import pytest
import torch

from shampoo import ops
from shampoo.kernels.triton import precondition as triton_kernel

KEPT = ("full", "diagonal", None)


def draw(shape, kept, flat):
    """Three blocks, their roots, and the direction by one dense product a mode."""
    letters = "ijkl"[: len(shape)]
    grad = torch.randn(3, *shape, dtype=flat)
    truth, roots = grad.double(), []
    for letter, size, how in zip(letters, shape, kept, strict=True):
        root = torch.randn(3, size, size, dtype=flat)
        root = root + root.mT
        if how == "diagonal":
            root = root.diagonal(dim1=1, dim2=2).clone()
            truth = torch.einsum(f"b{letters},b{letter}->b{letters}", truth, root.double())
        elif how == "full":
            others = letters.replace(letter, "z")
            truth = torch.einsum(f"b{letters},b{letter}z->b{others}", truth, root.double())
        roots.append(None if how is None else root)
    return grad, roots, truth


@pytest.mark.parametrize("shape", [(5,), (5, 7), (40, 3), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("flat", [torch.float32, torch.float64], ids=str)
def test_none_leaves_a_mode_as_it_is_in_every_position(impl, flat, shape):
    for kept in itertools.product(KEPT, repeat=len(shape)):
        grad, roots, truth = draw(shape, kept, flat)
        out, norm = torch.full_like(grad, torch.nan), torch.full((3,), torch.nan, dtype=flat)
        before = grad.clone()
        impl.precondition_([out], [norm], [grad], roots)
        near = 64 * torch.finfo(flat).eps * truth.norm()
        torch.testing.assert_close(out.double(), truth, rtol=0, atol=near)
        torch.testing.assert_close(norm.double(), truth.flatten(1).norm(dim=1), rtol=0, atol=near)
        assert torch.equal(grad, before)


@pytest.mark.parametrize("shape", [(5,), (5, 7), (3, 4, 5)], ids=str)
def test_without_a_root_nothing_changes_a_bit(impl, shape):
    grad, roots, _ = draw(shape, [None] * len(shape), torch.float32)
    out = torch.empty_like(grad)
    impl.precondition_([out], [torch.empty(3)], [grad], roots)
    assert torch.equal(out, grad)


def test_none_is_as_good_as_the_identity(impl):
    grad = torch.randn(3, 4, 5, 6)
    for mode in range(3):
        roots = [torch.randn(3, size, size) for size in (4, 5, 6)]
        roots = [root @ root.mT for root in roots]
        found = []
        for root in (None, torch.eye(grad.shape[mode + 1]).repeat(3, 1, 1)):
            out, norm = torch.empty_like(grad), torch.empty(3)
            impl.precondition_([out], [norm], [grad], [*roots[:mode], root, *roots[mode + 1 :]])
            found.append((out, norm))
        (out, norm), (expected, length) = found
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(norm, length)


def test_the_op_passes_none_through_the_dispatcher():
    arguments = ([torch.empty(2, 4, 3)], [torch.empty(2)], [torch.randn(2, 4, 3)])
    roots = [None, torch.eye(3).repeat(2, 1, 1)]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.precondition_, (*arguments, roots), test_utils=checks)


def test_the_kernel_in_triton_leaves_none_to_the_reference():
    stack = [torch.empty(2, 4, 3)], [torch.empty(2)], [torch.randn(2, 4, 3)]
    full = [torch.eye(4).repeat(2, 1, 1), torch.eye(3).repeat(2, 1, 1)]
    assert triton_kernel.supports(*stack, full)
    for roots in ([None, full[1]], [full[0], None], [None, None]):
        assert not triton_kernel.supports(*stack, roots)
