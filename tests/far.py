"""A device of its own, of type ``far``, that refuses to be read: what a GPU is to the host.

Its tensors have no memory that the host can reach: every operator on them runs in :class:`Far`, on
tensors that lie under them. Whatever would tell the host a value raises ``HostReadError``, as
``torch.cuda.set_sync_debug_mode("error")`` does on a GPU: numbers, sizes that depend on values, and
copies to the host. What travels in a :class:`shampoo.ops.transit.Letter` is on its way for a while.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tape import READS, HostReadError
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from shampoo import ops
from shampoo.ops.transit import Letter

aten = torch.ops.aten
# Those that wait for a GPU beside those that a capture meets.
WAITS = READS | {
    aten.masked_select,
    aten.nonzero_numpy,
    aten.argwhere,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.unique_dim_consecutive,
    aten.bincount,
    aten.allclose,
    aten.linalg_eigh,
    aten.linalg_inv_ex,
    aten.linalg_cholesky_ex,
    aten._linalg_svd,
    ops.eigh_.overloadpacket,
}
_MASKS = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class _Module:
    """What torch asks of the module of a device."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return False  # or torch.distributed would stage the checkpoints of later tests through it

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16]


def _device() -> torch.device:
    if torch._C._get_privateuse1_backend_name() != "far":
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend("far", backend_module=_Module())
    return torch.device("far", 0)


DEVICE = _device()


class FarTensor(Tensor):
    """A tensor there. ``under`` is what lies under it, which only a test looks at."""

    under: Tensor

    @staticmethod
    def __new__(cls, under: Tensor):
        made = Tensor._make_wrapper_subclass(
            cls,
            under.shape,
            strides=under.stride(),
            storage_offset=under.storage_offset(),
            dtype=under.dtype,
            device=DEVICE,
        )
        made.under = under
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def tolist(self):
        raise HostReadError("tolist")

    def numpy(self, *, force: bool = False):
        raise HostReadError("numpy")

    def __repr__(self) -> str:
        return f"FarTensor({tuple(self.shape)})"


class Far(TorchDispatchMode):
    """The device, while a test uses it: makes what is asked for on it.

    Attributes:
        refuses_copies: whether what comes from the host must come without waiting.
        memory: where what lies under its tensors is: on "meta", nothing is computed.
    """

    refuses_copies = True
    memory = torch.device("cpu")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def far(values: Tensor) -> FarTensor:
    """A copy of a tensor, there."""
    return FarTensor(values.detach().clone())


def near(value: Tensor) -> Tensor:
    """What lies under a tensor, wherever it is: for a test, which may look."""
    return value.under if isinstance(value, FarTensor) else value


def parameter(values: Tensor) -> Parameter:
    return Parameter(far(values))


def _is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type == "far"


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FarTensor)]
    asked = kwargs.get("device")
    packet = func.overloadpacket
    if not given and not _is_far(asked):
        return func(*args, **kwargs)
    if given:
        _refuse(func, args, kwargs)
    elif packet is aten._to_copy:
        _refuse_wait(str(func), args[0], kwargs.get("non_blocking", False))
    unwrapped, named = tree_map_only(FarTensor, lambda each: each.under, (args, kwargs))
    if asked is not None:
        named["device"] = Far.memory if _is_far(asked) else torch.device("cpu")
    out = func(*unwrapped, **named)
    if packet is aten._to_copy and given and asked is not None and not _is_far(asked):
        return out  # a copy that was let through
    known = {id(each.under): each for each in given}

    def wrap(tensor: Tensor) -> Tensor:
        # What was written in place comes back as it came in.
        return known[id(tensor)] if id(tensor) in known else FarTensor(tensor)

    return tree_map_only(Tensor, wrap, out)


def _refuse_wait(name: str, source: Tensor, non_blocking: bool) -> None:
    """A copy to the device waits for it as well, unless it is told not to."""
    is_from_host = not isinstance(source, FarTensor) and source.dim() > 0
    if is_from_host and not non_blocking and Far.refuses_copies:
        raise HostReadError(f"{name} from the host, not non_blocking")


def _refuse(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises for what would tell the host a value."""
    packet = func.overloadpacket
    name = str(func)
    if packet in WAITS:
        raise HostReadError(name)
    if packet is aten._to_copy and not _is_far(kwargs.get("device", DEVICE)):
        raise HostReadError(f"{name} to {kwargs['device']}")
    if packet is aten.copy_:
        if not isinstance(args[0], FarTensor):
            raise HostReadError(f"{name} into memory of the host")
        _refuse_wait(name, args[1], args[2] if len(args) > 2 else False)
    if packet in _MASKS:
        for index in args[1]:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                raise HostReadError(f"{name} by a mask")
    if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
        raise HostReadError(f"{name} without output_size")
    for argument, value in zip(func._schema.arguments, args, strict=False):
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        is_here = isinstance(value, Tensor) and not isinstance(value, FarTensor)
        if is_written and is_here and not packet.__name__.startswith("magnitudes"):
            raise HostReadError(f"{name} writes into memory of the host")


class Post:
    """Carries letters. A step that is under way waits for none that it has sent itself.

    Args:
        delay: how many steps a letter is on its way.
    """

    def __init__(self, delay: int) -> None:
        self.delay = delay
        self.now = 0
        self.waited = 0  # how often the host has waited for one that was sent before

    def install(self, monkeypatch: Any) -> None:
        post = self

        def send(letter: Any, values: Tensor) -> None:
            letter.sent = post.now
            letter.is_far = isinstance(values, FarTensor)
            letter.values = near(values).clone()

        def has_arrived(letter: Any) -> bool:
            return not letter.is_far or letter.sent + post.delay <= post.now

        def read(letter: Any) -> Tensor:
            if not has_arrived(letter):
                if letter.sent == post.now:
                    raise HostReadError("waits for what this step has sent")
                post.waited += 1
            return letter.values

        monkeypatch.setattr(Letter, "__init__", send)
        monkeypatch.setattr(Letter, "has_arrived", has_arrived)
        monkeypatch.setattr(Letter, "read", read)
