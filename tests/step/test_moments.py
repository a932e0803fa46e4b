"""Moments, decay and momentum: algorithm.md section 8, groups B and D."""

import itertools

import pytest
import torch
from reference_shampoo import inverse_root
from torch import Tensor
from torch.nn import Parameter
from trajectory import apply, assert_relative, compare, directions, double_shampoo, random_grads

from shampoo import Shampoo
from shampoo.ops import jit


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def factors_over(history: list[Tensor], **hyper: object) -> list[tuple[Tensor, Tensor]]:
    """Both factors of one matrix after every step."""
    param = Parameter(torch.zeros_like(history[0]))
    opt = double_shampoo([param], lr=0.0, **hyper)
    found = []
    for G in history:
        apply(opt, [param], [G])
        state = opt.state[param]
        found.append((state["block0.factor0"].clone(), state["block0.factor1"].clone()))
    return found


def test_b1_without_decay_factors_are_plain_sums():
    history = [randn(3, 5) for _ in range(6)]
    for t, (L, R) in enumerate(factors_over(history, betas=(0.9, 1.0)), start=1):
        assert_relative(L, sum(G @ G.T for G in history[:t]), 1e-13)
        assert_relative(R, sum(G.T @ G for G in history[:t]), 1e-13)


def test_b2_with_decay_factors_are_weighted_sums():
    history = [randn(3, 5) for _ in range(6)]
    beta = 0.8
    for t, (L, R) in enumerate(factors_over(history, betas=(0.9, beta)), start=1):
        weights = [(1 - beta) * beta ** (t - s) for s in range(1, t + 1)]
        seen = list(zip(weights, history, strict=False))
        assert_relative(L, sum(w * G @ G.T for w, G in seen), 1e-13)
        assert_relative(R, sum(w * G.T @ G for w, G in seen), 1e-13)


def test_b2_a_constant_gradient_gives_a_constant_corrected_factor():
    G, beta = randn(3, 5), 0.9
    for t, (L, R) in enumerate(factors_over([G] * 8, betas=(0.0, beta)), start=1):
        assert_relative(L / (1 - beta**t), G @ G.T, 1e-12)
        assert_relative(R / (1 - beta**t), G.T @ G, 1e-12)


def test_b3_factors_take_the_raw_gradient_not_the_filtered_one():
    G, beta2 = randn(3, 5), 0.9
    history = [G if t % 2 == 0 else -G for t in range(20)]
    param = Parameter(torch.zeros_like(G))
    opt = double_shampoo([param], lr=0.0, betas=(0.95, beta2))
    for t, grad in enumerate(history, start=1):
        apply(opt, [param], [grad])
        L = opt.state[param]["block0.factor0"] / (1 - beta2**t)
        assert_relative(L, G @ G.T, 1e-12)
    assert opt.state[param]["block0.exp_avg"].norm() < 0.05 * G.norm()


@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_b4_the_first_moment_is_a_corrected_average(shape):
    beta1 = 0.7
    history = [randn(*shape) for _ in range(6)]
    found = directions(
        history,
        betas=(beta1, 0.9),
        grafting="sgd",
        start_preconditioning_step=float("inf"),
    )
    for t, P in enumerate(found, start=1):
        weights = [(1 - beta1) * beta1 ** (t - s) for s in range(1, t + 1)]
        average = sum(w * G for w, G in zip(weights, history, strict=False))
        assert_relative(P, average / (1 - beta1**t), 1e-12)


def test_b4_the_filtered_gradient_is_what_is_preconditioned():
    beta1, eps = 0.7, 1e-4
    history = [randn(3, 4) for _ in range(6)]
    found = directions(
        history,
        betas=(beta1, 1.0),
        eps=eps,
        relative_eps=0.0,
        grafting="none",
        precondition_frequency=1,
    )
    M1 = torch.zeros(3, 4, dtype=torch.float64)
    for t, P in enumerate(found, start=1):
        M1 = beta1 * M1 + (1 - beta1) * history[t - 1]
        XL = inverse_root(sum(G @ G.T for G in history[:t]), -0.5, eps, 0.0)
        XR = inverse_root(sum(G.T @ G for G in history[:t]), -0.5, eps, 0.0)
        assert_relative(P, XL @ (M1 / (1 - beta1**t)) @ XR)


def test_b5_without_bias_correction_moment_and_factors_are_raw():
    beta1, beta2, eps = 0.7, 0.9, 1e-3
    history = [randn(3, 4) for _ in range(4)]
    found = directions(
        history,
        betas=(beta1, beta2),
        eps=eps,
        relative_eps=0.0,
        grafting="none",
        precondition_frequency=1,
        bias_correction=False,
    )
    M1, L, R = torch.zeros(3, 4).double(), torch.zeros(3, 3).double(), torch.zeros(4, 4).double()
    for G, P in zip(history, found, strict=True):
        M1 = beta1 * M1 + (1 - beta1) * G
        L = beta2 * L + (1 - beta2) * G @ G.T
        R = beta2 * R + (1 - beta2) * G.T @ G
        XL, XR = inverse_root(L, -0.5, eps, 0.0), inverse_root(R, -0.5, eps, 0.0)
        assert_relative(P, XL @ M1 @ XR)


def test_b5_the_graft_keeps_its_own_correction():
    beta1, beta2 = 0.7, 0.9
    history = [randn(3, 4) for _ in range(4)]
    found = directions(
        history,
        betas=(beta1, beta2),
        grafting="adam",
        grafting_eps=1e-3,
        bias_correction=False,
        start_preconditioning_step=float("inf"),
    )
    M1, v = torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
    for t, (G, P) in enumerate(zip(history, found, strict=True), start=1):
        M1 = beta1 * M1 + (1 - beta1) * G
        v = beta2 * v + (1 - beta2) * G**2
        assert_relative(P, M1 / ((v / (1 - beta2**t)).sqrt() + 1e-3), 1e-12)


def test_b5_the_adagrad_row_is_corrected_like_a_factor():
    """The diagonal formula of unpreconditioned tensors without a graft: v/c2, with beta2."""
    for bias_correction in (True, False):
        found = directions(
            [torch.full((4,), 2.0, dtype=torch.float64)] * 3,
            betas=(0.0, 0.9),
            eps=0.5,
            grafting="none",
            bias_correction=bias_correction,
        )
        for t, P in enumerate(found, start=1):
            v = 4.0 * (1 - 0.9**t) / (1 - 0.9**t if bias_correction else 1.0)
            expected = torch.full((4,), 2.0 / (v**0.5 + 0.5), dtype=torch.float64)
            assert_relative(P, expected, 1e-12)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_b6_the_ridge_is_added_after_the_correction(bias_correction):
    beta2, eps = 0.9, 5.0
    history = [randn(3, 4) for _ in range(3)]
    param = Parameter(torch.zeros(3, 4, dtype=torch.float64))
    opt = double_shampoo(
        [param],
        betas=(0.0, beta2),
        eps=eps,
        precondition_frequency=1,
        bias_correction=bias_correction,
    )
    for t, G in enumerate(history, start=1):
        apply(opt, [param], [G])
        c2 = 1 - beta2**t if bias_correction else 1.0
        state = opt.state[param]
        for mode in range(2):
            A = state[f"block0.factor{mode}"] / c2
            expected = inverse_root(A, -0.5, eps, 0.0)
            assert_relative(state[f"block0.root{mode}"], expected)


def test_b6_the_ridge_is_the_larger_of_absolute_and_relative():
    history = [randn(3, 4) for _ in range(2)]
    for relative_eps, eps in [(0.1, 1e-12), (0.1, 1e3), (1e-6, 1e-12)]:
        param = Parameter(torch.zeros(3, 4, dtype=torch.float64))
        opt = double_shampoo(
            [param],
            betas=(0.0, 1.0),
            eps=eps,
            relative_eps=relative_eps,
            precondition_frequency=1,
        )
        for G in history:
            apply(opt, [param], [G])
        A = opt.state[param]["block0.factor0"]
        schatten = (A @ A).norm().sqrt().item()  # ||A^2||_F^(1/2), not through eigenvalues
        expected = inverse_root(A, -0.5, max(eps, relative_eps * schatten), 0.0)
        assert_relative(opt.state[param]["block0.root0"], expected)


def decay_only(**hyper: object) -> tuple[Parameter, object, list[Tensor]]:
    """A parameter whose loss gradient is zero beside one that keeps the steps from being inert."""
    param, other = Parameter(randn(3, 4)), Parameter(randn(2))
    opt = double_shampoo([param, other], precondition_frequency=1, weight_decay=0.3, **hyper)
    seen = [param.detach().clone()]
    for _ in range(4):
        apply(opt, [param, other], [torch.zeros_like(param), randn(2)])
        seen.append(param.detach().clone())
    return param, opt, seen


def test_b7_coupled_decay_enters_the_factors():
    param, opt, seen = decay_only(lr=0.1, decoupled_weight_decay=False, betas=(0.0, 1.0))
    L = sum((0.3 * W) @ (0.3 * W).T for W in seen[:-1])
    assert_relative(opt.state[param]["block0.factor0"], L, 1e-12)


def test_b7_decoupled_decay_shrinks_the_weights_exactly():
    param, opt, seen = decay_only(lr=0.1, decoupled_weight_decay=True)
    for before, after in itertools.pairwise(seen):
        assert_relative(after, (1 - 0.1 * 0.3) * before, 4e-16)
    assert not opt.state[param]["block0.factor0"].any()


@pytest.mark.parametrize("nesterov", [True, False])
def test_b7_with_momentum_decoupled_decay_flows_through_the_buffer(nesterov):
    param, opt, seen = decay_only(lr=0.1, momentum=0.9, nesterov=nesterov)
    M, W = torch.zeros(3, 4).double(), seen[0]
    for after in seen[1:]:
        P = 0.3 * W
        M = 0.9 * M + P
        W = W - 0.1 * (P + 0.9 * M if nesterov else M)
        assert_relative(after, W, 1e-14)
    assert_relative(opt.state[param]["block0.momentum"], M, 1e-14)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.95), (0.9, 1.0)])
def test_b7_every_mixture_follows_the_reference(decoupled, momentum, bias_correction, betas):
    compare(
        [(5, 3), (4,)],
        7,
        lr=0.1,
        betas=betas,
        weight_decay=0.2,
        decoupled_weight_decay=decoupled,
        momentum=momentum,
        nesterov=momentum > 0,
        bias_correction=bias_correction,
        precondition_frequency=2,
        max_preconditioner_dim=3,
    )


@pytest.mark.parametrize("grafting", ["none", "adam"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_d1_momentum_sums_directions(grafting, nesterov):
    mu, lr = 0.8, 0.1
    history = [randn(4, 3) for _ in range(6)]
    hyper = {"grafting": grafting, "precondition_frequency": 2}
    P = directions(history, **hyper)
    param = Parameter(torch.zeros(4, 3, dtype=torch.float64))
    opt = double_shampoo([param], lr=lr, momentum=mu, nesterov=nesterov, **hyper)
    W = torch.zeros(4, 3, dtype=torch.float64)
    for t in range(1, 7):
        M = sum(mu ** (t - s) * P[s - 1] for s in range(1, t + 1))
        W = W - lr * (P[t - 1] + mu * M if nesterov else M)
        apply(opt, [param], [history[t - 1]])
        assert_relative(param, W, 1e-12)
        assert_relative(opt.state[param]["block0.momentum"], M, 1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
def test_d2_momentum_is_primal_averaging(nesterov):
    """z <- z - lr/(1-mu) P, x <- mu x + (1-mu) z: a loss whose gradient depends on the weights."""
    mu, lr = 0.9, 0.02
    A, target = randn(4, 4), randn(4, 3)
    # A ridge under which the first roots, of one gradient each, do not enlarge what is rounded.
    hyper = {"precondition_frequency": 3, "max_preconditioner_dim": 3, "relative_eps": 1e-2}

    def gradient(W: Tensor) -> Tensor:
        return A.T @ (A @ W - target)

    W = Parameter(randn(4, 3))
    z = x = y = W.detach().clone()
    opt = double_shampoo([W], lr=lr, momentum=mu, nesterov=nesterov, **hyper)
    probe = Parameter(torch.zeros(4, 3, dtype=torch.float64))  # moves by -P at lr = 1
    oracle = double_shampoo([probe], lr=1.0, **hyper)
    for _ in range(30):
        apply(opt, [W], [gradient(W.detach())])
        with torch.no_grad():
            probe.zero_()
        apply(oracle, [probe], [gradient(y if nesterov else x)])
        z = z + lr / (1 - mu) * probe.detach()
        x = mu * x + (1 - mu) * z
        y = mu * x + (1 - mu) * z
        assert_relative(W, y if nesterov else x, 1e-12)


def test_d2_is_not_vacuous():
    """The history that the identities run on has directions of different length."""
    lengths = [P.norm().item() for P in directions([g[0] for g in random_grads([randn(4, 3)], 3)])]
    assert max(lengths) > 1.01 * min(lengths)


@pytest.mark.parametrize("maximize", [False, True])
def test_coupled_decay_is_rounded_once(maximize):
    if not jit.compiler_version():
        pytest.skip("no C++ compiler: the reference rounds twice")
    param = Parameter(torch.randn(300, 200))
    param.grad = torch.randn(300, 200)
    grad, weight = -param.grad if maximize else param.grad, param.detach().clone()
    decayed = grad.double() + torch.tensor(0.1).double() * weight.double()
    hyper = {"betas": (0.0, 0.99), "grafting": "sgd", "precondition": False, "maximize": maximize}
    opt = Shampoo([param], lr=1.0, weight_decay=0.1, decoupled_weight_decay=False, **hyper)
    opt.step()
    assert torch.equal(param.detach(), weight - decayed.float())
