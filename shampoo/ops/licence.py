"""What a device may run: kernels that passed their checks on it, and where they are fastest.

A *licence* is given by who has checked (:mod:`shampoo.certificates`). Here it is only obeyed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

REFERENCE = "reference"

Row = Mapping[str, Any]  # a "size", the "kernel" that is fastest there, perhaps "seconds" by kernel


@dataclass(frozen=True)
class Licence:
    """What one device may run. Kernels are keys ``(op, kind)``, dtypes are those of the subject.

    Attributes:
        passed: The dtypes in which a kernel passed all its checks.
        refused: Of a kernel that is not used, by dtype in words why.
        rows: By op and dtype, the fastest of the kernels that passed, at some sizes.
    """

    passed: Mapping[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    refused: Mapping[tuple[str, str], Mapping[str, str]] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, Sequence[Row]]] = field(default_factory=dict)

    def allows(self, op: str, kind: str, dtype: str) -> bool:
        """Whether a kernel may run on a dtype; the reference always may."""
        return kind == REFERENCE or dtype in self.passed.get((op, kind), ())

    def allows_always(self, op: str, kind: str) -> bool:
        """Whether a kernel may run whatever the arguments: as on a CPU, where none is asked."""
        key = (op, kind)
        return kind == REFERENCE or (bool(self.passed.get(key)) and not self.refused.get(key))

    def pays(self, op: str) -> bool:
        """Whether a kernel of the op wins at one size at least, or none was timed."""
        rows = [row for each in self.rows.get(op, {}).values() for row in each]
        return not rows or any(row["kernel"] != REFERENCE for row in rows)

    def complaints(self, kinds: Sequence[str]) -> list[str]:
        """Why kernels of some kinds are not used, one line each."""
        return [
            f"{op} ({kind}, {dtype}): {why}"
            for (op, kind), reasons in self.refused.items()
            if kind in kinds
            for dtype, why in reasons.items()
        ]
