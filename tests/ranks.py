"""Processes that play the ranks of a run, kept from test to test: importing torch takes seconds.

Real processes and gloo, because threads share what ranks do not, and wake each other when one of
them fails.
"""

import datetime
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PATIENCE = 120  # seconds that a job may take before its processes are ended


class DiedError(Exception):
    """A rank ended without an answer; its exit code."""


class Ranks:
    """Up to as many ranks as have been asked for so far.

    ``run(function, world, *arguments)`` calls ``function(rank, *arguments)`` in ``world`` processes
    that form a gloo group, and returns what each returned or raised. Functions must be importable.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._ranks: list[tuple[Any, Connection]] = []

    def run(
        self,
        function: Callable[..., Any],
        world: int,
        *arguments: Any,
        timeout: float = 60.0,
        environment: dict[str, str] | None = None,
    ) -> list[Any]:
        """Results in the order of ranks; an exception, or :class:`DiedError`, where there is none.

        Args:
            timeout: of the process group, in seconds.
            environment: variables of the processes while they run the job.
        """
        while len(self._ranks) < world:
            self._ranks.append(self._start())
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, connection) in enumerate(self._ranks[:world]):
                store = str(Path(folder) / "store")
                job = function, rank, world, store, timeout, environment or {}, arguments
                connection.send(job)
            return [self._answer(rank) for rank in range(world)]

    def returns(self, function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
        """Like ``run``, but raises the first exception of a rank."""
        results = self.run(function, world, *arguments)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def _answer(self, rank: int) -> Any:
        process, connection = self._ranks[rank]
        wait([connection, process.sentinel], PATIENCE)
        if connection.poll():
            try:
                return connection.recv()
            except EOFError:
                pass
        process.join(1)
        code = process.exitcode
        process.kill()
        self._ranks[rank] = self._start()
        return DiedError("no answer in time" if code is None else f"exit code {code}")

    def _start(self) -> tuple[Any, Connection]:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there,), daemon=True)
        process.start()
        there.close()
        return process, here

    def close(self) -> None:
        """Ends all processes."""
        for process, _ in self._ranks:
            process.kill()
            process.join()


def _serve(connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            function, rank, world, store, timeout, environment, arguments = connection.recv()
        except EOFError:
            return
        os.environ.update(environment)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout),
        )
        try:
            result = function(rank, *arguments)
        except Exception as error:
            result = error
        try:
            connection.send(result)
        except Exception as error:  # what cannot be pickled is said in words
            connection.send(RuntimeError(f"{type(result).__name__}: {result} ({error})"))
        dist.destroy_process_group()
        for name in environment:
            os.environ.pop(name)
