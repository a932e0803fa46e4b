"""The record of an op, and what torch is told of it.

Everything that is known of one op stands in one :class:`Op`: the dispatcher, the choice of kernels,
benchmarks and tests read it there. The records themselves are in :mod:`shampoo.ops`.
"""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Run = Callable[..., None]
Supports = Callable[..., bool]

library = torch.library.Library("shampoo", "DEF")  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Cpp:
    """A kernel for the CPU in C++: csrc/bindings.cpp registers it under the name of the op."""

    kind: ClassVar[str] = "cpp"
    device: ClassVar[str] = "cpu"

    def load(self, op: "Op", overload: str) -> tuple[Run, Supports | None]:
        """The op as torch calls it, and no test."""
        return getattr(op.packet, overload or "default"), None


@dataclass(frozen=True)
class Cuda:
    """A kernel in CUDA C++, which has a torch name of its own so that it can be chosen by size.

    Attributes:
        supports: Whether the kernel takes the arguments of a call. By default it takes them all.
        op: The op that the kernel belongs to, if it serves another one too: ``cuda_<op>`` is its
            name.
    """

    supports: Supports | None = None
    op: str = ""
    kind: ClassVar[str] = "cuda"
    device: ClassVar[str] = "cuda"

    def load(self, op: "Op", overload: str) -> tuple[Run, Supports | None]:
        """The kernel as torch calls it, and its test of arguments."""
        packet = getattr(torch.ops.shampoo, f"cuda_{self.op or op.name}")
        return getattr(packet, overload or "default"), self.supports


@dataclass(frozen=True)
class Triton:
    """A kernel in Triton: one function for an op and its overload.

    Attributes:
        module: Of :mod:`shampoo.kernels.triton`. It has a function with the name of the op, and
            ``supports``, which says whether that takes the arguments of a call.
    """

    module: str
    kind: ClassVar[str] = "triton"
    device: ClassVar[str] = "cuda"

    def load(self, op: "Op", overload: str) -> tuple[Run, Supports | None]:
        """The launcher of the kernel, and its test of arguments."""
        home: Any = importlib.import_module(f"shampoo.kernels.triton.{self.module}")
        return getattr(home, op.name), home.supports


@dataclass(frozen=True)
class Op:
    """All that is known of one op.

    Ops write into tensors they are given and return nothing.

    Attributes:
        schema: What torch is told: the name, the arguments, and which of them are written.
        reference: The op in plain PyTorch, on any device, with the arguments of the schema. It
            says what the op means, and its docstring is that of the op.
        subject: The argument whose dtype and size decide which kernel is fastest: the first of
            several that is there. Of a list, the dtype of the first tensor and the size of all.
        moving: The arguments of type ``float`` that may be tensors on the device instead.
        is_elementwise: Whether the size is the number of elements; otherwise it is the number of
            columns of the subject.
        kernels: The kernels beside the reference, at most one of a kind.
        by_stack: The arguments that are lists with one entry for each of several stacks of blocks.
            A kernel is chosen for every stack by itself: bits do not depend on what else is in a
            call. ``grads`` is among them: the blocks.
        by_mode: The lists with one entry for every mode of every stack.
    """

    schema: str
    reference: Run
    subject: tuple[str, ...]
    moving: tuple[str, ...] = ()
    is_elementwise: bool = False
    kernels: tuple[Cpp | Cuda | Triton, ...] = ()
    by_stack: tuple[str, ...] = ()
    by_mode: tuple[str, ...] = ()

    @functools.cached_property
    def name(self) -> str:
        """The name of the op, such as ``"gram_ema_"``."""
        return self.schema.partition("(")[0]

    @functools.cached_property
    def arguments(self) -> tuple[str, ...]:
        """The names of the arguments, in order."""
        inside = self.schema[self.schema.index("(") + 1 : self.schema.index(") ->")]
        return tuple(re.sub(r"=.*", "", part.split()[-1]) for part in inside.split(","))

    @functools.cached_property
    def outputs(self) -> tuple[str, ...]:
        """The names of the arguments that are written."""
        inside = self.schema[self.schema.index("(") + 1 : self.schema.index(") ->")]
        parts = re.findall(r"\([a-z]!\)[^ ]* (\w+)", inside)
        return tuple(parts)

    def places_of(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """Where arguments stand among all of them."""
        return tuple(self.arguments.index(name) for name in names)

    def stacks_of(self, arguments: Sequence[Any]) -> list[list[Any]]:
        """A call on lists of stacks as calls on one stack each, in the same order.

        Raises:
            ValueError: if a list is longer or shorter than there are stacks, or their modes.
        """
        lists, modes = self.places_of(self.by_stack), self.places_of(self.by_mode)
        grads = arguments[self.arguments.index("grads")]
        counts = dict.fromkeys(lists, (len(grads), "stack"))
        counts |= dict.fromkeys(modes, (sum(grad.dim() - 1 for grad in grads), "mode of a stack"))
        for place, (count, each) in counts.items():
            if len(arguments[place]) != count:
                raise ValueError(
                    f"Invalid {self.arguments[place]}: {len(arguments[place])} entries. Must be"
                    f" {count}, one for each {each}."
                )
        calls, begin = [], 0
        for index, grad in enumerate(grads):
            call, end = list(arguments), begin + grad.dim() - 1
            for place in lists:
                call[place] = [arguments[place][index]]
            for place in modes:
                call[place] = list(arguments[place][begin:end])
            calls.append(call)
            begin = end
        return calls

    def joined(self, calls: Sequence[Sequence[Any]]) -> list[Any]:
        """Calls that differ in their stacks alone as one."""
        arguments = list(calls[0])
        for place in self.places_of(self.by_stack + self.by_mode):
            arguments[place] = [each for call in calls for each in call[place]]
        return arguments

    @functools.cached_property
    def schemas(self) -> Mapping[str, str]:
        """The schema of every overload: of ``""``, and of ``"Tensor"`` if numbers may move.

        The overload takes every moving number as a tensor.
        """
        if not self.moving:
            return {"": self.schema}
        tensors = re.sub(rf"float ({'|'.join(self.moving)})\b", r"Tensor \1", self.schema)
        tensors = re.sub(r"Tensor (\w+)=[\d.]+", r"Tensor? \1=None", tensors)
        return {"": self.schema, "Tensor": tensors.replace("(", ".Tensor(", 1)}

    def full_name(self, overload: str) -> str:
        """The name of an overload, such as ``"gram_ema_.Tensor"``."""
        return f"{self.name}.{overload}" if overload else self.name

    @property
    def packet(self) -> Any:
        """The op and its overload as torch knows them."""
        return getattr(torch.ops.shampoo, self.name)

    def kinds(self, device: str) -> tuple[str, ...]:
        """The kinds of kernels for ``"cpu"`` or ``"cuda"``, without the reference."""
        return tuple(kernel.kind for kernel in self.kernels if kernel.device == device)

    @property
    def has_cuda_name(self) -> bool:
        """Whether a kernel in CUDA C++ is registered as ``cuda_<name>``."""
        return any(isinstance(kernel, Cuda) and not kernel.op for kernel in self.kernels)

    def load(self, kind: str, overload: str = "") -> tuple[Run, Supports | None]:
        """A kernel of the op, and what says whether it takes arguments; None: it takes all.

        Raises:
            ValueError: if the op has no kernel of this kind.
        """
        if kind == "reference":
            return self.reference, None
        for kernel in self.kernels:
            if kernel.kind == kind:
                return kernel.load(self, overload)
        known = ("reference", *(kernel.kind for kernel in self.kernels))
        raise ValueError(f"Invalid kind={kind!r} for {self.name}. Must be one of {known}.")

    @property
    def doc(self) -> str:
        """The docstring of the reference, and what of the record concerns a caller."""
        source = f"{self.reference.__module__}.{self.reference.__qualname__}"
        lines = [inspect.getdoc(self.reference) or "", "", f"Schema: ``{self.schema}``."]
        if self.moving:
            lines.append(
                f"Moving numbers: {', '.join(self.moving)}. Each is a float, or a 0-d float64"
                " tensor on the device."
            )
        kinds = ", ".join(kernel.kind for kernel in self.kernels) or "none"
        lines.append(f"Reference: :func:`{source}`. Kernels beside it: {kinds}.")
        return "\n".join(lines)


OPS: dict[str, Op] = {}
"""Every op that was declared, by name."""


def kinds_of(name: str, device: str) -> tuple[str, ...]:
    """The kinds of kernels of an op on a device; none if there is no op of this name."""
    return OPS[name].kinds(device) if name in OPS else ()


def _no_output(*_: object) -> None:
    """What tracing needs to know of every op: nothing comes out, and tables are not read."""


def declare(op: Op) -> Callable[..., Any]:
    """Tells torch of an op, and returns what calls it.

    The op starts out as its reference everywhere, and has one fake that does nothing, with which
    torch.compile traces it.
    """
    OPS[op.name] = op
    for overload, schema in op.schemas.items():
        name = op.full_name(overload)
        library.define(schema)  # type: ignore[no-untyped-call]
        if op.has_cuda_name:
            library.define(f"cuda_{schema}")  # type: ignore[no-untyped-call]
        library.impl(name, op.reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"shampoo::{name}", _no_output, lib=library)
    call: Any = _with_moving_numbers(op) if op.moving else op.packet.default
    call.__doc__ = op.doc
    return call  # type: ignore[no-any-return]


def _with_moving_numbers(op: Op) -> Run:
    """A function that calls an op, or its overload ``Tensor`` if a moving number is a tensor.

    A step that a graph replays cannot take its moving numbers from the host: there they are 0-d
    float64 tensors beside the others. The choice is made here, since the dispatcher's own would
    turn such a tensor into a float, and wait for the device. Where one of them is a tensor, all
    become tensors.
    """
    plain, on_device = op.packet.default, op.packet.Tensor
    names, places = op.moving, op.places_of(op.moving)

    # With floats this is the only frame between a step and torch: every step pays for it.
    @functools.wraps(op.reference)
    def call(*given: Any, **named: Any) -> None:
        number = None
        for place in places:
            if place < len(given) and isinstance(given[place], Tensor):
                number = given[place]
                break
        if named and number is None:
            for name in names:
                if name in named and isinstance(named[name], Tensor):
                    number = named[name]
                    break
        if number is None:
            plain(*given, **named)
            return
        values = list(given)
        for place in places:
            if place < len(given):
                values[place] = _as_tensor(given[place], number)
        for name in names:
            if name in named:
                named[name] = _as_tensor(named[name], number)
        on_device(*values, **named)

    return call


def _as_tensor(number: Any, like: Tensor) -> Tensor:
    """A number as a tensor on the device of another one."""
    if isinstance(number, Tensor):
        return number
    if type(like) is Tensor and like.device.type == "cpu":  # and so is no fake
        return _constant(float(number))
    # Not torch.tensor, whose copy to a GPU waits for it.
    return torch.full((), float(number), dtype=torch.float64, device=like.device)


@functools.lru_cache(maxsize=256)
def _constant(number: float) -> Tensor:
    """A number on the host as a tensor, which nobody writes to."""
    return torch.tensor(number, dtype=torch.float64, device="cpu")


def has_kernel(name: str, device: str) -> bool:
    """Whether a name of an op has a kernel for a dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"shampoo::{name}", device)
