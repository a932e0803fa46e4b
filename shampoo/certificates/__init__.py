"""Kernels that prove themselves on the machine they meet, once: who may run is written down.

:func:`load_kernels` is what the optimizer calls. A device without a certificate is examined then,
the CPU before its library is loaded, a GPU before the first step of a plan on it; one process does
it and the others of the machine wait. ``SHAMPOO_TUNE=0`` forbids it, and what has no certificate
then runs references; ``SHAMPOO_TUNE=1`` repeats it, once a process.
"""

from shampoo.certificates.alone import inverse_root
from shampoo.certificates.issue import (
    certificate_of,
    complain,
    complaints_of,
    kernels_in_use,
    licence_of,
)
from shampoo.certificates.loading import load_kernels, prepare
from shampoo.certificates.shared import agree, offers

__all__ = [
    "agree",
    "certificate_of",
    "complain",
    "complaints_of",
    "inverse_root",
    "kernels_in_use",
    "licence_of",
    "load_kernels",
    "offers",
    "prepare",
]
