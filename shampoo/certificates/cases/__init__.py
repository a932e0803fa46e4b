"""Every call that a kernel must do right: one list, for tests, certificates and benchmarks.

:data:`CASES` holds them by op. A case says what it is about and makes its arguments, the same on
every machine; what is asked of a kernel that runs it is in :mod:`shampoo.certificates.checks`.
"""

from collections.abc import Sequence

from shampoo.certificates.cases.case import Arguments, Case
from shampoo.certificates.cases.numbers import number_cases
from shampoo.certificates.cases.stacks import stack_cases
from shampoo.certificates.cases.tiles import tile_cases

__all__ = ["CASES", "Arguments", "Case"]

CASES: dict[str, Sequence[Case]] = {**tile_cases(), **number_cases(), **stack_cases()}
"""The cases of every op, cheap ones first."""
