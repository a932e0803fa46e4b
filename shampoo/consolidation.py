"""The whole state on one rank, for those who save from one rank only (distributed.md 7).

Owners send their blocks, packed, to the host memory of one rank. Past some 100 GB, save with
``torch.distributed.checkpoint`` instead: every rank then writes what it owns.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo.step_plan import Plan

_BATCH = 1 << 26  # bytes of a message, unless a single tensor is larger


class Entry(NamedTuple):
    """One state tensor on its way: the position of its parameter in the plan, and its name."""

    member: int
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def consolidate(
    plan: Plan,
    params: Sequence[Tensor],
    state: Mapping[Tensor, dict[str, Any]],
    group: dist.ProcessGroup,
    to: int,
) -> dict[Tensor, dict[str, Tensor]] | None:
    """Gathers the state of all blocks; a collective of all ranks that hold the parameters.

    Args:
        plan: of the state.
        params: the planned ones, in plan order.
        state: what this rank owns.
        group: the ranks that hold the parameters.
        to: the global rank that receives.

    Returns:
        The whole state, copied to the host, on rank ``to``; None on the others.
    """
    outgoing: list[tuple[Entry, Tensor]] = []
    if dist.get_rank() != to:
        outgoing = [
            (Entry(index, key, value.dtype, tuple(value.shape)), value)
            for index, (member, param) in enumerate(zip(plan.members, params, strict=True))
            if to in member.team.ranks  # other teams own copies of the same blocks
            for key, value in state[param].items()
            if key != "step"  # which every rank has
        ]
    manifest = [entry for entry, _ in outgoing]
    manifests: list[Any] = [None] * dist.get_world_size(group)
    dist.gather_object(manifest, manifests if dist.get_rank() == to else None, to, group)
    # gloo sends from the host only.
    host = torch.device("cpu")
    device = host if dist.get_backend(group) == "gloo" else plan.arenas[0].device
    if dist.get_rank() != to:
        for start, stop in _batches(manifest):
            values = [value.reshape(-1).view(torch.uint8) for _, value in outgoing[start:stop]]
            dist.send(torch.cat([value.to(device) for value in values]), to, group)
        return None
    whole = {
        param: {key: value.to(host, copy=True) for key, value in state[param].items()}
        for param in params
    }
    for source, entries in zip(dist.get_process_group_ranks(group), manifests, strict=True):
        for start, stop in _batches(entries):
            sizes = [entry.nbytes for entry in entries[start:stop]]
            buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
            dist.recv(buffer, source, group)
            pieces = torch.split(buffer.to(host), sizes)
            for entry, piece in zip(entries[start:stop], pieces, strict=True):
                # A tensor of its own: a view would be saved with all of its message.
                value = piece.clone().view(entry.dtype).view(entry.shape)
                whole[params[entry.member]][entry.key] = value
    return whole


def _batches(entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
    """Cuts entries into messages, alike on both ends."""
    start = size = 0
    for index, entry in enumerate(entries):
        if size > 0 and size + entry.nbytes > _BATCH:
            yield start, index
            start, size = index, 0
        size += entry.nbytes
    if start < len(entries):
        yield start, len(entries)
