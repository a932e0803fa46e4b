"""p = 2, the default for blocks of every order: what it means, and that its fast path is taken."""

import pytest
import torch
from torch.nn import Parameter
from trajectory import apply, double_shampoo

from shampoo import Shampoo, ops
from shampoo.ops import supports
from shampoo.roots import solver
from shampoo.roots.minimax_table import tabulated_powers

SHAPES = {1: (6,), 2: (6, 4), 3: (4, 5, 3)}
FULL = {"merge_dims": "none", "precondition_1d": True, "large_dim_method": "blocking"}


@pytest.mark.parametrize("order", SHAPES)
def test_the_square_of_a_root_inverts_the_factor(order):
    """In float64, by products alone: X A X = I and X = X^T > 0, for every order by default."""
    param = Parameter(torch.zeros(SHAPES[order], dtype=torch.float64))
    hyper = {"eps": 1e-2, "relative_eps": 0.0, "precondition_frequency": 1, "betas": (0.9, 0.95)}
    optimizer = double_shampoo([param], **hyper, **FULL)
    for _ in range(4):
        apply(optimizer, [param], [torch.randn(SHAPES[order], dtype=torch.float64)])
    state, corrected = optimizer.state[param], 1 - 0.95**4
    for mode, side in enumerate(SHAPES[order]):
        identity = torch.eye(side, dtype=torch.float64)
        A = state[f"block0.factor{mode}"] / corrected + 1e-2 * identity
        X = state[f"block0.root{mode}"]
        torch.testing.assert_close(X @ A @ X, identity, rtol=0, atol=1e-10)
        assert X.equal(X.T)
        assert torch.linalg.eigvalsh(X).min() > 0


@pytest.mark.parametrize("order", SHAPES)
@pytest.mark.parametrize("exponent", [None, "covariance", 2, 2.0])
def test_float32_takes_the_fast_path(order, exponent, monkeypatch):
    powers, fast = [], ops.minimax_root_

    def counted(root, ridge, factor, p, *rest):
        powers.append(p)
        return fast(root, ridge, factor, p, *rest)

    monkeypatch.setattr(ops, "minimax_root_", counted)
    monkeypatch.setattr(solver, "eigh_root_", None)
    param = Parameter(torch.zeros(SHAPES[order]))
    named = {} if exponent is None else {"exponent": exponent}
    optimizer = Shampoo([param], precondition_frequency=1, **FULL, **named)
    apply(optimizer, [param], [torch.randn(SHAPES[order])])
    assert powers
    assert set(powers) == {2}


def test_it_has_a_schedule_and_the_fused_kernels_take_it():
    assert 2 in tabulated_powers()
    root = torch.empty(1, 64, 64)
    schedule = [1.0] * 35
    assert supports.minimax_small_root(root, torch.empty(1), root, 2, 0.0, 0.0, schedule)
    assert not supports.minimax_small_root(root, torch.empty(1), root, 1, 0.0, 0.0, schedule)


@pytest.mark.parametrize("exponent", [1.5, [0, 2.5]])
def test_fractions_go_by_eigenvalues(exponent, monkeypatch):
    monkeypatch.setattr(ops, "minimax_root_", None)
    param = Parameter(torch.zeros(6, 4))
    optimizer = Shampoo([param], precondition_frequency=1, exponent=exponent, **FULL)
    apply(optimizer, [param], [torch.randn(6, 4)])
    assert optimizer.state[param]["block0.root0"].any()
