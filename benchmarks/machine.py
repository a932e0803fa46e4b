"""What a number must carry to be compared later: the machine, the versions, the commit."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def describe(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions and commit, as JSON-like values."""
    facts: dict[str, Any] = {
        "device": device.type,
        "name": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "load": os.getloadavg()[0],
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["triton"] = version_of("triton")
        facts["clock_khz"] = getattr(torch.cuda.get_device_properties(device), "clock_rate", None)
    return facts


def command(module: str, arguments: Sequence[str]) -> str:
    """How to make a number again; of a path only its name, the rest is this machine's."""
    shown = [Path(argument).name if os.sep in argument else argument for argument in arguments]
    return " ".join(["python -m", module, *shown])


def is_busy() -> bool:
    """Whether other work takes a good part of the cores: an average load of a quarter of them."""
    return os.getloadavg()[0] > 0.25 * (os.cpu_count() or 1)


def device_name(device: torch.device) -> str:
    """Name of the card, or of the processor with the number of its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else name} ({os.cpu_count()} cores)"


def commit() -> str:
    """Short hash of the checked-out commit, ``+`` if code differs from it, or ``unknown``."""
    root = Path(__file__).parent
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        return head + (
            "+" if _git(root, "status", "--porcelain", "-uno", ":/*.py", ":/csrc") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=root, check=True, capture_output=True, text=True, timeout=10
    )
    return done.stdout.strip()


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = next(line for line in lines if line.startswith("MemAvailable"))
    return int(available.split()[1]) * 1024
