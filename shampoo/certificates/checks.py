"""What is asked of a kernel that runs a case.

It is judged by its reference: at most twice as far from float64 as that is in the same dtype, give
or take roundings of the largest value. Roots are judged by what they are for. Beside that it must
write all of its outputs and nothing else, give the same bits a second time, in a stack of one, at
another place in memory and with its numbers on the device, and be symmetric where that is promised.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo.certificates.cases.case import Arguments, Case
from shampoo.certificates.cases.tiles import one_tile
from shampoo.certificates.memory import Guarded, guarded, is_intact
from shampoo.ops.licence import REFERENCE
from shampoo.ops.registry import Op, Run

# What sums in another order, or products in split precision, may differ by, of the whole. Kernels
# for the CPU round as the references do.
_NEAR = {"cpp": 0.0, "cuda": 2.0**-18, "triton": 2.0**-18}

# Whitened error of a root by iteration, from (p, relative_eps) on: the "standard" level.
_ROOT_LIMITS = {(4, 1e-6): 2e-2, (2, 1e-4): 4e-3, (6, 1e-6): 2e-2}
_RIDGE_LIMIT = 1e-3
_ROOTS = ("minimax_root_", "minimax_small_root_", "minimax_class_root_")

Load = Callable[[str], Run]
"""A kernel for each overload of its op."""


@dataclass(frozen=True)
class Finding:
    """How a kernel did in a case.

    Attributes:
        error: How far it was from float64, of the whole; of a check, how many verdicts are wrong.
        limit: How far it may be.
        failure: What was wrong, in words; empty if nothing was.
    """

    error: float
    limit: float
    failure: str = ""


class _FailedError(Exception):
    """A check that did not pass."""


class Trial:
    """One case on one device, and what is right for it.

    Args:
        case: the case.
        op: its op, whose reference says what is right.
        device: where kernels run.
        kind: of the kernels, which decides how near they must come.
    """

    def __init__(self, case: Case, op: Op, device: torch.device, kind: str) -> None:
        self.case, self.op, self.device, self.kind = case, op, device, kind
        self.given = case.arguments()
        self.outputs = op.outputs
        self.truth = {name: _in_float64(value) for name, value in self.given.items()}
        if op.name in _ROOTS:  # judged by what they are for: the reference would take the longest
            self.truth["ridge"] = _ridge(**self.truth)
        else:
            self._call(op.reference, self.truth)
        self._measured = 0.0, 0.0

    @functools.cached_property
    def plain(self) -> Arguments:
        """What the reference makes of the case in its own dtype."""
        if all(map(_is_double, self.given.values())):
            return self.truth
        plain = {name: _copied(value) for name, value in self.given.items()}
        if self.op.by_stack:  # whose references take blocks in the dtype of the others
            plain["grads"] = [grad.to(self.case.dtype) for grad in plain["grads"]]
        self._call(self.op.reference, plain)
        return plain

    def accepts(self, supports: Callable[..., bool] | None) -> bool:
        """Whether a kernel takes this call, as far as it says."""
        if not self.case.on_cpu and (self.device.type == "cpu" or self.kind == REFERENCE):
            return False
        if supports is None:
            return True
        return supports(*(_placed(value, self.device)[0] for value in self.given.values()))

    def examine(self, load: Load) -> Finding:
        """Runs a kernel, and says how it did."""
        self._measured = 0.0, 0.0
        try:
            first = self._run_first(load(""))
            if self.kind != REFERENCE:  # whose sums may follow the shape of a stack
                self._look_for_asymmetry(first)
                self._run_again(load(""), first)
                self._run_with_live_numbers(load, first)
                self._run_in_parts(load(""), first)
                self._run_by_stack(load(""), first)
        except _FailedError as failure:
            return Finding(*self._measured, str(failure))
        except Exception as error:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # raises again if the context is lost
            words = f"raised {type(error).__name__}: {str(error)[:300]}"
            return Finding(*self._measured, words)
        return Finding(*self._measured)

    def _run_first(self, run: Run) -> Arguments:
        results, guards = self._results(run, fill=False)
        for name, guard in guards:
            if not is_intact(guard):
                raise _FailedError(f"wrote beside {name}")
        for name, value in results.items():
            if name not in self.outputs and not _are_equal(value, self.given[name]):
                raise _FailedError(f"wrote to {name}, which it only reads")
        for name in self.outputs:
            for mine, true in _pairs(results[name], self.truth[name]):
                if mine.is_floating_point() and bool((mine.isnan() != true.isnan()).any()):
                    is_unwritten = bool((mine.isnan() & ~true.isnan()).any())
                    raise _FailedError(
                        f"left an element of {name} unwritten, or NaN"
                        if is_unwritten
                        else f"wrote a number into {name} where there is none"
                    )
        self._measured = error, limit = self.measured(results)
        if not error <= limit:
            raise _FailedError(f"error {error:.3g} exceeds {limit:.3g}")
        return results

    def _look_for_asymmetry(self, first: Arguments) -> None:
        for name in self.case.symmetric:
            for matrices, _ in _pairs(first[name], first[name]):
                if matrices.dim() == 3 and not torch.equal(_bits(matrices), _bits(matrices.mT)):
                    raise _FailedError(f"{name} is not symmetric")

    def _run_again(self, run: Run, first: Arguments) -> None:
        again, _ = self._results(run, fill=True, shift=1 if self.device.type == "cpu" else 32)
        if not self._outputs_are_equal(again, first):
            raise _FailedError("gave other bits in a second run, elsewhere in memory")

    def _run_with_live_numbers(self, load: Load, first: Arguments) -> None:
        if not self.op.moving:
            return
        live = dict(self.given)
        for name in self.op.moving:
            live[name] = torch.tensor(self.given[name], dtype=torch.float64)
        results, _ = self._results(load("Tensor"), fill=False, given=live)
        if not self._outputs_are_equal(results, first):
            raise _FailedError("gave other bits with its numbers on the device")

    def _run_in_parts(self, run: Run, first: Arguments) -> None:
        for place, given, parts in self._parts():
            results, _ = self._results(run, fill=False, given=given)
            for name in self.outputs:
                part = parts.get(name)
                if part is None:
                    continue
                for mine, whole in _pairs(results[name], first[name]):
                    mine = mine[-(part.stop - part.start) :]
                    if not torch.equal(_bits(mine), _bits(whole[part])):
                        raise _FailedError(
                            f"gave other bits for block {place} alone than in the batch"
                        )

    def _run_by_stack(self, run: Run, first: Arguments) -> None:
        """Every stack of a list by itself."""
        names = self.op.arguments
        if not self.op.by_stack or len(self.given["grads"]) == 1:
            return
        for place, call in enumerate(self.op.stacks_of(list(self.given.values()))):
            given = dict(zip(names, call, strict=True))
            results, _ = self._results(run, fill=False, given=given)
            for name in self.outputs:
                if not torch.equal(_bits(results[name][0]), _bits(first[name][place])):
                    raise _FailedError(f"gave other bits for stack {place} alone than with others")

    def _parts(self) -> list[tuple[int, Arguments, Mapping[str, slice]]]:
        """The call for the first and the last block alone."""
        found: list[tuple[int, Arguments, Mapping[str, slice]]] = []
        if self.case.stacked:
            stacks = self.given[self.case.stacked[0]]
            count = len(stacks[0] if isinstance(stacks, list) else stacks)
            for place in sorted({0, count - 1}):
                part = slice(place, place + 1)
                alone = {
                    name: _sliced(value, part) if name in self.case.stacked else value
                    for name, value in self.given.items()
                }
                found.append((place, alone, dict.fromkeys(self.outputs, part)))
        elif "tiles" in self.given:
            rows = len(self.given["tiles"])
            for row in sorted({0, rows - 1}):
                found.append((row, *one_tile(self.given, row, 4)))
        return found

    def measured(self, results: Arguments) -> tuple[float, float]:
        """The error of results, and what it may be."""
        if self.op.name == "check_roots_":
            wrong = (results["ok"] != self.truth["ok"]).double().mean()
            return float(wrong), 0.0
        if self.op.name in _ROOTS:
            p, eps = self.given["p"], self.given["relative_eps"]
            limit, ridge = _ROOT_LIMITS[p, eps], self.truth["ridge"]
            if not bool(((results["ridge"] - ridge).abs() <= _RIDGE_LIMIT * ridge).all()):
                raise _FailedError(f"ridge is not within {_RIDGE_LIMIT:g} of itself")
            matrices = self._matrices(results["root"])
            return max(whitened_error(X, A, p, eps) for X, A in matrices), limit
        if self.op.name == "eigh_":
            error = _eigh_error(results, self.given["stack"])
            return error, 64 * max(1, len(results["vectors"][0])) * _eps(results["values"])
        found = []
        for name in self.outputs:
            pairs = zip(
                _pairs(results[name], self.truth[name]),
                _pairs(self.plain[name], self.truth[name]),
                strict=True,
            )
            for (mine, true), (plain, _) in pairs:
                found.append(self._distance(mine, plain, true))
        return max(found, key=lambda each: each[0] - each[1], default=(0.0, 0.0))

    def _matrices(self, root: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Roots and their matrices: of a size class each by itself, without what is beyond."""
        factor, sizes = self.given["factor"], self.given.get("sizes")
        if sizes is None:
            return [(root, factor)]
        found = []
        for X, A, n in zip(root, factor, sizes.tolist(), strict=True):
            if bool(X[n:].any()) or bool(X[:, n:].any()):
                raise _FailedError("wrote beyond the size of a matrix")
            found.append((X[None, :n, :n], A[None, :n, :n]))
        return found

    def _distance(self, mine: Tensor, plain: Tensor, true: Tensor) -> tuple[float, float]:
        """Of one output, as parts of its largest value; of counts and flags, how many are wrong."""
        if not mine.is_floating_point():
            return float((mine != true).double().mean()), 0.0
        rounding = _eps(mine) * max(self.case.roundings, 16 if mine.dtype == torch.float64 else 1)
        is_number = true.isfinite()
        if not bool(is_number.all()):
            strange = mine[~is_number].double().nan_to_num(), true[~is_number].nan_to_num()
            if not torch.equal(*strange):
                return float("inf"), 0.0
            mine, plain, true = (each[is_number] for each in (mine, plain, true))
        largest = float(true.abs().max()) if true.numel() else 0.0
        if largest == 0.0:
            return float((mine != 0).any()), 0.0
        error, reference = (
            0.0 if each is true else float((each.double() - true).abs().max()) / largest
            for each in (mine, plain)
        )
        return error, 2 * reference + max(rounding, _NEAR.get(self.kind, 0.0))

    def _results(
        self, run: Run, fill: bool, given: Arguments | None = None, shift: int = 0
    ) -> tuple[Arguments, list[tuple[str, Guarded]]]:
        """The arguments after a call, on the CPU, and the memory they lie in.

        Args:
            run: a kernel.
            fill: what booleans that are overwritten hold before.
            given: other arguments than the case's.
            shift: elements by which tensors start later in memory.
        """
        given = self.given if given is None else given
        call: Arguments = {}
        guards: list[tuple[str, Guarded]] = []
        for name, value in given.items():
            if name in self.case.overwritten:
                value = _each(value, lambda t: t.new_full(t.shape, _spoilt(t, fill)))
            call[name], new = _placed(value, self.device, shift)
            guards += [(name, guard) for guard in new]
        run(*call.values())
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return {name: _each(value, Tensor.cpu) for name, value in call.items()}, guards

    def _call(self, run: Run, arguments: Arguments) -> None:
        for name in self.case.overwritten:
            for tensor, _ in _pairs(arguments[name], arguments[name]):
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
        run(*arguments.values())

    def _outputs_are_equal(self, one: Arguments, other: Arguments) -> bool:
        return all(_are_equal(one[name], other[name]) for name in self.outputs)


def _ridge(factor: Tensor, eps: float, relative_eps: float, **_: Any) -> Tensor:
    """[B] ``max(eps, relative_eps * ||A||_S4)``, with the norm of eigenvalues from those of A^2."""
    norm: Tensor = (factor @ factor).flatten(1).norm(dim=1).sqrt()
    return (relative_eps * norm).clamp(min=eps)


def whitened_error(X: Tensor, A: Tensor, p: float, relative_eps: float) -> float:
    """Largest spectral norm of ``A_r^(1/2p) X A_r^(1/2p) - I``, A_r with its ridge, in float64."""
    values, vectors = torch.linalg.eigh(A.double())
    ridge = relative_eps * values.pow(4).sum(1, keepdim=True).pow(0.25)
    half = torch.maximum(values + ridge, 0.2 * ridge).pow(0.5 / p)
    E = half[:, :, None] * (vectors.mT @ X.double() @ vectors) * half[:, None, :]
    E.diagonal(dim1=1, dim2=2).sub_(1)
    return float(torch.linalg.eigvalsh(0.5 * (E + E.mT)).abs().max())


def _eigh_error(results: Arguments, stack: Tensor) -> float:
    """How far vectors are from orthogonal, or from those of the matrices, of their norms."""
    values, vectors, A = (each.double() for each in (results["values"], results["vectors"], stack))
    rebuilt = vectors * values[:, None] @ vectors.mT
    norms = A.flatten(1).norm(dim=1).clamp(min=1e-300)
    error = (rebuilt - A).flatten(1).norm(dim=1) / norms
    eye = torch.eye(A.shape[-1], dtype=torch.float64)
    skew = (vectors.mT @ vectors - eye).flatten(1).norm(dim=1)
    ordered = bool((values.diff(dim=1) >= 0).all())
    return float(torch.maximum(error, skew).max()) if ordered else float("inf")


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


def _spoilt(tensor: Tensor, fill: bool) -> float | bool:
    """What stands in an output before a kernel writes it."""
    return torch.nan if tensor.is_floating_point() else fill


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An argument with its tensors changed."""
    if isinstance(value, list):
        return [_each(one, change) for one in value]
    return change(value) if isinstance(value, Tensor) else value


def _in_float64(value: Any) -> Any:
    return _each(value, lambda t: t.to(torch.float64 if t.is_floating_point() else t.dtype).clone())


def _is_double(value: Any) -> bool:
    """Whether all that an argument holds of numbers with a point is in float64."""
    if isinstance(value, list):
        return all(map(_is_double, value))
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    return not is_floating or value.dtype == torch.float64


def _copied(value: Any) -> Any:
    return _each(value, torch.clone)


def _sliced(value: Any, part: slice) -> Any:
    return _each(value, lambda t: t[part].clone())


def _placed(value: Any, device: torch.device, shift: int = 0) -> tuple[Any, list[Guarded]]:
    """An argument on a device, its tensors between guards; tables stay on the host."""
    guards: list[Guarded] = []

    def place(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.int64:
            return tensor.clone()
        if tensor.dim() == 0 and tensor.dtype == torch.float64:  # a number on the device
            return tensor.to(device, copy=True)
        guards.append(guarded(tensor, device, shift))
        return guards[-1].tensor

    return _each(value, place), guards


def _pairs(one: Any, other: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors of two arguments; none of numbers, or of what is not there."""
    both = list(zip(one, other, strict=True)) if isinstance(one, list) else [(one, other)]
    return [(a, b) for a, b in both if isinstance(a, Tensor)]


def _are_equal(one: Any, other: Any) -> bool:
    pairs = _pairs(one, other)
    return all(torch.equal(a, b) or torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(tensor: Tensor) -> Tensor:
    """What compares as its bits do, but for zeros and NaNs, which are all alike."""
    return tensor.nan_to_num(nan=-97.0) if tensor.is_floating_point() else tensor
