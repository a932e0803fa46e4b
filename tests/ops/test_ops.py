"""Every op, as reference and as compiled kernel, against float64 arithmetic written out here."""

import itertools

import pytest
import torch
from compiled import load_compiled
from op_arguments import good_arguments
from pairwise import pairwise
from torch import Tensor

from shampoo import ops
from shampoo.certificates.cases.case import strided
from shampoo.certificates.cases.tiles import FLAT, LAYOUTS, PARAM, make, table
from shampoo.kernels.reference import ops as reference


@pytest.fixture
def compiled():
    load_compiled()
    return ops


def error(actual: Tensor, truth: Tensor) -> float:
    assert not actual.isnan().any(), "memory that should have been written is NaN"
    return (actual.double() - truth).abs().max().item()


def assert_as_good(
    actual: Tensor, expected: Tensor, truth: Tensor, flat: torch.dtype = torch.float64
) -> None:
    """At most twice as wrong as PyTorch in the same dtype, give or take one rounding.

    In float64 the truth is rounded as often: then sixteen. ``flat`` is the other operands' dtype.
    """
    rounding = torch.finfo(actual.dtype).eps * truth.abs().max().item()
    rounding *= 16 if actual.dtype == truth.dtype else 1
    assert error(actual, truth) <= 2.0 * error(expected, truth) + rounding
    coarsest = max(rounding, torch.finfo(flat).eps * truth.abs().max().item())
    assert error(actual, truth) <= 16.0 * coarsest  # the reference itself is right


SUMS = [(1.0, False), (0.3, False), (0.3, True)]  # alpha, accumulate


@pytest.mark.parametrize(
    ("layout", "param", "how", "flat"), pairwise(LAYOUTS, PARAM, SUMS, FLAT), ids=str
)
def test_gather_blocks(impl, flat, param, layout, how):
    alpha, accumulate = how
    sources = [make(layout, param), make(layout, torch.float32)]
    dims = LAYOUTS[layout][1]
    tiles, boxes, numel = table([dims, dims], 16, skip=3)
    before = torch.randn(numel, dtype=flat) if accumulate else torch.full((numel,), torch.nan)
    out, expected, truth = (before.to(t) for t in (flat, flat, torch.float64))
    out, expected = out.clone(), expected.clone()
    covered = torch.zeros(numel, dtype=torch.bool)
    for source, box, offset in boxes:
        block = alpha * sources[source].double().reshape(dims)[box].flatten()
        region = slice(offset, offset + block.numel())
        truth[region] = block + truth[region] if accumulate else block
        covered[region] = True
    impl.gather_blocks_(out, sources, tiles, alpha, accumulate)
    reference.gather_blocks_(expected, sources, tiles, alpha, accumulate)
    assert_as_good(out[covered], expected[covered], truth[covered])
    torch.testing.assert_close(
        out[~covered].double(), truth[~covered], rtol=0, atol=0, equal_nan=True
    )
    if not accumulate:
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


MOVES = {"plain": (0.0, False), "momentum": (0.9, False), "nesterov": (0.9, True)}


def update_truth(param, dims, boxes, momentum, direction, scale, lr, decay, mu, nesterov):
    """All blocks in float64; returns the weights and the momentum."""
    weights, momentum = param.double().reshape(dims).clone(), momentum.double().clone()
    for block, (_, box, offset) in enumerate(boxes):
        w = weights[box]
        region = slice(offset, offset + w.numel())
        step = scale[block].double() * direction[region].double().reshape(w.shape)
        if mu == 0.0:
            weights[box] = w - lr * decay * w - lr * step
            continue
        step = step + decay * w
        buffer = mu * momentum[region].reshape(w.shape) + step
        momentum[region] = buffer.flatten()
        weights[box] = w - lr * (step + mu * buffer if nesterov else buffer)
    return weights.reshape(param.shape), momentum


@pytest.mark.parametrize(
    ("layout", "param", "move", "flat"), pairwise(LAYOUTS, PARAM, MOVES, FLAT), ids=str
)
def test_update_blocks(impl, flat, param, layout, move):
    dims, (mu, nesterov) = LAYOUTS[layout][1], MOVES[move]
    tiles, boxes, numel = table([dims], 16, skip=2)
    start = make(layout, param)
    buffer, direction = torch.randn(numel, dtype=flat), torch.randn(numel, dtype=flat)
    scale = torch.rand(len(boxes), dtype=flat) + 0.5
    results = []
    for function in (impl.update_blocks_, reference.update_blocks_):
        weight = strided(start.clone(), LAYOUTS[layout][2])
        momentum = buffer.clone() if mu else None
        function([weight], momentum, direction, scale, tiles, 0.1, 0.5, mu, nesterov)
        results.append((weight, momentum))
    truth = update_truth(start, dims, boxes, buffer, direction, scale, 0.1, 0.5, mu, nesterov)
    for actual, expected, true in zip(*results, truth, strict=True):
        if actual is not None:
            assert_as_good(actual, expected, true, flat)
    if not mu:
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_update_blocks_leaves_the_gaps_of_a_strided_parameter_alone(impl):
    memory = torch.full((40, 80), 7.0)
    tiles, boxes, numel = table([(40, 40)], 16)
    ones = torch.ones(len(boxes))
    impl.update_blocks_([memory[:, ::2]], None, torch.ones(numel), ones, tiles, 1.0, 0, 0, False)
    assert (memory[:, 1::2] == 7.0).all()
    assert (memory[:, ::2] == 6.0).all()


@pytest.mark.parametrize("shape", [(520, 300), (300, 515), (260, 3, 513)], ids=str)
@pytest.mark.parametrize("flat", FLAT, ids=str)
def test_gram_ema_of_large_factors(compiled, flat, shape):
    grad = torch.randn(2, *shape, dtype=flat)
    for mode, size in enumerate(shape):
        start = torch.randn(2, size, size, dtype=flat)
        start = start + start.mT
        rows = grad.double().movedim(mode + 1, 1).flatten(2)
        truth = 0.9 * start.double() + 0.2 * rows @ rows.mT
        factor, expected = start.clone(), start.clone()
        compiled.gram_ema_([factor], [grad], [mode], 0.9, 0.2)
        reference.gram_ema_([expected], [grad], [mode], 0.9, 0.2)
        assert_as_good(factor, expected, truth)


@pytest.mark.parametrize("shape", [(5,), (5, 7), (3, 4, 5), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("flat", FLAT, ids=str)
def test_gram_ema_and_precondition(impl, flat, shape):
    order, letters = len(shape), "ijkl"[: len(shape)]
    for diagonals in itertools.product([False, True], repeat=order):
        grad = torch.randn(3, *shape, dtype=flat)
        truth, roots = grad.double(), []
        for mode, (size, diagonal) in enumerate(zip(shape, diagonals, strict=True)):
            factor = torch.randn(3, size, size, dtype=flat)
            factor = factor.diagonal(dim1=1, dim2=2).clone() if diagonal else factor + factor.mT
            roots.append(factor.clone())
            letter, others = letters[mode], letters.replace(letters[mode], "z")
            inputs = f"b{letters},b{others}" if not diagonal else f"b{letters},b{letters}"
            output = f"b{letter}z" if not diagonal else f"b{letter}"
            double = factor.double().clone()
            gram = torch.einsum(f"{inputs}->{output}", grad.double(), grad.double())
            product = f"b{letters},b{letter}{'' if diagonal else 'z'}"
            truth = torch.einsum(f"{product}->b{letters if diagonal else others}", truth, double)
            impl.gram_ema_([factor], [grad], [mode], 0.9, 0.2)
            expected = 0.9 * double + 0.2 * gram
            torch.testing.assert_close(
                factor.double(),
                expected,
                rtol=0,
                atol=32 * torch.finfo(flat).eps * expected.abs().max(),
            )
        out, norm = torch.full_like(grad, torch.nan), torch.full((3,), torch.nan, dtype=flat)
        impl.precondition_([out], [norm], [grad], roots)
        near = 64 * torch.finfo(flat).eps * truth.norm()
        torch.testing.assert_close(out.double(), truth, rtol=0, atol=near)
        torch.testing.assert_close(norm.double(), truth.flatten(1).norm(dim=1), rtol=0, atol=near)


def is_number(argument, value):
    return str(argument.type) in ("Tensor", "Optional[Tensor]") and isinstance(value, float)


@pytest.mark.parametrize("op", vars(good_arguments()))
def test_opcheck(compiled, op):
    arguments = vars(good_arguments())[op]
    packet = getattr(torch.ops.shampoo, op)
    for overload in packet.overloads():
        schema = getattr(packet, overload)._schema
        given = (
            torch.tensor(value, dtype=torch.float64) if is_number(argument, value) else value
            for argument, value in zip(schema.arguments, arguments.values(), strict=True)
        )
        torch.library.opcheck(getattr(packet, overload), tuple(given))


def test_every_op_traces_without_reading_its_tables():
    arguments = good_arguments()
    assert set(vars(arguments)) == set(ops.kernels())
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        ops.gather_blocks_(**arguments.gather_blocks_)


def change(tensor: Tensor, index: int, value: int) -> Tensor:
    changed = tensor.clone()
    changed[0, index] = value
    return changed


ROW = good_arguments().gather_blocks_["tiles"]
GATHER, MOMENTS, UPDATE = "gather_blocks_", "graft_moments_", "update_blocks_"
GRAM, ROOTS, SCALE = "gram_ema_", "precondition_", "graft_scale_"
WRONG = [
    (GATHER, "out", torch.ones(3, 4), r"out must be one-dimensional.*\[3, 4\]"),
    (GATHER, "out", torch.ones(24)[::2], r"out must be one-dimensional.*strides \[2\]"),
    (GATHER, "out", torch.ones(12).half(), r"out has dtype Half. Must be float32 or"),
    (GATHER, "out", torch.ones(11), r"tiles\[0\] lies at \[0, 12\) but out has 11"),
    (GATHER, "sources", [], r"tiles\[0\] names tensor 0 but sources has 0"),
    (GATHER, "sources", [torch.ones(4, 4)], r"dims of 12 elements but sources\[0\] has 16"),
    (GATHER, "sources", [torch.ones(4, 3).int()], r"sources\[0\] has dtype Int. Must be"),
    (GATHER, "tiles", ROW.float(), r"tiles has dtype Float. Must be int64"),
    (GATHER, "tiles", ROW[0], r"tiles must be contiguous \[rows, columns\].*got shape \[10\]"),
    (GATHER, "tiles", ROW[:, :8].clone(), r"tiles has 8 columns. Must be 2 \+ 4 \* order"),
    (GATHER, "tiles", change(ROW, 0, -1), r"tiles\[0\] names tensor -1"),
    (GATHER, "tiles", change(ROW, 1, 1), r"tiles\[0\] lies at \[1, 13\)"),
    (GATHER, "tiles", change(ROW, 1, -1), r"tiles\[0\] lies at \[-1, 11\)"),
    (GATHER, "tiles", change(ROW, 4, 1), r"\[1, 1 \+ 2 \* 2\) in mode 0. Must lie in \[0, 4\)"),
    (GATHER, "tiles", change(ROW, 5, -1), r"\[-1, -1 \+ 1 \* 3\) in mode 1"),
    (GATHER, "tiles", change(ROW, 6, 0), r"\[0, 0 \+ 0 \* 2\) in mode 0"),
    (GATHER, "tiles", change(ROW, 8, 3), r"\[0, 0 \+ 2 \* 3\) in mode 0. Must lie in"),
    (MOMENTS, "exp_avg", torch.ones(12).double(), r"exp_avg has dtype Double but norm has Float"),
    (MOMENTS, "exp_avg_sq", torch.ones(11), r"lies at \[0, 12\) but exp_avg_sq has 11 elements"),
    (MOMENTS, "direction", torch.ones(11), r"lies at \[0, 12\) but direction has 11 elements"),
    (MOMENTS, "ahead", torch.ones(11), r"lies at \[0, 12\) but ahead has 11 elements"),
    (MOMENTS, "exp_avg", None, r"ahead without an exp_avg to look ahead from"),
    (MOMENTS, "grad", torch.ones(11), r"lies at \[0, 12\) but grad has 11 elements"),
    (MOMENTS, "grad", torch.ones(24)[::2], r"grad must be one-dimensional.*strides \[2\]"),
    (MOMENTS, "norm", torch.ones(1), r"norm has 1 elements but tiles describes 2"),
    (MOMENTS, "norm", torch.ones(2).half(), r"norm has dtype Half. Must be float32 or"),
    (MOMENTS, "sources", [], r"tiles\[0\] names tensor 0 but sources has 0"),
    (MOMENTS, "sources", [torch.ones(4, 3).int()], r"sources\[0\] has dtype Int. Must be"),
    (MOMENTS, "correction1", 0.0, r"Invalid correction1=0. Must be > 0"),
    (MOMENTS, "correction2", -1.0, r"Invalid correction2=-1. Must be > 0"),
    (UPDATE, "scale", torch.ones(1), r"scale has 1 elements but tiles describes 2"),
    (UPDATE, "scale", torch.ones(2).double(), r"scale has dtype Double but direction has Float"),
    (UPDATE, "direction", torch.ones(11), r"tiles\[0\] lies at \[0, 12\) but direction has 11"),
    (UPDATE, "momentum", torch.ones(11), r"momentum has 11 elements but direction describes 12"),
    (SCALE, "norm", torch.ones(2), r"norm has 2 elements. Must have 3, as scale has"),
    (SCALE, "length", torch.ones(3).double(), r"length has dtype Double but scale has Float"),
    (SCALE, "is_own", torch.ones(3), r"is_own is Float with strides \[1\] on cpu"),
    (SCALE, "accepted", torch.ones(2).bool(), r"accepted has 2 elements. Must be one flag"),
    (SCALE, "correction", 0.0, r"Invalid correction=0. Must be > 0"),
    (GRAM, "modes", [0, 2], r"Invalid modes\[1\]=2. Must be in \[0, 2\) for grads"),
    (GRAM, "factors", [torch.ones(2, 3, 3)] * 2, r"factors\[0\] has shape \[2, 3, 3\]"),
    (GRAM, "factors", [torch.ones(2, 4).double()] * 2, r"factors\[0\] has dtype Double but"),
    (GRAM, "factors", [torch.ones(2, 4)], r"factors, grads and modes have 1, 2 and 2 entries"),
    (UPDATE, "params", [torch.ones(12, dtype=torch.int8)], r"params\[0\] has dtype Char"),
    ("magnitudes_", "out", torch.empty(2), r"out is Float of shape \[2\] on cpu. Must be"),
    ("magnitudes_", "tensors", [torch.ones(3)], r"Must be contiguous float64 of shape \[1\]"),
    ("magnitudes_", "tensors", [torch.ones(3), torch.ones(0)], r"tensors\[1\] is empty"),
    (ROOTS, "roots", [torch.ones(2, 4)], r"roots has 1 tensors. Must have one"),
    (ROOTS, "roots", [torch.ones(2, 4)] * 3, r"roots\[1\] has shape \[2, 4\]"),
    (ROOTS, "outs", [torch.ones(2, 3, 4)] * 2, r"outs\[0\] has shape \[2, 3, 4\].*Must be"),
    (ROOTS, "norms", [torch.ones(2), torch.ones(3)], r"norms\[1\] has 3 elements. Must have 1"),
    (ROOTS, "norms", [torch.ones(2).double()] * 2, r"norms\[0\] has dtype Double but"),
    (ROOTS, "norms", [torch.ones(2)], r"outs, norms and grads have 2, 1 and 2 entries"),
    ("eigh_", "stack", torch.ones(2, 4, 3), r"stack has shape \[2, 4, 3\]. Must be \[B, n, n\]"),
    ("eigh_", "values", torch.ones(2, 3), r"values has shape \[2, 3\]. Must be \[2, 4\]"),
    ("eigh_", "vectors", torch.ones(1, 4, 4), r"vectors has shape \[1, 4, 4\]. Must be"),
]  # fmt: skip


def test_there_is_nothing_to_add_to_without_a_gradient(compiled):
    arguments = {**good_arguments().graft_moments_, "accumulate": True}
    compiled.graft_moments_(**arguments)
    with pytest.raises(RuntimeError, match=r"accumulate=True without a grad"):
        compiled.graft_moments_(**{**arguments, "grad": None})


@pytest.mark.parametrize(("op", "argument", "value", "message"), WRONG)
def test_a_wrong_argument_is_named_with_its_value_and_bound(compiled, op, argument, value, message):
    arguments = vars(good_arguments())[op]
    getattr(compiled, op)(**arguments)  # as they are they are right
    with pytest.raises(RuntimeError, match=message):
        getattr(compiled, op)(**{**arguments, argument: value})


def test_empty_tables_do_nothing(impl):
    arguments = good_arguments()
    tiles = torch.empty(0, 6, dtype=torch.int64)
    out, none = torch.full((3,), torch.nan), torch.empty(0)
    impl.gather_blocks_(out, [], tiles, 1.0, False)
    numbers = 1.0, False, 0.9, 0.1, 0.9, 0.1, 0.1, 1e-8, True
    impl.graft_moments_(none, none, none, none, none, [], tiles, *numbers)
    impl.update_blocks_([], none, none, none, tiles, 0.1, 0.0, 0.9, False)
    assert out.isnan().all()
    param = arguments.update_blocks_["params"][0].clone()
    impl.update_blocks_([param], None, none, none, tiles, 0.1, 0.5, 0.0, False)
    torch.testing.assert_close(param, arguments.update_blocks_["params"][0] * 0 + param)


def test_bits_do_not_depend_on_the_number_of_threads(compiled):
    shape = (700, 700)  # several times the grain of the kernels, in blocks that no grain divides
    tiles, boxes, numel = table([shape], 96)
    source, noise = torch.randn(shape), torch.randn(3, numel)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        grad, norm = noise[0].clone(), torch.empty(len(boxes))
        direction, ahead = torch.empty(2, numel).unbind()
        exp_avg, exp_avg_sq, param = noise[1].clone(), noise[2].square(), source.clone()
        compiled.gather_blocks_(grad, [source], tiles, 0.1, True)
        compiled.graft_moments_(
            *(grad, exp_avg, exp_avg_sq, direction, norm, [source], tiles, 0.1, True),
            *(0.9, 0.1, 0.99, 0.01, 0.1, 1e-8, True, ahead),
        )
        compiled.update_blocks_([param], exp_avg, direction, norm, tiles, 0.1, 0.1, 0.9, True)
        results.append((grad, exp_avg, exp_avg_sq, direction, norm, param, ahead))
    torch.set_num_threads(1)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_compiled_kernels_are_registered_for_the_cpu(compiled):
    there = {name for name, present in compiled.kernels("CPU").items() if present}
    assert there == {name for name, op in ops.OPS.items() if "cpp" in op.kinds("cpu")}
