"""Every Python snippet of README.md and of the documents runs, page after page, top to bottom."""

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shampoo

ROOT = Path(__file__).parents[1]
# Pages whose snippets a test of their own runs, which knows what they need.
ELSEWHERE = {"README", "metrics"}
# Pages that speak of a program which is there already.
WITHIN = {"index", "distributed", "faults", "frameworks", "from_official", "tuning"}


def snippets(page: Path) -> list[str]:
    """The blocks of Python, each on the lines where the page has it, for tracebacks."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in found]


PAGES = [
    page
    for page in sorted((ROOT / "docs").glob("*.md"))
    if snippets(page) and page.stem not in ELSEWHERE
]


@pytest.fixture
def program(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What a snippet may take for granted: a model, its gradients, a process group of one rank."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    model(torch.ones(2, 8)).sum().backward()
    yield {
        **{"torch": torch, "nn": nn, "dist": dist, "gc": gc, "shampoo": shampoo},
        **{"Shampoo": shampoo.Shampoo, "DistributedDataParallel": DistributedDataParallel},
        **{"model": model, "steps": 10, "step": 1, "train": lambda: None},
        "mesh": SimpleNamespace(),
    }
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_of_a_page_run(page, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    given = request.getfixturevalue("program") if page.stem in WITHIN else {}
    namespace = {"__name__": page.stem, **given}
    for snippet in snippets(page):
        exec(compile(snippet, str(page), "exec"), namespace)


def test_the_first_run_of_readme_prints_what_it_says(program, capsys):
    """But for what another release of Python has in the text that it trains on."""
    readme = ROOT / "README.md"
    line, first = snippets(readme)
    for snippet in (line, first):
        namespace = dict(program) if snippet is line else {"__name__": "__main__"}
        exec(compile(snippet, str(readme), "exec"), namespace)
    said = re.findall(r"^steps to .*$", readme.read_text(encoding="utf-8"), re.M)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(said) > 3
    losses = []
    for ours, theirs in zip(printed, said, strict=True):
        assert re.sub(r"\d+\.\d+", "", ours) == re.sub(r"\d+\.\d+", "", theirs)
        losses.append([float(number) for number in re.findall(r"\d+\.\d+", ours)])
        expected = [float(number) for number in re.findall(r"\d+\.\d+", theirs)]
        assert losses[-1] == pytest.approx(expected, abs=0.1)
    adamw, shampoos = zip(*losses, strict=True)
    assert [*adamw] == sorted(adamw, reverse=True)
    assert shampoos[-1] < adamw[-1] - 0.1


def test_readme_is_two_screens_to_its_first_run_and_short():
    """A screen has 50 lines; who has read two of them has seen a loss fall."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    output = max(number for number, line in enumerate(lines) if line.startswith("steps to "))
    assert output < 2 * 50
    assert len(lines) <= 125
    assert max(map(len, lines)) <= 130


def test_pages_that_teach_have_snippets():
    taught = {"quickstart", "checkpoints", "planner", "coming_from", "tuning", "distributed"}
    assert taught <= {page.stem for page in PAGES}


def test_a_snippet_that_fails_says_where(tmp_path):
    page = tmp_path / "page"
    page.write_text("# Page\n\n```python\nx = 1\nraise ValueError(x)\n```\n")
    [snippet] = snippets(page)
    with pytest.raises(ValueError, match="1") as caught:
        exec(compile(snippet, str(page), "exec"), {})
    assert caught.traceback[-1].lineno + 1 == 5
