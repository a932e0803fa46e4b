"""The file that says which kernels passed on a device, and how fast they were.

Its name is a digest of everything that shapes a kernel or a check, so that one that does not fit is
not found. It is read only where nobody else can have written it, and if it has the digest that was
recorded when it was.
"""

import datetime
import functools
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from shampoo.certificates.report import Report
from shampoo.ops import jit
from shampoo.ops.licence import REFERENCE, Licence
from shampoo.ops.trust import digest_of, is_whole, make_folder, objection, write_recorded

VERSION = 1
FOLDER = "certificates"
SHAPES = "shapes"  # among the facts of a certificate that is of a model alone

Facts = Mapping[str, str]


@dataclass(frozen=True)
class Certificate:
    """What was found on a device.

    Attributes:
        facts: Everything that shaped it.
        reports: Of every kernel and dtype.
        is_timed: Whether kernels were timed too.
        made: When, in UTC.
        seconds: How long it took.
    """

    facts: Facts
    reports: Sequence[Report]
    is_timed: bool
    made: str
    seconds: float

    @functools.cached_property
    def licence(self) -> Licence:
        """What the device may run."""
        passed: dict[tuple[str, str], set[str]] = {}
        refused: dict[tuple[str, str], dict[str, str]] = {}
        for report in self.reports:
            key = report.op, report.kernel
            if report.passed:
                passed.setdefault(key, set()).add(report.dtype)
            else:
                words = f"{report.failure} in {report.worst}" if report.worst else report.failure
                refused.setdefault(key, {})[report.dtype] = words
        return Licence(
            {key: frozenset(each) for key, each in passed.items()}, refused, self._rows()
        )

    def joined(self, other: "Certificate") -> "Certificate":
        """With what another one of the same device says of the kernels that this one knows."""
        more = {(each.op, each.kernel, each.dtype): each for each in other.reports}
        reports = []
        for report in self.reports:
            found = more.get((report.op, report.kernel, report.dtype))
            reports.append(report if found is None else report.joined(found))
        return replace(self, reports=tuple(reports))

    def to_json(self) -> str:
        """What its file holds."""
        content = {
            "version": VERSION,
            "facts": dict(self.facts),
            "is_timed": self.is_timed,
            "made": self.made,
            "seconds": self.seconds,
            "reports": [report.to_json() for report in self.reports],
        }
        return json.dumps(content, indent=1) + "\n"

    def _rows(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """By op and dtype the fastest kernel at every size at which one was timed."""
        speeds: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
        for report in self.reports:
            for timing in report.timings if report.passed else ():
                sizes = speeds.setdefault((report.op, report.dtype), {})
                at = sizes.setdefault(timing.size, {})
                at[report.kernel] = timing.speed if report.wins(timing) else 0.0
        rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for (op, dtype), sizes in speeds.items():
            mine = rows.setdefault(op, {}).setdefault(dtype, [])
            for size, at in sorted(sizes.items()):
                best = max(at, key=at.__getitem__)
                mine.append({"size": size, "kernel": best if at[best] > 0.0 else REFERENCE})
        return rows


def facts_of(device: torch.device, library: Path | None) -> dict[str, str]:
    """Everything that shapes what kernels and checks do on a device.

    Args:
        device: of which.
        library: the compiled kernels, if there are any.
    """
    facts = {
        "device": device.type,
        "torch": torch.__version__,
        "library": digest_of(library)[:16] if library is not None else "",
        "sources": _sources(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["name"] = properties.name
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = str(properties.multi_processor_count)
        facts["driver"] = _read("/proc/driver/nvidia/version").partition("\n")[0]
        facts["cuda"] = torch.version.cuda or ""
        facts["triton"] = _triton()
    else:
        facts["name"], facts["flags"] = _processor()
        facts["capability"] = torch.backends.cpu.get_cpu_capability()
    return facts


@functools.cache
def _sources() -> str:
    """A digest of kernels in Python, references, checks, and of how roots are refreshed."""
    parts = []
    for package in ("ops", "kernels", "roots", "certificates"):
        folder = Path(str(resources.files(f"shampoo.{package}")))
        for path in sorted(folder.rglob("*.py")):
            parts += [str(path.relative_to(folder)), path.read_text(encoding="utf-8")]
    return jit.digest(*parts)


@functools.cache
def _processor() -> tuple[str, str]:
    """The name of the processor, and a digest of what it says it can do."""
    lines = _read("/proc/cpuinfo").splitlines()
    halves = (line.partition(":")[::2] for line in lines)
    pairs = [(name.strip(), value.strip()) for name, value in halves]
    found = dict(reversed(pairs))
    name = found.get("model name") or platform.processor() or platform.machine()
    flags = " ".join(sorted(found.get("flags", found.get("Features", "")).split()))
    return name, jit.digest(platform.machine(), flags)


@functools.cache
def _triton() -> str:
    try:
        from importlib.metadata import version

        return version("triton")
    except ImportError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def path_of(facts: Facts) -> Path:
    """Where the certificate for these facts lies, made or not; elsewhere if others may write it."""
    digest = jit.digest(*(f"{name}={value}" for name, value in sorted(facts.items())))
    return jit.trusted(Path(FOLDER, f"{facts['device']}-{digest}.json"))


def read(path: Path, facts: Facts) -> Certificate | None:
    """The certificate in a file; None if there is none that is whole, ours, and of these facts."""
    if objection(path, path.parents[1]) or not is_whole(path):
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION or content["facts"] != dict(facts):
            return None
        reports = tuple(Report.of_json(each) for each in content["reports"])
        found = {name: content[name] for name in ("is_timed", "made", "seconds")}
        return Certificate(content["facts"], reports, **found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def of_models(facts: Facts) -> list[Certificate]:
    """The certificates that there are of the shapes of models, of a device with these facts."""
    found = []
    for path in sorted(path_of(facts).parent.glob(f"{facts['device']}-*.json")):
        try:
            its = json.loads(path.read_text(encoding="utf-8"))["facts"]
            is_ours = {**facts, SHAPES: its[SHAPES]} == its
        except (OSError, ValueError, KeyError, TypeError):
            continue
        read_again = read(path, its) if is_ours else None
        found += [] if read_again is None else [read_again]
    return found


def write(path: Path, certificate: Certificate) -> None:
    """Writes a certificate into the cache, whole or not at all."""
    make_folder(path.parent, path.parents[1])
    write_recorded(path, certificate.to_json())


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
