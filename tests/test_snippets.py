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
ELSEWHERE = {"metrics"}
# Pages that speak of a program which is there already.
WITHIN = {"README", "index", "distributed", "faults", "frameworks", "from_official", "tuning"}


def snippets(page: Path) -> list[str]:
    """The blocks of Python, each on the lines where the page has it, for tracebacks."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in found]


PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
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


def test_pages_that_teach_have_snippets():
    taught = {"README", "quickstart", "checkpoints", "planner", "coming_from"}
    assert taught <= {page.stem for page in PAGES}


def test_a_snippet_that_fails_says_where(tmp_path):
    page = tmp_path / "page"
    page.write_text("# Page\n\n```python\nx = 1\nraise ValueError(x)\n```\n")
    [snippet] = snippets(page)
    with pytest.raises(ValueError, match="1") as caught:
        exec(compile(snippet, str(page), "exec"), {})
    assert caught.traceback[-1].lineno + 1 == 5
