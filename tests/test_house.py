"""The shape of the code base: what ships, how long files are, and which module may import which."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Every module and what it may import of the package. Nothing imports upwards.
LAYERS = {
    # the mathematics on stacks, which knows torch alone
    "kernels": "",
    "kernels.philox": "",
    "kernels.reference": "kernels.philox",
    "kernels.norms": "",
    "kernels.newton": "kernels.norms",
    "kernels.minimax": "kernels.norms",
    "kernels.health": "kernels.norms",
    # the same in Triton
    "kernels.chip": "",
    "kernels.planes": "",
    "kernels.chain": "kernels.minimax",
    "kernels.gram": "kernels.chip",
    "kernels.precondition": "kernels.gram kernels.planes",
    "kernels.probe": "kernels.health kernels.planes",
    "kernels.symmetric_gemm": "kernels.chip",
    "kernels.minimax_triton": "kernels.chain kernels.minimax kernels.planes kernels.symmetric_gemm",
    # the op table
    "backends": "",
    "jit": "backends",
    "ops": "backends jit kernels.gram kernels.health kernels.minimax kernels.minimax_triton"
    " kernels.precondition kernels.probe kernels.reference",
    # inverse roots
    "wording": "",
    "limits": "",
    "precision": "",
    "generate_coefficients": "",
    "schedule": "kernels.minimax",
    "probe": "kernels.health ops",
    "eigen": "kernels.norms ops",
    "diagonal": "eigen kernels.norms",
    "solver": "diagonal eigen kernels.newton ops precision schedule wording",
    "refresh": "averages precision probe solver",
    "roots": "solver",
    # who works with whom
    "errors": "",
    "group_handle": "errors",
    "agreement": "errors group_handle",
    "regions": "",
    "workers": "agreement group_handle regions wording",
    # what is where
    "patterns": "",
    "blocking": "",
    "averages": "",
    "grafting": "averages",
    "caller": "",
    "hyperparameters": "averages blocking caller grafting schedule solver wording",
    "layout": "blocking hyperparameters",
    "footprint": "grafting hyperparameters layout",
    "cost": "layout",
    "ownership": "",
    "slots": "",
    "state_keys": "",
    "entries": "errors state_keys",
    "publication": "entries state_keys",
    "rows": "",
    "names": "",
    "division": "cost layout ownership workers",
    "stacks": "blocking layout refresh slots state_keys workers",
    "segments": "rows stacks",
    "replicas": "agreement errors regions workers",
    "parameters": "regions",
    "step_plan": "agreement blocking division entries errors gradients grafting hyperparameters"
    " layout names parameters patterns publication regions segments solver stacks state_keys"
    " workers",
    "thin": "caller footprint hyperparameters layout names",
    "fillable": "division state_keys step_plan workers",
    "state_dict": "division entries errors fillable hyperparameters layout names state_keys"
    " step_plan workers",
    "consolidation": "agreement state_keys step_plan",
    "inquiry": "",
    # what travels
    "exchange": "averages hyperparameters layout limits ops scalars segments stacks",
    "allgather": "agreement exchange group_handle hyperparameters limits ops patterns scalars"
    " segments stacks",
    "routes": "blocking regions",
    "router": "agreement averages exchange group_handle hyperparameters limits ops patterns routes"
    " scalars segments stacks",
    "exchanges": "allgather blocking exchange hyperparameters regions router routes stacks"
    " segments step_plan workers",
    # the step
    "gradients": "limits names ops regions",
    "versions": "exchange",
    "tracing": "regions",
    "scalars": "averages grafting hyperparameters layout",
    "capture": "gradients hyperparameters patterns scalars segments stacks step_plan",
    "proposal": "agreement capture errors exchange exchanges gradients replicas step_plan",
    "direction": "averages exchange hyperparameters kernels.norms limits ops scalars segments",
    "layerwise": "exchange limits ops segments stacks",
    "advance": "agreement averages capture direction exchange hyperparameters layerwise ops"
    " precision refresh scalars segments stacks",
    "ridge": "advance hyperparameters scalars segments solver stacks step_plan",
    "persistence": "agreement capture consolidation division exchanges fillable inquiry names"
    " patterns publication ridge state_dict state_keys step_plan versions workers",
    "optimizer": "advance agreement capture errors exchange exchanges gradients hyperparameters"
    " layout names ops parameters persistence proposal regions replicas scalars segments"
    " solver stacks step_plan thin tracing versions workers",
    "replay": "optimizer patterns",
    "checkpoint": "hyperparameters layout optimizer state_dict state_keys",
    # before the step
    "architectures": "",
    "traffic": "layout",
    "report": "",
    "forecast": "allgather cost division footprint grafting hyperparameters layout report slots"
    " traffic workers",
    "planner": "cost forecast hyperparameters layout optimizer report thin workers",
    "__init__": "errors optimizer planner replay roots",
    "__main__": "architectures backends cost grafting hyperparameters jit ops planner workers",
}

FOLDERS = {"shampoo": ROOT / "shampoo", "shampoo.kernels": ROOT / "kernels"}


def modules() -> dict[str, Path]:
    found = {path.stem: path for path in FOLDERS["shampoo"].glob("*.py")}
    for path in FOLDERS["shampoo.kernels"].glob("*.py"):
        found["kernels" if path.stem == "__init__" else f"kernels.{path.stem}"] = path
    return found


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import on line {node.lineno}"
            if node.module == "shampoo":
                found |= {alias.name for alias in node.names}
            elif node.module == "shampoo.kernels":
                found |= {f"kernels.{alias.name}" for alias in node.names}
            elif (node.module or "").startswith("shampoo."):
                found.add(node.module.removeprefix("shampoo."))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {name.removeprefix("shampoo.") for name in names if name.startswith("shampoo")}
    return found


@pytest.mark.parametrize("module", modules())
def test_module_imports_only_what_lies_below_it(module):
    assert module in LAYERS, f"{module} has no place in LAYERS"
    assert imports_of(modules()[module]) <= set(LAYERS[module].split())


def test_every_layer_is_a_module():
    assert set(LAYERS) == set(modules())


def test_layers_have_no_cycle():
    below = {name: set(allowed.split()) for name, allowed in LAYERS.items()}
    while below:
        lowest = {name for name, allowed in below.items() if not allowed & set(below)}
        assert lowest, f"these import each other: {sorted(below)}"
        below = {name: allowed for name, allowed in below.items() if name not in lowest}


SOURCES = [
    path
    for folder in ("shampoo", "kernels", "csrc", "tests", "benchmarks", "examples")
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
        if path.is_file() and "__pycache__" not in path.parts
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
