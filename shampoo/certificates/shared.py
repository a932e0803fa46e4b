"""The kernels that must be the same on all ranks, and which those are where devices differ.

Every rank moves its replicas of the parameters by the same directions, with one op: by another
kernel it would move them by a bit more or less, and replicas would drift. Size classes of roots are
the same on all, too: which stacks go together is part of the plan of a refresh. What else only the
owner of a block computes may run by whatever is fastest there.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from shampoo import ops
from shampoo.ops.licence import REFERENCE
from shampoo.ops.routes import choices, impose

SHARED = ("update_blocks_", "minimax_class_root_")

Choices = Mapping[str, Mapping[str, Sequence[tuple[float, str]]]]
"""For every type of device and op, by dtype: sizes, and the kernel up to each of them."""


def shared_choices(devices: Iterable[torch.device]) -> Choices:
    """What this rank runs on its devices for the ops that ranks share, by ``type op``."""
    found: dict[str, Mapping[str, Sequence[tuple[float, str]]]] = {}
    for device in devices:
        if device.type in ("cpu", "cuda"):
            for name in SHARED:
                found.setdefault(f"{device.type} {name}", choices(ops.OPS[name], device))
    return found


def agree(everyone: Sequence[Choices]) -> None:
    """Takes what all ranks take: the reference wherever two of them differ.

    Args:
        everyone: the choices of every rank, in the same order on each.
    """
    for name in dict.fromkeys(name for each in everyone for name in each):
        device, op = name.split()
        there = [each[name] for each in everyone if name in each]
        impose(device, op, _common(there))


def _common(
    everyone: Sequence[Mapping[str, Sequence[tuple[float, str]]]],
) -> dict[str, list[tuple[float, str]]]:
    common: dict[str, list[tuple[float, str]]] = {}
    for dtype in everyone[0]:
        ends = sorted({end for each in everyone for end, _ in each[dtype]})
        for end in ends:
            kinds = {next(kind for at, kind in each[dtype] if at >= end) for each in everyone}
            kernel = kinds.pop() if len(kinds) == 1 else REFERENCE
            common.setdefault(dtype, []).append((end, kernel))
    return common
