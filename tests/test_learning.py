"""The protocol by which optimizers are compared: what it runs, what it reads off, what it keeps."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import data
from benchmarks.learning import pool, race, studies, tables
from benchmarks.learning.__main__ import DOCUMENTS
from benchmarks.learning.measures import median_reached, reached
from benchmarks.learning.pool import execute
from benchmarks.learning.protocol import FRESH, WIDEST, Search
from benchmarks.learning.records import RESULTS, Records
from benchmarks.learning.trial import Trial, made_with, run
from benchmarks.tasks import TASKS
from benchmarks.tasks.base import multiplier
from shampoo import Shampoo

ROOT = Path(__file__).parents[1]


def record(trial, loss, curve=()):
    return {
        **dataclasses.asdict(trial),
        "key": trial.key(),
        "made_with": made_with(trial.task, trial.optimizer),
        "loss": None if math.isinf(loss) else loss,
        "diverged": math.isinf(loss),
        "accuracy": None,
        "seconds": 1.0,
        "curve": list(curve),
    }


def search_on(surface, records, search, most=200):
    """Runs the search where a run's loss is ``surface(trial)``; what was run, in order."""
    ran = []
    while missing := search.missing(records):
        for trial in missing:
            records.add(record(trial, surface(trial)))
            ran.append(trial)
        assert len(ran) < most
    return ran


def valley(best):
    """Loss grows with the distance of the rate from the best, in factors of two, and with seeds."""

    def surface(trial):
        return 1 + 0.1 * math.log2(trial.rate / best) ** 2 + 0.001 * trial.seed

    return surface


@pytest.mark.parametrize("power", [0, 1, -2, 5, -7, 9, -11])
def test_the_search_finds_the_best_rate_wherever_it_lies_and_brackets_it(tmp_path, power):
    search = Search.of("digits", "adamw")
    best = search.at(power, 0)
    records = Records(tmp_path)
    search_on(valley(best.rate), records, search)
    assert search.best_power(records) == (power, [])
    for seeds in [(0,), (0, 1)]:
        assert {power - 1, power, power + 1} <= search.losses(records, seeds).keys()


def test_rates_of_three_decades_are_tried_and_a_divergence_is_a_loss_without_bound(tmp_path):
    search = Search.of("digits", "shampoo")

    def surface(trial):
        return math.inf if trial.rate > 0.03 else valley(0.02)(trial)

    records = Records(tmp_path)
    ran = search_on(surface, records, search)
    rates = [trial.rate for trial in ran]
    assert max(rates) / min(rates) >= 1000
    chosen, _ = search.choice(records)
    assert 0.01 <= chosen.rate <= 0.03


def test_an_optimizer_that_never_learns_ends_the_search_without_a_choice(tmp_path):
    records = Records(tmp_path)
    search = Search.of("digits", "adamw")
    search_on(lambda trial: math.inf, records, search)
    assert search.choice(records) == (None, [])
    assert search.fresh_runs(records) == []


def test_a_variation_is_kept_if_both_seeds_are_better_with_it_alone(tmp_path):
    def surface(trial):
        gain = {3 * TASKS["digits"].weight_decay: 0.05}.get(trial.weight_decay, 0.0)
        gain += 0.2 if trial.warmup is not None and trial.seed == 0 else 0.0  # luck of one seed
        gain -= 0.3 if trial.warmup is not None and trial.seed == 1 else 0.0
        return valley(2e-3)(trial) - gain

    records = Records(tmp_path)
    search = Search.of("digits", "adamw")
    search_on(surface, records, search)
    assert search.choice(records)[0] == search.at(0, 0)  # the most promising one was luck

    def decay_alone(trial):
        return valley(2e-3)(trial) - (0.05 if trial.weight_decay == 0.03 else 0.0)

    records = Records(tmp_path / "another")
    search_on(decay_alone, records, search)
    assert search.choice(records)[0].weight_decay == 0.03


def test_a_variation_that_is_kept_is_tried_at_half_and_twice_the_rate(tmp_path):
    def surface(trial):
        best = 4e-3 if trial.weight_decay == 0.03 else 2e-3
        return valley(best)(trial) - (0.15 if trial.weight_decay == 0.03 else 0.0)

    records = Records(tmp_path)
    search = Search.of("digits", "adamw")
    ran = search_on(surface, records, search)
    chosen, _ = search.choice(records)
    assert (chosen.weight_decay, chosen.rate) == (0.03, 4e-3)
    assert {t.rate for t in ran if t.weight_decay == 0.03} == {1e-3, 2e-3, 4e-3}


def test_a_best_rate_at_the_edge_of_what_may_be_tried_is_marked(tmp_path):
    records = {power: Records(tmp_path / str(power)) for power in (0, 2 * WIDEST)}
    search = Search.of("digits", "shampoo")
    for power, found in records.items():
        search_on(valley(search.base.rate * 2.0**power), found, search)
        assert search.is_bracketed(found) == (power == 0)
        row = tables.results("digits", found)[1]
        assert ("not bracketed" in row[1]) == (power != 0)


def test_seconds_are_those_of_a_race_of_the_settings_that_were_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(race.studies, "MAIN", ("adamw", "shampoo"))
    records = Records(tmp_path)
    for name in ("adamw", "shampoo"):
        search_on(valley(8e-3), records, Search.of("digits", name))
    assert len(list(race.missing(records, race.Races(tmp_path)))) == 1
    race.execute(records, Console(quiet=True))
    races = race.Races(tmp_path)
    assert list(race.missing(records, races)) == []
    for name in ("adamw", "shampoo"):
        runs = race.fresh_runs("digits", name, records)
        seconds = races.seconds(Search.of("digits", name).choice(records)[0])
        assert [made["seconds"] for made in runs] == [seconds] * len(FRESH)
        assert 0.1 < seconds < 60
    again = Records(tmp_path)  # other settings are another race
    again.add(record(Search.of("digits", "adamw").at(0, 0), 0.5))
    again.add(record(Search.of("digits", "adamw").at(0, 1), 0.5))
    search_on(valley(8e-3), again, Search.of("digits", "adamw"))
    assert len(list(race.missing(again, races))) == 1


def test_the_seconds_of_a_curve_are_stretched_to_those_of_the_race(tmp_path):
    records = Records(tmp_path)
    search = Search.of("digits", "adamw")
    search_on(valley(8e-3), records, search)
    curve = [[40, 2.0, None, 2.0, 0.25], [80, 1.0, None, 1.0, 1.0]]
    for made in search.fresh_runs(records):
        records.add({**made, "curve": curve})
    chosen, _ = search.choice(records)
    race.Races(tmp_path).add([chosen], [8.0], {"name": "a machine"})
    for made in race.fresh_runs("digits", "adamw", records):
        assert [point[4] for point in made["curve"]] == [2.0, 8.0]
        assert reached(made, 2.0) == (40, 2.0)


def test_runs_on_other_data_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setenv("SHAMPOO_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "cpython").mkdir(parents=True)
    (tmp_path / "data" / "cpython" / "text").write_text("def f(x):\n    return x + 1\n" * 5000)
    trial = Search.of("cpython-64", "adamw").at(0, 0)
    Records(tmp_path).add({**record(trial, 1.0), "data": "0123456789ab"})
    command = [sys.executable, "-m", "benchmarks.learning", "--out", str(tmp_path)]
    command += ["--study", "main", "--tasks", "cpython-64", "--optimizers", "adamw"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "runs of cpython-64 on other data (0123456789ab and not" in done.stderr
    assert "Name another folder: --out FOLDER." in done.stderr


def test_fresh_seeds_are_none_of_those_tuned_on_and_judged_on_other_data(tmp_path):
    records = Records(tmp_path)
    search = Search.of("digits", "muon")
    ran = search_on(valley(8e-3), records, search)
    fresh = [trial for trial in ran if trial.split == "report"]
    assert [trial.seed for trial in fresh] == list(FRESH)
    assert not {t.seed for t in ran if t.split == "tuning"} & set(FRESH)
    assert search.fresh_runs(records) == [records.of(trial) for trial in fresh]


def test_a_search_that_was_stopped_goes_on_and_repeats_nothing(tmp_path):
    search, surface = Search.of("digits", "adamw"), valley(4e-3)
    whole = search_on(surface, Records(tmp_path / "whole"), search)
    stopped = []
    while missing := search.missing(Records(tmp_path / "stopped")):  # read anew from the disk
        Records(tmp_path / "stopped").add(record(missing[0], surface(missing[0])))
        stopped.append(missing[0])
    assert sorted(t.key() for t in stopped) == sorted(t.key() for t in whole)


def test_ours_are_tuned_in_their_rate_alone_and_no_other_optimizer_is_tuned_less(tmp_path):
    """Their defaults are what is judged."""
    tried = {}
    for name in studies.MAIN:
        search = Search.of("digits", name)
        ran = search_on(valley(search.base.rate), Records(tmp_path / name), search)
        tried[name] = len(ran)
        if name in ("shampoo", "kl_shampoo"):
            changed = {(t.weight_decay, t.warmup, str(t.arguments)) for t in ran}
            assert changed == {(None, None, "{}")}
    assert tried["shampoo"] == tried["kl_shampoo"] < min(tried[name] for name in ("adamw", "muon"))


def test_a_run_that_raises_is_recorded_as_failed_and_is_not_run_again(tmp_path):
    trial = Trial("digits", "adamw", 1e-3, 0, arguments={"betas": (0.9, 2.0)})
    records = Records(tmp_path)
    console = Console(quiet=True)
    assert execute(lambda found: found.missing([trial]), records, console, workers=1, seconds=60)
    made = Records(tmp_path).of(trial)
    assert made["diverged"]
    assert "Invalid beta" in made["error"]
    assert Records(tmp_path).missing([trial]) == []


def killed(trial):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_is_killed_ends_the_grid_and_is_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "run", killed)
    trial = Trial("digits", "adamw", 1e-3, 0)
    records = Records(tmp_path)
    console = Console(quiet=True)
    with pytest.raises(SystemExit, match=r"was killed.*adamw.*run it again to go on"):
        execute(lambda found: found.missing([trial]), records, console, workers=1, seconds=60)
    assert len(Records(tmp_path)) == 0


def test_a_run_with_other_defaults_or_another_task_is_made_again(tmp_path, monkeypatch):
    ours, theirs = (Trial("digits", name, 1e-3, 0) for name in ("shampoo", "adamw"))
    records = Records(tmp_path)
    for trial in (ours, theirs):
        records.add(record(trial, 1.0))
    assert records.missing([ours, theirs]) == []
    made_with.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(Shampoo.__init__, "__defaults__", (2e-3, (0.9, 0.99), 1e-12, 0.0))
        assert records.missing([ours, theirs]) == [ours]
        again = {**record(ours, 2.0)}
        records.add(again)
        assert Records(tmp_path).of(ours)["loss"] == 2.0  # the later line counts
    made_with.cache_clear()
    monkeypatch.setitem(TASKS, "digits", dataclasses.replace(TASKS["digits"], version=2))
    assert records.missing([ours, theirs]) == [ours, theirs]
    made_with.cache_clear()


def test_a_line_that_was_cut_off_is_passed_over_and_the_next_stands_alone(tmp_path):
    first, second = (Trial("digits", "adamw", rate, 0) for rate in (1e-3, 2e-3))
    records = Records(tmp_path)
    records.add(record(first, 1.0))
    path = tmp_path / "digits.jsonl"
    path.write_text(path.read_text() + json.dumps(record(second, 2.0))[:40])
    again = Records(tmp_path)
    assert again.missing([first, second]) == [second]
    again.add(record(second, 2.0))
    assert Records(tmp_path).of(second)["loss"] == 2.0
    assert Records(tmp_path).of(first)["loss"] == 1.0


def test_steps_to_a_loss_lie_on_the_line_between_two_evaluations():
    trial = Trial("digits", "adamw", 1e-3, 0)
    curve = [[10, 2.0, None, 2.0, 1.0], [20, 1.0, None, 1.0, 3.0], [30, 1.5, None, 1.0, 4.0]]
    made = record(trial, 1.5, curve)
    assert reached(made, 1.25) == (17.5, 2.5)
    assert reached(made, 2.5) == (10, 1.0)
    assert reached(made, 0.9) is None
    never = record(trial, 1.9, curve[:1])
    assert median_reached([made, made, never], 1.25) == (17.5, 2.5)
    assert median_reached([made, never, never], 1.25) is None


def test_the_schedule_warms_up_in_a_line_and_ends_at_a_tenth():
    values = [multiplier(step, 100, 10) for step in range(101)]
    assert values[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert max(values) == 1.0
    assert values[55] == pytest.approx(0.55)
    assert values[100] == pytest.approx(0.1)


def test_a_run_is_the_same_again_and_its_curve_goes_down():
    trial = Trial("digits", "shampoo", 8e-3, 2, "report")
    one, two = run(trial), run(trial)
    losses = [point[1] for point in one["curve"]]
    assert [point[:4] for point in one["curve"]] == [point[:4] for point in two["curve"]]
    assert losses[-1] < 0.2 < 1 < losses[0]
    assert one["accuracy"] > 0.95
    assert not one["diverged"]


def test_a_run_that_goes_up_is_cut_short():
    made = run(Trial("digits", "sgd", 1e3, 0))
    assert made["diverged"]
    assert made["loss"] is None
    assert len(made["curve"]) < TASKS["digits"].steps / TASKS["digits"].every


@pytest.mark.parametrize("task", ["digits", "cpython-64"])
def test_what_tunes_and_what_reports_are_different_data(task, tmp_path, monkeypatch):
    if task != "digits":
        monkeypatch.setenv("SHAMPOO_DATA", str(tmp_path))
        (tmp_path / "cpython").mkdir()
        (tmp_path / "cpython" / "text").write_text("def f(x):\n    return x + 1\n" * 5000)
    model = TASKS[task].model()
    judged = [TASKS[task].judge(model.eval(), split) for split in ("tuning", "report")]
    assert judged[0][0] == pytest.approx(judged[1][0], rel=0.2)
    if task == "digits":
        assert judged[0] != judged[1]


def test_data_that_is_missing_or_wrong_is_named_with_the_command_that_mends_it(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("SHAMPOO_DATA", str(tmp_path))
    remedy = "python -m benchmarks.data king-james"
    with pytest.raises(SystemExit, match=rf"text is missing.*{remedy}"):
        data.files("king-james")
    (tmp_path / "king-james").mkdir()
    (tmp_path / "king-james" / "text").write_text("In the end")
    with pytest.raises(SystemExit, match=rf"has SHA-256 [0-9a-f]{{64}} and not ca682.*{remedy}"):
        data.files("king-james")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_of_documents_are_those_of_the_committed_runs(document):
    text = document.read_text()
    assert text.count("<!-- table ") == text.count("<!-- end -->") > 0
    assert tables.fill(document, Records(RESULTS)) == text


@pytest.mark.slow
def test_the_quick_form_trains_reports_and_repeats_nothing(tmp_path):
    command = [sys.executable, "-m", "benchmarks.learning", "--quick", "--out", str(tmp_path)]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "everything is there" in done.stdout
        lines = (tmp_path / "digits.jsonl").read_text().splitlines()
        keys = [json.loads(line)["key"] for line in lines]
        assert len(keys) == len(set(keys)) > 40
    records = Records(tmp_path)
    runs = {
        name: Search.of("digits", name).fresh_runs(records) for name in ("adamw", "muon", "shampoo")
    }
    assert all(len(made) == len(FRESH) for made in runs.values())
    adamw = max(run["loss"] for run in runs["adamw"])
    steps, _ = median_reached(runs["shampoo"], adamw)
    assert steps < 0.8 * TASKS["digits"].steps  # what the optimizer is for
    for name in ("loss_over_steps", "loss_over_seconds", "loss_over_rates", "steps_to_target"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
