"""Tables of stacks: what is in them, which are kept, and what stacks that share a launch get."""

import pytest
import torch
from comparison import symmetric

from shampoo.certificates.cases.stacks import SHAPES
from shampoo.kernels.triton import gram, precondition, stack_table
from shampoo.kernels.triton.stack_table import distance, strides_of, table_of, vector_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_tables(monkeypatch):
    monkeypatch.setattr(stack_table, "_tables", type(stack_table._tables)())
    forget_plans(monkeypatch)


def forget_plans(monkeypatch):
    for module in (gram, precondition):
        monkeypatch.setattr(module, "_plans", stack_table.Plans())


@pytest.mark.parametrize("count", [1, 16, 17, 70])
def test_rows_without_a_stack_begin_where_no_program_is(count):
    rows = [(3 * i, i, 2**40 + i) for i in range(count)]
    table = table_of(rows, CPU)
    assert len(table) in (16, 32, 128)
    assert table[:count].tolist() == [list(row) for row in rows]
    assert (table[count:, 0] > 2**31).all()


def test_a_table_is_made_once_and_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(stack_table, "_MOST", 3)
    first = table_of([(0, 1)], CPU)
    assert table_of([(0, 1)], CPU) is first
    for number in (2, 3):
        table_of([(0, number)], CPU)
    assert table_of([(0, 1)], CPU) is first, "it was used since"
    table_of([(0, 4)], CPU)
    assert [key[0][0][1] for key in stack_table._tables] == [3, 1, 4]


def test_a_graph_makes_its_table_from_numbers_of_the_host():
    rows = [(0, 2**47 + 1, -(2**40) - 3), (5, 7, 11)]
    made = stack_table._captured([*rows, (stack_table._END, 0, 0)], CPU)
    assert made.dtype == torch.int64
    assert made[:2].tolist() == [list(row) for row in rows]
    assert made[2, 0] > 2**31


def test_a_graph_reads_a_table_that_is_there_and_keeps_it(monkeypatch):
    monkeypatch.setattr(stack_table, "_of_graphs", {})
    monkeypatch.setattr(stack_table, "_MOST", 1)
    known = table_of([(0, 1)], CPU)
    monkeypatch.setattr(stack_table, "_is_captured", lambda device: True)
    assert table_of([(0, 1)], CPU) is known
    assert table_of([(0, 2)], CPU)[0].tolist() == [0, 2], "made in the graph, and not kept"
    monkeypatch.setattr(stack_table, "_is_captured", lambda device: False)
    table_of([(0, 3)], CPU)
    assert list(stack_table._tables) == [(((0, 3),), CPU)]
    [kept] = stack_table._of_graphs.values()
    assert kept is known, "a replay reads it, though it is found no more"


def test_another_stream_waits_until_a_table_is_there():
    class Stream:
        def wait_event(self, event):
            seen.append(event)

    class Table:
        def record_stream(self, stream):
            seen.append(stream)

    seen, own, other = [], Stream(), Stream()
    stack_table._follow(Table(), own, "copied", own)
    assert seen == []
    stack_table._follow(Table(), own, "copied", other)
    assert seen == ["copied", other]


def test_distances_and_alignment():
    memory = torch.empty(100, dtype=torch.bfloat16)
    assert distance(memory[40:], memory[8:]) == 32
    assert distance(memory[8:], memory[40:]) == -32
    assert strides_of(torch.empty(1, 5, 1, 7)) == [0, 7, 0, 1]
    assert vector_of([8, 16, 0], 2) == 8
    assert vector_of([8, 12, 0], 2) == 1
    assert vector_of([8, 12, 0], 4) == 4


def test_stacks_share_launches(monkeypatch):
    """As many as kernels are compiled differently, whatever the number of stacks."""
    grids = []

    class Counter:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: grids.append(grid)

    monkeypatch.setattr(gram, "gram_ema_kernel", Counter())
    for name in ("scales_kernel", "apply_root_kernel", "norm_kernel"):
        monkeypatch.setattr(precondition, name, Counter())
    for count in (1, 20):
        grads = [torch.empty(2, 64 * (1 + i % 4), 64) for i in range(count)]
        factors = [torch.empty(2, grad.shape[1], grad.shape[1]) for grad in grads]
        gram.gram_ema_(factors, grads, [0] * count, 0.9, 0.1)
        assert len(grids) == 1
        grids.clear()
        roots = [torch.empty(2, n, n) for grad in grads for n in grad.shape[1:]]
        outs, norms = [torch.empty_like(grad) for grad in grads], [torch.empty(2)] * count
        precondition.precondition_(outs, norms, grads, roots)
        assert len(grids) == (4 if count == 1 else 5)  # sides above 128 have tiles of their own
        grids.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_has_the_bits_that_it_has_alone(dtype):
    shapes = [*SHAPES, (64, 128), (128, 64), (1, 5)]
    grads = [torch.randn(1 + i % 3, *shape).to(dtype) for i, shape in enumerate(shapes)]
    stacks = [(grad, k) for grad in grads for k in range(grad.dim() - 1)]
    before = [symmetric(len(grad), grad.shape[k + 1]) for grad, k in stacks]
    together = [factor.clone() for factor in before]
    sources, modes = [grad for grad, _ in stacks], [k for _, k in stacks]
    gram.gram_ema_(together, sources, modes, 0.9, 0.3)
    for factor, found, (grad, k) in zip(before, together, stacks, strict=True):
        gram.gram_ema_([factor], [grad], [k], 0.9, 0.3)
        assert torch.equal(found, factor)
    outs = [torch.full(grad.shape, torch.nan) for grad in grads]
    norms = [torch.full((len(grad),), torch.nan) for grad in grads]
    precondition.precondition_(outs, norms, grads, before)
    begin = 0
    for out, norm, grad in zip(outs, norms, grads, strict=True):
        end = begin + grad.dim() - 1
        alone, length = torch.empty_like(out), torch.empty_like(norm)
        precondition.precondition_([alone], [length], [grad], before[begin:end])
        assert torch.equal(out, alone)
        assert torch.equal(norm, length)
        begin = end


class Launch:
    """Keeps what a kernel would get, of memory where in it."""

    def __init__(self, seen):
        self.seen = seen

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.seen.append(
            (grid, [self.of(each) for each in arguments], constants)
        )

    def of(self, argument):
        if not isinstance(argument, torch.Tensor):
            return argument
        if argument.dtype == torch.int64:
            return argument.tolist()
        # Scratch lies elsewhere every time, as aligned as torch makes it.
        is_scratch = argument.dtype in (torch.int32, torch.float64) or argument.dim() == 1
        return argument.data_ptr() % 16 if is_scratch else argument.data_ptr()


class Stacks:
    """Two stacks of blocks of order 3 in one tensor, and what belongs to them."""

    def __init__(self, at=0, apart=4096, shape=(8, 5, 4), batch=2, dtype=torch.float32):
        room, numel = torch.zeros(1 << 14, dtype=dtype), batch * torch.Size(shape).numel()
        self.grads = [room[begin : begin + numel].view(batch, *shape) for begin in (at, at + apart)]
        self.sides = [(stack, mode) for stack in range(2) for mode in range(3)]
        self.outs = [torch.zeros(batch, *shape) for _ in range(2)]
        self.norms = [torch.zeros(batch) for _ in range(2)]
        self.roots = [torch.eye(shape[mode]).repeat(batch, 1, 1) for _, mode in self.sides]

    def run(self):
        grads = [self.grads[stack] for stack, _ in self.sides]
        modes = [mode for _, mode in self.sides]
        gram.gram_ema_(self.roots, grads, modes, 0.9, 0.1)
        precondition.precondition_(self.outs, self.norms, self.grads, self.roots)


def changed(change, **made):
    stacks = Stacks(**made)
    change(stacks)
    return stacks


def wide(tensor):
    """The same values, with room between them."""
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


# What differs from the first call in one thing, which one plan cannot serve.
CHANGES = {
    "farther apart": lambda: Stacks(apart=4100),
    "elsewhere": lambda: Stacks(at=1024),
    "elsewhere, less aligned": lambda: Stacks(at=1, apart=4095),
    "other sizes": lambda: Stacks(shape=(4, 5, 8)),
    "more blocks": lambda: Stacks(batch=3),
    "half precision": lambda: Stacks(dtype=torch.bfloat16),
    "other strides": lambda: changed(lambda s: s.grads.reverse()),
    "gradient with gaps": lambda: changed(lambda s: s.grads.__setitem__(1, wide(s.grads[1]))),
    "root with gaps": lambda: changed(
        lambda s: s.roots.__setitem__(0, torch.zeros(2, 8, 12)[:, :, :8])
    ),
    "norms with gaps": lambda: changed(lambda s: s.norms.__setitem__(1, wide(s.norms[1]))),
}


@pytest.fixture
def seen(monkeypatch):
    found = []
    monkeypatch.setattr(gram, "gram_ema_kernel", Launch(found))
    for name in ("scales_kernel", "apply_root_kernel", "norm_kernel"):
        monkeypatch.setattr(precondition, name, Launch(found))
    return found


def launches(seen, stacks):
    seen.clear()
    stacks.run()
    return [*seen]


@pytest.mark.parametrize("change", CHANGES)
def test_no_plan_outlives_what_it_was_made_of(change, seen, monkeypatch):
    """After the first call, and again, the launches are those of a process that knows no plan."""
    first, other = Stacks(), CHANGES[change]()
    original = launches(seen, first)
    assert launches(seen, first) == original, "a plan that is known gives what it gave"
    found = [launches(seen, other) for _ in range(2)]
    forget_plans(monkeypatch)
    fresh = launches(seen, other)
    assert found == [fresh, fresh]
    assert fresh != original
    assert launches(seen, first) == original


def test_as_many_plans_are_kept_as_fit():
    plans = stack_table.Plans(2)
    for key in (1, 2):
        plans.keep(key, [key])
    assert plans.get(1) == [1]
    plans.keep(3, [3])
    assert (plans.get(2), plans.get(1), plans.get(3), len(plans)) == (None, [1], [3], 2)


def test_stacks_that_move_as_one_have_one_plan(seen):
    stacks = Stacks()
    for at in (0, 16, 32):
        stacks.grads = Stacks(at).grads
        stacks.run()
        assert len(gram._plans) == len(precondition._plans) == 1


def test_what_is_copied_to_be_unfolded_keeps_no_plan():
    """Its copies lie elsewhere every time."""
    results = []
    for is_copied in (False, True, True):
        stacks = Stacks()
        for number, grad in enumerate(stacks.grads):
            grad.copy_(torch.linspace(-1, 1 + number, grad.numel()).view(grad.shape))
        if is_copied:
            turned = [grad.permute(0, 3, 2, 1).contiguous() for grad in stacks.grads]
            stacks.grads = [grad.permute(0, 3, 2, 1) for grad in turned]
        stacks.run()
        results.append([*stacks.outs, *stacks.norms, *stacks.roots])
        assert len(gram._plans) == len(precondition._plans) == 1
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-6, atol=1e-7)
