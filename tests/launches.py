"""What a step would launch on a GPU, counted without one, by the shapes alone.

Steps run on the device of ``far.py`` with nothing under its tensors (``meta``). Ops go to the
launchers of the package itself: those in Triton with a counter in place of each kernel, those in
CUDA C++ as built for the host, which count and run nothing. An operator of torch counts as one
launch unless it only makes a view, or asks for memory; of those that take lists, as many as torch
cuts them into.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from far import DEVICE, Far, FarTensor
from host_build import HostOps
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from shampoo.kernels.reference.keep_roots import PASSED
from shampoo.ops import OPS, backends
from shampoo.ops.registry import Op
from shampoo.ops.routes import routes_of
from shampoo.ops.transit import Letter
from shampoo.roots import size_classes

ROOT = Path(__file__).parents[1]
TRITON = ("diagonal", "gram", "keep_roots", "minimax", "precondition", "root_check", "split_fp16")
TRITON += ("symmetric_gemm",)
NOTHING: backends.Table = {"cpu": {}, "cuda": {}}
# Which kernels run an op: the first of these that it has, else its reference.
BACKENDS = {
    "auto": ("cuda", "triton"),  # all that there are, as where all pass and win
    "triton": ("triton",),
    "cuda": ("cuda",),
    "reference": (),
}
_LAUNCH_NOTHING = ("empty", "new_empty", "lift_fresh", "detach", "promote_types")
_LISTS = {"_foreach": 64, "stack": 128, "cat": 128}  # tensors in a launch


class Launches(TorchDispatchMode):
    """Counts what would be launched while :attr:`is_counting`.

    Args:
        backend: a key of ``BACKENDS``.
        has_classes: whether size classes win, where there are kernels for them.

    Attributes:
        counts: by ``(name, line of the package that asks for it)``.
    """

    def __init__(self, backend: str = "auto", has_classes: bool = True) -> None:
        super().__init__()
        self.kinds = BACKENDS[backend]
        self.has_classes = has_classes and "triton" in self.kinds
        self.is_counting = False
        self.counts: Counter[tuple[str, str]] = Counter()
        self._host = HostOps() if "cuda" in self.kinds else None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Launches:
        self._stack.enter_context(_patched(Far, "memory", torch.device("meta")))
        for name, way in (("__init__", _post), ("has_arrived", lambda _: True), ("read", _read)):
            self._stack.enter_context(_patched(Letter, name, way))
        padded = _patched(size_classes, "is_padded", lambda *how, **_: self.has_classes)
        self._stack.enter_context(padded)
        for module in map(_triton, TRITON if "triton" in self.kinds else ()):
            for name in [each for each in vars(module) if each.endswith("_kernel")]:
                self._stack.enter_context(_patched(module, name, _Kernel(name, self)))
        if self._host is not None:
            self._host.module.set_dry(True)
            self._stack.callback(self._host.module.set_dry, False)
        self._stack.enter_context(Far())
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        self._stack.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "shampoo":
            return self._run(func, args)
        if self._is_launch(func, args, kwargs):
            self.add(func.overloadpacket.__name__, _launches_of(func, args))
        return func(*args, **kwargs)

    def _run(self, func: Any, args: Sequence[Any]) -> None:
        if not self.is_counting:
            return
        op = OPS[func.overloadpacket.__name__]
        kind = next((kind for kind in self.kinds if self._has(kind, op)), "reference")
        given = tree_map_only(FarTensor, lambda each: each.under, list(args))
        if kind == "cuda":
            module = self._host.module
            before = module.launches()
            getattr(self._host, op.name)(*given)
            self.add(op.name, module.launches() - before)
            return
        with _OnMeta(self):
            if kind == "reference":
                op.reference(*given)
                return
            routes_of(op, "triton", NOTHING, {"triton"})[op.full_name(_overload(func))](*given)

    def _has(self, kind: str, op: Op) -> bool:
        return kind in op.kinds("cuda") and (kind != "cuda" or hasattr(self._host, op.name))

    def _is_launch(self, func: Any, args: Any, kwargs: Any) -> bool:
        there = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FarTensor)]
        is_there = bool(there) or torch.device(kwargs.get("device") or "cpu") == DEVICE
        return is_there and _does_work(func)

    def add(self, name: str, count: int = 1) -> None:
        if self.is_counting:
            self.counts[name, _line()] += count

    def total(self) -> int:
        return sum(self.counts.values())

    def by_name(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for (name, _), count in self.counts.items():
            found[name] += count
        return found


class _OnMeta(TorchDispatchMode):
    """Counts what a launcher asks torch for."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, out))
        is_there = any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves)
        if is_there and _does_work(func):
            self.launches.add(func.overloadpacket.__name__, _launches_of(func, args))
        return out


class _Kernel:
    """Stands for a kernel in Triton."""

    def __init__(self, name: str, launches: Launches) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: Sequence[int]) -> Any:
        assert all(extent > 0 for extent in grid)
        return lambda *arguments, **constants: self.launches.add(self.name)


def _triton(name: str) -> Any:
    return importlib.import_module(f"shampoo.kernels.triton.{name}")


@contextlib.contextmanager
def _patched(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def _post(letter: Any, values: Tensor) -> None:
    """What every letter says: all gradients are fit, all blocks are ready, all roots passed."""
    is_outcome = values.dtype == torch.uint8
    letter.values = torch.full(values.shape, PASSED if is_outcome else 1, dtype=values.dtype)


def _read(letter: Any) -> Tensor:
    return letter.values


def _overload(func: Any) -> str:
    return "" if func._overloadname == "default" else func._overloadname


def _does_work(func: Any) -> bool:
    name = func.overloadpacket.__name__
    return not func.is_view and not name.startswith(_LAUNCH_NOTHING)


def _launches_of(func: Any, args: Sequence[Any]) -> int:
    name = func.overloadpacket.__name__
    most = next((most for word, most in _LISTS.items() if name.startswith(word)), None)
    return 1 if most is None else -(-len(args[0]) // most)


def _line() -> str:
    """The innermost line of a step that asks: not of an op."""
    frame = sys._getframe()
    for each, number in traceback.walk_stack(frame):
        path = Path(each.f_code.co_filename)
        is_of_a_step = not {"ops", "triton", "reference"} & {*path.parts}
        if path.is_relative_to(ROOT / "shampoo") and is_of_a_step:
            return f"{path.relative_to(ROOT / 'shampoo')}:{number}"
    return "?"


def parameter(shape: Sequence[int]) -> Parameter:
    """A parameter there without values, with a gradient."""
    made = Parameter(FarTensor(torch.empty(shape, device="meta")))
    made.grad = FarTensor(torch.empty(shape, device="meta"))
    return made
