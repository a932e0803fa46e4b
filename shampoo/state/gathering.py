"""The whole state on one rank, for those who save from one rank only (distributed.md 7), or on all.

Owners send their blocks, packed, to the host memory of one rank, or to all others. Past some
100 GB, save with ``torch.distributed.checkpoint`` instead: every rank then writes what it owns.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo.blocks.state_keys import is_own, parse
from shampoo.distributed.consensus import Consensus, DeferredError
from shampoo.step.block_plan import BlockPlan

_BATCH = 1 << 26  # bytes of a message, unless a single tensor is larger
Whole = dict[Tensor, dict[str, Any]]


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
    plan: BlockPlan,
    params: Sequence[Tensor],
    state: Mapping[Any, Any],
    group: dist.ProcessGroup,
    to: int | None,
    consensus: Consensus,
) -> Whole | None:
    """Gathers the state of all blocks; a collective of all ranks that hold the parameters.

    Args:
        plan: of the state.
        params: the planned ones, in plan order.
        state: what this rank owns.
        group: the ranks that hold the parameters.
        to: the global rank that receives, in host memory; None for all of them, each on the
            devices of its parameters.
        consensus: of the same ranks.

    Returns:
        The whole state, copied, where it is received; None on the other ranks. What is not this
        optimizer's is this rank's, as it is.

    Raises:
        ShampooDistributedError: on all ranks if one of them has failed, for want of memory, say.
    """
    me, ranks = dist.get_rank(), dist.get_process_group_ranks(group)
    is_receiver = to is None or me == to
    deferred = DeferredError(is_shared=True)
    teammate = ranks[0] if to is None else to
    outgoing: list[tuple[Entry, Tensor]] = []
    with deferred:
        if me != to:
            outgoing = _outgoing(plan, params, state, teammate)
    manifest = [entry for entry, _ in outgoing]
    manifests: list[Any] = [[] if rank != me else manifest for rank in ranks]
    if to is None:
        dist.all_gather_object(manifests, manifest, group)
    else:
        dist.gather_object(manifest, manifests if is_receiver else None, to, group)
    # gloo sends from the host only.
    is_gloo = dist.get_backend(group) == "gloo"
    device = torch.device("cpu") if is_gloo else plan.arenas[0].device
    # All memory is asked for before the first message: nobody is left to wait for one.
    whole: Whole | None = None
    if is_receiver:
        coming = [list(entries) for entries in manifests]
        coming[ranks.index(me)] = []
        with deferred:
            # Asked for in vain if something has failed, and then given back.
            whole = _room(params, state, coming, on_host=to is not None)
    buffer: Tensor | None = None
    with deferred:
        buffer = _buffer(manifests, device)
    consensus.check(deferred)
    assert buffer is not None
    # Whatever else fails, a device perhaps, messages keep their number and lengths.
    for source, entries in zip(ranks, manifests, strict=True):
        for start, stop in _batches(entries):
            message = buffer[: _nbytes(entries[start:stop])]
            if source == me:
                with deferred:
                    _pack(message, [value for _, value in outgoing[start:stop]])
            if to is None:
                dist.broadcast(message, source, group)
            elif source == me:
                dist.send(message, to, group)
            else:
                dist.recv(message, source, group)
            if source != me:
                assert whole is not None
                places = [whole[params[e.member]][e.key] for e in entries[start:stop]]
                with deferred:
                    _unpack(message, places)
    consensus.check(deferred)
    return whole


def _outgoing(
    plan: BlockPlan, params: Sequence[Tensor], state: Mapping[Any, Any], to: int
) -> list[tuple[Entry, Tensor]]:
    """What this rank sends: its blocks, unless it is of a team that ``to`` is not in.

    Counts of a parameter every rank has, and other teams own copies of the same blocks.
    """
    return [
        (Entry(index, key, value.dtype, tuple(value.shape)), value)
        for index, (member, param) in enumerate(zip(plan.members, params, strict=True))
        if to in member.team.ranks
        for key, value in state.get(param, {}).items()
        if parse(key) is not None
    ]


def _room(
    params: Sequence[Tensor],
    state: Mapping[Any, Any],
    manifests: Sequence[Sequence[Entry]],
    on_host: bool,
) -> Whole:
    """A copy of what this rank owns, with room for what comes."""
    host = torch.device("cpu")
    whole: Whole = {
        param: {
            key: value.to(host if on_host else value.device, copy=True) if is_own(key) else value
            for key, value in state.get(param, {}).items()
        }
        for param in params
    }
    for entry in itertools.chain(*manifests):
        # A tensor of its own: a view would be saved with all of its message.
        device = host if on_host else params[entry.member].device
        room = torch.empty(entry.shape, dtype=entry.dtype, device=device)
        whole[params[entry.member]][entry.key] = room
    return whole


def _buffer(manifests: Sequence[Sequence[Entry]], device: torch.device) -> Tensor:
    """Room for the longest message."""
    lengths = [
        _nbytes(entries[start:stop]) for entries in manifests for start, stop in _batches(entries)
    ]
    return torch.empty(max(lengths, default=0), dtype=torch.uint8, device=device)


def _nbytes(entries: Sequence[Entry]) -> int:
    return sum(entry.nbytes for entry in entries)


def _pack(message: Tensor, values: Sequence[Tensor]) -> None:
    pieces = torch.split(message, [value.nbytes for value in values])
    for piece, value in zip(pieces, values, strict=True):
        piece.copy_(value.reshape(-1).view(torch.uint8))


def _unpack(message: Tensor, places: Sequence[Tensor]) -> None:
    pieces = torch.split(message, [place.nbytes for place in places])
    for piece, place in zip(pieces, places, strict=True):
        place.view(-1).view(torch.uint8).copy_(piece)


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
