"""Programs that a user might write, generated: weights, arguments, and what is done between steps.

All of it is plain values, so that a program that fails is printed as it can be pasted. Indices are
taken modulo what is there when the operation runs.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from shampoo.blocks.layout import LARGE_DIM_METHODS
from shampoo.hyperparameters import REFRESH_SCHEDULES

SHAPES = [
    *((), (1,), (7,), (0,), (1, 1, 1)),
    *((3, 4), (4, 4), (6, 5), (1, 5), (5, 1), (0, 3)),
    *((2, 33), (40, 2), (2, 3, 2), (4, 3, 2, 2)),
]
DTYPES = ["float32", "float32", "float64", "bfloat16", "float16"]
LAYOUTS = ["plain", "plain", "transposed", "offset", "channels_last"]
GRAFTINGS = (
    *("none", "sgd", "adagrad", "rmsprop", "adam"),
    *("adagrad_normalized", "rmsprop_normalized", "adam_normalized", "lars", "lamb"),
)


@dataclass(frozen=True)
class Weight:
    """A parameter: normal numbers, drawn by seed, times ten to a power."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "plain"
    seed: int = 0
    power: int = 0


@dataclass(frozen=True)
class Slope:
    """A gradient: None, zero, not finite, or normal numbers times ten to a power."""

    kind: str = "normal"  # "none", "zero", "nan", "inf", "normal"
    power: int = 0
    layout: str = "plain"  # or "expanded": one number for all


@dataclass(frozen=True)
class Op:
    """One thing a user does; the machine has a method of that name."""

    name: str
    args: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"Op({self.name!r}, {self.args!r})"


@dataclass(frozen=True)
class Program:
    """Weights, arguments of the constructor, and what follows."""

    weights: list[Weight]
    hyper: dict[str, Any] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)


weights = st.builds(
    Weight,
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.integers(0, 3),
    st.sampled_from([0, 0, 0, 0, -30, 4, 19, 30]),
)
ordinary = st.sampled_from([0, 0, 0, -3, 3])
extreme = st.sampled_from([-42, -38, -30, -20, -8, 6, 10, 15, 18, 19, 25, 30])
slopes = st.one_of(
    st.builds(Slope, st.just("normal"), ordinary, st.sampled_from([*LAYOUTS, "expanded"])),
    st.builds(Slope, st.sampled_from(["normal", "normal", "none", "zero"]), ordinary),
    st.builds(Slope, st.just("normal"), extreme),
    st.builds(Slope, st.sampled_from(["none", "none", "zero", "nan", "inf"])),
)

# Values that every group may take at any time, and those that none may, with words of the error.
LIVE: dict[str, list[Any]] = {
    "lr": [0.0, 1e-3, 0.1],
    "betas": [(0.9, 0.99), (0.0, 0.99), (0.9, 1.0), (0.5, 0.5)],
    "eps": [1e-12, 1e-30, 1e-3],
    "relative_eps": [1e-6, 1e-2],
    "weight_decay": [0.0, 0.1],
    "decoupled_weight_decay": [True, False],
    "momentum": [0.0, 0.9],
    "nesterov": [True, False],
    "precondition_frequency": [1, 2, 3, 7],
    "bias_correction": [True, False],
    "grafting_beta2": [None, 0.9, 1.0],
    "grafting_eps": [1e-8, 1e-3, 1e-30],
    "maximize": [True, False],
    "exponent": ["covariance", "paper", 3, [0, 4, 0, 0]],
}
BAD: list[tuple[str, Any]] = [
    *(("lr", -1.0), ("lr", math.nan), ("lr", "fast"), ("betas", (1.0, 0.9)), ("betas", 0.9)),
    *(("eps", -1.0), ("relative_eps", math.inf), ("weight_decay", -0.1), ("momentum", 1.0)),
    *(("nesterov", 1), ("precondition_frequency", 0), ("grafting", "adamax")),
    *(("eps", None), ("grafting_eps", 0.0), ("root_method", "svd")),
    *(("max_preconditioner_dim", 0), ("nonfinite", "ignore"), ("exponent", -1)),
    *(("merge_dims", "all"), ("maximize", None), ("start_preconditioning_step", -7)),
]
GEOMETRY: list[tuple[str, Any]] = [
    *(("max_preconditioner_dim", 2), ("max_preconditioner_dim", 5), ("merge_dims", "full")),
    *(("precondition_1d", True), ("large_dim_method", "diagonal")),
    ("refresh_schedule", "staggered"),
    *(("grafting", name) for name in ("sgd", "rmsprop", "lars")),
    ("capturable", True),
]
arguments = st.fixed_dictionaries(
    {"lr": st.sampled_from([0.1, 0.01])},
    optional={
        **{name: st.sampled_from(values) for name, values in LIVE.items() if name != "lr"},
        "grafting": st.sampled_from(GRAFTINGS),
        "max_preconditioner_dim": st.sampled_from([2, 3, 5, 1024]),
        "large_dim_method": st.sampled_from(LARGE_DIM_METHODS),
        "merge_dims": st.sampled_from(["matrix", "full", "none"]),
        "precondition_1d": st.booleans(),
        "precondition": st.sampled_from([True, True, False]),
        "refresh_schedule": st.sampled_from(REFRESH_SCHEDULES),
        "preconditioner_dtype": st.sampled_from(["float32", "float64"]),
        "root_method": st.sampled_from(["auto", "eigh", "minimax", "coupled_newton"]),
        "nonfinite": st.sampled_from(["skip", "raise"]),
        "exponent_multiplier": st.sampled_from([1.0, 1.0, 1.5]),
        "stochastic_rounding": st.booleans(),
        "capturable": st.booleans(),
        "start_preconditioning_step": st.sampled_from([-1, 2, 4, math.inf]),
    },
)
some = st.integers(0, 5)  # an index of a parameter
steps = st.builds(
    lambda seed, kinds: Op("step", (seed, kinds)),
    st.integers(0, 99),
    st.lists(slopes, min_size=1, max_size=4).map(tuple),
)
edits = st.one_of(
    st.sampled_from(sorted(LIVE)).flatmap(
        lambda name: st.sampled_from(LIVE[name]).map(lambda value: Op("set", (name, value)))
    ),
    st.sampled_from(BAD).map(lambda bad: Op("bad_value", bad)),
    st.sampled_from(GEOMETRY).map(lambda pair: Op("geometry", pair)),
    st.builds(
        lambda i, how: Op("bad_gradient", (i, how)),
        some,
        st.sampled_from(["longer", "turned", "sparse"]),
    ),
    st.builds(lambda i: Op("freeze", (i,)), some),
    st.builds(lambda i: Op("unfreeze", (i,)), some),
    st.builds(lambda weight: Op("join", (weight,)), weights),
    st.sampled_from(["again", "lr", "shared", "leaf", "twice"]).map(
        lambda how: Op("bad_join", (how,))
    ),
    st.sampled_from(["deepcopy", "pickle", "load", "file"]).map(lambda how: Op("twin", (how,))),
    st.just(Op("reload")),
    st.sampled_from(["values", "dtype", "inner", "outer"]).map(lambda how: Op("replace", (how,))),
    st.builds(lambda i: Op("clear", (i,)), some),
    st.sampled_from(["clear", "assign"]).map(lambda how: Op("clear_all", (how,))),
    st.builds(lambda i: Op("foreign_entry", (i,)), some),
    st.builds(
        lambda i, how: Op("bad_state", (i, how)), some, st.sampled_from(["longer", "int32", "word"])
    ),
    st.booleans().map(lambda to_none: Op("zero_grad", (to_none,))),
    st.just(Op("again")),
)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Programs whose constructor seldom refuses, and which step more often than anything else."""
    hyper = draw(arguments)
    if hyper.get("capturable"):
        for name in ("nonfinite", "exponent_multiplier", "preconditioner_dtype", "relative_eps"):
            hyper.pop(name, None)
    if hyper.get("capturable") or hyper.get("exponent_multiplier", 1.0) != 1.0:
        hyper.pop("root_method", None)
    if not isinstance(hyper.get("exponent", ""), str):
        hyper.pop("exponent_multiplier", None)
    ops = draw(st.lists(st.one_of(steps, steps, edits), min_size=3, max_size=12))
    return Program(draw(st.lists(weights, min_size=1, max_size=4)), hyper, ops)
