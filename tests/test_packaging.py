"""What an import brings, what types say, and what is written for those who install the package."""

import ast
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import shampoo
from shampoo.blocks.blocking import MERGE_MODES
from shampoo.blocks.declared import choices
from shampoo.blocks.layout import LARGE_DIM_METHODS
from shampoo.grafting import GRAFTING
from shampoo.hyperparameters import EXPONENTS, NONFINITE, REFRESH_SCHEDULES
from shampoo.optimizer import Shampoo
from shampoo.roots.methods import ROOT_METHODS

ROOT = Path(__file__).parents[1]


def answer(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_an_import_brings_nothing_that_takes_long():
    """Of torch, what it has imported itself: these took 0.6 s and more of CPU."""
    heavy = ("torch.distributed.tensor", "torch.distributed.checkpoint", "sympy", "triton")
    code = "import sys, torch; had = set(sys.modules); import shampoo; print(*{*sys.modules} - had)"
    brought = answer("-c", code).split()
    assert "shampoo.optimizer" in brought
    assert [name for name in brought if name.startswith(heavy)] == []
    assert "shampoo.checkpoint" not in brought


@pytest.mark.parametrize("name", ["checkpoint", "migrate"])
def test_packages_are_there_once_they_are_named(name):
    code = f"import shampoo; print('{name}' in dir(shampoo), shampoo.{name}.__name__)"
    assert answer("-c", code) == f"True shampoo.{name}"
    with pytest.raises(AttributeError, match="no_such"):
        _ = shampoo.no_such


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("max_preconditioner_dim", ["auto"]),
        ("merge_dims", MERGE_MODES),
        ("preconditioner", choices()),
        ("exponent", EXPONENTS),
        ("grafting", GRAFTING),
        ("large_dim_method", LARGE_DIM_METHODS),
        ("root_method", ROOT_METHODS),
        ("nonfinite", NONFINITE),
        ("refresh_schedule", REFRESH_SCHEDULES),
    ],
)
def test_types_name_the_choices_that_there_are(name, expected):
    said = typing.get_type_hints(Shampoo.__init__)[name]
    literals = [each for each in (said, *typing.get_args(said)) if "Literal[" in str(each)]
    named = {word for each in literals for word in typing.get_args(each) if isinstance(word, str)}
    assert named == set(expected)
    assert inspect.signature(Shampoo).parameters[name].default in named


def test_the_version_is_written_once():
    assert answer("-m", "shampoo", "--version") == f"shampoo {shampoo.__version__}"
    written = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'attr = "shampoo.__version__"' in written
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## (.+)$", changes, re.M)
    unreleased = re.fullmatch(r"Unreleased \((.+)\)", heads[-1])
    assert unreleased is None or shampoo.__version__.startswith(unreleased[1])
    assert all(re.fullmatch(r"\d+\.\d+\.\d+, \d{4}-\d\d-\d\d", head) for head in heads[:-1])


def test_sources_are_of_the_oldest_python_that_is_named():
    """The grammar of 3.10; of its library, `make types` asks mypy."""
    paths = [*(ROOT / "shampoo").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(paths) > 100
    for path in paths:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))
