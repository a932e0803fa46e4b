"""Which kernel runs an op: what ``SHAMPOO_BACKEND`` names, or what passed and measured fastest.

On a CUDA device an op may have a kernel in CUDA C++, one in Triton, both or neither, beside its
*reference* in plain PyTorch, whose products are cuBLAS. ``cuda`` and ``triton`` name one of them.
``auto`` asks the licence of the device (:mod:`shampoo.ops.licence`): which kernels passed their
checks on it, and which is fastest at some sizes, so it also says where a kernel loses to cuBLAS. A
table of measurements by card may know better what is fastest, but licenses nothing. On a CPU the
kernels are those in C++ (``cpp``).

``backends.json`` ships with the package; ``SHAMPOO_BACKEND_TABLE`` names another one, such as
``python -m benchmarks.gpu --write-table`` writes. Nothing here runs a kernel.
"""

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from shampoo.errors import shown
from shampoo.inputs import (
    MOST_INTEGER,
    check_list,
    check_object,
    is_integer,
    is_number,
    read_json,
)
from shampoo.ops.licence import REFERENCE, Licence, Row
from shampoo.ops.registry import OPS, Op, kinds_of

DTYPES = ("float32", "float64", "bfloat16", "float16")  # of what ops work on
BACKENDS = ("auto", "cuda", "triton", REFERENCE)
_MOST_SECONDS = 1e6  # of a measurement

Table = Mapping[str, Any]


def chosen() -> str:
    """The backend that ``SHAMPOO_BACKEND`` names; ``auto`` by default.

    Raises:
        ValueError: if it is none of the four.
    """
    backend = os.environ.get("SHAMPOO_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"Invalid SHAMPOO_BACKEND={shown(backend)}. Must be one of {BACKENDS}.")
    return backend


def table() -> Table:
    """The measurements behind ``auto``: of ``SHAMPOO_BACKEND_TABLE``, else those of the package.

    Raises:
        ValueError: if it cannot be read, or names a kernel that an op does not have.
    """
    return read_table(os.environ.get("SHAMPOO_BACKEND_TABLE", ""))


@functools.cache
def read_table(path: str) -> Table:
    """The table in a file, checked; the package's own for an empty path."""
    if not path:
        with resources.as_file(resources.files("shampoo.ops").joinpath("backends.json")) as own:
            return _checked(read_json(own))
    try:
        return _checked(read_json(os.path.expanduser(path)))
    except ValueError as error:
        raise ValueError(
            f"Invalid SHAMPOO_BACKEND_TABLE={shown(path)}: {error} Must be a table that"
            " `python -m benchmarks.gpu --write-table` wrote."
        ) from error


def _checked(found: Any) -> Table:
    """The table, if :func:`choose`, :func:`wanted` and :func:`describe` can use all of it."""
    table = check_object(found, "it", {"cpu", "cuda"})
    for op, kernel in check_object(table["cpu"], "cpu").items():
        _check_kernel(op, kernel, "cpu")
    for card, entry in check_object(table["cuda"], "cuda").items():
        measured = check_object(entry, f"card {shown(card)}", {"ops"})["ops"]
        for op, dtypes in check_object(measured, f"ops of card {shown(card)}").items():
            for dtype, rows in check_object(dtypes, shown(op)).items():
                for row in check_list(rows, f"{shown(dtype)} of {shown(op)}"):
                    _check_row(op, check_object(row, f"a row of {shown(op)}", {"size", "kernel"}))
    return table


def _check_row(op: str, row: Mapping[str, Any]) -> None:
    _check_kernel(op, row["kernel"], "cuda")
    size = row["size"]
    if not is_integer(size, 1, MOST_INTEGER):
        raise ValueError(f"size={shown(size)} for {op}. Must be an integer >= 1 and < 2^63.")
    for kernel, seconds in check_object(row.get("seconds", {}), f"seconds of {op}").items():
        _check_kernel(op, kernel, "cuda")
        if not (is_number(seconds, 0.0, _MOST_SECONDS) and seconds > 0.0):
            raise ValueError(
                f"seconds={shown(seconds)} of {kernel} for {op}. Must be a number > 0.0 and"
                f" <= {_MOST_SECONDS}."
            )


def _check_kernel(op: str, kernel: Any, device: str) -> None:
    if op not in OPS:
        raise ValueError(
            f"no op is named {shown(op)}: write the table again. Must be in {(*OPS,)}."
        )
    known = (*kinds_of(op, device), REFERENCE)
    if kernel not in known:
        raise ValueError(f"kernel={shown(kernel)} for {op}. Must be one of {known}.")


def choose(
    op: str,
    device: str,
    dtype: str,
    size: float,
    *,
    backend: str,
    card: str,
    table: Table,
    licence: Licence | None = None,
) -> str:
    """The kernel that runs an op.

    Args:
        op: Its name, such as ``"gram_ema_"``.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Of its data, such as ``"float32"``.
        size: Columns of the largest factor; elements for an op that works on elements.
        backend: One of ``BACKENDS``.
        card: The card's key in the table: its compute capability, such as ``"9.0"``.
        table: Of measurements.
        licence: Of the device; without one every kernel counts as passed.

    Returns:
        ``"cpp"``, ``"cuda"``, ``"triton"`` or ``"reference"``. A backend that has no kernel for
        the op leaves the reference: there is nothing else that it could name.

    """
    if device == "cpu":
        if backend == "auto":
            kernel = str(table["cpu"].get(op, REFERENCE))
            is_licensed = licence is None or (
                licence.allows_always(op, kernel) and licence.pays(op)
            )
            return kernel if is_licensed else REFERENCE
        return "cpp" if backend == "cuda" and "cpp" in kinds_of(op, "cpu") else REFERENCE
    if device != "cuda":
        return REFERENCE
    if backend != "auto":
        return backend if backend in kinds_of(op, "cuda") else REFERENCE
    rows = table["cuda"].get(card, {}).get("ops", {}).get(op, {}).get(dtype, ())
    named = _fastest(rows, size)
    if licence is None:
        return named or REFERENCE
    measured = _fastest(licence.rows.get(op, {}).get(dtype, ()), size)
    for fastest in (named, measured):
        if fastest is not None and licence.allows(op, fastest, dtype):
            return fastest
    return REFERENCE


def _fastest(rows: Sequence[Row], size: float) -> str | None:
    """The kernel of the next measured size above; beyond the last one, of the last."""
    above = [row for row in rows if row["size"] >= size]
    nearest = min(above, key=_size) if above else max(rows, key=_size, default=None)
    return None if nearest is None else str(nearest["kernel"])


def _size(row: Row) -> float:
    return float(row["size"])


def wanted(backend: str, card: str, table: Table) -> frozenset[str]:
    """The kinds of kernels that a process has to build: of ``cpp``, ``cuda`` and ``triton``.

    ``card`` is empty where there is no CUDA device. Where there is one, ``auto`` wants them all:
    its licence says which are used.
    """
    if backend == "auto":
        kinds = {kind for kind in table["cpu"].values() if kind != REFERENCE}
        return frozenset(kinds | ({"cuda", "triton"} if card else set()))
    named = {"cuda": {"cpp", "cuda"}, "triton": {"triton"}, "reference": set[str]()}
    return frozenset(named[backend])


def choices(
    op: Op, device: torch.device, backend: str, table: Table, licence: Licence | None
) -> dict[str, list[tuple[float, str]]]:
    """What :func:`choose` says of an op on a device.

    Returns:
        By dtype, ``(size, kernel)`` with sizes that ascend up to infinity: the kernel runs up to
        this size.
    """
    card = card_of(device)
    measured = [table["cuda"].get(card, {}).get("ops", {}), licence.rows if licence else {}]
    settings = {"backend": backend, "card": card, "table": table, "licence": licence}
    found = {}
    for dtype in DTYPES:
        sizes = {row["size"] for each in measured for row in each.get(op.name, {}).get(dtype, ())}
        ends = [*sorted(sizes)[:-1], math.inf]
        found[dtype] = [
            (end, choose(op.name, device.type, dtype, end, **settings))  # type: ignore[arg-type]
            for end in ends
        ]
    return found


def router(
    op: Op,
    backend: str,
    table: Table,
    licence_of: Callable[[torch.device], Licence | None] = lambda device: None,
) -> Callable[[Sequence[Any]], str]:
    """:func:`choose` for the arguments of a call on a CUDA device, whether or not it takes them."""
    places = op.places_of(op.subject)

    @functools.lru_cache(maxsize=1024)
    def remembered(dtype: torch.dtype, size: int, device: torch.device) -> str:
        name, card, licence = dtype_name(dtype), card_of(device), licence_of(device)
        settings = {"backend": backend, "card": card, "table": table, "licence": licence}
        return choose(op.name, "cuda", name, size, **settings)  # type: ignore[arg-type]

    def kernel_for(arguments: Sequence[Any]) -> str:
        subject: Tensor | Sequence[Tensor]
        subject = next(arguments[at] for at in places if arguments[at] is not None)
        first = subject if isinstance(subject, Tensor) else subject[0]
        return remembered(first.dtype, size_of(op, subject), first.device)

    return kernel_for


def size_of(op: Op, subject: Tensor | Sequence[Tensor]) -> int:
    """The size of a call: elements, or columns of the largest factor."""
    tensors = [subject] if isinstance(subject, Tensor) else subject
    if op.is_elementwise:
        return sum(tensor.numel() for tensor in tensors)
    return max(tensors[0].shape[1:], default=0)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as tables and certificates name it: ``"float32"``."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def card_of(device: torch.device) -> str:
    """The key of a device in the table: its compute capability; empty for one without."""
    if device.type != "cuda":
        return ""
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def card() -> str:
    """The key of the current CUDA device, empty if there is none."""
    if not torch.cuda.is_available():
        return ""
    return card_of(torch.device("cuda", torch.cuda.current_device()))


def describe(
    backend: str, card: str, table: Table, licence: Licence | None = None
) -> dict[str, str]:
    """For every op with kernels on a CUDA device, in words which one runs, and where it loses."""
    names = [op.name for op in OPS.values() if op.kinds("cuda")]
    if backend != "auto":
        return {
            op: choose(op, "cuda", "float32", 1, backend=backend, card=card, table=table)
            for op in names
        }
    measured = table["cuda"].get(card, {}).get("ops", {})
    said = {}
    for op in names:
        rows = measured.get(op, {}) or (licence.rows.get(op, {}) if licence else {})
        in_order = sorted(rows.get("float32", ()), key=_size)
        said[op] = "; ".join(map(_in_words, in_order)) or "reference (not yet measured here)"
    return said


def _in_words(row: Row) -> str:
    seconds: Mapping[str, float] = row.get("seconds", {})
    base = seconds.get(REFERENCE, math.nan)
    ratios = [f"{kind} {base / s:.2g}x" for kind, s in seconds.items() if kind != REFERENCE]
    return f"{row['size']}: {row['kernel']}" + (f" ({', '.join(ratios)})" if ratios else "")
