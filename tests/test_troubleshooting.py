"""docs/troubleshooting.md has every error of the package and every line it logs, in its words."""

import ast
import re
from pathlib import Path

import pytest

from shampoo import errors

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
PUBLIC = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.ShampooError)
}
RAISED = {*PUBLIC, "RuntimeError", "BuildError", "KeyError", "FileExistsError"}
SAID = {
    *("logger.info", "logger.warning", "logger.error"),
    *("warn_outside", "_say", "_warn_once", "print"),
}
# What is said in a process apart is heard of as the verdict on a kernel; `__main__` and `tune` are
# commands, whose output is what was asked for.
APART = {"certificates/runner.py", "certificates/checks.py", "ops/apart.py"}
COMMANDS = {"__main__.py", "certificates/tune.py"}
VALUE = "\N{HORIZONTAL ELLIPSIS}"  # stands for a value in a message
LEAST = 2  # words of a message; what has fewer is made of what others say


def words(node: ast.AST) -> str:
    """The text of an expression as far as it is written out, with ``VALUE`` for the rest."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else VALUE
    if isinstance(node, ast.JoinedStr):
        return "".join(map(words, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words(node.left) + words(node.right)
    return VALUE


def plain(text: str) -> str:
    """On one line, with one sign for all values."""
    text = re.sub(r"%[-.\d]*[a-z]", VALUE, text)
    return re.sub(r"\s+", " ", text).strip()


def sources() -> dict[str, ast.Module]:
    found = {}
    for path in sorted((ROOT / "shampoo").rglob("*.py")):
        name = path.relative_to(ROOT / "shampoo").as_posix()
        if not name.startswith(("kernels/", "csrc/")) and name not in APART | COMMANDS:
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


SOURCES = sources()


def messages() -> list[tuple[str, str]]:
    """Where something is raised or said, and what: of a variable, what its function gives it."""
    found = []
    for name, module in SOURCES.items():
        functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
        for function in [module, *functions]:
            given = {
                target.id: words(node.value)
                for node in ast.walk(function)
                if isinstance(node, ast.Assign)
                for target in node.targets
                if isinstance(target, ast.Name)
            }
            if function is module:
                continue
            for node in ast.walk(function):
                if not isinstance(node, ast.Call) or not node.args:
                    continue
                called = ast.unparse(node.func)
                if called.rpartition(".")[2] in RAISED or called in SAID:
                    first = node.args[0]
                    text = given.get(first.id, "") if isinstance(first, ast.Name) else words(first)
                    text = plain(text)
                    if len(re.findall(r"[a-zA-Z]{2,}", text)) >= LEAST:
                        found.append((f"{name}:{node.lineno}", text))
    return sorted(set(found))


def quotes(page: str) -> list[str]:
    """The code of the first cells of all tables that quote: what the page says is said."""
    found = []
    is_quoting = False
    for line in page.splitlines():
        if not line.startswith("|"):
            is_quoting = False
        elif line.startswith("| it says |"):
            is_quoting = True
        elif is_quoting:
            cell = line.split(" | ")[0]
            # A code span that holds a back quote of its own is taken whole.
            found += re.findall(r"`(.+?)`(?=, `|$)", cell.removeprefix("| "))
    return found


def is_of(quote: str, text: str) -> bool:
    """Whether a text has the parts of a quote, one after the other."""
    place = 0
    for part in quote.split("..."):
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


QUOTES = quotes(PAGE)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_error_has_a_section(name):
    assert f"\n### {name}\n" in PAGE


def test_every_message_is_on_the_page():
    found = messages()
    assert len(found) > 50
    # A quote of values alone would take everything.
    known = [quote for quote in QUOTES if re.sub(r"\W|shampoo", "", quote)]
    missing = [each for each in found if not any(is_of(quote, each[1]) for quote in known)]
    assert not missing, "\n".join(f"{where}: {text}" for where, text in missing)


def test_every_quote_of_the_page_is_said_somewhere():
    assert len(QUOTES) > 80
    texts = {
        plain(words(node))
        for module in SOURCES.values()
        for node in ast.walk(module)
        if isinstance(node, (ast.JoinedStr, ast.Constant, ast.BinOp))
    }
    stale = [quote for quote in QUOTES if not any(is_of(quote, text) for text in texts)]
    assert not stale, "\n".join(stale)


def test_a_bad_value_is_refused_with_a_remedy():
    """``Invalid x=... Must be ...``: what the page says of all messages that it does not list."""
    found = 0
    for name, module in SOURCES.items():
        for node in ast.walk(module):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "ValueError":
                text = plain(words(node.args[0]))
                if text.startswith("Invalid"):
                    found += 1
                    assert re.search(r"\b(Must|must|Build)\b", text), (
                        f"{name}:{node.lineno}: {text}"
                    )
    assert found > 40


@pytest.mark.parametrize(
    ("quote", "text", "is_found"),
    [
        ("no ...: it is", "no compiler: it is not there", True),
        ("no ...: it is", "no compiler; it is not there", False),
        ("a (b) c", "a (b) c", True),
    ],
)
def test_a_quote_stands_for_what_it_says(quote, text, is_found):
    assert is_of(quote, text) == is_found


def test_quotes_are_found_in_tables_that_say_so():
    page = (
        "| it says | why |\n|---|---|\n| `one ...`, `two` | `no` |\n\n| other |\n|---|\n| `no` |\n"
    )
    assert quotes(page) == ["one ...", "two"]
