"""Who shares the work: teams of ranks that divide blocks among them, and their process groups."""

import logging
import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shampoo.blocks.ownership import ALONE, Team
from shampoo.distributed.consensus import Consensus
from shampoo.distributed.group_handle import GroupHandle
from shampoo.distributed.shard_regions import mesh_ranks
from shampoo.dtensor import is_dtensor
from shampoo.errors import shown
from shampoo.inputs import is_integer

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)

COMMUNICATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_COUNT = 1 << 53  # of ranks or steps
_BLOCKS_PER_TRAINER = 4  # with fewer, padding and imbalance cost more than sharing saves


class ProcessGroups:
    """The process groups of one optimizer. Nothing here communicates before a step does.

    Args:
        process_group: the ranks that hold replicas of plain parameters; None is the default group.
            Parameters that are DTensors bring their own ranks, those of their mesh.
        num_trainers_per_group: how many consecutive ranks divide the blocks of replicated
            parameters; -1 means the ranks of one node, 0 or 1 that none are divided.
        communication_dtype: in which directions travel, None for the one they are computed in.
        overlap: send directions in parts, the first while later ones are computed.
        check_replicas_every: steps between comparisons of what must be equal bits on several ranks,
            0 for never.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        num_trainers_per_group: int = -1,
        communication_dtype: torch.dtype | None = None,
        overlap: bool = False,
        check_replicas_every: int = 0,
    ) -> None:
        if not is_integer(num_trainers_per_group, -1, _MOST_COUNT):
            raise ValueError(
                f"Invalid num_trainers_per_group={shown(num_trainers_per_group)}. Must be an"
                f" integer >= -1 and <= {_MOST_COUNT} (-1: the ranks of one node, 1: blocks are"
                " not divided)."
            )
        wire, is_dtype = communication_dtype, isinstance(communication_dtype, torch.dtype)
        if wire is not None and not (is_dtype and wire in COMMUNICATION_DTYPES):
            raise ValueError(
                f"Invalid communication_dtype={shown(communication_dtype)}. Must be None or one of"
                f" {', '.join(map(str, COMMUNICATION_DTYPES))}."
            )
        if not isinstance(overlap, bool):
            raise ValueError(f"Invalid overlap={shown(overlap)}. Must be True or False.")
        if not is_integer(check_replicas_every, 0, _MOST_COUNT):
            raise ValueError(
                f"Invalid check_replicas_every={shown(check_replicas_every)}. Must be an integer"
                f" >= 0 and <= {_MOST_COUNT} (0: never)."
            )
        self.num_trainers_per_group = num_trainers_per_group
        self.communication_dtype = communication_dtype
        self.overlap = overlap
        self.check_replicas_every = check_replicas_every
        # Nothing here holds a group, or a mesh, which holds some: they end when torch lets go.
        world = self.world()
        self._world = None if world is None else weakref.ref(world)
        # A process group does not outlive the default one, nor a copy or pickle: its ranks do.
        part = None if process_group is world else process_group
        self._ranks = None if part is None else dist.get_process_group_ranks(part)
        # On a rank outside it torch gives a number in its place: replicas() says so, by the ranks.
        self.process_group = GroupHandle(part) if isinstance(part, dist.ProcessGroup) else None
        self._trainers: dict[int, int] = {}  # by how many ranks hold the parameters
        self._groups: dict[tuple[int, ...], GroupHandle] = {}
        # Of one dimension, by their ranks.
        self._meshes: dict[tuple[int, ...], weakref.ref[DeviceMesh]] = {}
        self._consensus: dict[tuple[tuple[int, ...], torch.device], Consensus] = {}

    @staticmethod
    def world() -> dist.ProcessGroup | None:
        """The default process group: another object once it has been destroyed and made anew."""
        is_there = dist.is_available() and dist.is_initialized()
        return dist.group.WORLD if is_there else None

    def terms(self) -> dict[str, str]:
        """What decides which collectives are called, and with how many bytes."""
        names = ("communication_dtype", "overlap", "check_replicas_every")
        return {name: str(getattr(self, name)) for name in names}

    def replicas(self) -> Team:
        """All ranks that hold the same plain parameters; this one alone without a process group."""
        if self.world() is None:
            return ALONE
        ranks = tuple(self._ranks or dist.get_process_group_ranks(self.world()))
        rank = dist.get_rank()
        if rank not in ranks:
            raise ValueError(
                f"Invalid process_group: its ranks are {ranks}, this is rank {rank}. Build the"
                " optimizer only on ranks of its group."
            )
        return Team(ranks, ranks.index(rank))

    def settle_trainers(self, blocks: int) -> None:
        """Decides, once, how many ranks divide the blocks of replicated parameters."""
        replicas = self.replicas().size
        if replicas not in self._trainers:
            self._trainers[replicas] = trainers_per_group(
                self.num_trainers_per_group,
                replicas,
                int(os.environ.get("LOCAL_WORLD_SIZE", replicas)),
                blocks,
            )

    def team_of(self, param: Tensor) -> Team:
        """The ranks that divide the blocks of a parameter, after :meth:`settle_trainers`."""
        if is_dtensor(param):
            team = _team_of_mesh(param)
            if param.device_mesh.ndim == 1:
                self._meshes[team.ranks] = weakref.ref(param.device_mesh)
            return team if not team.is_alone else Team(team.ranks, 0)
        everyone = self.replicas()
        size = self._trainers.get(everyone.size, 1)
        first = everyone.me // size * size
        return Team(everyone.ranks[first : first + size], everyone.me - first)

    def stepping_ranks(self, params: Sequence[Tensor]) -> Team:
        """The ranks that must step alike: all that hold parameters which this rank holds too."""
        if self.world() is None:
            return ALONE
        ranks: set[int] = set()
        rank = dist.get_rank()
        for mesh in {param.device_mesh for param in params if is_dtensor(param)}:
            ranks.update(mesh.mesh.flatten().tolist())
        is_shared = self.num_trainers_per_group not in (0, 1) or self.check_replicas_every > 0
        if is_shared and not all(is_dtensor(param) for param in params):
            ranks.update(self.replicas().ranks)
        ordered = tuple(sorted(ranks | {rank}))
        return Team(ordered, ordered.index(rank))

    def group(self, team: Team) -> GroupHandle:
        """The process group of a team, made at first use: all of the team must ask for it."""
        self._forget_dead_groups()
        if team.ranks not in self._groups:
            self._groups[team.ranks] = GroupHandle(self._make_group(team))
        return self._groups[team.ranks]

    def _make_group(self, team: Team) -> dist.ProcessGroup:
        """A group that exists where there is one; a new one takes a name that ranks must share."""
        world = self.world()
        parent = world if self.process_group is None else self.process_group.live()
        assert parent is not None
        everyone = tuple(dist.get_process_group_ranks(parent))
        if everyone == team.ranks:
            return parent
        known = self._meshes.get(team.ranks)
        mesh = None if known is None else known()
        if mesh is not None:
            own: dist.ProcessGroup = mesh.get_group()
            if tuple(dist.get_process_group_ranks(own)) == team.ranks:
                return own
        backend = dist.get_backend_config(parent)
        if parent is world and not team.is_sharded and len(everyone) % team.size == 0:
            # All ranks make all of these together. Among the ranks of one alone, torch numbers
            # groups by those that a rank is in: one that some have and others have not, say for
            # logging on the first rank, and they would wait for each other under two names.
            chunks = [everyone[i : i + team.size] for i in range(0, len(everyone), team.size)]
            groups: list[dist.ProcessGroup] = [
                dist.new_group(list(ranks), backend=backend) for ranks in chunks
            ]
            if team.ranks in chunks:
                return groups[chunks.index(team.ranks)]
        made: dist.ProcessGroup = dist.new_group(
            list(team.ranks), backend=backend, use_local_synchronization=True
        )
        return made

    def consensus(self, stepping_ranks: Team, device: torch.device) -> Consensus:
        """How the ranks that must step alike agree to."""
        self._forget_dead_groups()
        key = stepping_ranks.ranks, device
        if key not in self._consensus:
            group = self.group(stepping_ranks)
            check_backend(group.live(), device)
            self._consensus[key] = Consensus(group, device)
        return self._consensus[key]

    def _forget_dead_groups(self) -> None:
        world = self.world()
        if world is not (None if self._world is None else self._world()):
            self._world = None if world is None else weakref.ref(world)
            self.process_group = None
            self._groups.clear()
            self._meshes.clear()
            self._consensus.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Process groups cannot be copied: a copy makes its own, of the same ranks."""
        dead: dict[str, Any] = {
            "process_group": None,
            "_world": None,
            "_groups": {},
            "_meshes": {},
            "_consensus": {},
        }
        return {**self.__dict__, **dead}


def check_backend(group: dist.ProcessGroup, device: torch.device) -> None:
    """Refuses a group that cannot send what lies on a device, before torch does in a collective.

    Parameters of FSDP2 under ``CPUOffloadPolicy`` lie on the host, their gradients and states too,
    while the group is often one of NCCL alone.

    Raises:
        ValueError: naming the devices that it has backends for, on all ranks alike: they are made
            with the same ones.
    """
    there = {each.type for each in group._device_types}
    if not there or device.type in there:  # a group of Python's own may name none
        return
    config = dist.get_backend_config(group)
    wanted = dist.Backend.default_device_backend_map.get(device.type, "gloo")
    raise ValueError(
        f"Invalid process group of the backends {shown(config)}, since parameters are on"
        f" {device.type}, as under CPUOffloadPolicy. Must have a backend for {device.type} too:"
        f' init_process_group("{device.type}:{wanted},{config}"). Nothing has changed.'
    )


def _team_of_mesh(param: "DTensor") -> Team:
    ranks = mesh_ranks(param)
    is_sharded = not all(placement.is_replicate() for placement in param.placements)
    return Team(ranks, ranks.index(dist.get_rank()), is_sharded)


def trainers_per_group(requested: int, replicas: int, local: int, blocks: int) -> int:
    """How many ranks divide the blocks of replicated parameters (distributed.md 6).

    Args:
        requested: ``num_trainers_per_group``.
        replicas: ranks that hold the parameters.
        local: ranks of this node.
        blocks: of all replicated parameters.

    Raises:
        ValueError: if ``requested`` does not divide ``replicas``.
    """
    divisors = [size for size in range(1, replicas + 1) if replicas % size == 0]
    if requested in (0, 1):
        return 1
    if requested == -1:
        size = max(1, min(local, replicas))
        # What divides a node too, so that no group has ranks of two.
        fitting = max(
            other
            for other in divisors
            if size % other == 0 and (other == 1 or blocks >= _BLOCKS_PER_TRAINER * other)
        )
        if fitting < size:
            logger.info(
                "shampoo: groups of %d ranks divide the blocks, not the %d of a node: a group must"
                " divide the %d ranks and have %d of the %d blocks a rank",
                fitting,
                size,
                replicas,
                _BLOCKS_PER_TRAINER,
                blocks,
            )
        return fitting
    if requested > replicas:
        logger.warning(
            "shampoo: num_trainers_per_group=%d, but there are %d ranks: using %d",
            requested,
            replicas,
            replicas,
        )
        return replicas
    if replicas % requested:
        raise ValueError(
            f"Invalid num_trainers_per_group={requested}. Must divide the {replicas} ranks that"
            f" hold the parameters: one of {', '.join(map(str, divisors))}."
        )
    return requested
