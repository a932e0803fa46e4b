"""What must hold of gradients before a step may change anything."""

import math
import operator
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from shampoo import ops
from shampoo.distributed.shard_regions import local_tensor
from shampoo.dtensor import is_dtensor
from shampoo.ops.limits import summand_limit
from shampoo.step.parameters import parameter_name

_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_PLAIN = (Parameter, Tensor)  # surely no DTensors
_PLAIN_GRADS = frozenset({Tensor})
_NAMES = "float64, float32, bfloat16 or float16"


Form = tuple[torch.Size, torch.device, torch.layout]
_FORM = operator.attrgetter("shape", "device", "layout")
_DTYPE = operator.attrgetter("dtype")


def form_of(param: Tensor) -> Form | None:
    """What the gradients of a parameter are like; None where that takes a closer look."""
    is_simple = type(param) in _PLAIN and param.device.type != "meta"
    return (param.shape, param.device, torch.strided) if is_simple else None


def are_ordinary(
    grads: Sequence[Tensor | None], present: Sequence[bool], forms: Sequence[Form | None]
) -> bool:
    """Whether gradients surely fit their parameters, seen from far: every step asks it of all.

    Args:
        grads: of all planned parameters.
        present: which of them are there.
        forms: of the parameters.
    """
    there, expected = list(grads), list(forms)
    if False in present:
        there, expected = list(compress(grads, present)), list(compress(forms, present))
    return (
        {*map(type, there)} <= _PLAIN_GRADS
        and {*map(_DTYPE, there)} <= _DTYPES
        and list(map(_FORM, there)) == expected
    )


def check_gradients(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuses what cannot be a step, before there is even a plan of one.

    torch looks at a gradient when it is assigned. What a parameter becomes through ``.data``
    afterwards it does not see, and kernels that count elements would read a gradient of another
    shape as if it were one of the parameter's.

    Args:
        groups: ``optimizer.param_groups``.

    Raises:
        RuntimeError: for a gradient unlike its parameter in shape, device, layout or placement, or
            of a dtype that is not floating point; for a parameter on ``"meta"``, of such a dtype,
            or one that only inference mode may write. Names the parameter, both values and the
            remedy.
    """
    may_write = torch.is_inference_mode_enabled()
    for index, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            grad, device = param.grad, param.device
            if grad is None:
                is_fit = device.type != "meta" or not param.requires_grad
            else:
                is_fit = (
                    grad.shape == param.shape
                    and grad.dtype in _DTYPES
                    and grad.layout is torch.strided
                    and grad.device == device
                    and device.type != "meta"
                    and (may_write or not param.is_inference())
                    and param.dtype in _DTYPES
                )
                if is_fit and not (type(grad) is Tensor and type(param) in _PLAIN):
                    is_fit = _is_placed_alike(param, grad)
            if not is_fit:
                complaint = _complaint(param, grad, parameter_name(group, index, position))
                raise RuntimeError(f"{complaint} Nothing has changed in this step.")


def _is_placed_alike(param: Tensor, grad: Tensor) -> bool:
    """Whether both are plain, or DTensors of one shape that are cut alike into such parts."""
    if not is_dtensor(param) or not is_dtensor(grad):
        return is_dtensor(param) == is_dtensor(grad)
    if param.placements != grad.placements or param.device_mesh != grad.device_mesh:
        return False
    part, other = local_tensor(param), local_tensor(grad)
    return part.shape == other.shape and other.layout is torch.strided


def _complaint(param: Tensor, grad: Tensor | None, name: str) -> str:
    """Why a parameter cannot step by a gradient, and what to do."""
    if param.device.type == "meta" or grad is None:
        return (
            f"Shampoo cannot step {name}: it is on device meta, without data. Materialise the model"
            " first (model.to_empty(device=...), then initialise or load it). To estimate memory"
            " without data, build model and optimizer under"
            " torch._subclasses.fake_tensor.FakeTensorMode()."
        )
    if is_dtensor(param) and is_dtensor(grad) and grad.shape == param.shape:
        if param.placements != grad.placements or param.device_mesh != grad.device_mesh:
            return (
                f"The gradient of {name} has placements {grad.placements} on {grad.device_mesh},"
                f" the parameter {param.placements} on {param.device_mesh}. Redistribute it before"
                " step()."
            )
        param, grad, name = local_tensor(param), local_tensor(grad), f"the local part of {name}"
    if is_dtensor(param) != is_dtensor(grad):
        kinds = ["a DTensor" if is_dtensor(each) else "plain" for each in (grad, param)]
        return (
            f"The gradient of {name} is {kinds[0]}, the parameter {kinds[1]}. Distribute both"
            " alike: backward() makes such gradients."
        )
    if grad.layout != torch.strided:
        kind = "sparse" if "sparse" in str(grad.layout) else f"{grad.layout}"
        return (
            f"Shampoo does not support {kind} gradients ({name}). Give that parameter its own"
            " torch.optim.SparseAdam, or make the layer dense (sparse=False)."
        )
    if grad.shape != param.shape:
        return (
            f"The gradient of {name} has shape {tuple(grad.shape)}, the parameter"
            f" {tuple(param.shape)}. It is that of an earlier shape, if the parameter was changed"
            " through .data: call zero_grad() then, and backward() anew."
        )
    if grad.device != param.device:
        return (
            f"The gradient of {name} is on {grad.device}, the parameter on {param.device}. Move it"
            " to the parameter, or call zero_grad() and backward() again after the model was moved."
        )
    if param.is_inference() and not torch.is_inference_mode_enabled():
        return (
            f"Inplace update to inference tensor outside InferenceMode is not allowed ({name})."
            " Make it a normal parameter: nn.Parameter(parameter.clone())."
        )
    both = f"The gradient of {name} has dtype {grad.dtype}, the parameter {param.dtype}."
    return f"{both} Must be {_NAMES}, not necessarily the same: convert what is not."


def largest_magnitudes(grads: Sequence[Tensor]) -> Tensor:
    """``max |g|`` of every gradient, [m] float64: NaN or Inf if it holds one, 0 if it is zero.

    One pass over the gradients. It must end before the first of them moves anything, so the pass
    that gathers them, segment after segment, comes too late to do this on the way.
    """
    magnitudes = torch.empty(len(grads), dtype=torch.float64, device=grads[0].device)
    ops.magnitudes_(magnitudes, grads)
    return magnitudes


def with_decay(magnitudes: Tensor, weights: Sequence[Tensor], decays: Sequence[float]) -> Tensor:
    """``max |g| + decay max |W|``: what the elements of ``g + decay W`` cannot exceed.

    Only with coupled decay is there another pass, over the weights that it brings in.

    Args:
        magnitudes: [m] float64, of the gradients; returned where no decay is coupled.
        weights: m tensors, none of them empty.
        decays: the coupled decay of each.
    """
    decayed = [index for index, decay in enumerate(decays) if decay != 0.0]
    if not decayed:
        return magnitudes
    largest = largest_magnitudes([weights[index] for index in decayed]).to(magnitudes.device)
    shares = torch._foreach_mul(largest.unbind(), [decays[index] for index in decayed])
    reach = magnitudes.clone()
    places = reach.unbind()
    torch._foreach_add_([places[index] for index in decayed], shares)
    return reach


def square_limit(numel: int, dtype: torch.dtype) -> float:
    """The magnitude from which statistics of ``dtype`` cannot hold the squares of a gradient.

    2.2e15 in float32, divided by the root of the number of elements. The squares of any number of
    steps add up below it, with ``betas[1] = 1`` and AdaGrad too; one finite gradient beyond could
    leave Inf in the factors and moments for ever.
    """
    return math.sqrt(summand_limit(dtype) / numel)
