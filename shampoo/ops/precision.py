"""Plain float32 products, whatever the process has switched on for everything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices on one device are float32 products inside.

    TF32, bf16 products and autocast are switched off, and afterwards found as they were. The
    per-operator ``fp32_precision`` is the one setting that can be read and written however the
    user set the precision: the older getters raise once the newer ones were used.
    """
    cuda = device.type == "cuda"
    backend: Any = torch.backends.cuda.matmul if cuda else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    with torch.autocast(device.type, enabled=False):
        if before in ("none", "ieee"):
            yield
            return
        backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            # Give back an inherited setting as inherited, so that it follows its parent again.
            backend.fp32_precision = "none"
            if backend.fp32_precision != before:
                backend.fp32_precision = before
