"""Version counters: how autograd notices that a parameter has moved.

A backward pass through a graph made before a step would use weights that are no longer there. torch
refuses it if the counter of a saved tensor has changed, and what its own functions write in place
they count. Our kernels write through pointers, below all of that, so a step counts for them: once,
whichever kernels and distributors have moved the parameters.
"""

from collections.abc import Sequence
from itertools import compress

from torch import Tensor
from torch.autograd.graph import increment_version

from shampoo.distributed.distributor import StepInputs


def mark_moved(params: Sequence[Tensor], step: StepInputs) -> None:
    """Says that a step has moved what has a gradient.

    Args:
        params: the planned parameters. A DTensor counts for itself, and so does its local tensor:
            either may have been saved.
        step: what was taken, in the order of ``params``.
    """
    moved = list(compress(params, step.present))
    if step.params is not params:
        moved += [
            local
            for param, local, is_here in zip(params, step.params, step.present, strict=True)
            if is_here and local is not param
        ]
    increment_version(moved)


def mark_replayed(params: Sequence[Tensor]) -> None:
    """Says that a graph has moved parameters, as torch's compiled functions do after a replay.

    A bare ``torch.cuda.CUDAGraph.replay()`` counts nothing. Which gradients the graph knows, the
    host does not, so that all parameters that are trained count.
    """
    increment_version([param for param in params if param.requires_grad])
