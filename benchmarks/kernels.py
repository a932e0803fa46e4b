"""Every kernel of a GPU against its reference, the bare products of cuBLAS, and a roofline.

No kernel is timed before it has passed the cases of its op in the same process, which are those of
certificates and tests. What is timed is also what ``auto`` chooses by: :func:`measured_table`.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo import ops
from shampoo.certificates.cases import CASES
from shampoo.certificates.checks import Finding
from shampoo.certificates.checks import Trial as Checked
from shampoo.certificates.class_timing import CLASS_ROOT
from shampoo.certificates.timing import timed
from shampoo.certificates.workloads import RELATIVE_EPS, WORKLOADS, P
from shampoo.kernels.triton.minimax_program import minimax_program
from shampoo.ops import OPS
from shampoo.ops.licence import REFERENCE
from shampoo.roots.minimax_table import minimax_schedule


class Trial(NamedTuple):
    """Arguments of one op, and the work that they are.

    ``flops`` are those of the products, which kernels for a GPU take ``passes`` times in ``unit``,
    a type of ``roofline.MATMULS``. ``library`` is the same products by cuBLAS alone, without what
    is fused around them; of other ops one call of torch's over as much memory.
    """

    arguments: list[Any]
    bytes: int
    flops: float = 0
    passes: float = 1
    unit: str = "float32"
    library: Callable[[], object] | None = None


def _gram(factors: list[Tensor], grads: list[Tensor], *rest: Any) -> Trial:
    [grad] = grads
    batch, n, _ = grad.shape
    product = torch.empty_like(grad)
    return Trial(
        [factors, grads, *rest],
        bytes=12 * batch * n * n,
        flops=batch * n**3,  # half of 2 n^3
        passes=3,
        unit="tf32",
        library=lambda: torch.bmm(grad, grad.mT, out=product),
    )


def _precondition(
    outs: list[Tensor], norms: list[Tensor], grads: list[Tensor], roots: list[Tensor]
) -> Trial:
    [grad] = grads
    batch, n, _ = grad.shape
    half, root = torch.empty_like(grad), roots[0]
    return Trial(
        [outs, norms, grads, roots],
        bytes=16 * batch * n * n,
        flops=4 * batch * n**3,
        passes=3,
        unit="float16",
        library=lambda: torch.bmm(torch.bmm(root, grad, out=half), root),
    )


def _root(root: Tensor, ridge: Tensor, factor: Tensor, *rest: Any) -> Trial:
    batch, n, _ = factor.shape
    count, passes = _products_of_a_root()
    product = torch.empty_like(factor)

    def library() -> None:
        for _ in range(count):
            torch.bmm(factor, factor, out=product)

    return Trial(
        [root, ridge, factor, *rest],
        bytes=8 * batch * n * n,
        flops=count * batch * n**3,
        passes=passes,
        unit="float16",
        library=library,
    )


def _class_root(root: Tensor, ridge: Tensor, factor: Tensor, sizes: Tensor, *rest: Any) -> Trial:
    count, passes = _products_of_a_root()
    sides = sizes.double()
    return Trial(
        [root, ridge, factor, sizes, *rest],
        bytes=8 * int(sides.square().sum()),
        flops=count * float(sides.pow(3).sum()),
        passes=passes,
        unit="float16",
    )


def _products_of_a_root() -> tuple[int, float]:
    """How many there are, and how many passes each takes in half precision."""
    program = minimax_program(P, minimax_schedule(P, RELATIVE_EPS), RELATIVE_EPS)
    products = [step for step in program.products if step.products]
    count = 1 + sum(1 + step.doubled for step in products)  # with the square before step 0
    passes = 3 + sum(step.products * (1 + step.doubled) for step in products)
    return count, passes / count


def _root_check(*arguments: Any) -> Trial:
    return Trial([*arguments], bytes=8 * arguments[1].numel())


def _diagonal(*arguments: Any) -> Trial:
    factor = arguments[2]
    return Trial([*arguments], bytes=4 * factor.numel(), library=lambda: factor.amax(dim=(1, 2)))


def _keep(root: Tensor, *rest: Any) -> Trial:
    candidate = rest[3]
    copy = torch.empty_like(candidate)
    return Trial([root, *rest], bytes=8 * root.numel(), library=lambda: copy.copy_(candidate))


def _gather(out: Tensor, *rest: Any) -> Trial:
    copy = torch.empty_like(out)
    return Trial([out, *rest], bytes=8 * out.numel(), library=lambda: copy.copy_(out))


def _magnitudes(out: Tensor, tensors: list[Tensor]) -> Trial:
    together = torch.cat(tensors)
    return Trial(
        [out, tensors],
        bytes=4 * together.numel(),
        library=lambda: torch.linalg.vector_norm(together, torch.inf),
    )


def _moments(*arguments: Any) -> Trial:
    return Trial([*arguments], bytes=32 * arguments[0].numel())


def _scale(scale: Tensor, *rest: Any) -> Trial:
    return Trial([scale, *rest], bytes=12 * scale.numel())


def _update(params: list[Tensor], momentum: None, direction: Tensor, *rest: Any) -> Trial:
    return Trial([params, momentum, direction, *rest], bytes=12 * direction.numel())


_WORK: dict[str, Callable[..., Trial]] = {
    "gram_ema_": _gram,
    "precondition_": _precondition,
    "minimax_root_": _root,
    "minimax_class_root_": _class_root,
    "diagonal_root_": _diagonal,
    "check_roots_": _root_check,
    "keep_roots_": _keep,
    "gather_blocks_": _gather,
    "magnitudes_": _magnitudes,
    "graft_moments_": _moments,
    "graft_scale_": _scale,
    "update_blocks_": _update,
}


def trial(op: str, batch: int, size: int, device: torch.device) -> Trial:
    """Arguments of an op at one size, and the work that they are."""
    return _WORK[op](*WORKLOADS[op](batch, size, device))


MEASURED = (*_WORK,)
"""The ops that are measured."""


def implementations(op: str, device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
    """What can run an op: (kernel, its test of arguments) by kind, and why others cannot."""
    record = OPS[op]
    found: dict[str, Any] = {"reference": record.load("reference")}
    failures: dict[str, str] = {}
    if device.type == "cpu":
        if ops.has_kernel(op, "CPU"):
            found["cpp"] = record.load("cpp")
        return found, failures
    for kind in record.kinds("cuda"):
        try:
            found[kind] = record.load(kind)
            if kind == "cuda" and not ops.has_kernel("cuda_gather_blocks_", "CUDA"):
                raise RuntimeError("csrc/ was not built for CUDA: see the phase 'build'")
        except Exception as error:
            found.pop(kind, None)
            failures[kind] = text_of(error)
    return found, failures


def text_of(error: BaseException) -> str:
    """An exception in one line or a few, for a row."""
    return f"{type(error).__name__}: {error}"[:500]


def check(op: str, kind: str, load: Callable[[str], Any], device: torch.device) -> Finding | None:
    """How a kernel did in its worst case of those that it takes; None if it takes none.

    Args:
        op: the name of its op.
        kind: of the kernel.
        load: the kernel for an overload, and its test of arguments.
        device: where it runs.
    """
    worst: Finding | None = None
    for case in CASES[op]:
        examined = Checked(case, OPS[op], device, kind)
        if examined.accepts(load("")[1]):
            found = examined.examine(lambda overload: load(overload)[0])
            if found.failure:
                return found
            if worst is None or found.error - found.limit > worst.error - worst.limit:
                worst = found
    return worst


@functools.cache
def checked(op: str, kind: str, device: torch.device) -> Finding | None:
    """:func:`check` of one of the package's kernels, once a process: rows differ in size alone."""
    return check(op, kind, functools.partial(OPS[op].load, kind), device)


def measure(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Checks, then times every kernel of one op at one size."""
    op, size, batch = case["op"], case["size"], case["batch"]
    found, failures = implementations(op, device)
    errors, limits, passed = {}, {}, {}
    for kind in found:
        try:
            judged = checked(op, kind, device)
            if judged is None:
                failures[kind] = "takes none of the cases"
                continue
            errors[kind], limits[kind] = judged.error, judged.limit
            passed[kind] = not judged.failure
            if not passed[kind]:
                failures[kind] = judged.failure
        except Exception as error:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises again if the context is lost
            failures[kind] = text_of(error)
    given = trial(op, batch, size, device)
    calls: dict[str, Callable[[], object]] = {}
    for kind in (kind for kind in passed if passed[kind]):
        kernel, supports = found[kind]
        if supports is None or supports(*given.arguments):
            calls[kind] = _bound(kernel, given.arguments)
        else:
            failures[kind] = "does not take these arguments"
    if given.library is not None:
        calls["library"] = given.library
    least = 3 if case["small"] else 20
    times = timed(calls, device, case["measure_s"], least)
    return {
        "dtype": "float32",
        "bytes": given.bytes,
        "flops": given.flops,
        "passes": given.passes,
        "unit": given.unit,
        "seconds": {name: summary._asdict() for name, summary in times.items()},
        "relative_error": errors,
        "limit": limits,
        "passed": passed,
        "failures": failures,
    }


def _bound(kernel: Callable[..., None], arguments: list[Any]) -> Callable[[], None]:
    return lambda: kernel(*arguments)


def measured_table(rows: Iterable[Mapping[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """A card's entry of ``backends.json``: at every size the fastest kernel that passed its check.

    The reference is always one of them: it is the op's meaning. Times are medians.
    """
    entry: dict[str, Any] = {**facts, "ops": {}}
    for row in rows:
        # A class competes with its stacks, not with its reference: a certificate times that.
        if "seconds" not in row or row["op"] == CLASS_ROOT:
            continue
        kinds = (*OPS[row["op"]].kinds("cuda"), REFERENCE)
        medians = {kind: row["seconds"][kind]["p50"] for kind in kinds if kind in row["seconds"]}
        if REFERENCE not in medians:
            continue
        sized = entry["ops"].setdefault(row["op"], {}).setdefault(row["dtype"], [])
        fastest = min(medians, key=lambda kind: medians[kind])
        sized.append({"size": row["size"], "kernel": fastest, "seconds": medians})
    return entry
