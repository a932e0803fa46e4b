"""Which kernel runs: the routing by synthetic tables, the shipped table, and what is loaded."""

import functools
import itertools
import json
import math
import os

import pytest
import torch
from compiled import load_compiled
from op_arguments import good_arguments
from root_cases import stack

from shampoo import ops
from shampoo.kernels.reference import minimax
from shampoo.ops import OPS, backends, jit, routes, supports
from shampoo.ops.licence import Licence
from shampoo.roots.minimax_table import minimax_schedule

ON_CUDA = {name: op.kinds("cuda") for name, op in OPS.items() if op.kinds("cuda")}
NOTHING: backends.Table = {"cpu": {}, "cuda": {}}


def table(card="9.0", dtype="float32", **ops_and_sizes):
    """A table of one card: ``gram_ema_=[(64, "reference"), (256, "triton")]``."""
    rows = {
        op: {dtype: [{"size": size, "kernel": kernel} for size, kernel in sizes]}
        for op, sizes in ops_and_sizes.items()
    }
    return {"cpu": {"gram_ema_": "cpp"}, "cuda": {card: {"ops": rows}}}


MEASURED = table(
    gram_ema_=[(256, "triton"), (64, "reference"), (1024, "reference")],  # in no order
    minimax_root_=[(128, "cuda"), (2048, "triton")],
)


def choose(
    op,
    size,
    *,
    device="cuda",
    dtype="float32",
    backend="auto",
    card="9.0",
    rows=MEASURED,
    licence=None,
):
    settings = {"backend": backend, "card": card, "table": rows, "licence": licence}
    return backends.choose(op, device, dtype, size, **settings)


@pytest.mark.parametrize(
    ("op", "size", "kernel"),
    [
        ("gram_ema_", 1, "reference"),
        ("gram_ema_", 64, "reference"),
        ("gram_ema_", 65, "triton"),  # the measurement of the next size above
        ("gram_ema_", 256, "triton"),
        ("gram_ema_", 257, "reference"),
        ("gram_ema_", 10**6, "reference"),  # beyond the last one, the last
        ("minimax_root_", 128, "cuda"),
        ("minimax_root_", 129, "triton"),
        ("minimax_root_", 4096, "triton"),
        ("precondition_", 256, "reference"),  # not measured
    ],
)
def test_auto_takes_the_fastest_of_the_next_measured_size(op, size, kernel):
    assert choose(op, size) == kernel


def test_auto_keeps_the_reference_where_nothing_was_measured():
    for op, size in itertools.product(ON_CUDA, (1, 128, 4096)):
        assert choose(op, size, card="8.0") == "reference"
        assert choose(op, size, card="") == "reference"
        assert choose(op, size, dtype="float64") == "reference"
        assert choose(op, size, rows=NOTHING) == "reference"


def licence(rows, *passed):
    """Of an imaginary card: what a certificate found fastest, and what passed."""
    return Licence({key: frozenset({"float32"}) for key in passed}, rows=rows)


def sized(**sizes):
    return {op: {"float32": [{"size": s, "kernel": k} for s, k in at]} for op, at in sizes.items()}


def test_auto_takes_what_the_certificate_of_an_unknown_card_says():
    rows = sized(minimax_root_=[(128, "cuda"), (2048, "triton")], gram_ema_=[(64, "reference")])
    found = licence(rows, *(("minimax_root_", kind) for kind in ("cuda", "triton")))
    with_licence = functools.partial(choose, card="12.0", rows=NOTHING, licence=found)
    assert with_licence("minimax_root_", 128) == "cuda"
    assert with_licence("minimax_root_", 129) == "triton"
    assert with_licence("minimax_root_", 10**6) == "triton"
    assert with_licence("minimax_root_", 128, dtype="float64") == "reference"
    assert with_licence("gram_ema_", 64) == with_licence("precondition_", 64) == "reference"
    assert choose("minimax_root_", 128, card="12.0", rows=NOTHING, licence=Licence()) == "reference"


def test_what_has_no_pass_is_not_run_though_a_table_praises_it():
    praised = table(gram_ema_=[(256, "triton")], minimax_root_=[(128, "cuda")])
    rows = sized(minimax_root_=[(128, "triton")])
    found = licence(rows, ("minimax_root_", "triton"))
    assert choose("gram_ema_", 64, rows=praised, licence=found) == "reference"
    assert choose("minimax_root_", 64, rows=praised, licence=found) == "triton", "the next best"
    both = licence(rows, ("minimax_root_", "triton"), ("minimax_root_", "cuda"))
    assert choose("minimax_root_", 64, rows=praised, licence=both) == "cuda", "as the table says"
    cpu = {"device": "cpu", "rows": {"cpu": {"gram_ema_": "cpp"}, "cuda": {}}}
    assert choose("gram_ema_", 64, **cpu, licence=Licence()) == "reference"
    assert choose("gram_ema_", 64, **cpu, licence=licence({}, ("gram_ema_", "cpp"))) == "cpp"
    key = "gram_ema_", "cpp"
    refused = Licence({key: frozenset({"float32"})}, {key: {"float64": "error"}})
    assert choose("gram_ema_", 64, **cpu, licence=refused) == "reference", "a CPU asks no dtype"


@pytest.fixture
def card_without_a_name(small_root, monkeypatch):
    """Tensors of the CPU as if they lay on a card, which runs references."""
    device = torch.device("cpu")
    monkeypatch.setattr(routes, "_state", ["auto", NOTHING, frozenset({"cuda"}), True])
    monkeypatch.setattr(routes, "_licences", {})
    monkeypatch.setattr(routes, "_imposed", {})
    monkeypatch.setattr(routes, "_register", lambda *_: None)
    routes._route()
    yield device
    routes._routes.clear()


def runs_kernel(n=64):
    root, *rest = root_call(n)
    routes._routes["minimax_root_"](root, *rest)
    return bool((root == n).all())


def test_a_device_runs_references_until_it_is_granted_more(card_without_a_name):
    assert not runs_kernel()
    found = licence(sized(minimax_root_=[(128, "cuda")]), ("minimax_root_", "cuda"))
    routes.grant(card_without_a_name, found)
    assert runs_kernel()
    routes.grant(card_without_a_name, Licence())
    assert not runs_kernel()


def test_what_ranks_agreed_on_outlives_a_licence(card_without_a_name):
    found = licence(sized(minimax_root_=[(128, "cuda")]), ("minimax_root_", "cuda"))
    routes.grant(card_without_a_name, found)
    infinite = float("inf")
    small = {"float32": [(32, "cuda"), (infinite, "reference")]}
    routes.impose("cuda", "minimax_root_", small)
    assert runs_kernel(32)
    assert not runs_kernel(33)
    routes.grant(card_without_a_name, Licence())
    assert runs_kernel(32)


@pytest.mark.parametrize("op", ON_CUDA)
def test_a_named_backend_is_taken_whatever_the_table_says(op):
    for kind, size in itertools.product(("cuda", "triton"), (1, 128, 4096)):
        expected = kind if kind in ON_CUDA[op] else "reference"
        for rows in (MEASURED, NOTHING):
            assert choose(op, size, backend=kind, rows=rows) == expected
    assert choose(op, 256, backend="reference") == "reference"


def test_kernels_for_the_cpu_are_those_in_cpp():
    for backend, kernel in (("auto", "cpp"), ("cuda", "cpp")):
        assert choose("gram_ema_", 64, device="cpu", backend=backend) == kernel
        assert choose("check_roots_", 64, device="cpu", backend=backend) == "reference"
    for backend in ("triton", "reference"):
        assert choose("gram_ema_", 64, device="cpu", backend=backend) == "reference"
    assert choose("gram_ema_", 256, device="mps") == "reference"


def test_only_what_may_run_is_loaded():
    wanted = backends.wanted
    assert wanted("auto", "9.0", MEASURED) == {"cpp", "cuda", "triton"}
    assert wanted("auto", "8.0", NOTHING) == {"cuda", "triton"}  # a licence says which are used
    assert wanted("auto", "", MEASURED) == {"cpp"}
    assert wanted("auto", "", NOTHING) == set()
    assert wanted("cuda", "", NOTHING) == {"cpp", "cuda"}
    assert wanted("triton", "9.0", MEASURED) == {"triton"}
    assert wanted("reference", "9.0", MEASURED) == set()


def test_size_and_dtype_are_those_of_what_the_op_works_on():
    arguments = {name: list(values.values()) for name, values in vars(good_arguments()).items()}
    sizes = {
        "graft_scale_": 3,
        "gather_blocks_": 12,
        "magnitudes_": 17,  # of two tensors
        "graft_moments_": 12,
        "update_blocks_": 12,
        "gram_ema_": 4,
        "precondition_": 4,
        "minimax_root_": 4,
        "minimax_small_root_": 4,
        "minimax_class_root_": 4,
        "diagonal_root_": 4,
        "check_roots_": 4,
        "keep_roots_": 4,
    }
    assert set(sizes) == set(ON_CUDA)
    for op, size in sizes.items():
        kind, record = ON_CUDA[op][0], OPS[op]
        # Tensors of a CPU belong to a card without a name.
        at = backends.router(record, "auto", table("", **{op: [(size, kind), (99, "reference")]}))
        below = table("", **{op: [(size - 1, kind), (99, "reference")]})
        assert at(arguments[op]) == kind
        assert backends.router(record, "auto", below)(arguments[op]) == "reference"
        other = table("", "float64", **{op: [(99, kind)]})
        assert backends.router(record, "auto", other)(arguments[op]) == "reference"


def root_call(n, p=4, dtype=torch.float32, count=2):
    A = stack(count, n, 4.0).to(dtype)
    schedule = [c for step in minimax_schedule(p, 1e-4) for c in step]
    root, ridge = torch.full_like(A, torch.nan), torch.empty(count, dtype=torch.float64)
    return root, ridge, A, p, 0.0, 1e-4, schedule


def test_magnitudes_of_several_devices_are_left_to_the_reference():
    out, here = torch.empty(2, dtype=torch.float64), torch.ones(3)
    assert supports.magnitudes(out, [here, here])
    assert not supports.magnitudes(out, [here, here.to("meta")])
    assert not supports.magnitudes(out.to("meta"), [here, here])


@pytest.fixture
def small_root():
    """Stands in for the kernel of small roots, which needs a GPU: it writes the rows it saw."""

    def run(root, ridge, factor, *_):
        root.fill_(factor.shape[-1])

    with torch.library._scoped_library("shampoo", "IMPL") as library:
        library.impl("cuda_minimax_small_root_", run, "CPU")
        yield


def root_route(backend, rows):
    return routes.routes_of(OPS["minimax_root_"], backend, rows, {"cpp", "cuda"})["minimax_root_"]


@pytest.mark.parametrize("backend", ["cuda", "auto"])
def test_small_float32_roots_go_to_the_kernel_for_them(small_root, backend):
    rows = table("", minimax_root_=[(128, "cuda"), (1024, "reference")])
    run = root_route(backend, rows)

    def is_small(*arguments):
        run(*arguments)
        assert arguments[0].isfinite().all()
        return bool((arguments[0] == arguments[2].shape[-1]).all())

    for n in (1, 32, 128):
        for p in (2, 4):
            assert is_small(*root_call(n, p))
    assert not is_small(*root_call(129))
    assert not is_small(*root_call(64, p=1))
    assert not is_small(*root_call(64, dtype=torch.float64))
    _, *rest = root_call(64)
    strided = torch.full((2, 64, 128), torch.nan)[:, :, ::2]
    assert not is_small(strided, *rest)


def test_the_limits_of_small_roots_are_those_of_the_source():
    source = (jit.source_dir() / "cuda" / "launch.h").read_text()
    assert f"kMaxRootSize = {supports.SMALL_ROWS};" in source
    assert f"kMaxSteps = {supports.SMALL_STEPS};" in source


def test_auto_leaves_small_roots_where_the_table_does(small_root):
    root, *rest = root_call(64)
    root_route("auto", table("", minimax_root_=[(128, "reference")]))(root, *rest)
    expected = torch.empty_like(root)
    minimax.minimax_root_(expected, *rest)
    assert torch.equal(root, expected)


def test_kernels_that_are_not_loaded_are_not_routed_to():
    assert routes.routes_of(OPS["minimax_root_"], "auto", MEASURED, {"cpp"}) == {}
    there_is_none = routes.routes_of(OPS["gram_ema_"], "cuda", MEASURED, {"cpp", "cuda"})
    assert there_is_none == {}


def test_the_shipped_table_names_the_kernels_that_the_cpu_has(monkeypatch):
    load_compiled()
    monkeypatch.delenv("SHAMPOO_BACKEND_TABLE", raising=False)
    shipped = backends.table()
    compiled = {name for name, present in ops.kernels("CPU").items() if present}
    assert {name for name, kind in shipped["cpu"].items() if kind == "cpp"} == compiled
    for card in shipped["cuda"].values():
        assert set(card) >= {"card", "commit", "torch", "ops"}
        assert set(card["ops"]) <= set(ON_CUDA)


def test_a_table_may_lie_anywhere(tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    file.write_text(json.dumps(MEASURED))
    monkeypatch.setenv("SHAMPOO_BACKEND_TABLE", str(file))
    assert backends.table() == MEASURED


def one_row(**changes):
    row = {"size": 64, "kernel": "triton", "seconds": {"reference": 2e-5, "triton": 1e-5}}
    rows = {"gram_ema_": {"float32": [row | changes]}}
    return json.dumps({"cpu": {}, "cuda": {"9.0": {"ops": rows}}})


BAD_TABLES = {
    "gone": (None, "it cannot be read: No such file"),
    "text": ("no JSON", "it is not JSON: Expecting value"),
    "empty": ("", "it is not JSON"),
    "bytes": (b"\x00\xff", "it is not UTF-8: invalid start byte at byte 1"),
    "deep": ("[" * 100_000, "it is nested too deeply"),
    "deep objects": ('{"cuda":' * 20_000, "it is nested too deeply"),
    "digits": ('{"cuda": 1%s}' % ("0" * 5000), "it has an integer of 5001 digits. Must be < 2^63"),
    "long": (b" " * (1 << 23) + b"{}", "it is longer than 8388608 bytes"),
    "twice": ('{"cpu": {}, "cuda": {}, "cpu": {}}', "it has 'cpu' twice in one object"),
    "list": ("[]", "it is []. Must be an object"),
    "no cpu": ('{"cuda": {}}', "it has no 'cpu'. Must have cpu, cuda"),
    "cpu list": ('{"cuda": {}, "cpu": []}', "cpu is []. Must be an object"),
    "cpu null": ('{"cuda": {}, "cpu": null}', "cpu is None. Must be an object"),
    "cpu op": ('{"cuda": {}, "cpu": {"gram": "cpp"}}', "no op is named 'gram'"),
    "cpu kernel": ('{"cuda": {}, "cpu": {"gram_ema_": []}}', "kernel=[] for gram_ema_"),
    "cpu kind": ('{"cuda": {}, "cpu": {"check_roots_": "cpp"}}', "kernel='cpp' for check_roots_"),
    "cuda list": ('{"cuda": [], "cpu": {}}', "cuda is []. Must be an object"),
    "card": ('{"cuda": {"9.0": "x"}, "cpu": {}}', "card '9.0' is 'x'. Must be an object"),
    "no ops": ('{"cuda": {"9.0": {}}, "cpu": {}}', "card '9.0' has no 'ops'"),
    "no rows": ('{"cuda": {"9.0": {"ops": {"gram_ema_": {"float32": 3}}}}, "cpu": {}}',
                "'float32' of 'gram_ema_' is 3. Must be a list"),
    "row": ('{"cuda": {"9.0": {"ops": {"gram_ema_": {"float32": [[]]}}}}, "cpu": {}}',
            "a row of 'gram_ema_' is []. Must be an object"),
    "kernel": (one_row(kernel="cuda"), "kernel='cuda' for gram_ema_"),
    "size 0": (one_row(size=0), "size=0 for gram_ema_. Must be an integer >= 1"),
    "size nan": (one_row(size=math.nan), "it has NaN, which is not a number"),
    "size inf": (one_row(size=math.inf), "it has Infinity, which is not a number"),
    "size 1e400": (one_row().replace("64", "1e400"), "it has '1e400', which is more than a float"),
    "size digits": (one_row(size=10**400), "it has an integer of 401 digits"),
    "size word": (one_row(size="x"), "size='x' for gram_ema_"),
    "size true": (one_row(size=True), "size=True for gram_ema_"),
    "seconds": (one_row(seconds=3), "seconds of gram_ema_ is 3. Must be an object"),
    "seconds 0": (one_row(seconds={"triton": 0}), "seconds=0 of triton for gram_ema_. Must be a"),
    "seconds word": (one_row(seconds={"reference": "x"}), "seconds='x' of reference"),
    "control": ('{"cuda": {"\\u001b[2J": 3}, "cpu": {}}', r"card '\x1b[2J' is 3"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_bad_table_is_named_with_what_is_wrong(tmp_path, monkeypatch, content, words):
    path = tmp_path / "table"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    monkeypatch.setenv("SHAMPOO_BACKEND_TABLE", str(path))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        backends.table()
    said = str(caught.value)
    assert said.startswith(f"Invalid SHAMPOO_BACKEND_TABLE={str(path)!r}: {words}")
    assert said.endswith("Must be a table that `python -m benchmarks.gpu --write-table` wrote.")
    assert said.isprintable()
    assert len(said) < 1000


def test_a_table_that_has_no_end_is_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "pipe", "it is not a file"),  # where opening alone would wait for a writer
        ("/dev/zero", "it is not a file"),
        (tmp_path, "it cannot be read: Is a directory"),
        ("x/" * 3000, "it cannot be read: File name too long"),
        ("~nobody\x1b/table", r"nobody\x1b/table': it cannot be read"),
    ):
        monkeypatch.setenv("SHAMPOO_BACKEND_TABLE", str(path))
        with pytest.raises(ValueError, match=r"^Invalid SHAMPOO_BACKEND_TABLE=") as caught:
            backends.table()
        assert words in str(caught.value)


def test_the_report_says_what_runs_and_where_it_loses():
    rows = {
        "float32": [
            {"size": 64, "kernel": "reference", "seconds": {"reference": 1e-5, "triton": 2e-5}},
            {"size": 512, "kernel": "triton", "seconds": {"reference": 3e-5, "triton": 1e-5}},
        ]
    }
    measured = {"cpu": {}, "cuda": {"9.0": {"ops": {"gram_ema_": rows}}}}
    said = backends.describe("auto", "9.0", measured)
    assert said["gram_ema_"] == "64: reference (triton 0.5x); 512: triton (triton 3x)"
    assert said["precondition_"] == "reference (not yet measured here)"
    assert backends.describe("cuda", "9.0", measured)["gather_blocks_"] == "cuda"
    assert backends.describe("cuda", "9.0", measured)["gram_ema_"] == "reference"
