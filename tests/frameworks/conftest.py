"""Where the packages of requirements.txt are not installed, nothing here is a test."""

import importlib.util

if importlib.util.find_spec("accelerate") is None:
    collect_ignore_glob = ["test_*.py"]
