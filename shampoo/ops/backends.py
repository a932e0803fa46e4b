"""Which kernel runs an op: what ``SHAMPOO_BACKEND`` names, or what measured fastest.

On a CUDA device an op may have a kernel in CUDA C++, one in Triton, both or neither, beside its
*reference* in plain PyTorch, whose products are cuBLAS. ``cuda`` and ``triton`` name one of them.
``auto`` asks a table of measurements: for a card, an op and a dtype the seconds of every kernel at
some sizes, so it also says where a kernel loses to cuBLAS. A card that is not in the table has not
been measured, and keeps the references. On a CPU the kernels are those in C++ (``cpp``).

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
from shampoo.ops.registry import OPS, Op, kinds_of

BACKENDS = ("auto", "cuda", "triton", "reference")
REFERENCE = "reference"
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
    op: str, device: str, dtype: str, size: int, *, backend: str, card: str, table: Table
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

    Returns:
        ``"cpp"``, ``"cuda"``, ``"triton"`` or ``"reference"``. A backend that has no kernel for
        the op leaves the reference: there is nothing else that it could name.

    """
    if device == "cpu":
        if backend == "auto":
            return str(table["cpu"].get(op, REFERENCE))
        return "cpp" if backend == "cuda" and "cpp" in kinds_of(op, "cpu") else REFERENCE
    if device != "cuda":
        return REFERENCE
    if backend != "auto":
        return backend if backend in kinds_of(op, "cuda") else REFERENCE
    rows: Sequence[Mapping[str, Any]]
    rows = table["cuda"].get(card, {}).get("ops", {}).get(op, {}).get(dtype, ())
    # The measurement of the next size above; beyond the last one, the last.
    above = [row for row in rows if row["size"] >= size]
    nearest = min(above, key=_size) if above else max(rows, key=_size, default=None)
    return REFERENCE if nearest is None else str(nearest["kernel"])


def _size(row: Mapping[str, Any]) -> float:
    return float(row["size"])


def wanted(backend: str, card: str, table: Table) -> frozenset[str]:
    """The kinds of kernels that a process has to load: of ``cpp``, ``cuda`` and ``triton``.

    ``card`` is empty where there is no CUDA device.
    """
    if backend == "auto":
        kinds = {kind for kind in table["cpu"].values() if kind != REFERENCE}
        measured = table["cuda"].get(card, {}).get("ops", {})
        for dtypes in measured.values():
            kinds |= {row["kernel"] for rows in dtypes.values() for row in rows} - {REFERENCE}
        return frozenset(kinds)
    named = {"cuda": {"cpp", "cuda"}, "triton": {"triton"}, "reference": set[str]()}
    return frozenset(named[backend])


def router(op: Op, backend: str, table: Table) -> Callable[[Sequence[Any]], str]:
    """:func:`choose` for the arguments of a call on a CUDA device, whether or not it takes them."""
    places = op.places_of(op.subject)

    @functools.lru_cache(maxsize=1024)
    def remembered(dtype: torch.dtype, size: int, card: str) -> str:
        name = str(dtype).removeprefix("torch.")
        return choose(op.name, "cuda", name, size, backend=backend, card=card, table=table)

    def kernel_for(arguments: Sequence[Any]) -> str:
        subject: Tensor | Sequence[Tensor]
        subject = next(arguments[at] for at in places if arguments[at] is not None)
        tensors = [subject] if isinstance(subject, Tensor) else subject
        first = tensors[0]
        if op.is_elementwise:
            size = sum(tensor.numel() for tensor in tensors)
        else:
            size = max(first.shape[1:], default=0)
        return remembered(first.dtype, size, card_of(first.device))

    return kernel_for


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


def describe(backend: str, card: str, table: Table) -> dict[str, str]:
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
        rows = sorted(measured.get(op, {}).get("float32", ()), key=_size)
        said[op] = "; ".join(map(_in_words, rows)) or "reference (not yet measured on this card)"
    return said


def _in_words(row: Mapping[str, Any]) -> str:
    seconds: Mapping[str, float] = row.get("seconds", {})
    base = seconds.get(REFERENCE, math.nan)
    ratios = [f"{kind} {base / s:.2g}x" for kind, s in seconds.items() if kind != REFERENCE]
    return f"{row['size']}: {row['kernel']}" + (f" ({', '.join(ratios)})" if ratios else "")
