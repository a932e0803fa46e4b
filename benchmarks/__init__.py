"""Measurements of the package: step time, its floor, and training to an accuracy."""

from importlib.util import find_spec

if find_spec("rich") is None:  # in a line, before a module of ours fails with a traceback
    raise SystemExit("The benchmarks need rich and matplotlib: pip install -e '.[bench]'")
