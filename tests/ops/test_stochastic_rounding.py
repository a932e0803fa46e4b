"""Stochastic rounding of bfloat16 parameters, by every kernel and by the optimizer."""

import copy

import pytest
import torch
from compiled import load_compiled
from host_build import HostOps
from tape import Tape, record_tape
from torch.nn import Parameter
from trajectory import assert_same_bits, snapshot

from shampoo import Replay, Shampoo, ops
from shampoo.certificates.cases.tiles import table
from shampoo.kernels.reference import ops as reference
from shampoo.kernels.reference.philox import philox
from shampoo.step import capture

KNOWN = [
    (0, 0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (2**64 - 1, 2**64 - 1, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        *(0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3243F6A88),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("seed", "high", "low", "words"), KNOWN)
def test_philox_gives_the_published_words(seed, high, low, words):
    """Known answers that Random123 ships with the generator."""
    assert HostOps().module.random_words(seed, high, low) == words
    signed = [value - 2**64 if value >= 2**63 else value for value in (high, low)]
    counter = torch.tensor([signed[1]])
    assert philox(seed, signed[0], counter).tolist() == [words]
    assert philox(seed, torch.tensor(signed[0]), counter).tolist() == [words]


@pytest.fixture(params=["reference", "compiled", "cuda"])
def impl(request):
    if request.param == "reference":
        return reference
    if request.param == "cuda":
        return HostOps()
    load_compiled()
    return ops


def step_by(impl, weight, distance, rounding, skip=0, live=False):
    """``weight - distance`` by an update of one block; ``rounding``: seed and step."""
    tiles, _, numel = table([tuple(weight.shape)], 4096, skip=skip)
    direction = torch.full((numel,), distance)
    seed, step = rounding or (None, 0.0)
    numbers = [1.0, 0.0, 0.0, float(step)]
    if live:
        numbers = [torch.tensor(number, dtype=torch.float64) for number in numbers]
    *move, step = numbers
    impl.update_blocks_(
        [weight], None, direction, torch.ones(1), tiles, *move, False, seed=seed, step=step
    )
    return weight


@pytest.mark.parametrize("share", [0.0, 0.125, 0.5, 0.9])
def test_the_mean_is_right(impl, share):
    """``share`` of the distance between 1 and its neighbour below, 2^-8 away."""
    weight = torch.ones(128, 512, dtype=torch.bfloat16)
    step_by(impl, weight, share * 2.0**-8, (7, 3))
    assert set(weight.flatten().tolist()) <= {1.0, 1.0 - 2.0**-8}
    moved = (weight < 1.0).double().mean().item()
    assert moved == pytest.approx(share, abs=4 * (share * (1 - share) / weight.numel()) ** 0.5)
    for distance in (1, 2, 3, 4, 5, 8, 16, 512):  # a word of a counter serves one element
        one, other = weight.flatten()[distance:] < 1, weight.flatten()[:-distance] < 1
        alike = (one == other).double().mean().item()
        assert alike == pytest.approx(share**2 + (1 - share) ** 2, abs=0.01)


@pytest.mark.parametrize("live", [False, True])
def test_it_depends_on_seed_step_and_place_alone(impl, live):
    start = torch.rand(40, 52).to(torch.bfloat16)
    first, again, seed, step = (
        step_by(impl, start.clone(), 1e-3, rounding, live=live)
        for rounding in ((1, 2), (1, 2), (2, 2), (1, 3))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, seed)
    assert not torch.equal(first, step)
    strided = torch.zeros(52, 40, dtype=torch.bfloat16).T.copy_(start)
    assert torch.equal(step_by(impl, strided, 1e-3, (1, 2), live=live), first)
    moved = step_by(impl, start.clone(), 1e-3, (1, 2), skip=4, live=live)
    assert not torch.equal(moved, first)


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("limit", [7, 8, 64])
def test_every_kernel_draws_the_same(impl, limit, skip):
    params = [torch.randn(40, 64), torch.randn(33, 7), torch.randn(5, 3, 4)]
    params = [param.to(torch.bfloat16) for param in params]
    tiles, boxes, numel = table([tuple(param.shape) for param in params], limit, skip)
    direction, scale = torch.randn(numel), torch.rand(len(boxes))
    results = []
    for function in (impl.update_blocks_, reference.update_blocks_):
        weights, momentum = [param.clone() for param in params], direction.clone()
        function(
            *(weights, momentum, direction, scale, tiles, 1e-3, 0.1, 0.9, True),
            **{"seed": 5 << 40 | 12, "step": 9.0},
        )
        results.append(torch.cat([weight.flatten() for weight in weights]).float())
    # A value that a kernel rounds elsewhere in float32 may fall on the other side of a draw.
    assert (results[0] != results[1]).float().mean() < 1e-3


def test_other_dtypes_and_special_values_stay_alone(impl):
    for dtype in (torch.float16, torch.float32, torch.float64):
        plain = torch.rand(8, 8).to(dtype)
        rounded = plain.clone()
        step_by(impl, plain, 1e-3, None)
        step_by(impl, rounded, 1e-3, (1, 2))
        assert torch.equal(plain, rounded)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0], dtype=torch.bfloat16)
    moved = step_by(impl, special.clone(), 0.0, (1, 2))
    torch.testing.assert_close(moved, special, equal_nan=True, rtol=0, atol=0)


def test_every_nan_stays_one(impl):
    """A GPU's own NaN has all bits set: one more, and it would be a zero."""
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, -0x400000], dtype=torch.int32)
    weight = torch.ones(4, 64, dtype=torch.bfloat16)
    direction = bits.view(torch.float32)[:, None].expand(4, 64).contiguous().flatten()
    tiles, _, _ = table([(4, 64)], 4096)
    move = (1.0, 0.0, 0.0, False)
    impl.update_blocks_([weight], None, direction, torch.ones(1), tiles, *move, seed=1, step=2.0)
    assert weight.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_it_the_nearest_is_taken_and_the_even_one_of_two(impl, dtype):
    """Of values of all signs and exponents, those halfway between two and beside it among them."""
    high = torch.randint(-(2**15), 2**15, (2**11, 1), dtype=torch.int32) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x3000], dtype=torch.int32)
    values = (high | low).flatten().view(torch.float32)
    tiles, _, _ = table([(len(values),)], 1 << 20)
    weight = torch.zeros(len(values), dtype=dtype)
    impl.update_blocks_([weight], None, -values, torch.ones(1), tiles, 1.0, 0.0, 0.0, False)
    torch.testing.assert_close(weight, values.to(dtype), rtol=0, atol=0, equal_nan=True)


def make(**arguments):
    torch.manual_seed(1)
    params = [Parameter(torch.ones(16, 12).bfloat16()), Parameter(torch.ones(40).bfloat16())]
    params.append(Parameter(torch.ones(16, 12).bfloat16()))
    limits = {"precondition_frequency": 3, "max_preconditioner_dim": 8}
    return params, Shampoo(params, stochastic_rounding=True, **limits, **arguments)


def put(params, step) -> None:
    for param in params:
        param.grad = torch.ones_like(param) * (1 + step % 2)


def test_steps_too_small_for_bfloat16_add_up():
    """A hundred of 1e-4: each would be rounded away, the spacing below 1 is 2^-8."""
    for stochastic in (False, True):
        params, opt = make(lr=1e-4, grafting="adam", start_preconditioning_step=1000)
        opt.param_groups[0]["stochastic_rounding"] = stochastic
        for _ in range(100):
            put(params, 0)
            opt.step()
        mean = torch.cat([param.detach().flatten().double() for param in params]).mean().item()
        assert mean == pytest.approx(1.0 - 1e-2 if stochastic else 1.0, abs=1e-3)


def test_parameters_draw_apart_and_steps_too():
    params, opt = make(lr=2.0**-9, start_preconditioning_step=1000)
    put(params, 0)
    opt.step()
    first = [param.detach().clone() for param in params]
    assert not torch.equal(first[0], first[2])
    for param in params:
        param.data.fill_(1.0)
    put(params, 0)
    opt.step()
    assert not torch.equal(params[0], first[0])


def test_groups_and_rules_draw_apart():
    """They have segments of their own, each of which begins at its first element."""
    params = [Parameter(torch.ones(40).bfloat16()) for _ in range(2)]
    params.append(Parameter(torch.ones(40, 1, 2).bfloat16()))
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    opt = Shampoo(groups, lr=2.0**-9, max_preconditioner_dim=80, stochastic_rounding=True)
    put(params, 0)
    opt.step()
    grafted, other, factored = (param.detach().flatten()[:40] for param in params)
    assert not torch.equal(grafted, other)
    assert not torch.equal(other, factored)


def test_a_resumed_run_draws_the_same():
    params, opt = make(lr=1e-3)
    for step in range(5):
        put(params, step)
        opt.step()
    theirs, resumed = make(lr=1e-3)
    for param, source in zip(theirs, params, strict=True):
        param.data.copy_(source)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for step in range(5):
        for twin, optimizer in ((params, opt), (theirs, resumed)):
            put(twin, step)
            optimizer.step()
    assert_same_bits(snapshot(resumed), snapshot(opt))


def test_replayed_steps_draw_anew(monkeypatch):
    monkeypatch.setattr(capture, "is_capturing", lambda: Tape.recording)
    theirs, ordinary = make(lr=1e-3)
    ours, opt = make(lr=torch.tensor(1e-3, dtype=torch.float64), capturable=True)
    put(ours, 0)
    replay = Replay(opt, opt.step, record_tape)
    for step in range(9):
        put(theirs, step)
        for mine, their in zip(ours, theirs, strict=True):
            mine.grad.copy_(their.grad)
        if step == 4:
            before = [param.detach().clone() for param in ours]
            ours[0].grad[0, 0] = torch.nan
            theirs[0].grad[0, 0] = torch.nan
            replay()
            assert all(map(torch.equal, before, ours))
            break
        replay()
        ordinary.step()
        assert all(map(torch.equal, ours, theirs))


def test_it_is_a_flag():
    with pytest.raises(ValueError, match="stochastic_rounding"):
        Shampoo([Parameter(torch.ones(2, 2))], stochastic_rounding="yes")


def step_together(rank: int, arguments: dict) -> None:
    param = Parameter(torch.ones(16, 12).bfloat16())
    param.grad = torch.ones_like(param)
    Shampoo([param], max_preconditioner_dim=8, **arguments).step()


@pytest.mark.parametrize("name", ["stochastic_rounding", "capturable"])
def test_ranks_that_step_together_are_refused(ranks, name):
    for error in ranks.run(step_together, 2, {name: True}):
        assert isinstance(error, ValueError)
        assert "where 2 ranks step together" in str(error)
        assert "num_trainers_per_group=1" in str(error)
    alone = {name: True, "num_trainers_per_group": 1}
    assert ranks.run(step_together, 2, alone) == [None, None]
