"""Products of split matrices, and splitting, judged in float64."""

import pytest
import torch
import triton
import triton.language as tl
from comparison import SIZES, error

from shampoo.kernels.triton.arch import triangle
from shampoo.kernels.triton.split_fp16 import absmax_, measure_, normalize_, start_
from shampoo.kernels.triton.symmetric_gemm import (
    ROOT,
    SPLIT,
    SQUARE,
    LaunchConfig,
    launch_config,
    padded,
    symmetric_gemm_,
    tile_count,
)

CONFIG = LaunchConfig(32, 32, 4, 2)
LOST = 2**-20  # two fp16 numbers hold 22 bits of each operand
SCALE = 2.0**11


def commuting(sizes, count=2):
    """``count`` stacks of polynomials of one matrix, float64, zero beyond the real sizes."""
    size = padded(max(sizes), CONFIG.block)
    stacks = torch.zeros(count, len(sizes), size, size, dtype=torch.float64)
    for b, n in enumerate(sizes):
        basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
        for stack in stacks:
            matrix = basis * torch.rand(n, dtype=torch.float64) @ basis.mT
            stack[b, :n, :n] = (matrix + matrix.mT) / 2
    return stacks


def split(values):
    """Planes of ``SCALE * values``, and what they stand for."""
    scaled = (values * SCALE).float()
    hi = scaled.half()
    lo = (scaled - hi.float()).half()
    return torch.stack([hi, lo], 1), (hi.double() + lo.double()) / SCALE


def merged(parts):
    return (parts[:, 0].double() + parts[:, 1].double()) / SCALE


def multiply(
    left, right, sizes, coefficients, kind=SPLIT, norms=None, out=None, addend=None, **options
):
    """The kernel on stored values, with coefficients for real ones."""
    a, b, c, d, *rest = coefficients
    e = rest[0] if rest else 0.0
    a = 0.0 if options.get("products") == 0 else a
    scale = SCALE if kind == SPLIT else 1.0
    stored = torch.tensor([a / SCALE**2, b / SCALE, c / SCALE, d, e / SCALE]) * scale
    out = torch.empty_like(left) if out is None else out
    norms = torch.empty(len(sizes), 4, dtype=torch.float64) if norms is None else norms
    options = {"products": 3, "doubled": False, "promote": 64, "config": CONFIG} | options
    symmetric_gemm_(
        out,
        left,
        right,
        left if addend is None else addend,
        stored,
        torch.tensor(sizes, dtype=torch.int32),
        norms,
        kind=kind,
        add_left=b != 0,
        add_right=c != 0,
        add_addend=e != 0,
        **options,
    )
    return out


@triton.jit
def list_tiles_kernel(out):
    i, j = triangle(tl.program_id(0))
    tl.store(out + 2 * tl.program_id(0), i)
    tl.store(out + 2 * tl.program_id(0) + 1, j)


def test_the_tile_map_names_every_upper_tile_once():
    rows = 40
    out = torch.empty(rows * (rows + 1) // 2, 2, dtype=torch.int32)
    list_tiles_kernel[(len(out),)](out)
    assert out.tolist() == [[i, j] for j in range(rows) for i in range(j + 1)]


FORMS = {
    "plain": ((1.0, 0.0, 0.0, 0.0), {}),
    "square": ((1.0, 0.0, 0.0, 0.0), {"promote": 256}),
    "polynomial": ((2.5, -3.8, 0.0, 2.1), {"promote": 256}),
    "first update": ((0.5, 0.0, 0.0, 0.0), {"doubled": True}),
    "turn": ((-1.0, 0.0, 0.0, 1.0), {}),
    "residual": ((1.0, 1.1, 0.0, 0.0), {"products": 1}),
    "power": ((1.0, 2.0, 0.0, 0.0), {"products": 1}),
    "update": ((0.9, -0.9, 0.9, 0.1), {"products": 1}),
    "fourth power": ((65.7, 0.0, 0.0, 0.9, -0.8), {"promote": 256}),
    "residual of it": ((65.7, -3.1, 0.0, 0.0, 0.8), {"products": 1}),
    "copy": ((0.0, 1.5, -0.25, 0.5), {"products": 0}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_at_ragged_sizes(form):
    coefficients, options = FORMS[form]
    a, b, c, d, *rest = coefficients
    e = rest[0] if rest else 0.0
    if options.get("doubled"):
        a *= 2
    left, right, addend = (split(stack) for stack in commuting(SIZES, 3))
    out = multiply(left[0], right[0], SIZES, coefficients, addend=addend[0], **options)
    for n, got, L, R, E in zip(SIZES, merged(out), left[1], right[1], addend[1], strict=True):
        beyond = padded(n, CONFIG.block)
        assert got[:beyond, beyond:].isnan().all()  # no work on padding
        assert got[beyond:].isnan().all()
        got, L, R, E = (each[:n, :n] for each in (got, L, R, E))
        truth = a * L @ R + b * L + c * R + d * torch.eye(n, dtype=torch.float64) + e * E
        assert torch.equal(got, got.mT)
        lost = {3: LOST, 1: 2**-10, 0: 2**-21}[options.get("products", 3)]
        # An entry of a symmetric product is off by the rounding of its rows; the mirrored half
        # by the commutator as well, which is as small.
        assert error(got, (truth + truth.mT) / 2) <= 2 * lost * max(1.0, truth.abs().max().item())


def test_single_products_use_the_leading_bits():
    left, right = (split(stack)[0] for stack in commuting((65,)))
    left[:, 1] = right[:, 1] = torch.inf
    assert not multiply(left, right, (65,), (1.0, 0.0, 0.0, 0.0), products=1)[:, 0].isnan().any()


# What rounding leaves of one sum, from (k, left, right): B^2 = 2^22 swallows 0.2, but not 0.4.
PROMOTIONS = {
    "small terms meet before they meet a large one": (
        ((32, 2.0**11, 2.0**11), (64, 0.4453125, 0.4453125), (96, 0.4453125, 0.4453125)),
        2.0**22 + 0.5,
    ),
    "both tiles of a stretch share an accumulator": (
        ((0, 0.4453125, 0.4453125), (32, 2.0**11, 2.0**11), (64, -(2.0**11), 2.0**11)),
        0.0,
    ),
}


@pytest.mark.parametrize("case", PROMOTIONS)
def test_a_fresh_accumulator_after_every_stretch_of_k(case):
    terms, wanted = PROMOTIONS[case]
    n = 256
    left, right = torch.zeros(2, 1, 2, n, n, dtype=torch.float16)
    for k, a, b in terms:
        left[0, 0, 0, k], right[0, 0, 0, k] = a, b
    out = torch.empty(1, n, n)
    squares = torch.empty(1, tile_count(n, CONFIG.block), dtype=torch.float64)
    coefficients = (SCALE**2, 0.0, 0.0, 0.0)
    options = {"kind": SQUARE, "norms": squares, "out": out, "promote": 64}
    multiply(left, right, (n,), coefficients, **options)
    assert out[0, 0, 0] == wanted


def test_the_symmetrised_product_sees_both_orders():
    """Operands that do not commute: the average of both orders, not one of them mirrored."""
    left, right = split(commuting((65,))[0]), split(commuting((65,))[0])
    out = merged(multiply(left[0], right[0], (65,), (0.5, 0.0, 0.0, 0.0), doubled=True))[0]
    L, R = left[1][0], right[1][0]
    assert torch.equal(out[:65, :65], out[:65, :65].mT)
    assert error(out[:65, :65], ((L @ R + R @ L) / 2)[:65, :65]) <= 2 * LOST


def test_mirrored_products_keep_the_upper_triangle():
    left, right = split(commuting((65,))[0]), split(commuting((65,))[0])
    out = merged(multiply(left[0], right[0], (65,), (1.0, 0.0, 0.0, 0.0)))[0, :65, :65]
    truth = (left[1][0] @ right[1][0])[:65, :65].triu()
    assert error(out, truth + truth.triu(1).mT) <= 2 * LOST


def test_norms_of_squares_and_no_dependence_on_neighbours_or_padding():
    sizes = (63, 65, 40)
    parts, values = split(commuting(sizes)[0])

    def square(parts, sizes):
        size = parts.shape[-1]
        out = torch.empty(len(sizes), size, size)
        squares = torch.empty(len(sizes), tile_count(size, CONFIG.block), dtype=torch.float64)
        multiply(parts, parts, sizes, (1.0, 0, 0, 0), kind=SQUARE, norms=squares, out=out)
        return out, squares

    out, squares = square(parts, sizes)
    truth = values @ values
    assert error(out, truth) <= LOST
    assert torch.equal(out, out.mT)
    wanted = truth.square().sum((1, 2))
    assert ((squares.sum(1) - wanted).abs() <= 2 * LOST * wanted).all()
    wide = torch.zeros(2, 2, 160, 160, dtype=torch.float16)
    wide[0], wide[1, :, : parts.shape[-1], : parts.shape[-1]] = torch.nan, parts[1]
    out_wide, squares_wide = square(wide, (160, 65))
    assert torch.equal(out_wide[1, :96, :96], out[1])
    assert torch.equal(squares_wide[1, : squares.shape[1]], squares[1])
    assert (squares_wide[1, squares.shape[1] :] == 0).all()


def test_the_root_goes_where_it_belongs_and_nowhere_else():
    sizes = (33, 65)
    left, right = (split(stack) for stack in commuting(sizes))
    norms = torch.tensor([[0, 0, 0, 3.0], [0, 0, 0, 1e-9]], dtype=torch.float64)
    wide = torch.full((2, 70, 68), 5.0)
    multiply(
        left[0],
        right[0],
        sizes,
        (1.0, 0.5, 0.0, 0.0),
        kind=ROOT,
        norms=norms,
        out=wide[:, :65, :65],
    )
    for n, got, L, R, scale in zip(sizes, wide, left[1], right[1], norms[:, 3], strict=True):
        truth = (scale * (L @ R + 0.5 * L))[:n, :n]
        assert torch.equal(got[:n, :n], got[:n, :n].mT)
        assert error(got[:n, :n], truth) <= 4 * LOST * scale
        assert (got[n:] == 5).all()
        assert (got[:, n:] == 5).all()


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 1e25])
def test_splits_of_matrices_of_any_scale(scale):
    sizes = (65, 3, 64)
    A = torch.zeros(3, 65, 65)
    for b, n in enumerate(sizes):
        A[b, :n, :n] = commuting((n,))[0][0, :n, :n].float() * scale
    A[2] = 0
    absmax = torch.zeros(3, dtype=torch.int32)
    absmax_(absmax, A)
    assert torch.equal(absmax.view(torch.float32), A.abs().amax((1, 2)))
    parts = torch.empty(3, 2, 128, 128, dtype=torch.float16)
    normalize_(parts, A, absmax, torch.tensor(sizes, dtype=torch.int32), SCALE)
    unit = torch.exp2(torch.floor(torch.log2(A.double().abs().amax((1, 2)))))
    truth = A.double() / torch.where(unit > 0, unit, 1.0)[:, None, None]
    assert error(merged(parts)[:, :65, :65], truth) <= 2**-21
    assert (parts[:, :, 65:] == 0).all()
    assert (parts[:, :, :, 65:] == 0).all()


@pytest.mark.parametrize("shape", [(2, 65, 65), (2, 1, 4097)], ids=str)
def test_the_largest_entry_wherever_it_is(shape):
    values, absmax = torch.zeros(shape), torch.zeros(2, dtype=torch.int32)
    values[0, 0, 0], values[1, -1, -1] = 3.0, -5.0
    absmax_(absmax, values)
    assert absmax.view(torch.float32).tolist() == [3.0, 5.0]


def test_splits_average_what_is_not_symmetric():
    A = torch.randn(1, 65, 65)
    absmax = torch.zeros(1, dtype=torch.int32)
    absmax_(absmax, A)
    parts = torch.empty(1, 2, 128, 128, dtype=torch.float16)
    normalize_(parts, A, absmax, torch.tensor([65], dtype=torch.int32), SCALE)
    assert torch.equal(parts, parts.mT)
    unit = 2.0 ** A.abs().max().log2().floor()
    assert error(merged(parts)[:, :65, :65], ((A + A.mT) / 2 / unit).double()) <= 2**-20


def test_norms_and_the_first_step():
    stack = commuting((65, 96, 3))[0]
    parts, S = split(stack)
    square = (S @ S).float()
    squares = torch.zeros(3, 130, dtype=torch.float64)  # more than one piece of the reduction
    squares[:, [0, 70, 129]] = (S @ S).square().sum((1, 2))[:, None] / 3
    absmax = torch.full((3,), 8.0).view(torch.int32)
    constants = torch.tensor([1e-2, 1e-4, 2.1, -3.8, 2.7], dtype=torch.float64)
    constants[0] = 8 * 2e-4
    norms, ridge = torch.empty(3, 4).double(), torch.empty(3).double()
    measure_(norms, ridge, squares, absmax, constants, 4)
    b = (S @ S).norm(dim=(1, 2)).sqrt()
    rho = (1e-4 * b).clamp(min=2e-4)
    close = {"rtol": 1e-14, "atol": 0.0}
    torch.testing.assert_close(ridge, 8 * rho, **close)
    wanted = torch.stack([1 / (b + rho), rho / (b + rho), b * 0 + 8, (8 * (b + rho)) ** -0.25], 1)
    torch.testing.assert_close(norms, wanted, **close)
    first, root = torch.empty_like(parts), torch.empty_like(parts)
    start_(
        first,
        root,
        parts,
        square,
        norms,
        constants,
        scale=SCALE,
        first_scale=2 * SCALE,
        start_scale=SCALE / 2,
    )
    eye = torch.eye(96, dtype=torch.float64)
    M = S / (b + rho)[:, None, None] + (rho / (b + rho))[:, None, None] * eye
    assert error(merged(first) / 2, M) <= LOST
    assert error(merged(root) * 2, 2.1 * eye - 3.8 * M + 2.7 * M @ M) <= 8 * LOST


def test_the_table_of_tiles_pads_little():
    for n in range(1, 2049):
        config = launch_config(n, torch.device("cpu"))
        assert padded(n, config.block) <= max(64, n + 127)
        assert config.block % config.block_k == 0
        assert 64 % config.block_k == 0
