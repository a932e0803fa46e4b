"""What code, tests and documents name of the documents is there, section by section."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("shampoo", "kernels", "csrc", "tests", "benchmarks", "examples", "tools", "docs")
KINDS = {".py", ".md", ".cpp", ".h", ".cu", ".cuh", ".toml"}
# Every text that may name a document, but this one: its examples name some that are not there.
SOURCES = [
    path
    for paths in (ROOT.iterdir(), *((ROOT / folder).rglob("*") for folder in FOLDERS))
    for path in sorted(paths)
    if path.is_file()
    and (path.suffix in KINDS or path.name == "Makefile")
    and path != Path(__file__)
]
DOCUMENTS = [path for path in SOURCES if path.suffix == ".md"]

NUMBER = r"\d+(?:\.\d+)*"
NUMBERS = rf"{NUMBER}(?:(?:, and|,| and| to) {NUMBER})*(?!\w)"
NAME = re.compile(r"[\w./-]*\w\.md\b")
# "x.md 1.3", "`x.md` 2.2, 3.3", "x.md, section 8", "[x](x.md), sections 2 to 4"
CITED = re.compile(rf"({NAME.pattern})(?:`? |[`)]*[,:]? sections? )({NUMBERS})")
# "section 7.1 of x.md", "sections 2 and 3 of [x](x.md)"
CITED_BEFORE = re.compile(rf"\b[Ss]ections? ({NUMBERS}) of (?:\[[^\]]*\]\(|`|)({NAME.pattern})")
LINK = re.compile(r"\]\(([^)\s]+)\)")
ADDRESS = re.compile(r"\w+://\S+")
NEXT_LINE = re.compile(r"\s*\n[ \t]*(?:#|//|>)?[ \t]*")  # and what a comment begins with


def found(name: str, home: Path) -> Path | None:
    """The file that a name stands for in a file of ``home``; a document needs no folder."""
    places = (home / name, ROOT / name, ROOT / "docs" / name)
    return next((place for place in places if place.is_file()), None)


def headings(document: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"^#+ +(.+?) *$", text, re.M)


def sections(document: Path) -> set[str]:
    """The numbers that its headings begin with."""
    matches = (re.match(rf"({NUMBER})\.?\s", heading) for heading in headings(document))
    return {match[1] for match in matches if match}


def anchors(document: Path) -> set[str]:
    """What a link may name behind ``#``, by the rule of those who show it."""
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings(document))
    return {heading.replace(" ", "-") for heading in plain}


def complaints(text: str, home: Path) -> Iterator[str]:
    """What a text of ``home`` names of documents that is not there."""
    text = NEXT_LINE.sub(" ", ADDRESS.sub("", text))
    yield from (f"no {name}" for name in NAME.findall(text) if not found(name, home))
    cited = [(match[1], match[2]) for match in CITED.finditer(text)]
    cited += [(match[2], match[1]) for match in CITED_BEFORE.finditer(text)]
    for name, numbers in cited:
        if document := found(name, home):
            missing = set(re.findall(NUMBER, numbers)) - sections(document)
            yield from (f"{name} has no section {number}" for number in sorted(missing))


def broken_links(document: Path) -> Iterator[str]:
    for target in LINK.findall(ADDRESS.sub("", document.read_text(encoding="utf-8"))):
        name, _, anchor = target.partition("#")
        linked = document.parent / name if name else document
        if not linked.exists():
            yield target
        elif anchor and anchor not in anchors(linked):
            yield f"{target}: no such heading"


def test_documents_and_their_sections_are_where_they_are_cited():
    assert len(SOURCES) > 200
    missing = [
        f"{path.relative_to(ROOT)}: {complaint}"
        for path in SOURCES
        for complaint in complaints(path.read_text(encoding="utf-8"), path.parent)
    ]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_documents_lead_somewhere(document):
    assert [*broken_links(document)] == []


def test_files_that_documents_name_exist():
    file = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`")
    named = [
        (document.name, name)
        for document in DOCUMENTS
        if document.name != "CHANGELOG.md"  # which tells of what there was
        for name in file.findall(document.read_text(encoding="utf-8"))
    ]
    assert len(named) > 15
    missing = [f"{document}: {name}" for document, name in named if not (ROOT / name).exists()]
    assert not missing, "\n".join(missing)


def test_the_table_of_faults_names_tests_that_exist():
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "faults.md").read_text()))
    assert len(named) > 25
    assert {name for name in named if f"def {name}(" not in written} == set()


FRAMEWORKS = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8").partition("## 1.")[0]
ROWS = re.findall(r"^\| (.+?) \| (\S+(?: \S+)?) \| .* \| (`test_.+) \|$", FRAMEWORKS, re.M)


def test_every_row_of_the_table_of_frameworks_names_tests_that_passed():
    assert len(ROWS) == len(re.findall(r"^\| ", FRAMEWORKS, re.M)) - 1 > 14
    last = json.loads((ROOT / "docs" / "frameworks.json").read_text(encoding="utf-8"))
    for _, version, cell in ROWS:
        tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", cell)
        assert len(tests) == cell.count("`") // 2, cell
        for file, name in tests:
            path = ROOT / "tests" / "frameworks" / file
            assert f"def {name}(" in path.read_text(encoding="utf-8"), cell
            assert last["tests"].get(f"tests/frameworks/{file}::{name}", 0) > 0, cell
        assert any(each.startswith(version.split()[-1]) for each in last["versions"].values())
    reasons = [why for each in last["not passed"].values() for why in each]
    assert all(why.startswith("skipped: could not import 'distributed_shampoo'") for why in reasons)


def test_versions_of_frameworks_are_those_that_are_installed():
    folder = ROOT / "tests" / "frameworks"
    largest, rest = (
        (folder / f"requirements{which}.txt").read_text(encoding="utf-8")
        for which in ("-largest", "")
    )
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", largest + rest, re.M))
    last = json.loads((ROOT / "docs" / "frameworks.json").read_text(encoding="utf-8"))
    ours = {name: version for name, version in last["versions"].items() if name in pins}
    assert len(ours) > 14
    assert ours == {name: pins[name] for name in ours}
    versions = {version for _, version, _ in ROWS if not version.startswith("torch ")}
    assert versions <= set(ours.values())


PAPER = """# Paper
## 1. First
### 1.2 `part` of it, really
```
# 3. not a heading
```
## 2 Last
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("As paper.md 1.2 says, step 7", []),
        ("`paper.md` 1, 1.2, and 2.5; 9", ["paper.md has no section 2.5"]),
        ("see ./paper.md, section 3", ["./paper.md has no section 3"]),
        ("[it](paper.md), sections 1 to 4", ["paper.md has no section 4"]),
        ("of sections 1 and 8 of [it](paper.md)", ["paper.md has no section 8"]),
        ("# as\n    # paper.md\n    # 1.3 says", ["paper.md has no section 1.3"]),
        ("docs/paper.md 1", ["no docs/paper.md"]),
        ("other.md, and https://example.org/another.md 5", ["no other.md"]),
        ("paper.md 3d", []),
    ],
)
def test_what_is_not_there_is_complained_about(tmp_path, text, expected):
    (tmp_path / "paper.md").write_text(PAPER)
    assert [*complaints(text, tmp_path)] == expected


@pytest.mark.parametrize(
    ("link", "is_good"),
    [
        ("paper.md", True),
        ("paper.md#12-part-of-it-really", True),
        ("paper.md#3-not-a-heading", False),
        ("#title", True),
        ("#nothing", False),
        ("../nowhere.md", False),
        ("picture.png", False),
        ("https://example.org/x.md#y", True),
    ],
)
def test_a_broken_link_is_found(tmp_path, link, is_good):
    (tmp_path / "paper.md").write_text(PAPER)
    document = tmp_path / "document.md"
    document.write_text(f"# Title\nSee [this]({link}).\n")
    assert (not [*broken_links(document)]) == is_good
