"""Processes that play the ranks of a run, kept from test to test: importing torch takes seconds.

Real processes and gloo, because threads share what ranks do not, and wake each other when one of
them fails.

No job meets anything of another. It begins when all its processes are there and hold no group, with
a store in a folder that is its own; and none of them ends its groups before all have answered. A
rank that did so earlier would close its connections on another that still makes a group, or is in
its last collective.
"""

import contextlib
import datetime
import gc
import multiprocessing
import os
import tempfile
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from patience import GROUP_TIMEOUT, PATIENCE

_READY = "holds no process group"


class DiedError(Exception):
    """A rank ended without an answer; its exit code."""


class _Rank:
    """One process: it says that it is ready, takes a job, answers, is told to end it, and so on."""

    def __init__(self, context: Any) -> None:
        self.connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there,), daemon=True)
        self._process.start()
        there.close()
        self._is_ready = False

    def hear(self) -> Any:
        """What the process says next, or :class:`DiedError`; it has ended then."""
        ready = wait([self.connection, self._process.sentinel], PATIENCE)
        if self.connection.poll():
            with contextlib.suppress(EOFError):
                return self.connection.recv()
        if ready:  # it ends: until it has, there is no exit code
            self._process.join(PATIENCE)
        code = self._process.exitcode
        self.kill()
        return DiedError("no answer in time" if code is None else f"exit code {code}")

    def is_ready(self) -> bool:
        """Waits until it can take a job; False if it never will."""
        if not self._is_ready:
            self._is_ready = self.hear() == _READY
        return self._is_ready

    def send(self, message: Any) -> None:
        """A job, or None to end it."""
        self._is_ready = False
        with contextlib.suppress(BrokenPipeError):  # it has died: what it says next is that
            self.connection.send(message)

    def kill(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()


class Ranks:
    """Up to as many ranks as have been asked for so far.

    ``run(function, world, *arguments)`` calls ``function(rank, *arguments)`` in ``world`` processes
    that form a gloo group, and returns what each returned or raised. Functions must be importable.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._ranks: list[_Rank] = []

    def run(
        self,
        function: Callable[..., Any],
        world: int,
        *arguments: Any,
        timeout: float = GROUP_TIMEOUT,
        environment: dict[str, str] | None = None,
    ) -> list[Any]:
        """Results in the order of ranks; an exception, or :class:`DiedError`, where there is none.

        Args:
            timeout: of the process group, in seconds.
            environment: variables of the processes while they run the job.
        """
        while len(self._ranks) < world:
            self._ranks.append(_Rank(self._context))
        for rank in range(world):
            while not self._ranks[rank].is_ready():
                self._replace(rank)
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(world):
                store = str(Path(folder) / "store")
                job = function, rank, world, store, timeout, environment or {}, arguments
                self._ranks[rank].send(job)
            answers = [rank.hear() for rank in self._ranks[:world]]
            alive = [rank for rank in range(world) if not isinstance(answers[rank], DiedError)]
            for rank in alive:
                self._ranks[rank].send(None)
            for rank in range(world):
                if rank not in alive or not self._ranks[rank].is_ready():
                    self._replace(rank)
        return answers

    def returns(self, function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
        """Like ``run``, but raises the first exception of a rank."""
        results = self.run(function, world, *arguments)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def _replace(self, rank: int) -> None:
        self._ranks[rank].kill()
        self._ranks[rank] = _Rank(self._context)

    def close(self) -> None:
        """Ends all processes."""
        for rank in self._ranks:
            rank.kill()


def _serve(connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    torch.set_num_threads(1)
    while True:
        connection.send(_READY)
        try:
            job = connection.recv()
        except EOFError:
            return
        _answer(connection, *job)
        del job  # it may hold what a group is held by
        connection.recv()  # until all have answered
        if held := _end_groups():
            raise SystemExit(f"{held} process groups outlive the job that made them")


def _answer(
    connection: Connection,
    function: Callable[..., Any],
    rank: int,
    world: int,
    store: str,
    timeout: float,
    environment: dict[str, str],
    arguments: tuple[Any, ...],
) -> None:
    import torch.distributed as dist

    os.environ.update(environment)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout),
        )
        result = function(rank, *arguments)
    except Exception as error:
        result = error
    try:
        connection.send(result)
    except Exception as error:  # what cannot be pickled is said in words
        connection.send(RuntimeError(f"{type(result).__name__}: {result} ({error})"))
    for name in environment:
        os.environ.pop(name)


def _end_groups() -> int:
    """Ends all groups and their threads; how many are held by something nevertheless."""
    import torch.distributed as dist

    gc.collect()  # DDP goes first: what it is the last to hold ends under Python's lock
    if not dist.is_initialized():
        return 0
    groups = [weakref.ref(group) for group in dist.distributed_c10d._world.pg_map]
    dist.destroy_process_group()
    forget_groups_of_meshes()
    return sum(group() is not None for group in groups)


def forget_groups_of_meshes() -> None:
    """Since torch 2.13 a mesh holds its groups, and caches of DTensor hold every mesh for ever."""
    from torch.distributed.device_mesh import DeviceMesh

    for thing in gc.get_objects():
        if type(thing) is DeviceMesh:
            vars(thing).get("_pg_registry", {}).clear()
