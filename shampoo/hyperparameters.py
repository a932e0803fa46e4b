"""The hyper-parameters of one parameter group: read, and checked."""

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

from shampoo.blocks.blocking import MERGE_MODES
from shampoo.blocks.declared import choices as preconditioners
from shampoo.blocks.layout import DTYPES, LARGE_DIM_METHODS, Geometry, is_auto, settle_dim
from shampoo.errors import require, shown, warn_outside
from shampoo.grafting import GRAFTING, SecondMoment, weight_of
from shampoo.ops import Number
from shampoo.roots.methods import MOST_POWER, ROOT_METHODS
from shampoo.roots.minimax_table import smallest_relative_eps, tabulated_powers

NONFINITE = ("skip", "raise")
REFRESH_SCHEDULES = ("together", "staggered")
MOST_STEPS = 1 << 53  # up to which a float, as which steps are counted, holds every integer

EXPONENTS = ("covariance", "paper")  # by name: p is 2, or twice the order

# Of what a root must not be older than, as a part of the steps that a factor remembers, which are
# 1 / (1 - beta2). Above one half, roots are of another factor than the one they are used beside.
_OLDEST_ROOT = 0.5


def dtype_name(dtype: Any) -> Any:
    """``torch.float32 -> "float32"``: groups hold JSON-like values, so that they load safely."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def settle(group: dict[str, Any]) -> dict[str, Any]:
    """Puts into a group what is saved of it, a dtype's name, a number for "auto"; returns it."""
    group["preconditioner_dtype"] = dtype_name(group["preconditioner_dtype"])
    settle_dim(group)
    return group


def _number(group: dict[str, Any], name: str) -> float:
    value = group[name]
    if isinstance(value, torch.Tensor):
        _check_tensor(name, value)
        return float(value)
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    require(is_number, name, value, "a number")
    try:
        return float(value)
    except OverflowError:
        require(False, name, value, "a number that a float holds, at most 1.8e+308 in magnitude")
        raise


def _check_tensor(name: str, value: torch.Tensor) -> None:
    is_fit = value.numel() == 1 and not (value.is_complex() or value.is_meta)
    require(is_fit, name, value, 'a number or a tensor of one element, real and not on "meta"')


def _live_number(value: Any, name: str, capturable: bool) -> Number:
    """A number that may move while a graph is replayed: as a tensor, it is never read here."""
    if not (capturable and isinstance(value, torch.Tensor)):
        return _number({name: value}, name)
    is_fit = value.numel() == 1 and not value.is_complex()
    require(is_fit, name, value, "a real number or a tensor of one element")
    return value.detach().reshape(()).double()


def _betas(group: dict[str, Any]) -> tuple[Number, Number]:
    betas = group["betas"]
    is_pair = isinstance(betas, Sequence) and not isinstance(betas, str) and len(betas) == 2
    require(is_pair, "betas", betas, "a pair (beta1, beta2)")
    beta1, beta2 = (
        _live_number(beta, f"betas[{i}]", group["capturable"]) for i, beta in enumerate(betas)
    )
    if not isinstance(beta1, torch.Tensor):
        require(0.0 <= beta1 < 1.0, "betas[0]", beta1, ">= 0.0 and < 1.0")
    if not isinstance(beta2, torch.Tensor):
        require(0.0 < beta2 <= 1.0, "betas[1]", beta2, "> 0.0 and <= 1.0")
    return beta1, beta2


@dataclass(frozen=True)
class Hyperparameters:
    """One group's values, in the words of algorithm.md 1.2.

    Plain numbers, but for tensors that a group with ``capturable=True`` holds.
    """

    geometry: Geometry
    lr: Number
    beta1: Number
    beta2: Number
    eps: float
    relative_eps: float
    weight_decay: float
    decoupled_weight_decay: bool
    momentum: float
    nesterov: bool
    nesterov_average: bool
    precondition_frequency: int
    start_preconditioning_step: float  # resolved: -1 has become precondition_frequency
    exponent: str | float | Sequence[float]
    exponent_multiplier: float
    bias_correction: bool
    grafting_beta2: Number
    grafting_eps: float
    root_method: str
    nonfinite: str
    max_root_failures: int | None
    maximize: bool
    stochastic_rounding: bool

    @classmethod
    def read(cls, group: dict[str, Any]) -> "Hyperparameters":
        """Reads a parameter group.

        Raises:
            ValueError: naming the first bad value, its bound and, where there is one, the remedy.
            RuntimeError: for ``differentiable=True``.
        """
        _check_flags(group)
        _check_choices(group)
        beta1, beta2 = _betas(group)
        plain_sum = GRAFTING[group["grafting"]].plain_sum
        graft_default = group["grafting_beta2"] is None
        grafting_beta2 = beta2 if graft_default else _number(group, "grafting_beta2")
        values = cls(
            geometry=Geometry.of(group),
            lr=_live_number(group["lr"], "lr", group["capturable"]),
            beta1=beta1,
            beta2=beta2,
            eps=_number(group, "eps"),
            relative_eps=_number(group, "relative_eps"),
            weight_decay=_number(group, "weight_decay"),
            decoupled_weight_decay=group["decoupled_weight_decay"],
            momentum=_number(group, "momentum"),
            nesterov=group["nesterov"],
            nesterov_average=group["nesterov_average"],
            precondition_frequency=group["precondition_frequency"],
            start_preconditioning_step=_start(group),
            exponent=group["exponent"],
            exponent_multiplier=_number(group, "exponent_multiplier"),
            bias_correction=group["bias_correction"],
            grafting_beta2=1.0 if plain_sum else grafting_beta2,
            grafting_eps=_number(group, "grafting_eps"),
            root_method=_root_method(group),
            nonfinite=group["nonfinite"],
            max_root_failures=group["max_root_failures"],
            maximize=group["maximize"],
            stochastic_rounding=group["stochastic_rounding"],
        )
        values._check()
        return values

    def _check(self) -> None:
        finite = math.isfinite
        _check_lr(self.lr)
        require(finite(self.eps) and self.eps >= 0.0, "eps", self.eps, ">= 0.0 and finite")
        require(
            finite(self.relative_eps) and self.relative_eps >= 0.0,
            "relative_eps",
            self.relative_eps,
            ">= 0.0 and finite",
        )
        pseudo = self.eps == 0.0 and self.relative_eps == 0.0
        require(
            self.eps > 0.0 or (pseudo and self.root_method in ("auto", "eigh")),
            "eps",
            self.eps,
            "> 0.0 (0.0 asks for the pseudo-inverse, which needs relative_eps=0.0 and"
            ' root_method="eigh" or "auto")',
        )
        require(
            finite(self.weight_decay) and self.weight_decay >= 0.0,
            "weight_decay",
            self.weight_decay,
            ">= 0.0 and finite",
        )
        require(0.0 <= self.momentum < 1.0, "momentum", self.momentum, ">= 0.0 and < 1.0")
        require(
            finite(self.exponent_multiplier) and self.exponent_multiplier > 0.0,
            "exponent_multiplier",
            self.exponent_multiplier,
            "> 0.0 and finite",
        )
        require(
            self.exponent_multiplier == 1.0 or self.root_method in ("auto", "eigh"),
            "root_method",
            self.root_method,
            f'"eigh" or "auto" when exponent_multiplier={self.exponent_multiplier} is not 1.0:'
            " an iteration needs an integer root",
        )
        require(
            _is_integer(self.exponent) or not self.geometry.capturable,
            "exponent",
            self.exponent,
            "a name or an integer when capturable=True: other exponents need"
            ' root_method="eigh", which waits for the device',
        )
        require(
            _is_integer(self.exponent) or self.root_method in ("auto", "eigh"),
            "root_method",
            self.root_method,
            f'"eigh" or "auto" when exponent={shown(self.exponent)} is not an integer: an iteration'
            " needs an integer root",
        )
        if not isinstance(self.grafting_beta2, torch.Tensor):
            require(
                0.0 < self.grafting_beta2 <= 1.0,
                "grafting_beta2",
                self.grafting_beta2,
                "> 0.0 and <= 1.0, or None for betas[1]",
            )
        require(
            finite(self.grafting_eps) and self.grafting_eps > 0.0,
            "grafting_eps",
            self.grafting_eps,
            "> 0.0 and finite",
        )

    def root_power(self, order: int) -> float:
        """p such that every factor of a block of this order is raised to ``-1/p`` (2.2)."""
        exponent = self.exponent
        if isinstance(exponent, Sequence) and not isinstance(exponent, str):
            exponent = (exponent[order - 1] if order <= len(exponent) else 0) or "paper"
        if isinstance(exponent, str):
            exponent = 2 if exponent == "covariance" else 2 * order
        return exponent / self.exponent_multiplier

    @property
    def roots_outlive_factors(self) -> bool:
        """Whether roots are used that are older than what the factors remember."""
        is_used = self.geometry.precondition and self.start_preconditioning_step < math.inf
        if isinstance(self.beta2, torch.Tensor) or not is_used:
            return False
        forgotten = self.precondition_frequency * (1.0 - self.beta2)
        is_rounding = math.isclose(forgotten, _OLDEST_ROOT, rel_tol=1e-6)  # of 0.95 in float32
        return forgotten > _OLDEST_ROOT and not is_rounding

    @functools.cached_property
    def coupled_decay(self) -> float:
        """The weight decay that joins the gradient."""
        return 0.0 if self.decoupled_weight_decay else self.weight_decay

    @functools.cached_property
    def decoupled_decay(self) -> float:
        """The decoupled weight decay, 0 if it is coupled."""
        return self.weight_decay if self.decoupled_weight_decay else 0.0

    @functools.cached_property
    def is_staggered(self) -> bool:
        """Whether refreshes are spread over the steps of a period."""
        return self.geometry.refresh_schedule == "staggered"

    def due_phase(self, step: int) -> int | None:
        """The phase whose roots are refreshed at ``step``, None at an ordinary step.

        Together, all factors are in phase 0 (1.5); staggered, phase r has its first root at
        ``start_preconditioning_step + r`` and then one every ``precondition_frequency`` steps.
        """
        start, frequency = self.start_preconditioning_step, self.precondition_frequency
        if step < start:
            return None
        if self.is_staggered:
            return int(step - start) % frequency
        return 0 if step in self.early_refreshes or step % frequency == 0 else None

    @functools.cached_property
    def early_refreshes(self) -> tuple[int, ...]:
        """The first steps that refresh all roots, the start and what doubles it, ascending.

        Up to the first multiple of ``precondition_frequency``, from which on these count: so no
        root is older than half of the steps that there have been. Empty where each root has its own
        step, and where none is ever taken.
        """
        if self.is_staggered or self.start_preconditioning_step == math.inf:
            return ()
        early = [int(self.start_preconditioning_step)]
        while 2 * early[-1] < self.precondition_frequency:
            early.append(2 * early[-1])
        return tuple(early)

    @functools.cached_property
    def has_exp_avg(self) -> bool:
        """Whether the gradient is averaged: a beta1 on the device may become anything."""
        return isinstance(self.beta1, torch.Tensor) or self.beta1 > 0.0

    @functools.cached_property
    def factor_weight(self) -> Number:
        """What a new gradient weighs in a factor: ``1 - beta2``, or 1 in a plain sum."""
        return weight_of(self.beta2)

    @functools.cached_property
    def grafting_moment(self) -> SecondMoment:
        """How the grafted method's accumulator moves (2.1), uncorrected."""
        kind = GRAFTING[self.geometry.grafting]
        beta, eps = self.grafting_beta2, self.grafting_eps
        return SecondMoment(beta, weight_of(beta), 1.0, eps, kind.normalized, kind.bias_corrected)

    @functools.cached_property
    def diagonal_moment(self) -> SecondMoment:
        """The same for tensors that use the "adagrad" row of 3.3: beta2, its correction, eps."""
        beta = self.beta2
        return SecondMoment(
            beta, weight_of(beta), 1.0, self.eps, normalized=False, corrected=self.bias_correction
        )

    def with_lr(self, lr: Any) -> "Hyperparameters":
        """The same with another learning rate, a number.

        Raises:
            ValueError: if it is negative or not finite.
        """
        values = copy.copy(self)  # what is derived does not depend on it, and is kept
        object.__setattr__(values, "lr", _number({"lr": lr}, "lr"))
        _check_lr(values.lr)
        return values


def _check_lr(lr: Number) -> None:
    if not isinstance(lr, torch.Tensor):
        require(math.isfinite(lr) and lr >= 0.0, "lr", lr, ">= 0.0 and finite")


def _check_flags(group: dict[str, Any]) -> None:
    for name in (
        "decoupled_weight_decay",
        "nesterov",
        "nesterov_average",
        "precondition_1d",
        "precondition",
        "bias_correction",
        "maximize",
        "stochastic_rounding",
        "capturable",
        "differentiable",
    ):
        require(isinstance(group[name], bool), name, group[name], "True or False")
    for name in ("foreach", "fused"):
        is_choice = group[name] is None or isinstance(group[name], bool)
        require(is_choice, name, group[name], "None, True or False")
    if group["differentiable"]:
        raise RuntimeError(
            "Shampoo does not support differentiable=True: roots are computed without autograd."
            " Pass differentiable=False."
        )
    if group["capturable"]:
        _check_capturable(group)


def _check_capturable(group: dict[str, Any]) -> None:
    """Refuses what would make a captured step wait for the device."""
    why = "when capturable=True: "
    nonfinite = group["nonfinite"]
    require(
        nonfinite == "skip", "nonfinite", nonfinite, f'"skip" {why}the host cannot see a gradient'
    )
    most = group["max_root_failures"]
    require(most is None, "max_root_failures", most, f"None {why}the host cannot see a root")
    method = group["root_method"]
    require(
        method != "eigh",
        "root_method",
        method,
        f'"auto", "minimax" or "coupled_newton" {why}eigh waits for the device',
    )
    multiplier = group["exponent_multiplier"]
    require(
        multiplier == 1.0,
        "exponent_multiplier",
        multiplier,
        f'1.0 {why}other exponents need root_method="eigh", which waits for the device',
    )
    if method == "auto":
        dtype = group["preconditioner_dtype"]
        require(
            dtype == "float32",
            "preconditioner_dtype",
            dtype,
            f'"float32" {why}for float64, root_method="auto" is "eigh", which waits for the'
            ' device; "minimax" roots are no more accurate in float64 than in float32, 3e-6 to'
            " 3e-3 relative",
        )
        relative_eps = _number(group, "relative_eps")
        smallest = max(map(smallest_relative_eps, tabulated_powers()))
        require(
            relative_eps >= smallest,
            "relative_eps",
            relative_eps,
            f'>= {smallest} {why}below it, root_method="auto" is "eigh", which waits for the'
            ' device; "minimax" roots would saturate',
        )


def _root_method(group: dict[str, Any]) -> str:
    """What ``"auto"`` may stand for depends on the device alone, unless the step is captured."""
    method: str = group["root_method"]
    return "minimax" if group["capturable"] and method == "auto" else method


def _check_choices(group: dict[str, Any]) -> None:
    for name, choices in (
        ("preconditioner", preconditioners()),
        ("grafting", tuple(GRAFTING)),
        ("merge_dims", MERGE_MODES),
        ("large_dim_method", LARGE_DIM_METHODS),
        ("root_method", ROOT_METHODS),
        ("nonfinite", NONFINITE),
        ("refresh_schedule", REFRESH_SCHEDULES),
        ("preconditioner_dtype", tuple(DTYPES)),
    ):
        is_choice = isinstance(group[name], str) and group[name] in choices
        require(is_choice, name, group[name], f"one of {', '.join(choices)}")
    for name, other in (("max_preconditioner_dim", ', or "auto"'), ("precondition_frequency", "")):
        value = group[name]
        is_count = isinstance(value, Integral) and not isinstance(value, bool)
        is_count = is_count and 1 <= int(value) <= MOST_STEPS
        is_count |= bool(other) and is_auto(value)
        require(is_count, name, value, f"an integer >= 1 and <= {MOST_STEPS}{other}")
    most = group["max_root_failures"]
    is_bound = isinstance(most, int) and not isinstance(most, bool) and 0 <= most <= MOST_STEPS
    require(
        most is None or is_bound,
        "max_root_failures",
        most,
        f"None or an integer >= 0 and <= {MOST_STEPS}",
    )
    _check_exponent(group)


def _check_exponent(group: dict[str, Any]) -> None:
    bound = (
        f'"covariance" (p = 2), "paper" (p = 2 * order), a number > 0 and <= {MOST_POWER}, or a'
        " list of such numbers by order, 0 for the paper's"
    )
    if "exponent_override" in group:
        value = shown(group["exponent_override"])
        raise ValueError(
            f"Invalid exponent_override={value}. Must be given as exponent: {bound}; what"
            ' exponent_override=0 was is exponent="paper".'
        )
    exponent = group["exponent"]
    if isinstance(exponent, (list, tuple)):
        is_exponent = all(_is_real(power) and 0 <= power <= MOST_POWER for power in exponent)
    elif isinstance(exponent, str):
        is_exponent = exponent in EXPONENTS
    else:
        is_exponent = _is_real(exponent) and 0 < exponent <= MOST_POWER
    require(is_exponent, "exponent", exponent, bound)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(exponent: str | float | Sequence[float]) -> bool:
    """Whether p is an integer for blocks of every order."""
    if isinstance(exponent, str):
        return True
    powers = exponent if isinstance(exponent, Sequence) else [exponent]
    return all(power % 1 == 0 for power in powers)


def _start(group: dict[str, Any]) -> float:
    start, frequency = group["start_preconditioning_step"], group["precondition_frequency"]
    is_number = isinstance(start, Real) and not isinstance(start, bool)
    if is_number and start == -1:
        return float(frequency)
    is_step = is_number and (start == math.inf or (start <= MOST_STEPS and start % 1 == 0))
    require(
        is_step and start >= 1,
        "start_preconditioning_step",
        start,
        f"-1 (means precondition_frequency), math.inf, or an integer >= 1 and <= {MOST_STEPS}",
    )
    return float(start)


def warn_about(group: dict[str, Any]) -> None:
    """Says once, when a group is made, what has no effect, at the line outside that made it."""
    if group["nesterov"] and _number(group, "momentum") == 0.0:
        warn_outside("nesterov=True has no effect with momentum=0.0.")


def warn_of_old_roots(values: Hyperparameters) -> None:
    """Says what stale roots do, at the line outside that asked for them."""
    frequency, beta2 = values.precondition_frequency, float(values.beta2)
    most = max(1, int(_OLDEST_ROOT / (1.0 - beta2) + 1e-9))
    least = math.ceil(1e4 * (1.0 - _OLDEST_ROOT / frequency)) / 1e4
    warn_outside(
        f"shampoo: precondition_frequency={frequency} uses a root for more than half of the"
        f" {1.0 / (1.0 - beta2):.3g} steps that a factor remembers with betas[1]={beta2}: stale"
        f" roots learn worse. Choose precondition_frequency <= {most}, or betas[1] >= {least}."
    )
