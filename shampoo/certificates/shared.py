"""The kernels that must be the same on all ranks, and which those are where devices differ.

Every rank moves its replicas of the parameters by the same directions, with one op: by another
kernel it would move them by a bit more or less, and replicas would drift. What only the owner of a
block computes may run by whatever is fastest there. Where several groups of ranks divide the same
blocks, as the nodes of a large run do, a block has an owner in each, and all ops are shared.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from shampoo import ops
from shampoo.ops.licence import REFERENCE
from shampoo.ops.routes import allowed, choices, impose

SHARED = ("update_blocks_",)


class Offer(NamedTuple):
    """What a rank has for an op.

    Attributes:
        chosen: By dtype, sizes, and the kernel up to each of them.
        allowed: By dtype, the kernels that may run there; on a CPU, those that do.
    """

    chosen: Mapping[str, Sequence[tuple[float, str]]]
    allowed: Mapping[str, Sequence[str]]


Offers = Mapping[str, Offer]
"""By ``type op``, for every type of device and op."""


def offers(devices: Iterable[torch.device], is_redundant: bool) -> Offers:
    """What this rank has for the ops that ranks share.

    Args:
        devices: of this rank.
        is_redundant: whether several ranks compute the same blocks, each for itself.
    """
    found: dict[str, Offer] = {}
    for device in devices:
        if device.type in ("cpu", "cuda"):
            for name in ops.OPS if is_redundant else SHARED:
                op = ops.OPS[name]
                offer = Offer(choices(op, device), allowed(op, device))
                found.setdefault(f"{device.type} {name}", offer)
    return found


def agree(everyone: Sequence[Offers]) -> None:
    """Takes what all ranks take: what the first chose if all may run it, else the reference.

    Args:
        everyone: the offers of every rank, in the same order on each.
    """
    for name in dict.fromkeys(name for each in everyone for name in each):
        device, op = name.split()
        impose(device, op, _common([each[name] for each in everyone if name in each]))


def _common(everyone: Sequence[Offer]) -> dict[str, list[tuple[float, str]]]:
    common: dict[str, list[tuple[float, str]]] = {}
    for dtype in everyone[0].chosen:
        ends = sorted({end for each in everyone for end, _ in each.chosen[dtype]})
        for end in ends:
            chosen = [
                next(kind for at, kind in each.chosen[dtype] if at >= end) for each in everyone
            ]
            kernel = chosen[0]
            is_agreed = all(other == kernel for other in chosen)
            if not is_agreed and not all(kernel in each.allowed[dtype] for each in everyone):
                kernel = REFERENCE
            common.setdefault(dtype, []).append((end, kernel))
    return common
