"""Whether ranks that must hold the same bits of a parameter do (distributed.md 8, fault 16).

A flipped bit or a kernel that rounds otherwise on one card makes replicas drift apart without a
sign. A sum of 64 bits over each tensor finds every single flip, and costs one pass over it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo.blocks.ownership import Team
from shampoo.distributed.consensus import FAILED, OK, Consensus
from shampoo.distributed.process_groups import ProcessGroups
from shampoo.distributed.shard_regions import local_tensor
from shampoo.dtensor import is_dtensor
from shampoo.errors import ReplicaMismatchError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_CHUNK = 1 << 20  # elements that are widened to 64 bits at a time
_WEIGHT = 0x1E3779B97F4A7C15  # spreads a bit over all 64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NOTHING = torch.iinfo(torch.int64).min  # loses every maximum


def checksum(tensor: Tensor) -> Tensor:
    """A sum over the bits of a tensor, int64 of no dimension; depends on where each bit is.

    Every element, as an integer, counts an odd number of times, modulo 2^64: a single flipped bit
    always changes it.
    """
    words = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _CHUNK):
        chunk = words[start : start + _CHUNK].to(torch.int64)
        weights = torch.arange(start + 1, start + 1 + len(chunk), device=words.device)
        total += (chunk * (weights * _WEIGHT).bitwise_or_(1)).sum()
    return total


@dataclass(frozen=True)
class ReplicaChecksums:
    """What a team of ranks must hold alike.

    Attributes:
        team: its ranks.
        names: of parameters, one for each place.
        sums: [2, places] int64, the checksums of this rank and their complements; the least
            integer where this rank holds something else.
    """

    team: Team
    names: list[str]
    sums: Tensor

    def compare(self, group: dist.ProcessGroup) -> ReplicaMismatchError | None:
        """One all-reduce; the error of all ranks of the team, naming the first such parameter."""
        largest = self.sums.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        # The complement turns the order around: the largest of them is that of the smallest sum.
        differs = (largest[0] != ~largest[1]).nonzero()
        if len(differs) == 0:
            return None
        place = int(differs[0])
        everyone: list[int] = [0] * self.team.size
        dist.all_gather_object(everyone, int(self.sums[0, place]), group=group)
        pairs = zip(self.team.ranks, everyone, strict=True)
        held = {rank: own for rank, own in pairs if own != _NOTHING}
        first = min(held)
        others = [rank for rank, own in held.items() if own != held[first]]
        return ReplicaMismatchError(
            f"{self.names[place]} is not the same on ranks that must hold the same bits: rank"
            f" {first} holds others than {', '.join(f'rank {rank}' for rank in others)}."
            " Load the last checkpoint, or broadcast parameters and optimizer from a healthy rank;"
            " then look for defective memory or a kernel that is not deterministic."
        )


def check_checksums(
    checksums: Sequence[ReplicaChecksums], process_groups: ProcessGroups, consensus: Consensus
) -> None:
    """Raises ReplicaMismatchError on all ranks if two of one team hold different bits."""
    errors = [held.compare(process_groups.group(held.team).live()) for held in checksums]
    error = next((error for error in errors if error is not None), None)
    # Not raised here: the teams that found nothing must hear of it.
    if consensus.confirm(OK if error is None else FAILED) != OK:
        consensus.fail(error)


def checksums_of(
    names: Sequence[str], params: Sequence[Tensor], replicas: Team
) -> list[ReplicaChecksums]:
    """The checksums of all that other ranks hold too, by team. No communication.

    Args:
        names: of the parameters.
        params: DTensors as they are.
        replicas: the ranks that hold plain parameters.
    """
    found: dict[Team, list[tuple[str, Tensor, int, int]]] = {}
    for name, param in zip(names, params, strict=True):
        team, place, places = replicas, 0, 1
        if is_dtensor(param):
            team, place, places = _place(param)
        if places < team.size:
            found.setdefault(team, []).append((name, local_tensor(param), place, places))
    copies = []
    for team in sorted(found, key=lambda team: (team.ranks, team.is_sharded)):
        sums, listed = [], []
        for name, local, place, places in found[team]:
            listed += [name] * places
            column = torch.full((2, places), _NOTHING, device=local.device)
            column[0, place] = checksum(local)
            column[1, place] = ~column[0, place]
            sums.append(column)
        copies.append(ReplicaChecksums(team, listed, torch.cat(sums, dim=1)))
    return copies


def _place(param: "DTensor") -> tuple[Team, int, int]:
    """The ranks of a mesh, which of the different shards this rank holds, and how many there are.

    Ranks that differ only along dimensions of the mesh over which it is replicated hold the same.
    """
    mesh = param.device_mesh
    coordinate = mesh.get_coordinate() or [0] * mesh.ndim
    place, places = 0, 1
    for size, at, placement in zip(mesh.mesh.shape, coordinate, param.placements, strict=True):
        if not placement.is_replicate():
            place, places = place * size + at, places * size
    ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
    return Team(ranks, ranks.index(dist.get_rank()), is_sharded=places > 1), place, places
