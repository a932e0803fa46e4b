"""What tests of certificates share."""

from pathlib import Path

import pytest
from compiled import load_compiled

from shampoo import ops
from shampoo.certificates import issue
from shampoo.ops import jit


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache of its own, so certificates of its own, with the library of the usual one."""
    load_compiled()
    library = jit.build()
    monkeypatch.setattr(jit, "build", lambda retry=False: library)
    monkeypatch.setenv("SHAMPOO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(issue, "_given", {})
    monkeypatch.setattr(issue, "_warned", set())
    monkeypatch.delenv("SHAMPOO_TUNE", raising=False)
    monkeypatch.delenv("SHAMPOO_BACKEND", raising=False)
    yield tmp_path / "cache"
    monkeypatch.delenv("SHAMPOO_BACKEND", raising=False)
    ops.load_kernels(required=True)  # whatever was set aside comes back
