"""Steps that nobody computes: compiled callers, and fake tensors, which have shapes and no values.

A step reads on the host what decides it: which step it is, whether gradients are finite, whether
roots are sound. A compiler would trace all of that again for every answer, so it is told to call
the step as it is. A fake tensor has no answer: the numbers that the host itself has put into
tensors keep their values beside them, everything else is what it is in an ordinary step. Kernels
are not run, as every op has a fake, but all memory of a step is asked for as in a real one, which
is what torch's tools for memory estimation count.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from shampoo.distributed.shard_regions import local_tensor

_aten = torch.ops.aten
_READ = _aten._local_scalar_dense.default
_MADE = (_aten.zeros.default, _aten.ones.default, _aten.full.default, _aten.arange.default)

# Of fake tensors, what the host has put into them. Steps are counted there from call to call.
_values: Any = WeakIdKeyDictionary()


def run_eagerly(kind: type[Optimizer]) -> None:
    """Lets ``torch.compile`` call ``step()`` and ``zero_grad()`` of a class as they are.

    Once an optimizer has been made, not where the class is: this imports the compiler, which takes
    a second, and torch does with its first optimizer what it then wraps into ``step()``.
    """
    if not getattr(kind.step, "_torchdynamo_disable", False):
        reason = "what a Shampoo step does depends on values: it always runs eagerly"
        eager = torch.compiler.disable(kind.step, reason=reason)  # type: ignore[no-untyped-call]
        kind.step = eager  # type: ignore[method-assign]
        kind.zero_grad = torch.compiler.disable(  # type: ignore[method-assign, no-untyped-call]
            kind.zero_grad, reason="as torch's own, which no compiler enters"
        )


def answering(params: Sequence[Tensor]) -> AbstractContextManager[object]:
    """Answers what a step reads on the host, if the parameters are fake."""
    if not params or type(params[0]) in _REAL:
        return _NOTHING
    first = local_tensor(params[0])
    return _answering(first) if isinstance(first, FakeTensor) else _NOTHING


_NOTHING = nullcontext()
_REAL = {Tensor, torch.nn.Parameter}  # what most are; a fake one, or a shard, has a type of its own


@contextmanager
def _answering(first: FakeTensor) -> Iterator[None]:
    with ExitStack() as modes:
        if active_fake_mode() is None:
            modes.enter_context(first.fake_mode)  # or what a step makes would be real memory
        modes.enter_context(_Answers())  # type: ignore[no-untyped-call]
        yield


class _Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows what fake tensors would hold, as far as a step depends on it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _READ:
            return _answer(args[0])
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_known = all(tensor in _values or not isinstance(tensor, FakeTensor) for tensor in given)
        if is_known and (bool(given) or func in _MADE) and _is_on_host(kwargs):
            return _run_both(func, args, kwargs)
        if func is _aten.nonzero.default:  # asks for what has failed: nothing has
            return torch.empty((0, args[0].dim()), dtype=torch.int64, device=args[0].device)
        out = func(*args, **kwargs)
        if func.overloadpacket is _aten.any:  # so does this, where "all" asks for what is well
            with _disable_current_modes():
                _values[out] = torch.zeros(out.shape, dtype=torch.bool)
        return out


def _is_on_host(options: dict[str, Any]) -> bool:
    """Whether what an op makes is a table of the host, instead of state: an integer on a CPU."""
    dtype, device = options.get("dtype"), options.get("device")
    is_counted = dtype is None or not (dtype.is_floating_point or dtype.is_complex)
    return is_counted and (device is None or torch.device(device).type == "cpu")


def _run_both(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an op makes of fake tensors whose values are known: fake, with its value beside it."""
    real_args, real_kwargs = tree_map_only(
        Tensor, lambda tensor: _values.get(tensor, tensor), (args, kwargs)
    )
    with _disable_current_modes():
        truth = func(*real_args, **real_kwargs)
    if torch.Tag.dynamic_output_shape in func.tags:  # no fake could say it
        out = torch.empty(truth.shape, dtype=truth.dtype, device=truth.device)
    else:
        out = func(*args, **kwargs)
    for fake, value in zip(tree_leaves(out), tree_leaves(truth), strict=True):
        if isinstance(fake, FakeTensor):
            _values[fake] = value
    return out


def _answer(tensor: Tensor) -> bool | int | float:
    """What a fake tensor of one element holds; if nobody knows, what an ordinary step would read.

    That is True, no failures to count, and a number in the range of magnitudes, lr and betas.
    """
    value = _values.get(tensor, getattr(tensor, "constant", None))
    if value is not None:
        with _disable_current_modes():
            known: bool | int | float = value.item()
            return known
    if tensor.dtype == torch.bool:
        return True
    return 0.5 if tensor.dtype.is_floating_point else 0
