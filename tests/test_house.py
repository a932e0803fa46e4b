"""The shape of the code base: what ships, how long files are, and which module may import which."""

import ast
import graphlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Every package and every module beside them, and what it imports of the others: just that. They
# stand in order, from the ground up, and nothing imports upwards.
IMPORTS = {
    "errors": "",
    "dtensor": "",
    "groups": "errors",
    "inputs": "errors",
    "kernels": "",
    "ops": "errors inputs kernels",
    "roots": "errors kernels ops",
    "certificates": "errors kernels ops roots",
    "blocks": "errors dtensor inputs ops",
    "grafting": "ops",
    "hyperparameters": "errors ops roots blocks grafting",
    "scalars": "ops blocks grafting hyperparameters",
    "preconditioner": "kernels ops roots blocks grafting hyperparameters scalars",
    "distributed": "errors dtensor inputs kernels ops blocks hyperparameters scalars",
    "step": "errors dtensor groups ops roots blocks grafting hyperparameters scalars preconditioner"
    " distributed",
    "state": "errors dtensor blocks hyperparameters preconditioner distributed step",
    "agreement": "errors certificates blocks hyperparameters distributed step state",
    "metrics": "errors blocks step agreement",
    "optimizer": "groups certificates blocks hyperparameters preconditioner distributed step state"
    " metrics",
    "migrate": "errors dtensor blocks grafting hyperparameters preconditioner state step optimizer",
    "replay": "blocks optimizer",
    "checkpoint": "errors inputs blocks preconditioner state optimizer",
    "planner": "errors inputs groups blocks grafting hyperparameters preconditioner distributed"
    " step optimizer",
    "integrations": "groups optimizer",
    "commands": "errors groups ops step optimizer",
    "__init__": "errors groups certificates optimizer migrate replay checkpoint planner",
    "__main__": "__init__ errors inputs ops certificates blocks grafting hyperparameters"
    " distributed planner commands",
}
MODULES = [path for path in sorted((ROOT / "shampoo").rglob("*.py")) if ".egg" not in str(path)]
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))


def unit_of(path: Path) -> str:
    """The package that a file is in, or the module that it is beside them."""
    parts = path.relative_to(ROOT).parts
    return "kernels" if parts[0] == "kernels" else parts[1].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """What a file imports of the package, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import on line {node.lineno}"
            is_root = node.module == "shampoo"
            names = [f"shampoo.{alias.name}" for alias in node.names] if is_root else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "shampoo":
                unit = rest.partition(".")[0]
                found.add(unit if unit in IMPORTS else "__init__")
    return found


def test_imports_are_those_of_the_table():
    found: dict[str, set[str]] = {unit: set() for unit in IMPORTS}
    for path in (*MODULES, *KERNELS):
        if "csrc" not in path.relative_to(ROOT).parts[:2]:
            found.setdefault(unit_of(path), set()).update(imports_of(path) - {unit_of(path)})
    assert found == {unit: set(below.split()) for unit, below in IMPORTS.items()}


def test_nothing_imports_upwards():
    graph = {unit: below.split() for unit, below in IMPORTS.items()}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(IMPORTS)
    places = {unit: place for place, unit in enumerate(IMPORTS)}
    for unit, below in IMPORTS.items():
        assert all(places[each] < places[unit] for each in below.split()), unit


def test_no_module_of_a_package_is_in_a_cycle():
    names = {_dotted(path): path for path in (*MODULES, *KERNELS)}
    graph = {
        name: {_target(node, alias, names) for node, alias in _import_nodes(path)} - {None, name}
        for name, path in names.items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def _dotted(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "shampoo":
        parts.insert(0, "shampoo")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _import_nodes(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def _target(module: str, alias: str, names: dict[str, Path]) -> str | None:
    """The module that a line of an import runs, as far as it is ours."""
    if f"{module}.{alias}" in names:
        return f"{module}.{alias}"
    return module if module in names else None


def test_the_listing_shows_the_architecture():
    entries = [path for path in (ROOT / "shampoo").iterdir() if not path.name.startswith("__pyc")]
    packages = [path for path in entries if path.is_dir() and not path.is_symlink()]
    assert len(packages) == 13
    assert len(entries) - len(packages) - len(LINKS) <= 15


LINKS = ("kernels", "csrc")  # which an install maps


def test_links_of_a_checkout_are_what_an_install_maps():
    assert all((ROOT / "shampoo" / name).resolve() == ROOT / name for name in LINKS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import shampoo.kernels.triton"],
        ["-m", "shampoo"],
        ["-m", "shampoo", "plan", "--help"],
        ["-m", "shampoo", "explain", "64x64,64"],
        ["-m", "benchmarks.step_time", "--help"],
    ],
)
def test_commands_run_in_the_root_of_a_clone(arguments):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SOURCES = [
    path
    for folder in ("shampoo", "kernels", "csrc", "tests", "benchmarks", "examples", "tools")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}
]


def test_no_file_is_long():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert len(lengths) > 100
    assert {path: length for path, length in lengths.items() if length > 500} == {}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what is written, so that no build leaves anything in the checkout, or meets it."""
    copy = tmp_path_factory.mktemp("tree") / "checkout"
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "peers"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def build(tree: Path, out: Path) -> Path:
    command = [*(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps"), "--no-build-isolation"]
    subprocess.run([*command, "--no-index", "-w", out, tree], check=True, cwd=out)
    [wheel] = out.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_wheel_ships_every_source_and_nothing_else(tree, tmp_path):
    wheel = build(tree, tmp_path)
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    homes = {"shampoo": "shampoo", "kernels": "shampoo/kernels", "csrc": "shampoo/csrc"}
    written = {
        f"{home}/{path.relative_to(ROOT / folder)}"
        for folder, home in homes.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.is_symlink()
    }
    assert shipped == written
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.slow
def test_wheel_from_the_sdist_is_the_same(tree, tmp_path):
    script = "from setuptools import build_meta as b; import sys; print(b.build_sdist(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", script, tmp_path], check=True, cwd=tree, stdout=subprocess.DEVNULL
    )
    [sdist] = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    wheels = []
    for name, source in (("direct", tree), ("through", unpacked)):
        (tmp_path / name).mkdir()
        wheels.append(build(source, tmp_path / name))
    direct, through = (
        {n for n in zipfile.ZipFile(w).namelist() if ".dist-info/" not in n} for w in wheels
    )
    assert direct == through
