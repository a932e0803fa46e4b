"""CUDA graphs for a machine without a GPU: a tape of operators that runs again without Python.

As a graph does, recording leaves all memory as it was, and a replay repeats the same operators on
the same memory: what the host read or decided while recording stays as it was. Reading the device
while recording is an error, as it is in a capture.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shampoo import ops

aten = torch.ops.aten
# Those that wait for a GPU: they tell the host a number, or the size of what they return.
READS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten._linalg_eigh,
    aten.linalg_eigh,
    ops.eigh_.overloadpacket,
}
HOST_TABLES = (torch.int32, torch.int64)  # tiles, runs and slots lie on the host on a GPU too


class HostReadError(AssertionError):
    """Something asked for the contents of a tensor."""


class _NoLists(TorchFunctionMode):
    """Finds what a CPU reads without an operator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu) and args[0].dtype not in HOST_TABLES:
            raise HostReadError(f"{func.__name__} of {args[0].dtype}, {tuple(args[0].shape)}")
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Records the operators that run inside ``with``; :meth:`replay` runs them again."""

    recording = False

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Any, Any]] = {}

    def __enter__(self):
        Tape.recording = True
        return super().__enter__()

    def __exit__(self, *details):
        super().__exit__(*details)
        Tape.recording = False
        for storage, saved in self._before.values():
            storage.copy_(saved)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket in READS:
            raise HostReadError(str(func))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._save(argument, value)
        for argument in func._schema.arguments:
            self._save(argument, kwargs.get(argument.name))
        out = func(*args, **kwargs)
        old = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        self._made |= {t.untyped_storage().data_ptr() for t in _tensors(out)} - old
        self._calls.append((func, args, kwargs, out))
        return out

    def _save(self, argument, value) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in _tensors(value):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._made:
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def borrowed(self) -> list[StorageWeakRef]:
        """The memory that a replay works on and that was there before, which no graph keeps."""
        read = [t.untyped_storage() for call in self._calls for t in _tensors(call[1:3])]
        return [StorageWeakRef(s) for s in read if s.data_ptr() not in self._made]

    @torch.no_grad()
    def replay(self) -> None:
        """Runs every operator again, into the memory of the recording."""
        for func, args, kwargs, out in self._calls:
            for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def record_tape(iteration: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """What :func:`shampoo.replay.record_graph` does, on the CPU."""
    with _NoLists(), Tape() as tape:
        result = iteration()
    return tape.replay, result
