"""KL-Shampoo against a float64 reference, its fixed point, and what every kind must keep."""

import copy
from typing import Any

import pytest
import torch
from ranks import Ranks
from reference_kl import ReferenceKLShampoo
from torch import Tensor
from torch.nn import Parameter
from trajectory import (
    apply,
    assert_relative,
    assert_same_bits,
    double_shampoo,
    random_grads,
    random_params,
    snapshot,
    state_tensors,
)

from shampoo import BlockGridMismatchError, Shampoo, plan

KL: dict[str, Any] = {"preconditioner": "kl_shampoo"}
SHAPES = [(9, 6), (5,), (3, 2, 4), (2, 7), (8, 4)]  # of which two share blocks of 4 x 4
# All values that the formulas of a kind see, pair by pair rather than each with each.
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no graft": {"grafting": "none", "precondition_1d": True},
    "every step": {"precondition_frequency": 1, "betas": (0.0, 0.9), "grafting": "sgd"},
    "sums": {"betas": (0.9, 1.0), "merge_dims": "none"},
    "uncorrected": {"bias_correction": False, "precondition_1d": True},
    "late": {"start_preconditioning_step": 5, "merge_dims": "none", "grafting": "none"},
    "diagonal": {"large_dim_method": "diagonal", "max_preconditioner_dim": 3},
    "diagonal alone": {"large_dim_method": "diagonal", "max_preconditioner_dim": 1},
    "diagonal sums": {
        "large_dim_method": "diagonal",
        "max_preconditioner_dim": 3,
        "betas": (0.5, 1.0),
        "precondition_frequency": 1,
    },
    "thin": {"large_dim_method": "auto", "merge_dims": "full", "max_preconditioner_dim": 80},
    "decay": {"weight_decay": 0.1, "momentum": 0.5, "decoupled_weight_decay": False},
    "large eps": {"eps": 1e-2, "relative_eps": 0.0},
}
REFUSED = r'Must be "covariance" and 1\.0 with preconditioner="kl_shampoo"'
SMALL = {"max_preconditioner_dim": 4, "precondition_frequency": 3, "large_dim_method": "blocking"}


def compare(shapes, steps: int, is_sparse: bool = False, **hyper: Any) -> Shampoo:
    """Package and reference on one history of gradients, equal after every step."""
    params = random_params(*shapes)
    opt = double_shampoo(params, **hyper)
    start = [param.detach().clone() for param in params]
    reference = ReferenceKLShampoo(params, **hyper)
    for t, full in enumerate(random_grads(params, steps), start=1):
        grads = [None if is_sparse and (t + i) % 4 == 3 else g for i, g in enumerate(full)]
        apply(opt, params, grads)
        reference.step(grads)
        for param, began, expected in zip(params, start, reference.params, strict=True):
            what = f"step {t}, shape {tuple(param.shape)}:"
            assert_relative(param.detach() - began, expected - began, 1e-10, what)
    return opt


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_those_of_the_reference(variant, is_sparse):
    compare(SHAPES, 11, is_sparse, **{**KL, **SMALL, "lr": 0.1, **VARIANTS[variant]})


def test_steps_across_segments_are_those_of_the_reference(monkeypatch):
    """Factors of all segments move before a refresh, by the roots from before it."""
    monkeypatch.setattr("shampoo.blocks.segments.CPU_SEGMENT", 24)
    compare(SHAPES, 8, **KL, **SMALL, lr=0.1)
    compare(SHAPES, 8, is_sparse=True, **KL, **{**SMALL, **VARIANTS["diagonal"]}, lr=0.1)


def outer(*shape: int) -> Tensor:
    """Of rank one in every mode."""
    found = torch.ones(())
    for size in shape:
        found = found[..., None] * torch.linspace(-1.0, 2.0, size)
    return found.double()


def one_entry(*shape: int) -> Tensor:
    found = outer(*shape)
    return found * (found == found.max())


def one_row(*shape: int) -> Tensor:
    found = torch.randn(shape, dtype=torch.float64)
    found[1:] = 0.0
    return found


def full(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


MATRICES = [(4, 3), (6, 6), (3, 2, 4)]


@pytest.mark.parametrize("first", [outer, one_entry, one_row, full])
@pytest.mark.parametrize("grafting", ["adam", "none"])
def test_roots_of_one_gradient_are_those_of_the_reference(first, grafting):
    """Where they are mostly ridge."""
    params = [Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in MATRICES]
    hyper = {**KL, "lr": 1.0, "grafting": grafting}
    opt, reference = double_shampoo(params, **hyper), ReferenceKLShampoo(params, **hyper)
    for t, later in enumerate(random_grads(params, 12), start=1):
        grads = [first(*p.shape) for p in params] if t == 1 else later
        before = [param.detach().clone() for param in params]
        earlier = [param.clone() for param in reference.params]
        apply(opt, params, grads)
        reference.step(grads)
        for i, param in enumerate(params):
            moved, expected = param.detach() - before[i], reference.params[i] - earlier[i]
            assert_relative(moved, expected, 1e-6, f"step {t}, shape {tuple(param.shape)}:")


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1.0, 1e12])
@pytest.mark.parametrize("first", [outer, one_entry, one_row, full])
def test_roots_of_one_gradient_leave_a_finite_step_of_the_grafts_length(first, scale):
    """From the first step on, in float32, whatever the gradients' size."""
    ours, grafted = ([Parameter(torch.zeros(shape)) for shape in MATRICES] for _ in range(2))
    opt = Shampoo(ours, lr=1.0, **KL)
    alone = Shampoo(grafted, lr=1.0, precondition=False)
    for t, later in enumerate(random_grads(ours, 12), start=1):
        grads = [first(*p.shape).float() for p in ours] if t == 1 else later
        for params, each in ((ours, opt), (grafted, alone)):
            with torch.no_grad():
                for param in params:
                    param.zero_()
            apply(each, params, [scale * grad for grad in grads])
        assert all(value.isfinite().all() for value in state_tensors(opt).values())
        for param, other in zip(ours, grafted, strict=True):
            torch.testing.assert_close(param.norm(), other.norm(), rtol=1e-3, atol=0.0)


def factors_of(steps: int, is_sparse: bool, **hyper: Any) -> list[dict[Any, Tensor]]:
    """After each step all factors, and after the last one the roots too."""
    params = random_params(*SHAPES, dtype=torch.float32)
    opt = Shampoo(params, **{**KL, **SMALL, "precondition_frequency": 7, **hyper})
    found = []
    for t, grads in enumerate(random_grads(params, steps), start=1):
        here = [not is_sparse or t == 1 or (t + i) % 3 > 0 for i in range(len(params))]
        # Of rank one at first, so that a root of it would whiten by thousands.
        given = [torch.ones_like(grad) if t == 1 else grad for grad in grads]
        apply(opt, params, [g if is_here else None for g, is_here in zip(given, here, strict=True)])
        kept = (".factor", ".root") if t == steps else (".factor",)
        tensors = state_tensors(opt).items()
        found.append({key: v.clone() for key, v in tensors if any(kind in key[1] for kind in kept)})
    return found


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("start", [1, 3])
def test_an_early_start_is_one_of_directions_alone(start, capturable, is_sparse):
    """Factors, and all later roots, are those of a start at the frequency, to the bit."""
    early, later = (
        factors_of(21, is_sparse, capturable=capturable, start_preconditioning_step=each)
        for each in (start, -1)
    )
    for t, (one, other) in enumerate(zip(early, later, strict=True), start=1):
        assert one.keys() == other.keys()
        assert all(value.equal(other[key]) for key, value in one.items()), f"step {t}"
    assert any(".root" in key and value.any() for (_, key), value in early[-1].items())


def test_staggered_roots_of_the_first_period_whiten_nothing_either():
    """Of a start at 1 the last of them is renewed at step 14."""
    ours, plain = (
        factors_of(15, False, refresh_schedule="staggered", start_preconditioning_step=start)
        for start in (1, float("inf"))
    )
    same = [
        all(v.equal(other[key]) for key, v in one.items() if "factor" in key[1])
        for one, other in zip(ours, plain, strict=True)
    ]
    assert same == [True] * 14 + [False]


def test_a_factor_is_the_dense_formula():
    """One step after a refresh, by one einsum with the inverse of the other factor."""
    param = Parameter(torch.zeros(4, 3, dtype=torch.float64))
    hyper = {"betas": (0.9, 0.9), "precondition_frequency": 1, "eps": 1e-2, "relative_eps": 0.0}
    opt = double_shampoo([param], **KL, **hyper)
    first, second = (torch.randn(4, 3, dtype=torch.float64) for _ in range(2))
    apply(opt, [param], [first])
    left, right = (opt.state[param][f"block0.factor{m}"].clone() for m in range(2))
    torch.testing.assert_close(left, 0.1 / 3 * first @ first.T)
    torch.testing.assert_close(right, 0.1 / 4 * first.T @ first)
    apply(opt, [param], [second])
    inner, outer = (torch.linalg.inv(A / 0.1 + 1e-2 * torch.eye(len(A))) for A in (right, left))
    for mode, began, inverse, size in ((0, left, inner, 3), (1, right, outer, 4)):
        spec = "im,mn,jn->ij" if mode == 0 else "mi,mn,nj->ij"
        gram = torch.einsum(spec, second, inverse, second) / size
        found = opt.state[param][f"block0.factor{mode}"]
        torch.testing.assert_close(found, 0.9 * began + 0.1 * gram)


@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 3)], ids=str)
def test_factors_converge_to_the_covariance_of_the_gradient(shape):
    """The fixed point: for a Gaussian whose covariance is a Kronecker product, that product."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    roots = [torch.eye(size) + 0.4 * randn(size, size) for size in shape]
    param = Parameter(torch.zeros(shape, dtype=torch.float64))
    hyper = {"betas": (0.0, 0.998), "precondition_frequency": 1, "merge_dims": "none"}
    opt = double_shampoo([param], **KL, **hyper, lr=0.0)
    for _ in range(5000):
        grad = randn(*shape)
        for mode, root in enumerate(roots):
            grad = torch.tensordot(root, grad, ([1], [mode])).movedim(0, mode)
        apply(opt, [param], [grad])
    found, truth = torch.ones(1, 1), torch.ones(1, 1)
    for mode, root in enumerate(roots):
        found = torch.kron(found, opt.state[param][f"block0.factor{mode}"])
        truth = torch.kron(truth, root @ root.T)
    error = torch.linalg.matrix_norm(found - truth) / torch.linalg.matrix_norm(truth)
    # An average of 1000 gradients; Shampoo's own factors are off by more than the truth itself.
    assert error < 0.15


def test_it_trains_without_a_graft():
    """Least squares by small batches, badly conditioned on both sides."""
    torch.manual_seed(0)
    left, right = (torch.diag(torch.logspace(0, -1.5, size)) for size in (12, 8))
    target, param = torch.randn(12, 8), Parameter(torch.zeros(12, 8))
    hyper = {"betas": (0.9, 0.9), "grafting": "none", "precondition_frequency": 5}
    opt = Shampoo([param], start_preconditioning_step=10, **KL, **hyper)
    errors = []
    for step in range(300):
        opt.param_groups[0]["lr"] = 0.03 * (1 - step / 300)
        opt.zero_grad()
        off = left @ (param - target) @ right
        (torch.randn(32, 12) @ off @ torch.randn(8, 32)).square().mean().backward()
        opt.step()
        errors.append(off.detach().square().sum().item())
    assert errors[-1] < 3e-3 * errors[0]


def run(params: list[Parameter], opt: Shampoo, seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        apply(opt, params, [torch.randn(p.shape, generator=generator) for p in params])


def make(**hyper: Any) -> tuple[list[Parameter], Shampoo]:
    torch.manual_seed(0)
    params = random_params(*SHAPES, dtype=torch.float32)
    return params, Shampoo(params, **{**KL, **SMALL, "lr": 0.05, **hyper})


@pytest.mark.parametrize("schedule", ["together", "staggered"])
@pytest.mark.parametrize("steps", [1, 7])
def test_a_resumed_run_goes_on_to_the_bit(steps, schedule):
    hyper = {"refresh_schedule": schedule, "large_dim_method": "auto"}
    params, opt = make(**hyper)
    run(params, opt, range(steps))
    others, other = make(**hyper)
    with torch.no_grad():
        for param, source in zip(others, params, strict=True):
            param.copy_(source)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.param_groups[0]["preconditioner"] == "kl_shampoo"
    run(params, opt, range(steps, 15))
    run(others, other, range(steps, 15))
    assert_same_bits(snapshot(other), snapshot(opt))


@pytest.mark.parametrize(("ours", "theirs"), [("kl_shampoo", "shampoo"), ("shampoo", "kl_shampoo")])
def test_statistics_of_another_kind_are_refused(ours, theirs):
    params, opt = make(preconditioner=theirs)
    run(params, opt, range(2))
    others, other = make(preconditioner=ours)
    run(others, other, range(2))
    before = snapshot(other)
    words = f"preconditioner='{theirs}', this optimizer uses '{ours}'"
    with pytest.raises(BlockGridMismatchError, match=words):
        other.load_state_dict(opt.state_dict())
    assert_same_bits(snapshot(other), before)


@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"grafting": "none", "betas": (0.0, 0.9)},
        {"refresh_schedule": "staggered", "momentum": 0.5, "precondition_1d": True},
        {"large_dim_method": "diagonal", "preconditioner_dtype": torch.float64},
    ],
)
def test_state_bytes_are_what_is_held(hyper):
    params, opt = make(**hyper)
    run(params, opt, range(4))
    tensors = state_tensors(opt).values()
    held = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in tensors}
    [planned] = plan(SHAPES, 1, block_candidates=(), **{**KL, **SMALL, **hyper}).state_bytes
    assert planned == sum(held.values())


def test_a_plan_counts_the_products_that_whiten():
    shapes = {"a": (512, 512), "b": (256, 768)}
    ours, theirs = (
        plan(shapes, 2, block_candidates=(), preconditioner=kind)
        for kind in ("kl_shampoo", "shampoo")
    )
    assert ours.state_bytes == theirs.state_bytes
    assert sum(ours.compute_seconds) > sum(theirs.compute_seconds)


@pytest.mark.parametrize("name", ["kl", 3, None, "grafted"])
def test_a_kind_that_there_is_not_is_named(name):
    words = f"Invalid preconditioner={name!r}. Must be one of shampoo, kl_shampoo"
    with pytest.raises(ValueError, match=words):
        make(preconditioner=name)
    params, opt = make()
    run(params, opt, range(1))
    opt.param_groups[0]["preconditioner"] = name
    with pytest.raises(ValueError, match=words):
        opt.step()


@pytest.mark.parametrize(
    "hyper", [{"exponent": "paper"}, {"exponent": 4}, {"exponent_multiplier": 2.0}]
)
def test_other_powers_are_refused(hyper):
    with pytest.raises(ValueError, match=REFUSED):
        make(**hyper)
    with pytest.raises(ValueError, match=REFUSED):
        plan(SHAPES, 1, **KL, **hyper)
    make(preconditioner="shampoo", **hyper)


def test_groups_choose_apart():
    torch.manual_seed(0)
    params = random_params((4, 4), (4, 4), dtype=torch.float32)
    params[1].data.copy_(params[0])
    opt = Shampoo([{"params": params[:1], **KL}, {"params": params[1:]}], lr=0.1, **SMALL)
    alone = Parameter(params[0].detach().clone()), Parameter(params[0].detach().clone())
    others = [Shampoo([alone[0]], lr=0.1, **KL, **SMALL), Shampoo([alone[1]], lr=0.1, **SMALL)]
    for seed in range(8):
        grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        apply(opt, params, [grad, grad])
        for param, other in zip(alone, others, strict=True):
            apply(other, [param], [grad])
    assert torch.equal(params[0], alone[0])
    assert torch.equal(params[1], alone[1])
    assert not torch.equal(params[0], params[1])


@pytest.mark.parametrize("hyper", [{}, {"betas": (0.9, 1.0)}, {"large_dim_method": "diagonal"}])
@pytest.mark.parametrize("eps", [1e-12, 1e-38])
def test_gradients_of_any_size_leave_everything_finite(hyper, eps):
    """Roots of tiny gradients whiten huge ones: what they come to is clipped."""
    params, opt = make(eps=eps, relative_eps=1e-6, precondition_frequency=2, **hyper)
    generator = torch.Generator().manual_seed(1)
    for power in (-42, -20, 14, 0, 14, -30, 10, 30, 0):
        for _ in range(4):
            grads = [torch.randn(p.shape, generator=generator).double() for p in params]
            apply(opt, params, [(grad * 10.0**power).float() for grad in grads])
            for key, value in state_tensors(opt).items():
                assert value.isfinite().all(), (power, key)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"momentum": 0.9},
    "no graft": {"grafting": "none", "precondition_1d": True},
    "diagonal": {"large_dim_method": "diagonal"},
}


def digests_of(rank: int, layout: str, sharing: dict[str, Any]) -> dict[str, str]:
    """A job for ranks: parameters after training every case."""
    from layouts import LAYOUTS, Case, digest, train

    found = {}
    for name, hyper in CASES.items():
        case = Case("transformer", {**KL, **hyper}, frozen="up.bias")
        model = LAYOUTS[layout](case.build())
        train(case, model, 12, **sharing)
        found[name] = digest(model.parameters())
    return found


def test_ranks_end_with_the_bits_of_one_process(ranks: Ranks):
    [alone] = ranks.returns(digests_of, 1, "replicated", {})
    shared = {"num_trainers_per_group": 2}
    assert ranks.returns(digests_of, 2, "replicated", shared) == [alone] * 2
    assert ranks.returns(digests_of, 2, "fsdp2", {}) == [alone] * 2


def disagree(rank: int) -> str:
    """A job: ranks whose groups name different kinds."""
    params = [Parameter(torch.ones(4, 4)) for _ in range(3)]
    kind = ("shampoo", "kl_shampoo")[rank]
    opt = Shampoo(params, preconditioner=kind, num_trainers_per_group=2)
    for param in params:
        param.grad = torch.ones(4, 4)
    try:
        opt.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_ranks_that_chose_otherwise_are_told(ranks: Ranks):
    for found in ranks.returns(disagree, 2):
        assert found.startswith("PlanMismatchError")
        assert "preconditioner" in found
