"""Size classes of roots are what a certificate says that they are."""

from types import SimpleNamespace

import pytest
import torch
from imaginary import CARD, FASTER, SLOWER, imaginary

from shampoo import certificates
from shampoo.certificates import certificate, issue, shared, tune
from shampoo.certificates.cases import CASES
from shampoo.certificates.checks import Trial
from shampoo.certificates.workloads import WORKLOADS, grid, shape_grid
from shampoo.kernels.reference.minimax_class import minimax_class_root_ as reference
from shampoo.ops import OPS, backends, routes
from shampoo.ops.licence import Licence
from shampoo.roots.size_classes import Stack, classes, most_matrices

NOTHING: backends.Table = {"cpu": {}, "cuda": {}}
FACTORS = SimpleNamespace(device=CARD, dtype=torch.float32)  # as far as a choice looks at them
RIDGES = 1e-12, 1e-6, "auto"
STACKS = [Stack(512, 8, 4), Stack(256, 8, 4), Stack(200, 8, 4), Stack(64, 8, 4)]
APART = [[0], [1], [2], [3]]


@pytest.fixture
def card(monkeypatch):
    """Gives an imaginary card a licence."""
    monkeypatch.setattr(backends, "card_of", lambda device: "17.0")
    monkeypatch.setattr(routes, "_licences", {})
    monkeypatch.setattr(routes, "_imposed", {})
    monkeypatch.setattr(routes, "_route", lambda: None)  # no calls are sent there

    def give(licence, backend="auto", kinds=("cuda", "triton")):
        monkeypatch.setattr(routes, "_state", [backend, NOTHING, frozenset(kinds), True])
        routes._licences.clear()
        if licence is not None:
            routes._licences[CARD] = licence

    return give


def test_what_is_praised_is_used(card):
    card(imaginary({64: FASTER, 512: FASTER}).licence)
    assert classes(STACKS, FACTORS, *RIDGES) == [[0, 1, 2, 3]]


def test_up_to_the_side_that_is_praised(card):
    """The next measured side above says what holds of one between."""
    card(imaginary({64: SLOWER, 256: FASTER, 512: SLOWER}).licence)
    assert classes(STACKS, FACTORS, *RIDGES) == [[0], [1, 2], [3]]
    card(imaginary({128: SLOWER, 256: SLOWER, 512: FASTER}).licence)
    assert classes(STACKS[1:], FACTORS, *RIDGES) == [[0], [1], [2]]


@pytest.mark.parametrize(
    "licence",
    {
        "slower": imaginary({64: SLOWER, 512: SLOWER}).licence,
        "not timed": imaginary({}).licence,
        "failed": imaginary({64: FASTER, 512: FASTER}, "error 2 exceeds 1").licence,
        "nothing known": Licence(),
        "not asked yet": None,
    }.values(),
)
def test_what_is_not_praised_is_not(card, licence):
    card(licence)
    assert classes(STACKS, FACTORS, *RIDGES) == APART


def test_a_verdict_is_of_one_dtype_and_of_kernels_that_are_there(card):
    licence = imaginary({64: FASTER, 512: FASTER}).licence
    card(licence)
    double = SimpleNamespace(device=CARD, dtype=torch.float64)
    how = 1e-12, 1e-6, "minimax"
    assert classes(STACKS, FACTORS, *how) == [[0, 1, 2, 3]]
    assert classes(STACKS, double, *how) == APART
    card(licence, kinds=("cuda",))
    assert classes(STACKS, FACTORS, *how) == APART


def test_a_backend_that_is_named_decides(card):
    """As for other kernels: in place of all measurements."""
    slower = imaginary({64: SLOWER, 512: SLOWER}).licence
    for backend, found in (("triton", [[0, 1, 2, 3]]), ("cuda", APART), ("reference", APART)):
        card(slower, backend)
        assert classes(STACKS, FACTORS, *RIDGES) == found


def test_what_is_timed_is_as_much_as_a_class_holds():
    op = OPS["minimax_class_root_"]
    for size, batch in (*grid(op, CARD), *shape_grid(op, CARD, [40, 300, 768, 4096])):
        assert batch == max(1, most_matrices(size))
    root, ridge, factor, sizes, *_ = WORKLOADS[op.name](10, 40, torch.device("cpu"))
    assert root.shape == factor.shape == (12, 40, 40)
    assert (len(ridge), sizes.tolist()) == (12, [40] * 3 + [30] * 3 + [20] * 3 + [10] * 3)
    for matrix, n in zip(factor, sizes.tolist(), strict=True):
        assert matrix[:n, :n].any()
        assert not matrix[n:].any()


def writes_beyond(root, ridge, factor, sizes, *how):
    reference(root, ridge, factor, sizes, *how)
    root[-1, -1, -1] = 1.0


def forgets_the_last_row(root, ridge, factor, sizes, *how):
    reference(root, ridge, factor, (sizes - 1).clamp(min=1), *how)


def knows_one_size(root, ridge, factor, sizes, *how):
    reference(root, ridge, factor, sizes[:1].expand_as(sizes), *how)


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (reference, ""),
        (writes_beyond, "beyond the size"),
        (forgets_the_last_row, "exceeds"),
        (knows_one_size, "beyond the size"),
    ],
)
def test_a_kernel_that_mistakes_a_size_does_not_pass(kernel, words):
    [case] = [each for each in CASES["minimax_class_root_"] if "n=63 " in each.words][:1]
    trial = Trial(case, OPS["minimax_class_root_"], torch.device("cpu"), "triton")
    assert words in trial.examine(lambda overload: kernel).failure
    assert bool(words) is bool(trial.examine(lambda overload: kernel).failure)


def test_the_classes_are_shown(card, monkeypatch, capsys):
    found = imaginary({64: SLOWER, 256: FASTER, 512: SLOWER})
    monkeypatch.setattr(issue, "licence_of", lambda device: found.licence)
    monkeypatch.setattr(backends, "chosen", lambda: "auto")
    shown = certificates.kernels_in_use(CARD)["minimax_class_root_"]["float32"]
    assert shown == [(64, "reference"), (256, "triton"), (float("inf"), "reference")]
    tune.show(found)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "class" in line]
    for words in ("minimax_class_root_", "triton", "passed", "64: 1x, 256: 2x, 512: 1x"):
        assert words in " ".join(line.split())


def test_a_verdict_is_kept_and_read_again(own_cache):
    found = imaginary({64: SLOWER, 512: FASTER})
    path = certificate.path_of(found.facts)
    certificate.write(path, found)
    assert certificate.read(path, found.facts) == found
    assert certificate.read(path, {**found.facts, "name": "another card"}) is None


def test_how_classes_are_made_is_among_the_facts(monkeypatch):
    """A verdict on other classes is not of these."""
    seen = []
    monkeypatch.setattr(certificate.jit, "digest", lambda *parts: seen.extend(parts) or "")
    certificate._sources.__wrapped__()
    assert any("def classes(" in part for part in seen)


def test_groups_of_unlike_cards_take_what_the_first_takes_if_it_passed_on_all(card):
    one = imaginary({64: FASTER, 256: FASTER, 512: SLOWER})
    other = imaginary({64: SLOWER, 256: FASTER, 512: FASTER})
    failed = imaginary({64: FASTER, 256: FASTER, 512: FASTER}, "error 2 exceeds 1")
    for its, found in ((other, [[0], [1, 2, 3]]), (failed, APART)):
        everyone = []
        for each in (one, its):
            card(each.licence)
            everyone.append(shared.offers([CARD], is_redundant=True))
        assert everyone[0] != everyone[1]
        for each in (one, its):
            card(each.licence)
            shared.agree(everyone)
            assert classes(STACKS, FACTORS, *RIDGES) == found
            routes._imposed.clear()
