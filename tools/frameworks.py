"""Writes down how ``make test-frameworks`` ended, from the file that pytest has left.

    python tools/frameworks.py last.xml docs/frameworks.json

Which tests passed, how often and in what time, which did not and why; the versions that were
there, the commit and the day. Run it in the environment of the tests.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
# What docs/frameworks.md and its neighbours name.
PACKAGES = (
    *("torch", "accelerate", "transformers", "trl", "peft", "lightning", "torchtitan", "timm"),
    *("deepspeed", "pytorch-ignite", "skorch", "schedulefree", "torchao", "tensorboard", "wandb"),
    *("mlflow-skinny", "playwright", "pytorch_optimizer"),
)


def outcome_of(path: Path) -> dict[str, Any]:
    """What stands in pytest's file: counts, tests that passed by name, and why others did not."""
    [suite] = ElementTree.parse(path).getroot().iter("testsuite")
    passed: dict[str, int] = collections.Counter()
    others: dict[str, dict[str, int]] = {}
    for case in suite.iter("testcase"):
        file = case.attrib["classname"].replace(".", "/")
        name = f"{file}.py::{case.attrib['name'].partition('[')[0]}"
        wrong = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
        if wrong is None:
            passed[name] += 1
        else:
            why = f"{wrong.tag}: {wrong.attrib.get('message', '')}"
            others.setdefault(name, collections.Counter())[why] += 1
    return {
        "date": suite.attrib["timestamp"].partition(".")[0],
        "seconds": round(float(suite.attrib["time"])),
        "passed": sum(passed.values()),
        "not passed": others,
        "tests": dict(sorted(passed.items())),
    }


def commit() -> str:
    """Of the tree, with ``-dirty`` behind it where files differ."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def versions() -> dict[str, str]:
    """Of what is there."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Reads and writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="what pytest --junitxml has written")
    parser.add_argument("file", type=Path, help="where to write")
    options = parser.parse_args()
    found = {"commit": commit(), **outcome_of(options.results), "versions": versions()}
    options.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
