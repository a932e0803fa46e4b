"""The seam: a kind that the package has never seen is stored, saved, counted and stepped alike."""

import ast
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from ranks import Ranks
from torch import Tensor
from torch.nn import Parameter
from trajectory import (
    apply,
    assert_same_bits,
    random_grads,
    random_params,
    snapshot,
    state_tensors,
)

import shampoo
from shampoo import (
    BlockGridMismatchError,
    IncompleteCheckpointError,
    RootFailureError,
    Shampoo,
    ops,
    plan,
)
from shampoo.blocks import declared
from shampoo.blocks.cost import Cost
from shampoo.blocks.declared import FULL, NONE, BlockState, ModeState
from shampoo.blocks.segments import TakenRows
from shampoo.blocks.statistics import Statistics
from shampoo.preconditioner import KINDS
from shampoo.preconditioner.base import Preconditioner


class OneSided(Preconditioner):
    """``P = (A / c2 + I)^-1 M`` along the shorter mode, divided by the root of a sum of squares."""

    name = "toy"
    mode_state: ClassVar = {
        FULL: (
            ModeState("gram", lambda d: (d, d), moves_every_step=True),
            ModeState("inverse", lambda d: (d, d), decides_ready=True),
            ModeState("failures", lambda d: (), torch.int32, is_lasting=False),
            ModeState("trace", lambda d: (2,), torch.float64, is_lasting=False),
        )
    }
    block_state = (BlockState("seen"),)

    def modes(self, extent: Sequence[int], diagonal: Sequence[bool]) -> tuple[str, ...]:
        short = min(range(len(extent)), key=extent.__getitem__)
        return tuple(FULL if mode == short else NONE for mode in range(len(extent)))

    def cost(self, extent: Sequence[int], modes: Sequence[str]) -> Cost:
        plain = super().cost(extent, modes)
        return Cost(plain.numel, numbers=min(extent) ** 2, refreshed=((min(extent), 1),))

    def are_ready(self, state: Mapping[str, Tensor]) -> Tensor:
        return state["inverse"][:, 0, 0] > 0

    def accumulate(
        self, statistics: Sequence[Statistics], grads: Sequence[Tensor], hyper: Any, scalars: Any
    ) -> None:
        for own, grad in zip(statistics, grads, strict=True):
            own.block_state["seen"].addcmul_(grad, grad)
            for k, mode in enumerate(own.modes):
                if mode.kept == FULL:
                    weight = scalars.factor_weight
                    ops.gram_ema_([mode.state["gram"]], [grad], [k], scalars.beta2, weight)

    def refresh(self, rows: Sequence[TakenRows], hyper: Any, scalars: Sequence[Any]) -> None:
        for each, its in zip(rows, scalars, strict=True):
            self._refresh(each, its.correction2)

    def _refresh(self, rows: TakenRows, correction: Any) -> None:
        gram = rows.state["gram"]
        if isinstance(correction, Tensor):
            correction = correction.to(gram.dtype)[:, None, None]
        for row, matrix in enumerate(gram / correction):
            inverse = torch.linalg.inv(matrix + torch.eye(len(matrix), dtype=gram.dtype))
            rows.state["inverse"][row].copy_((inverse + inverse.mT) / 2)
            rows.state["trace"][row, 0] = matrix.diagonal().sum()
        rows.state["failures"] += self.fails
        rows.ready.fill_(True)

    fails = 0

    def apply(
        self, outs: Sequence[Tensor], norms: Sequence[Tensor], statistics: Sequence[Statistics],
        filtered: Sequence[Tensor], hyper: Any, scalars: Any,
    ) -> None:  # fmt: skip
        scaled, inverses = [], []
        for own, blocks in zip(statistics, filtered, strict=True):
            scaled.append(blocks / (own.block_state["seen"].sqrt() + 1.0))
            for mode in own.modes:
                inverses.append(mode.state["inverse"] if mode.kept == FULL else None)
        ops.precondition_(outs, norms, scaled, inverses)


@contextmanager
def registered() -> Iterator[OneSided]:
    """The kind is there inside ``with``."""
    kind = OneSided()
    tables = (declared.MODE_STATE, declared.BLOCK_STATE, declared._choices, KINDS)
    before = [dict(table) for table in tables]
    KINDS[kind.name] = kind
    declared.declare(kind)
    try:
        yield kind
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)


@pytest.fixture
def toy() -> Iterator[OneSided]:
    with registered() as kind:
        yield kind


SHAPES = [(9, 6), (5,), (3, 2, 4), (2, 7), (8, 4)]  # of which two share blocks of 4 x 4
HYPER = {"preconditioner": "toy", "lr": 0.05, "precondition_frequency": 3}
HYPER |= {"max_preconditioner_dim": 4, "large_dim_method": "blocking"}


def make(**hyper: Any) -> tuple[list[Parameter], Shampoo]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    return params, Shampoo(params, **{**HYPER, **hyper})


def run(params, opt, seeds, absent=lambda seed, index: False) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(param.shape, generator=generator) for param in params]
        apply(opt, params, [None if absent(seed, i) else g for i, g in enumerate(grads)])


def test_state_is_published_by_the_names_that_are_declared(toy):
    params, opt = make(refresh_schedule="staggered")
    run(params, opt, range(5))
    tensors = {key: value for (index, key), value in state_tensors(opt).items() if index == 0}
    block = {key: value for key, value in tensors.items() if key.startswith("block0.")}
    assert {key: (tuple(v.shape), v.dtype) for key, v in block.items()} == {
        "block0.exp_avg": ((4, 4), torch.float32),
        "block0.exp_avg_sq": ((4, 4), torch.float32),
        "block0.seen": ((4, 4), torch.float32),
        "block0.gram0": ((4, 4), torch.float32),
        "block0.inverse0": ((4, 4), torch.float32),
        "block0.failures0": ((), torch.int32),
        "block0.trace0": ((2,), torch.float64),
        "block0.slot0": ((), torch.int32),
    }
    # A block of 1 x 4 keeps its first mode, one of 4 x 2 its second.
    assert {key for key in tensors if ".gram" in key and key.startswith(("block4", "block1"))} == {
        "block4.gram0",
        "block1.gram1",
    }


@pytest.mark.parametrize("hyper", [{}, {"refresh_schedule": "staggered", "momentum": 0.9}])
def test_state_bytes_are_what_is_held(toy, hyper):
    params, opt = make(**hyper)
    run(params, opt, range(4))
    tensors = state_tensors(opt).values()
    held = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in tensors}
    [planned] = plan(SHAPES, 1, block_candidates=(), **{**HYPER, **hyper}).state_bytes
    assert planned == sum(held.values())


@pytest.mark.parametrize("schedule", ["together", "staggered"])
def test_a_resumed_run_goes_on_to_the_bit(toy, schedule):
    params, opt = make(refresh_schedule=schedule)
    run(params, opt, range(7))
    others, other = make(refresh_schedule=schedule)
    with torch.no_grad():
        for param, source in zip(others, params, strict=True):
            param.copy_(source)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    run(params, opt, range(7, 15))
    run(others, other, range(7, 15))
    assert_same_bits(snapshot(other), snapshot(opt))


def test_blocks_that_are_copied_together_move_as_alone(toy):
    """Gradients that come and go: rows are copied, and put back where they have moved."""
    params, opt = make()
    twins = [Parameter(param.detach().clone()) for param in params]
    alone = [Shampoo([twin], **HYPER) for twin in twins]
    for seed in range(14):
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(param.shape, generator=generator) for param in params]
        here = [None if (seed + i) % 3 == 0 else grad for i, grad in enumerate(grads)]
        apply(opt, params, here)
        for twin, other, grad in zip(twins, alone, here, strict=True):
            apply(other, [twin], [grad])
    for (index, key), value in state_tensors(opt).items():
        expected = alone[index].state[twins[index]][key]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


def test_what_a_block_cannot_go_on_without_is_missed(toy):
    for key in ("block0.seen", "block0.gram0", "block0.inverse0"):
        params, opt = make()
        run(params, opt, range(4))
        state = copy.deepcopy(opt.state_dict())
        del state["state"][0][key]
        with pytest.raises(IncompleteCheckpointError):
            make()[1].load_state_dict(state)
        del opt.state[params[0]][key]
        with pytest.raises(IncompleteCheckpointError, match=key):
            run(params, opt, [4])


def test_what_somebody_writes_into_what_decides_is_seen(toy):
    """A block whose inverse is taken away follows its graft again."""
    params, opt = make(precondition_frequency=4)
    run(params, opt, range(5))
    twins, twin = copy.deepcopy((params, opt))
    opt.state[params[0]]["block0.inverse0"].zero_()
    graft = Shampoo([params[0]], **HYPER | {"precondition": False})
    run(params, opt, [5])
    run(twins, twin, [5])
    assert not torch.equal(params[0][:4, :4], twins[0][:4, :4])
    assert torch.equal(params[0][4:], twins[0][4:])
    assert graft.state_dict()["param_groups"][0]["preconditioner"] == "toy"


def test_failures_are_counted_by_name(toy, monkeypatch):
    monkeypatch.setattr(OneSided, "fails", 1)
    params, opt = make(max_root_failures=0)
    with pytest.raises(RootFailureError, match=r"block0\.gram0 of .* for 1 refreshes"):
        run(params, opt, range(9))


def test_outside_of_its_registration_a_kind_is_unknown():
    with pytest.raises(ValueError, match="Invalid preconditioner='toy'"):
        make()


def train(rank: int) -> tuple[list[Tensor], dict[str, Any] | None]:
    """A job: parameters after some steps, and the whole state on the first rank."""
    with registered():
        params, opt = make(**({} if rank < 0 else {"num_trainers_per_group": 2}))
        run(params, opt, range(8))
        opt.consolidate_state_dict()
        state = opt.state_dict()["state"] if rank <= 0 else None
        return [param.detach() for param in params], state


def test_ranks_divide_and_gather_it(ranks: Ranks, toy):
    params, state = train(-1)
    for rank, (theirs, gathered) in enumerate(ranks.returns(train, 2)):
        assert all(torch.equal(a, b) for a, b in zip(theirs, params, strict=True))
        if rank == 0:
            assert gathered.keys() == state.keys()
            for index, entries in state.items():
                assert gathered[index].keys() == entries.keys()
                assert all(torch.equal(gathered[index][k], v) for k, v in entries.items())


PACKAGE = Path(shampoo.__file__).parent
SHARED = [
    path
    for folder in ("blocks", "step", "state", "planner", "distributed")
    for path in sorted((PACKAGE / folder).glob("*.py"))
]


@pytest.mark.parametrize("path", SHARED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_all_kinds_share_names_none_of_them(path):
    """Nor what one of them keeps, as an attribute or a key."""
    states = {s.name for kind in KINDS.values() for m in kind.mode_state.values() for s in m}
    names = KINDS.keys() | (states - {declared.FAILURES})
    # A choice of large_dim_method, and what a machine takes for an inverse root.
    names -= {"layout": {"adagrad"}, "cost": {"root"}}.get(path.stem, set())
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            assert node.attr not in names, f"line {node.lineno}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in names, f"line {node.lineno}"


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_a_kind_is_consistent(kind):
    extent, diagonal = (5, 3, 7), (False, True, False)
    modes = kind.modes(extent, diagonal)
    assert len(modes) == 3
    assert set(modes) <= {NONE, *kind.mode_state}
    assert kind.preconditions or set(modes) == {NONE}
    assert 0 <= kind.stream < declared.STREAMS
    assert (kind.stream == 0) == kind.preconditions
    assert kind.cost(extent, modes).numel == 105
    assert (kind.name in declared.choices()) == kind.preconditions


@pytest.mark.parametrize("name", ["shampoo", "kl_shampoo"])
def test_factors_and_roots_are_counted(name):
    assert KINDS[name].mode_numbers((5, 3, 7), (False, True, False)) == 2 * (25 + 49) + 3


@pytest.mark.parametrize("names", [("shampoo", "kl_shampoo"), ("kl_shampoo", "shampoo")])
@pytest.mark.parametrize("copied", [False, True])
def test_a_kind_cannot_change_while_its_state_stands(names, copied):
    """Both keep the same tensors, but their roots are other powers of other statistics."""
    params = random_params((6, 4), (5,), dtype=torch.float32)
    opt = Shampoo(params, preconditioner=names[0], precondition_frequency=2)
    for grads in random_grads(params, 3):
        apply(opt, params, grads)
    if copied:
        params, opt = copy.deepcopy((params, opt))
    opt.param_groups[0]["preconditioner"] = names[1]
    before = [param.detach().clone() for param in params]
    state = {param: dict(entries) for param, entries in opt.state.items()}
    with pytest.raises(BlockGridMismatchError, match=f"has state of preconditioner='{names[0]}'"):
        apply(opt, params, [torch.ones_like(param) for param in params])
    assert all(param.equal(old) for param, old in zip(params, before, strict=True))
    assert all(opt.state[param] == entries for param, entries in state.items())
    opt.state.clear()
    apply(opt, params, [torch.ones_like(param) for param in params])
    assert all(entries["step"] == 1 for entries in opt.state.values())
