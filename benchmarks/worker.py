"""Measurements in a process that can be lost: a kernel may hang, or take the GPU's context along.

A *case* is one row to be: a JSON-like dict whose ``section`` names what measures it. The parent
asks for one at a time, waits so long and no longer, and starts another worker for what is left.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import kernels, roofline, roots, steps, training
from benchmarks.kernels import text_of
from shampoo import ops
from shampoo.ops import OPS, jit

Case = dict[str, Any]


def build(case: Case, device: torch.device) -> dict[str, Any]:
    """Builds and loads the compiled kernels: seconds, and which there are."""
    start = time.perf_counter()
    jit.load(retry=True)
    named = [name for name, op in OPS.items() if op.has_cuda_name]
    return {
        "seconds": time.perf_counter() - start,
        "cpu": ops.kernels("CPU"),
        "cuda": {name: ops.has_kernel(f"cuda_{name}", "CUDA") for name in named},
    }


SECTIONS: dict[str, Callable[[Case, torch.device], dict[str, Any]]] = {
    "build": build,
    "rates": roofline.measure,
    "kernels": kernels.measure,
    "roots": roots.measure,
    "steps": steps.measure,
    "training": training.measure,
    "peers": steps.measure,
}


def answer(case: Case, device: torch.device) -> tuple[dict[str, Any], bool]:
    """What a case measures, or its ``error`` as text; and whether this process is still of use."""
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        return SECTIONS[case["section"]](case, device), True
    except torch.cuda.OutOfMemoryError as error:
        row = {"error": f"out of memory: {text_of(error)}"}
    except Exception as error:
        row = {"error": text_of(error), "trace": traceback.format_exc()[-1500:]}
    try:
        if is_gpu:
            torch.cuda.synchronize(device)
    except Exception as error:
        row["error"] += f" (the context is lost: {text_of(error)})"
        return row, False
    return row, True


@functools.cache
def load() -> None:
    """Loads the kernels of ``SHAMPOO_BACKEND``; rows say what is not there."""
    with contextlib.suppress(jit.BuildError):
        ops.load_kernels()


def serve(connection: Connection, device: str, environment: dict[str, str]) -> None:
    """Answers cases until there are no more: the whole life of a worker."""
    os.environ.update(environment)
    target = torch.device(device)
    if target.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    while (case := connection.recv()) is not None:
        if case["section"] != "build":
            load()
        row, is_useful = answer(case, target)
        connection.send((row, is_useful))
        if not is_useful:
            return
        gc.collect()
        if target.type == "cuda":
            torch.cuda.empty_cache()


class Worker:
    """The parent's side: a process that is started when it is needed, and again when it is lost."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.environment: dict[str, str] = {}
        self._process: Any = None
        self._connection: Connection | None = None

    def ask(self, case: Case, timeout: float) -> dict[str, Any]:
        """The row of a case; one with an ``error`` if the process is lost or takes too long."""
        connection = self._connection or self._start()
        try:
            connection.send(case)
            if not connection.poll(timeout):
                self.stop()
                return {"error": f"no answer after {timeout:.0f} s: the process was ended"}
            row, is_useful = connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            self.stop()
            return {"error": f"the process was lost (exit status {code})"}
        if not is_useful:
            self.stop()
        return row  # type: ignore[no-any-return]

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")  # a forked child could not use CUDA
        ours, theirs = context.Pipe()
        arguments = (theirs, self.device, self.environment)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._connection = ours
        return ours

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None
