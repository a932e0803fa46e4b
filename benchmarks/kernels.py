"""Every kernel of a GPU against its reference, the bare products of cuBLAS, and a roofline.

No kernel is timed before it has passed its check against float64 in the same process. What is
timed is also what ``auto`` chooses by: :func:`measured_table`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import Clock, Quantiles, interleaved, quantiles
from shampoo import ops
from shampoo.kernels.reference import minimax
from shampoo.kernels.triton.minimax_program import minimax_program
from shampoo.ops import OPS, backends
from shampoo.roots.minimax_table import minimax_schedule

P, RELATIVE_EPS = 4, 1e-6
NEAR = 2.0**-18  # of the whole: what split precision and fused sums may differ by
ROOT_LIMIT = 2e-2  # whitened error of a root, the "standard" level at relative eps 1e-6
_CHECKED = 2  # blocks, of as many as are timed: float64 is slow on most cards, and large
_CHECKED_ELEMENTS = 1 << 22
_MOST = 200  # rounds of a small kernel


class Trial(NamedTuple):
    """Arguments of one op, and the work that they are.

    ``outputs`` are the places of what is written; ``flops`` are those of the products, which
    kernels for a GPU take ``passes`` times in ``unit``, a type of ``roofline.MATMULS``.
    ``library`` is the same products by cuBLAS alone, without what is fused around them; of other
    ops one call of torch's over as much memory.
    """

    arguments: list[Any]
    outputs: tuple[int, ...]
    bytes: int
    flops: float = 0
    passes: float = 1
    unit: str = "float32"
    library: Callable[[], object] | None = None


def random_factors(batch: int, n: int, device: torch.device) -> Tensor:
    """[B, n, n] float32: a few random matrices with log-spaced spectra over six decades."""
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(min(batch, 2), n, n, generator=generator, device=device)
    Q = torch.linalg.qr(noise.double()).Q
    A = Q * torch.logspace(0, -6, n, dtype=torch.float64, device=device) @ Q.mT
    A = (0.5 * (A + A.mT)).float()
    return A.repeat(-(-batch // len(A)), 1, 1)[:batch].contiguous()


def _gram(batch: int, n: int, device: torch.device) -> Trial:
    grad = torch.randn(batch, n, n, device=device)
    factor = random_factors(batch, n, device)
    product = torch.empty_like(grad)
    return Trial(
        [factor, grad, 0, 0.9, 0.1],
        (0,),
        bytes=12 * batch * n * n,
        flops=batch * n**3,  # half of 2 n^3
        passes=3,
        unit="tf32",
        library=lambda: torch.bmm(grad, grad.mT, out=product),
    )


def _precondition(batch: int, n: int, device: torch.device) -> Trial:
    grad, root = torch.randn(batch, n, n, device=device), random_factors(batch, n, device)
    half = torch.empty_like(grad)
    return Trial(
        [torch.empty_like(grad), torch.empty(batch, device=device), grad, [root, root.clone()]],
        (0, 1),
        bytes=16 * batch * n * n,
        flops=4 * batch * n**3,
        passes=3,
        unit="float16",
        library=lambda: torch.bmm(torch.bmm(root, grad, out=half), root),
    )


def _root(batch: int, n: int, device: torch.device) -> Trial:
    factor = random_factors(batch, n, device)
    schedule = minimax_schedule(P, RELATIVE_EPS)
    products = [
        step for step in minimax_program(P, schedule, RELATIVE_EPS).products if step.products
    ]
    count = 1 + sum(1 + step.doubled for step in products)  # with the square before step 0
    passes = 3 + sum(step.products * (1 + step.doubled) for step in products)
    product = torch.empty_like(factor)

    def library() -> None:
        for _ in range(count):
            torch.bmm(factor, factor, out=product)

    ridge = torch.empty(batch, dtype=torch.float64, device=device)
    coefficients = [c for step in schedule for c in step]
    return Trial(
        [torch.empty_like(factor), ridge, factor, P, 0.0, RELATIVE_EPS, coefficients],
        (0, 1),
        bytes=8 * batch * n * n,
        flops=count * batch * n**3,
        passes=passes / count,
        unit="float16",
        library=library,
    )


def _root_check(batch: int, n: int, device: torch.device) -> Trial:
    arguments = _root(batch, n, device).arguments
    minimax.minimax_root_(*arguments)
    root, ridge, factor = arguments[:3]
    root[:: max(2, batch // 2)] *= 1.3  # some that must be flagged
    ok = torch.empty(batch, dtype=torch.bool, device=device)
    return Trial([ok, root, factor, ridge, float(P)], (0,), bytes=8 * batch * n * n)


def _blocks(batch: int, numel: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Square tensors of ``numel`` elements together, and the tiles that cut them into blocks."""
    count = min(batch, 8)
    side = max(1, int((numel / count) ** 0.5))
    cut = min(1024, side)
    grid = side // cut
    rows = [
        [i, i * (grid * cut) ** 2, side, side, 0, 0, grid, grid, cut, cut] for i in range(count)
    ]
    return [torch.randn(side, side, device=device) for _ in range(count)], torch.tensor(rows)


def _covered(tiles: Tensor) -> int:
    return int((tiles[:, 6] * tiles[:, 7] * tiles[:, 8] * tiles[:, 9]).sum())


def _gather(batch: int, numel: int, device: torch.device) -> Trial:
    sources, tiles = _blocks(batch, numel, device)
    out = torch.empty(_covered(tiles), device=device)
    copy = torch.empty_like(out)
    return Trial(
        [out, sources, tiles, 1.0, False],
        (0,),
        bytes=8 * out.numel(),
        library=lambda: copy.copy_(out),
    )


def _magnitudes(batch: int, numel: int, device: torch.device) -> Trial:
    together = torch.randn(numel, device=device)
    tensors = [*together.chunk(8 * batch)]  # as many as a model has
    out = torch.empty(len(tensors), dtype=torch.float64, device=device)
    return Trial(
        [out, tensors],
        (0,),
        bytes=4 * numel,
        library=lambda: torch.linalg.vector_norm(together, torch.inf),
    )


def _moments(batch: int, numel: int, device: torch.device) -> Trial:
    sources, tiles = _blocks(batch, numel, device)
    total, blocks = _covered(tiles), int((tiles[:, 6] * tiles[:, 7]).sum())
    grad, exp_avg, direction, ahead = (torch.randn(total, device=device) for _ in range(4))
    moments = [grad, exp_avg, torch.rand(total, device=device), direction]
    scalars = (0.9, 0.1, 0.999, 1e-3, 1e-3, 1e-8, False, ahead)
    arguments = [*moments, torch.empty(blocks, device=device), sources, tiles, 1.0, False, *scalars]
    return Trial(arguments, (0, 1, 2, 3, 4, 16), bytes=32 * total)


def _update(batch: int, numel: int, device: torch.device) -> Trial:
    params, tiles = _blocks(batch, numel, device)
    direction = torch.randn(_covered(tiles), device=device)
    scale = torch.rand(int((tiles[:, 6] * tiles[:, 7]).sum()), device=device)
    arguments = [params, None, direction, scale, tiles, 1e-3, 0.1, 0.0, False]
    return Trial(arguments, (0,), bytes=12 * direction.numel())


TRIALS: dict[str, Callable[[int, int, torch.device], Trial]] = {
    "gram_ema_": _gram,
    "precondition_": _precondition,
    "minimax_root_": _root,
    "check_roots_": _root_check,
    "gather_blocks_": _gather,
    "magnitudes_": _magnitudes,
    "graft_moments_": _moments,
    "update_blocks_": _update,
}


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


def copied(arguments: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """Arguments with tensors of their own, floating ones in ``dtype`` if it is given."""

    def one(value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [one(each) for each in value]
        if not isinstance(value, Tensor):
            return value
        return value.to(dtype) if dtype and value.is_floating_point() else value.clone()

    return [one(value) for value in arguments]


def error_of(op: str, outputs: Sequence[Any], truth: Sequence[Any], inputs: Sequence[Any]) -> float:
    """How far results are from those in float64, relative to the whole, the worst of them."""
    if op == "check_roots_":
        return float((outputs[0] != truth[0]).double().mean())
    if op == "minimax_root_":
        return whitened_error(outputs[0], inputs[2], P, RELATIVE_EPS)
    worst = 0.0
    for got, wanted in zip(outputs, truth, strict=True):
        pairs = zip(got, wanted, strict=True) if isinstance(got, list) else [(got, wanted)]
        for a, b in pairs:
            worst = max(worst, float((a.double() - b).norm() / b.norm()))
    return worst


def whitened_error(X: Tensor, A: Tensor, p: float, relative_eps: float) -> float:
    """Largest spectral norm of ``A_r^(1/2p) X A_r^(1/2p) - I``, A_r with its ridge, in float64."""
    values, vectors = torch.linalg.eigh(A.double())
    ridge = relative_eps * values.pow(4).sum(1, keepdim=True).pow(0.25)
    half = torch.maximum(values + ridge, 0.2 * ridge).pow(0.5 / p)
    E = half[:, :, None] * (vectors.mT @ X.double() @ vectors) * half[:, None, :]
    E.diagonal(dim1=1, dim2=2).sub_(1)
    return float(torch.linalg.eigvalsh(0.5 * (E + E.mT)).abs().max())


def check(op: str, kind: str, kernel: Callable[..., None], trial: Trial) -> tuple[float, float]:
    """A kernel's error on a trial, and the bound that it must keep."""

    def run(function: Callable[..., None], dtype: torch.dtype | None) -> tuple[list[Any], ...]:
        arguments = copied(trial.arguments, dtype)
        function(*arguments)
        return [arguments[place] for place in trial.outputs], arguments

    truth, inputs = run(OPS[op].reference, torch.float64)
    plain = error_of(op, run(OPS[op].reference, None)[0], truth, inputs)
    error = plain if kind == "reference" else error_of(op, run(kernel, None)[0], truth, inputs)
    if op == "minimax_root_":
        return error, ROOT_LIMIT
    return error, 0.0 if op == "check_roots_" else 2 * plain + NEAR


def timed(
    calls: Mapping[str, Callable[[], object]], device: torch.device, seconds: float, least: int
) -> dict[str, Quantiles]:
    """Quantiles of calls that take turns, ``least`` rounds and on until ``seconds`` are over."""
    if not calls:
        return {}
    clock = Clock(device)
    warm = interleaved(calls, clock, rounds=2)
    round_s = max(1e-9, sum(samples[-1] for samples in warm.values()))
    rounds = max(least, min(_MOST, int(seconds / round_s)))
    times = interleaved(calls, clock, rounds=rounds, first_round=2)
    return {name: quantiles(samples) for name, samples in times.items()}


def measure(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Checks, then times every kernel of one op at one size."""
    op, size, batch = case["op"], case["size"], case["batch"]
    found, failures = implementations(op, device)
    is_flat = OPS[op].is_elementwise
    few_of = (batch, min(size, _CHECKED_ELEMENTS)) if is_flat else (min(batch, _CHECKED), size)
    few = TRIALS[op](*few_of, device)
    errors, limits, passed = {}, {}, {}
    for kind, (kernel, supports) in found.items():
        try:
            if supports is not None and not supports(*few.arguments):
                failures[kind] = "does not take these arguments"
                continue
            errors[kind], limits[kind] = check(op, kind, kernel, few)
            passed[kind] = errors[kind] <= limits[kind]
            if not passed[kind]:
                failures[kind] = f"error {errors[kind]:.3g} exceeds {limits[kind]:.3g}"
        except Exception as error:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises again if the context is lost
            failures[kind] = text_of(error)
    del few
    trial = TRIALS[op](batch, size, device)
    calls: dict[str, Callable[[], object]] = {
        kind: _bound(found[kind][0], trial.arguments) for kind in passed if passed[kind]
    }
    if trial.library is not None:
        calls["library"] = trial.library
    least = 3 if case["small"] else 20
    times = timed(calls, device, case["measure_s"], least)
    return {
        "dtype": "float32",
        "bytes": trial.bytes,
        "flops": trial.flops,
        "passes": trial.passes,
        "unit": trial.unit,
        "seconds": {name: summary._asdict() for name, summary in times.items()},
        "relative_error": errors,
        "limit": limits,
        "passed": passed,
        "failures": failures,
    }


def _bound(kernel: Callable[..., None], arguments: Sequence[Any]) -> Callable[[], None]:
    return lambda: kernel(*arguments)


def measured_table(rows: Iterable[Mapping[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """A card's entry of ``backends.json``: at every size the fastest kernel that passed its check.

    The reference is always one of them: it is the op's meaning. Times are medians.
    """
    entry: dict[str, Any] = {**facts, "ops": {}}
    for row in rows:
        if "seconds" not in row:
            continue
        kinds = (*OPS[row["op"]].kinds("cuda"), backends.REFERENCE)
        medians = {kind: row["seconds"][kind]["p50"] for kind in kinds if kind in row["seconds"]}
        if backends.REFERENCE not in medians:
            continue
        sized = entry["ops"].setdefault(row["op"], {}).setdefault(row["dtype"], [])
        fastest = min(medians, key=lambda kind: medians[kind])
        sized.append({"size": row["size"], "kernel": fastest, "seconds": medians})
    return entry
