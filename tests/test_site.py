"""The site that `make docs` builds: all of it is there, and no link leads out of it by mistake."""

import ast
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import shampoo
from shampoo import checkpoint, migrate

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

PACKAGES = {"checkpoint": checkpoint, "migrate": migrate}
NAMES = [name for name in shampoo.__all__ if name not in PACKAGES]


INTEGRATIONS = {
    f"shampoo.integrations.{path.stem}": ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "shampoo" / "integrations").glob("[!_]*.py"))
}


def listed() -> set[str]:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\.\. auto\w+:: ([\w.]+)(?:\(\))?$", page, re.M))


def public_of_integrations() -> list[str]:
    """What their modules define under a public name; their frameworks need not be installed."""
    return [
        f"{module}.{node.name}"
        for module, tree in INTEGRATIONS.items()
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    ]


def test_the_api_page_has_every_public_name():
    public = {f"shampoo.{name}" for name in NAMES}
    public |= {f"shampoo.{name}.{each}" for name, kind in PACKAGES.items() for each in kind.__all__}
    assert len(public_of_integrations()) >= len(INTEGRATIONS) >= 5
    assert public | {*INTEGRATIONS, *public_of_integrations()} <= listed()


def test_the_api_page_has_what_public_functions_return():
    """By its public name or, if it has none, where it is defined: it is a user's too."""
    returned = [shampoo.Shampoo.explain, shampoo.plan, migrate.from_distributed_shampoo]
    kinds = [typing.get_type_hints(each)["return"] for each in returned]
    own = {
        f"{kind.__module__}.{kind.__qualname__}"
        for kind in kinds
        if getattr(kind, "__module__", "").startswith("shampoo.")
    }
    assert len(own) >= 2
    assert own <= listed()


def test_every_document_has_one_place_in_the_menu():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    menus = re.findall(r"^```\{toctree\}\n(.*?)^```", index, re.M | re.S)
    entries = [line for menu in menus for line in menu.splitlines() if line and line[0] != ":"]
    named = [re.sub(r"^.*<(.*)>$", r"\1", entry) for entry in entries]
    here = [name for name in named if not name.startswith("../")]
    assert sorted(here) == sorted(path.stem for path in DOCS.glob("*.md") if path.stem != "index")
    assert {"../README", "../CHANGELOG", "../CONTRIBUTING", "../SECURITY"} <= set(named)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for needed in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"]
    build += ["-d", str(folder / "read"), "-c", "docs", ".", str(folder / "out")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return folder / "out"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_every_document(site):
    for document in [*DOCS.glob("*.md"), ROOT / "README.md"]:
        page = document.relative_to(ROOT).with_suffix(".html")
        assert (site / page).is_file(), page
    assert 'url=docs/index.html"' in (site / "index.html").read_text(encoding="utf-8")
    api = (site / "docs" / "api.html").read_text(encoding="utf-8")
    assert all(f'id="shampoo.{name}"' in api for name in NAMES)
    assert all(f'id="{name}"' in api for name in public_of_integrations())


@pytest.mark.slow
def test_links_between_documents_stay_in_the_site(site):
    """Sphinx offers a file that is no page of the site for download; only sources are to be so."""
    pages = [page for page in site.rglob("*.html") if "_static" not in page.parts]
    links = [(page, link) for page in pages for link in _links(page)]
    assert len(links) > 100
    for page, link in links:
        assert not link.endswith(".md"), f"{page.name}: {link}"
        target, _, anchor = link.partition("#")
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page.name}: {link}"
        if anchor and linked.suffix == ".html":
            assert f'id="{anchor}"' in linked.read_text(encoding="utf-8"), f"{page.name}: {link}"


def _links(page: Path) -> list[str]:
    """Those within the site, of what a page says."""
    text = page.read_text(encoding="utf-8")
    article = re.search(r"<article.*?</article>", text, re.S)
    found = re.findall(r'href="([^"]+)"', article[0]) if article else []
    return [link for link in found if "://" not in link]
