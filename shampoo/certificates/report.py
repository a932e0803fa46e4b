"""What was found of one kernel in one dtype."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

WIN = 1.05  # a kernel must be so much faster than the reference: noise must not choose

# Those for the CPU have other merits too: bits that follow neither the batch nor the threads. They
# go where they lose clearly, however the machine was loaded while they were timed.
NO_LOSS = 0.8


@dataclass(frozen=True)
class Timing:
    """Median seconds of a kernel and of the reference, which took turns.

    Attributes:
        size: Columns of the largest factor; elements for an op that works on elements.
        kernel: Seconds of the kernel.
        reference: Seconds of the reference.
    """

    size: int
    kernel: float
    reference: float

    @property
    def speed(self) -> float:
        """How many times as fast as the reference the kernel is."""
        return self.reference / self.kernel


@dataclass(frozen=True)
class Report:
    """What was found of one kernel in one dtype.

    Attributes:
        op: The name of the op.
        kernel: The kind of the kernel: ``"cpp"``, ``"cuda"``, ``"triton"``.
        dtype: Of the subject of the op.
        cases: How many were run.
        error: The largest error, as a part of what it may be.
        limit: What it may be.
        worst: The case of that error, or the one that failed.
        failure: What was wrong; empty if it passed.
        timings: At some sizes, if it passed and was timed.
    """

    op: str
    kernel: str
    dtype: str
    cases: int
    error: float = 0.0
    limit: float = 0.0
    worst: str = ""
    failure: str = ""
    timings: Sequence[Timing] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return not self.failure

    @property
    def is_used(self) -> bool:
        """Whether it passed, and wins somewhere if it was timed."""
        return self.passed and (not self.timings or any(map(self.wins, self.timings)))

    def wins(self, timing: Timing) -> bool:
        """Whether the kernel is fast enough to be used at a size."""
        return timing.speed >= (NO_LOSS if self.kernel == "cpp" else WIN)

    def joined(self, other: "Report") -> "Report":
        """What is known of the kernel where it has been asked for more. First times stand."""
        sizes = {timing.size for timing in self.timings}
        new = [timing for timing in other.timings if timing.size not in sizes]
        worse = self if self.failure or not other.failure else other
        return replace(
            worse,
            cases=self.cases + other.cases,
            timings=() if worse.failure else (*self.timings, *new),
        )

    def to_json(self) -> dict[str, Any]:
        """As a certificate holds it."""
        return asdict(self)

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> "Report":
        """Back from there.

        Raises:
            TypeError: if it is not what :meth:`to_json` returned, as does KeyError.
        """
        timings = tuple(Timing(**timing) for timing in content["timings"])
        return cls(**{**content, "timings": timings})
