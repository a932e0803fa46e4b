"""What ``python -m benchmarks.gpu`` measures: its cases in order of importance, and its tests."""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import kernels, peers, steps, training
from shampoo.ops import OPS

Case = dict[str, Any]
TESTS = Path(__file__).parents[1] / "tests"

# Where each section must start no more rows, as a part of the budget: what one leaves over is
# there for the next.
SECTIONS = {
    "build": 0.25,
    "tests": 0.50,
    "rates": 0.52,
    "kernels": 0.66,
    "roots": 0.74,
    "steps": 0.88,
    "training": 0.95,
    "peers": 1.0,
}
LONGEST = {
    "build": 240.0,
    "tests": 150.0,
    "steps": 60.0,
    "training": 60.0,
    "peers": 60.0,
}  # seconds of one row
USUAL = 45.0

_STACKS = ((1024, 64), (128, 512), (512, 128), (256, 256), (64, 512), (2048, 16))  # (n, batch)
_ELEMENTS = (1 << 24, 1 << 20, 1 << 27)
_PRODUCTS = [op for op in kernels.MEASURED if not OPS[op].is_elementwise]
_FLAT = [op for op in kernels.MEASURED if OPS[op].is_elementwise]
_SMALL = {"stacks": ((48, 2), (32, 2)), "elements": (1 << 14,), "factor": 16}


def cases(small: bool) -> Iterator[Case]:
    """Every row to be measured, section by section."""
    common = {"small": small}
    yield {"section": "build", **common}
    yield {"section": "rates", **common}
    stacks = _SMALL["stacks"] if small else _STACKS
    seconds = 0.01 if small else 0.5
    for n, batch in stacks:
        for op in _PRODUCTS:
            row = {"section": "kernels", "op": op, "size": n, "batch": batch}
            yield {**row, "measure_s": seconds, **common}
    for elements in _SMALL["elements"] if small else _ELEMENTS:
        for op in _FLAT:
            row = {"section": "kernels", "op": op, "size": elements, "batch": 16}
            yield {**row, "measure_s": seconds, **common}
    for n, batch in stacks:
        for p in (4,) if n > 1024 else (4, 2):
            row = {"section": "roots", "size": n, "batch": batch, "p": p, "relative_eps": 1e-6}
            yield {**row, "measure_s": seconds, **common}
    for model in steps.NAMES:
        for refresh in steps.REFRESHES:
            row = {"section": "steps", "model": model, "refresh": refresh}
            optimizers = ["adamw-fused", "muon", "shampoo"]
            times = {"measure_s": 0.0, "periods": 1}
            if not small:
                times = {"measure_s": 1.0, "periods": {1: 20, 10: 3, 50: 1}[refresh]}
            yield {**row, "optimizers": optimizers, **times, **common}
    for model in training.MODELS:
        batch = 2 if small else {"resnet50": 256, "gpt2": 64}[model]  # 64 x 1024 tokens
        row = {"section": "training", "model": model, "batch": batch}
        yield {**row, "refresh": 3 if small else 50, **common}
    for model, refresh in (("gpt2", 1), ("gpt2", 10), ("resnet50", 10)):
        for peer in peers.PEERS:
            row = {"section": "peers", "model": model, "refresh": refresh, "peer": peer}
            optimizers = ["adamw-fused", "shampoo", peer]
            # Some take seconds a root step: few of them, or there is no row at all.
            times = {"measure_s": 0.0, "periods": 1 if small or refresh > 1 else 3}
            yield {**row, "optimizers": optimizers, **times, **common}


def run_tests(backend: str, timeout: float) -> dict[str, Any]:
    """``pytest -m gpu`` under one backend, in a process of its own: counts, and what failed."""
    if not TESTS.is_dir():
        return {"error": f"no tests at {TESTS.name}/: run from a checkout"}
    others = {"cuda": "ops/test_triton_gpu.py", "triton": "ops/test_cuda_gpu.py"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short"]
        command += ["-p", "no:cacheprovider"]
        command += [f"--ignore={TESTS / others[backend]}", f"--junitxml={report}", str(TESTS)]
        environment = {**os.environ, "SHAMPOO_BACKEND": backend}
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired as error:
            said = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            return {"error": f"no end after {timeout:.0f} s", "tail": said[-2000:]}
        seconds = time.perf_counter() - start
        if not report.exists():
            return {"error": f"exit status {done.returncode}", "tail": _tail(done)}
        [suite] = ElementTree.parse(report).getroot().iter("testsuite")
        counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors")}
        skipped = int(suite.get("skipped", 0))
        failed = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - skipped
    row: dict[str, Any] = {"seconds": seconds, "passed": passed, "skipped": skipped}
    row["failed"] = failed
    return {**row, "tail": _tail(done)} if failed else row


def _tail(done: "subprocess.CompletedProcess[str]") -> str:
    return (done.stdout + done.stderr)[-4000:]
