"""Every argument has its range, and an error that says what was wrong: K1."""

import inspect
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from shampoo import Shampoo


def one() -> list[Parameter]:
    return [Parameter(torch.randn(3, 2))]


# argument, bad value, what the message shows beside the name and the value
BAD = [
    ("lr", -1.0, "0"),
    ("lr", math.nan, "0"),
    ("lr", math.inf, "0"),
    ("betas", (-0.1, 0.9), "0"),
    ("betas", (1.0, 0.9), "1"),
    ("betas", (0.9, 0.0), "0"),
    ("betas", (0.9, 1.1), "1"),
    ("betas", (0.9, math.nan), "1"),
    ("eps", -1e-8, "0"),
    ("eps", math.nan, "0"),
    ("relative_eps", -1e-6, "0"),
    ("relative_eps", math.nan, "0"),
    ("weight_decay", -0.1, "0"),
    ("weight_decay", math.nan, "0"),
    ("weight_decay", math.inf, "0"),
    ("momentum", -0.1, "0"),
    ("momentum", 1.0, "1"),
    ("momentum", math.nan, "1"),
    ("max_preconditioner_dim", 0, "1"),
    ("max_preconditioner_dim", -3, "1"),
    ("precondition_frequency", 0, "1"),
    ("precondition_frequency", -1, "1"),
    ("start_preconditioning_step", -2, "1"),
    ("start_preconditioning_step", 0, ">= 1"),
    ("start_preconditioning_step", math.nan, "precondition_frequency"),
    ("start_preconditioning_step", -math.inf, "math.inf"),
    ("merge_dims", "all", "matrix"),
    ("max_preconditioner_dim", "large", "auto"),
    ("exponent", -1, "0"),
    ("exponent", 0, "paper"),
    ("exponent", [2, -1], "0"),
    ("exponent", math.nan, "0"),
    ("exponent", math.inf, "1048576"),
    ("exponent", "both", "covariance"),
    ("exponent", None, "covariance"),
    ("exponent", True, "covariance"),
    ("exponent_multiplier", 0.0, "0"),
    ("exponent_multiplier", -1.0, "0"),
    ("grafting", "adamw", "adam_normalized"),
    ("grafting_beta2", 0.0, "0"),
    ("grafting_beta2", 1.5, "1"),
    ("grafting_beta2", math.nan, "1"),
    ("grafting_eps", math.nan, "0"),
    ("exponent_multiplier", math.nan, "0"),
    ("grafting_eps", 0.0, "0"),
    ("grafting_eps", -1e-8, "0"),
    ("large_dim_method", "skip", "blocking"),
    ("root_method", "newton", "coupled_newton"),
    ("preconditioner_dtype", torch.float16, "float64"),
    ("preconditioner_dtype", torch.bfloat16, "float32"),
    ("nonfinite", "ignore", "raise"),
]


def shown(value: Any) -> str:
    """How a message may show the value: the part of a tuple or list that is wrong, or all of it."""
    if isinstance(value, (tuple, list)):
        bad = [x for x in value if not 0 < x < 1 and x != 2]
        return str(bad[0])
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize(("name", "value", "bound"), BAD)
@pytest.mark.parametrize("where", ["constructor", "group", "add_param_group"])
def test_k1_a_value_out_of_range_is_refused(name, value, bound, where):
    with pytest.raises(ValueError, match=name.removesuffix("s")) as caught:  # noqa: PT012
        if where == "constructor":
            Shampoo(one(), **{name: value})
        elif where == "group":
            Shampoo([{"params": one(), name: value}])
        else:
            Shampoo(one()).add_param_group({"params": one(), name: value})
    message = str(caught.value)
    for part in (name.removeprefix("betas") or "beta", shown(value), bound):
        assert part in message, f"{part!r} is not in {message!r}"


# The bound that a message names, of arguments that take numbers.
BEYOND = {
    **dict.fromkeys(("lr", "eps", "weight_decay", "relative_eps", "momentum"), "1.8e+308"),
    **dict.fromkeys(("exponent_multiplier", "grafting_beta2", "grafting_eps"), "1.8e+308"),
    **dict.fromkeys(("max_preconditioner_dim", "precondition_frequency"), ">= 1 and <= "),
    **dict.fromkeys(("start_preconditioning_step", "max_root_failures"), "<= 9007199254740992"),
    "exponent": "<= 1048576",
}


@pytest.mark.parametrize("digits", [400, 6000])  # Python does not print the second at all
@pytest.mark.parametrize(("name", "bound"), BEYOND.items())
def test_k1_an_integer_beyond_the_range_of_floats_is_refused(name, bound, digits):
    with pytest.raises(ValueError, match=f"Invalid {name}=1e{digits} or so. Must be") as caught:
        Shampoo(one(), **{name: 10**digits})
    assert bound in str(caught.value)
    opt = Shampoo(one())
    opt.param_groups[0]["params"][0].grad = torch.ones_like(opt.param_groups[0]["params"][0])
    opt.param_groups[0][name] = 10**digits
    with pytest.raises(ValueError, match=f"Invalid {name}=1e{digits}"):
        opt.step()
    assert not opt.state, "the step was refused before anything was made"


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ({"betas": (10**400, 0.9)}, r"betas\[0\]=1e400"),
        ({"betas": (0.9, 10**400)}, r"betas\[1\]=1e400"),
        ({"lr": -(10**400)}, "lr=-1e400"),
        ({"exponent": [2, 10**400]}, r"exponent=\[2, 1e400"),
        ({"num_trainers_per_group": -(10**6000)}, "num_trainers_per_group=-1e6000"),
        ({"check_replicas_every": -(10**6000)}, "check_replicas_every=-1e6000"),
    ],
)
def test_k1_a_long_integer_inside_a_value_is_refused(argument, shown):
    with pytest.raises(ValueError, match=f"Invalid {shown} or so"):
        Shampoo(one(), **argument)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_preconditioner_dim", 2.5),
        ("precondition_frequency", 1.5),
        ("exponent", torch.tensor(2)),
        ("exponent", ["paper"]),
        ("start_preconditioning_step", 12.5),
        ("betas", 0.9),
        ("betas", (0.9, 0.99, 0.999)),
        ("betas", (0.9,)),
    ],
)
def test_k1_a_value_of_the_wrong_kind_is_refused(name, value):
    with pytest.raises((ValueError, TypeError), match="(?i)" + name.removesuffix("s")):
        Shampoo(one(), **{name: value})


@pytest.mark.parametrize(
    "hyper",
    [
        {"root_method": "coupled_newton", "exponent_multiplier": 1.5},
        {"root_method": "minimax", "exponent_multiplier": 0.5},
        {"root_method": "coupled_newton", "exponent": 1.5},
        {"root_method": "minimax", "exponent": [2, 2.5]},
        {"root_method": "coupled_newton", "eps": 0.0, "relative_eps": 0.0},
        {"root_method": "minimax", "eps": 0.0, "relative_eps": 0.0},
    ],
)
def test_k1_a_pair_that_no_solver_takes_is_refused_at_once(hyper):
    with pytest.raises(ValueError, match="root_method") as caught:
        Shampoo(one(), **hyper)
    assert "eigh" in str(caught.value), "the remedy is the method that can"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0),
        ("lr", torch.tensor(0.1)),
        ("betas", (0.0, 1.0)),
        ("eps", 1.0),
        ("relative_eps", 0.0),
        ("weight_decay", 0.0),
        ("momentum", 0.99),
        ("max_preconditioner_dim", 1),
        ("precondition_frequency", 1),
        ("start_preconditioning_step", -1),
        ("start_preconditioning_step", 1),
        ("start_preconditioning_step", 9),
        ("start_preconditioning_step", 10),
        ("start_preconditioning_step", math.inf),
        ("merge_dims", "none"),
        ("max_preconditioner_dim", "auto"),
        ("exponent", "paper"),
        ("exponent", 1 << 20),
        ("exponent", 1.5),
        ("exponent", [0, 2.5, 0]),
        ("exponent", []),
        ("exponent_multiplier", 0.1),
        ("grafting_beta2", 1.0),
        ("preconditioner_dtype", torch.float64),
        ("nonfinite", "raise"),
        *[("foreach", value) for value in (None, True, False)],
        *[("fused", value) for value in (None, True, False)],
        ("maximize", True),
        ("root_method", "minimax"),
    ],
)
def test_k1_the_edges_of_the_ranges_are_accepted(name, value):
    params = one()
    for opt in (Shampoo(params, **{name: value}), Shampoo([{"params": params, name: value}])):
        params[0].grad = torch.randn(3, 2)
        opt.step()
        assert params[0].isfinite().all()


def test_k1_the_signature_is_the_documented_one():
    """Names and defaults that recipes rely on; the first four may be given by position."""
    opt = Shampoo(one(), 0.1, (0.8, 0.9), 1e-6, 0.3)
    group = opt.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.9), 1e-6)
    assert group["weight_decay"] == 0.3
    with pytest.raises(TypeError):
        Shampoo(one(), 0.1, (0.8, 0.9), 1e-6, 0.3, 1e-6)
    defaults = Shampoo(one()).defaults
    expected = {
        **{"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-12, "weight_decay": 0.0},
        **{"relative_eps": 1e-6, "decoupled_weight_decay": True, "momentum": 0.0},
        **{"nesterov": False, "max_preconditioner_dim": "auto", "precondition_frequency": 10},
        **{"start_preconditioning_step": 1, "merge_dims": "matrix", "precondition_1d": False},
        **{"precondition": True, "exponent": "covariance", "exponent_multiplier": 1.0},
        **{"bias_correction": True, "grafting": "adam", "grafting_beta2": None},
        **{"grafting_eps": 1e-8, "large_dim_method": "auto", "root_method": "auto"},
        **{"maximize": False, "foreach": None, "fused": None, "preconditioner": "shampoo"},
    }
    for name, value in expected.items():
        assert defaults[name] == value, name


def test_k1_a_learning_rate_tensor_has_one_element():
    with pytest.raises(ValueError, match="lr"):
        Shampoo(one(), lr=torch.tensor([0.1, 0.2]))


def test_k1_nesterov_without_momentum_warns_and_is_ignored():
    ours, theirs = one(), one()
    theirs[0].data.copy_(ours[0].data)
    with pytest.warns(UserWarning, match="nesterov"):
        opt = Shampoo(ours, nesterov=True)
    twin = Shampoo(theirs)
    ours[0].grad = torch.randn(3, 2)
    theirs[0].grad = ours[0].grad.clone()
    opt.step()
    twin.step()
    assert torch.equal(ours[0], theirs[0])


def test_k1_what_is_not_available_says_so():
    with pytest.raises(RuntimeError, match=r"(?s)differentiable.*autograd"):
        Shampoo(one(), differentiable=True)
    with pytest.raises(RuntimeError, match="differentiable"):
        Shampoo([{"params": one(), "differentiable": True}])


def test_k1_an_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match="learning_rate"):
        Shampoo(one(), learning_rate=0.1)


def test_k1_no_parameters_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        Shampoo([])


def test_train_and_eval_are_not_taken():
    """Trainers call them when they are there."""
    opt = Shampoo(one())
    assert not hasattr(opt, "train")
    assert not hasattr(opt, "eval")


def deep(levels: int = 5000):
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


class Loud:
    def __repr__(self) -> str:
        return "\x1b[2J" * 10_000


STRANGE = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "1e400": 10**400,
    "-1e6000": -(10**6000),
    "fraction": Fraction(10**400),
    "complex": 1j,
    "word": "\x1b[2J",
    "long word": "x" * 100_000,
    "bytes": b"\x00",
    "None": None,
    "list": [],
    "long list": [1e400] * 100_000,
    "deep list": deep(),
    "dict": {"\x1b[2J": 1},
    "object": Loud(),
    "tensor": torch.tensor([1.0, 2.0]),
    "tensor of nan": torch.tensor(math.nan),
    "empty tensor": torch.tensor([]),
    "complex tensor": torch.tensor(1j),
    "meta tensor": torch.ones((), device="meta"),
    "array": np.array(["a", "b"]),
    "array of nan": np.array(math.nan),
    "int64": np.int64(2**62),
    "bool": np.bool_(True),
}
NAMES = [
    name
    for name in inspect.signature(Shampoo).parameters
    if name not in ("params", "process_group")
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STRANGE)
def test_k1_a_value_of_any_type_and_size_is_taken_or_refused_by_name(kind):
    for name in NAMES:
        values = [STRANGE[kind]] + [(STRANGE[kind], 0.9), (0.9, STRANGE[kind])] * (name == "betas")
        for value in values:
            try:
                Shampoo(one(), **{name: value})
            except (ValueError, RuntimeError) as error:
                said = str(error)
                assert f"Invalid {name}" in said, (name, said)
                assert "Must be" in said, (name, said)
                assert said.isprintable(), (name, said)
                assert len(said) < 2000, name
