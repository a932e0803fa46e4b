"""`python -m shampoo dashboard`: the page of a run, read by a parser and shown by a browser."""

import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shampoo import Shampoo
from shampoo.__main__ import main
from shampoo.commands.chart import Line, chart
from shampoo.commands.dashboard import dashboard
from shampoo.commands.log import read_log

VOID = {"meta", "line", "circle", "polygon", "polyline"}  # written without an end


class Page(HTMLParser):
    """What a page is made of; raises where elements are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """A run with skipped steps and a root that fails."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4))
    opt = Shampoo(model, lr=1e-2, max_preconditioner_dim=8, precondition_frequency=4)
    opt.record_metrics(every=2)
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    with path.open("w") as lines:
        for step in range(1, 41):
            opt.zero_grad()
            loss = model(torch.randn(8, 12)).square().mean()
            loss.backward()
            if step in (9, 10):
                model[0].weight.grad[0, 0] = math.nan
            if step > 20:
                opt.state[model[2].weight]["block0.factor0"].fill_diagonal_(-1.0)
            opt.step()
            print(json.dumps({"step": step, "loss": loss.item(), **opt.metrics()}), file=lines)
    return path


def test_the_page_is_whole_and_needs_nothing(log):
    text = dashboard(read_log(log), "a < run & more")
    page = Page(text)
    titles = list(page.text["b"])
    assert titles[0] == "loss"
    assert {"Spectra", "Graft scale", "Failures", "Skipped steps", "Update / weight"} <= {*titles}
    tags = [tag for tag, _ in page.elements]
    assert tags.count("svg") == tags.count("figure") == len(titles) == 14
    assert tags.count("polyline") > 20
    assert tags.count("polygon") == 1  # the range of the spectra, of the one group that has roots
    assert page.text["title"] == ["a < run & more"]
    for _, attributes in page.elements:  # nothing is fetched
        assert not {"src", "href", "xlink:href", "srcset", "data"} & attributes.keys()
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp", text)
    assert len(text) < 300_000


def test_what_the_log_holds_is_what_is_drawn(log):
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    page = Page(dashboard(read_log(log), "run"))
    data = {}
    for title, drawn in zip(page.text["b"], page.text["script"], strict=False):
        data[title] = {line["name"]: line["points"] for line in json.loads(drawn)["lines"]}
    for key, title, group in (
        ("loss", "loss", "loss"),
        ("shampoo/update_rms", "Update", "all groups"),
        ("shampoo/vectors/update_rms", "Update", "vectors"),
        ("shampoo/matrices/eig_over_ridge", "Spectra", "matrices"),
        ("shampoo/skipped_steps", "Skipped steps", "all groups"),
        ("shampoo/matrices/root_failures", "Failures", "matrices"),
    ):
        expected = [[line["step"], line[key]] for line in lines if key in line]
        assert data[title][group] == expected, key
    assert data["Skipped steps"]["all groups"][-1][1] == 2
    assert data["Failures"]["matrices"][-1][1] == 1
    tiles = dict(zip(page.text["dt"], page.text["dd"], strict=True))
    assert tiles["skipped steps"] == "2"
    assert tiles["roots that failed, most"] == "1"


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    drawn = re.findall(r'<polyline class="c\d" points="([^"]*)"', svg)
    return [[tuple(map(float, each.split(","))) for each in line.split()] for line in drawn]


def test_lines_are_drawn_to_scale():
    svg = chart("x", "", [Line("a", 0, [(0, 1.0), (50, 10.0), (100, 100.0)])], is_log=True)
    [[(x0, y0), (x1, y1), (x2, y2)]] = points_of(svg)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert y0 > y2  # up is more
    svg = chart("x", "", [Line("a", 0, [(0, 1.0), (50, 3.0), (100, 9.0)])], is_log=False)
    [[(_, y0), (_, y1), (_, y2)]] = points_of(svg)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(2 / 8, abs=0.01)


def test_a_long_run_keeps_its_peaks():
    points = [(step, 1.0 + (step == 7_531)) for step in range(20_000)]
    svg = chart("x", "", [Line("a", 0, points)], is_log=False)
    [line] = points_of(svg)
    assert len(line) <= 500
    assert min(y for _, y in line) < min(line[0][1], line[-1][1])


@pytest.mark.parametrize(
    "values", [[1.0], [0.0, 0.0], [5.0, 5.0], [-3.0, 2.0], [1e-300, 1e300], [1e-12, 2e-12], [7, 7]]
)
@pytest.mark.parametrize("is_log", [False, True])
def test_odd_values_are_drawn(values, is_log):
    found = chart("x", "", [Line("a", 9, list(enumerate(values)))], is_log)
    Page(found)
    assert "nan" not in found.lower().replace("nanny", "")
    has_some = not is_log or any(value > 0 for value in values)
    assert ("<svg" in found) is has_some


def test_words_and_holes_are_passed_over(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"step": 2, "note": "begun", "loss": NaN, "ok": true, "lr": 0.5, "empty": null}\n\n'
        '{"step": 1, "loss": 3}\n{"step": 2, "lr": 0.25, "loss": Infinity}\n'
        '{"step": 3, "</script><b>": 1, "shampoo/a<b/grad_rms": 2}\n'
    )
    run = read_log(path)
    assert run["loss"] == [(1.0, 3.0)]
    assert run["lr"] == [(2.0, 0.25)]  # a step that comes again counts once
    page = Page(dashboard(run, "run"))
    assert "</script><b>" in page.text["b"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: it is not JSON"),
        ("[1, 2]", 'line 2: it is [1, 2]. Must be an object with a "step"'),
        ("3", "line 2: it is 3."),
        ('{"loss": 1}', 'line 2: its "step" must be a number >= 0'),
        ('{"step": "10"}', 'line 2: its "step"'),
        ('{"step": -1}', 'line 2: its "step"'),
        ('{"step": NaN}', 'line 2: its "step"'),
        ('{"step": 1' + "0" * 400 + "}", 'line 2: its "step"'),
        ('{"step": true}', 'line 2: its "step"'),
        ('{"step": 1, "x": {"y": 1}}', "line 2: x is"),
        ('{"step": 1, "x": [1]}', "line 2: x is [1]. Must be a number"),
        ("[" * 100_000, "line 2: "),
    ],
)
def test_a_bad_line_is_named(tmp_path, capsys, monkeypatch, line, words):
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1, "loss": 2}}\n{line}\n')
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_log(path)
    assert words in str(error.value)
    monkeypatch.setattr(sys, "argv", ["shampoo", "dashboard", str(path)])
    with pytest.raises(SystemExit):
        main()
    assert "line 2" in capsys.readouterr().err
    assert not path.with_suffix(".html").exists()


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"step": 1}\n', b"\xff\xfe\n"])
def test_a_log_without_metrics_is_refused(tmp_path, content):
    path = tmp_path / "log.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Must (be|have) lines of JSON"):
        read_log(path)
    with pytest.raises(ValueError, match="Must be lines of JSON"):
        read_log(tmp_path / "nowhere")


def test_the_command_writes_beside_the_log(log, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["shampoo", "dashboard", str(log), "--title", "My run"])
    assert main() == 0
    out = log.with_suffix(".html")
    assert capsys.readouterr().out.strip() == str(out)
    assert Page(out.read_text()).text["h1"] == ["My run"]
    other = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["shampoo", "dashboard", str(log), "--out", str(other)])
    assert main() == 0
    assert Page(other.read_text()).text["h1"] == ["metrics.jsonl"]
    monkeypatch.setattr(sys, "argv", ["shampoo", "dashboard", str(log), "--out", str(log)])
    with pytest.raises(SystemExit):
        main()
    assert "Must be another file than the log" in capsys.readouterr().err
    assert read_log(log)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real one, without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser")
    path = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if path is None:
        pytest.skip("no Chromium to show the page")
    with api.sync_playwright() as driver:
        shown = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield shown
        shown.close()


@pytest.mark.frameworks
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 380])
def test_a_browser_shows_it(browser, log, tmp_path, scheme, width):
    """All of it, without a request or an error, and no wider than the window."""
    path = tmp_path / "page.html"
    path.write_text(dashboard(read_log(log), "run"))
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(path.as_uri())
    assert page.locator("figure svg").count() == 14
    boxes = [page.locator("figure").nth(index).bounding_box() for index in range(14)]
    assert all(box["width"] > 300 and box["height"] > 150 for box in boxes)
    columns = {round(box["x"]) for box in boxes}
    assert len(columns) == (2 if width == 1280 else 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", color)[:3])) > 384) is (scheme == "light")
    stroke = page.evaluate("getComputedStyle(document.querySelector('polyline')).stroke")
    assert re.fullmatch(r"rgb\(\d+, \d+, \d+\)", stroke)
    chart = page.locator("figure").filter(has_text="Skipped steps").last
    chart.scroll_into_view_if_needed()
    box = chart.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.975, box["y"] + box["height"] / 2)
    assert chart.locator("output").inner_text() == "step 40\nall groups: 2"
    page.mouse.move(0, 0)
    assert not chart.locator("output").is_visible()
    assert requests == [path.as_uri()]
    assert errors == []
    page.close()
