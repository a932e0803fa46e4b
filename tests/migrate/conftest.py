"""Where the official package is not installed, what runs beside it is no test."""

import importlib.util

if importlib.util.find_spec("distributed_shampoo") is None:
    collect_ignore = ["test_official_package.py"]
