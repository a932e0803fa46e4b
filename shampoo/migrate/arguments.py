"""Arguments of ``DistributedShampoo`` in the words of ``Shampoo``.

The two compute the same, step by step and up to rounding, where this module does not refuse: while
gradients are finite, every parameter of a group has one in every step, and the smallest eigenvalues
of the factors lie above their rounding or ``epsilon`` does.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from shampoo.errors import require
from shampoo.migrate.configs import CLASSES, Config, read_config

# Of the constructor. None stands for the configuration that its signature names.
_DEFAULTS: dict[str, Any] = {
    "lr": 1e-2,
    "betas": (0.9, 1.0),
    "beta3": -1.0,
    "epsilon": 1e-12,
    "weight_decay": 0.0,
    "weight_decay_type": "DECOUPLED",
    "max_preconditioner_dim": 1024,
    "precondition_frequency": 1,
    "start_preconditioning_step": -1,
    "use_bias_correction": True,
    "iterate_averaging_config": None,
    "grafting_config": None,
    "distributed_config": None,
    "preconditioner_config": None,
    "peak_lr": None,  # of a group; the constructor's lr
}
# How a step runs there, or what it is watched for: nothing of what it computes.
_WITHOUT_EFFECT = (
    "use_pin_memory",
    "shampoo_pt2_compile_config",
    "shampoo_runtime_config",
    "concurrency_config",
)
ARGUMENTS = _DEFAULTS.keys() | set(_WITHOUT_EFFECT)
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_WIRES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OF_A_GROUP = ("params", "param_names")
# Arguments that the package had before, and what it has in their place.
_FORMER = {
    "momentum": "iterate_averaging_config=ClassicMomentumConfig(momentum=...)",
    "dampening": "iterate_averaging_config=ClassicMomentumConfig(dampening=...)",
    "use_nesterov": "iterate_averaging_config=ClassicMomentumConfig(use_nesterov=...)",
    "use_decoupled_weight_decay": "weight_decay_type=WeightDecayType.DECOUPLED or .L2",
    "use_merge_dims": "distributed_config with a target_parameter_dimensionality",
    "inv_root_override": "preconditioner_config with an inverse_exponent_override",
    "exponent_multiplier": "preconditioner_config with an inverse_exponent_override",
    "num_trainers_per_group": "distributed_config=DDPDistributedConfig(...)",
    "communication_dtype": "distributed_config=DDPDistributedConfig(...)",
    "track_root_inv_residuals": "nothing: leave it out",
    "use_normalized_grafting": 'nothing: leave it out, and add grafting="..._normalized" to what is'
    " returned",
}

_AVERAGING = {
    "ClassicMomentumConfig": "",
    "GeneralizedPrimalAveragingConfig": "Shampoo does not average iterates; where it is used as"
    " momentum, ClassicMomentumConfig(momentum=eval_interp_coeff) with lr * (1 -"
    " eval_interp_coeff) is close to it",
    "ScheduleFreeConfig": "Shampoo does not average iterates; give None and a schedule of lr",
    "": "or None",
}
_GRAFTING = {
    "SGDPreconditionerConfig": "",
    "AdaGradPreconditionerConfig": "",
    "RMSpropPreconditionerConfig": "",
    "AdamPreconditionerConfig": "",
    "": "or None",
}
_KL = 'Shampoo has preconditioner="kl_shampoo", whose factors move otherwise: choose it by hand'
_PLAIN = "a group with precondition=False moves by its grafted method alone"
_PRECONDITIONERS = {
    "RootInvShampooPreconditionerConfig": "",
    "EigendecomposedShampooPreconditionerConfig": "",
    "EigenvalueCorrectedShampooPreconditionerConfig": "Shampoo has no eigenvalue correction (SOAP)",
    "RootInvKLShampooPreconditionerConfig": _KL,
    "EigendecomposedKLShampooPreconditionerConfig": _KL,
    **{name: _PLAIN for name in _GRAFTING if name},
    "": "Shampoo has no other direction",
}
_ROOTS = {
    "EigenConfig": "",
    "CoupledNewtonConfig": "",
    "CoupledHigherOrderConfig": 'root_method="minimax" or "auto" of Shampoo is as fast: give'
    " EigenConfig, and change root_method and relative_eps in what is returned",
}
_EIGENDECOMPOSITIONS = {
    "EighEigendecompositionConfig": "",
    "QREigendecompositionConfig": "Shampoo computes whole eigendecompositions",
}
_FLAT = "Shampoo does not take flat parameters (FSDP1): shard with fully_shard"
_DISTRIBUTED = {
    "SingleDeviceDistributedConfig": "",
    "DDPDistributedConfig": "",
    "FullyShardDistributedConfig": "",
    "HybridShardDistributedConfig": "",
    "FSDPDistributedConfig": _FLAT,
    "HSDPDistributedConfig": _FLAT,
}


def from_distributed_shampoo(**config: Any) -> dict[str, Any]:
    """Arguments with which :class:`shampoo.Shampoo` computes what ``DistributedShampoo`` does.

    ``Shampoo(params, **from_distributed_shampoo(lr=0.1, betas=(0.9, 0.999), ...))``. Parameter
    groups with values of their own are translated one by one, each with the constructor's values
    under its own: ``Shampoo([from_distributed_shampoo(**{**common, **group}) for group in
    groups])``.

    Args:
        **config: what ``distributed_shampoo.DistributedShampoo`` takes, but for the parameters; its
            defaults stand for what is not given. Configurations are objects of that package, or
            dictionaries that name a class under ``"_target_"``. With ``params`` it is a group:
            these are returned with it, and who shares the work is left out, which is an argument of
            the optimizer alone.

    Returns:
        Keyword arguments, or a parameter group. What only says how a step runs there
        (``use_pin_memory``, ``shampoo_pt2_compile_config``, ``load_balancing_config``, ...) has no
        place in them.

    Raises:
        ValueError: for what has no counterpart, naming the argument, its value and the remedy.
    """
    for name in config.keys() - ARGUMENTS - set(_OF_A_GROUP):
        now = f"given as {_FORMER[name]}" if name in _FORMER else "left out"
        require(False, name, config[name], f"{now}: it is no argument of DistributedShampoo")
    given = {**_DEFAULTS, **config}
    factors = _of(
        given, "preconditioner_config", "RootInvShampooPreconditionerConfig", _PRECONDITIONERS
    )
    sharing = _of(given, "distributed_config", "SingleDeviceDistributedConfig", _DISTRIBUTED)
    found = {
        "lr": given["lr"],
        **_averages(given),
        **_decay(given),
        **_momentum(given),
        **_grafting(given),
        **_blocks(given, sharing),
        **_schedule(given),
        **_factors(given, factors),
        **_roots(given, factors),
    }
    if "params" in given:
        return {**found, **{name: given[name] for name in _OF_A_GROUP if name in given}}
    return {**found, **_sharing(sharing)}


def _of(given: Mapping[str, Any], name: str, default: str, choices: Mapping[str, str]) -> Config:
    if given[name] is None:
        return Config(name, default, CLASSES[default])
    return read_config(name, given[name], choices)


def _averages(given: Mapping[str, Any]) -> dict[str, Any]:
    betas, beta3 = tuple(given["betas"]), given["beta3"]
    require(
        len(betas) == 2 and betas[1] > 0.0,
        "betas",
        given["betas"],
        "a pair with betas[1] > 0.0: without a memory, a factor is one gradient's",
    )
    require(
        beta3 in (-1.0, betas[0]),
        "beta3",
        beta3,
        "-1.0 or betas[0]; nesterov_average=True, which can be added to what is returned, looks"
        " ahead as beta3=betas[0]**2 does, but takes the length of the step from the average",
    )
    return {
        "betas": betas,
        "nesterov_average": False,
        "bias_correction": given["use_bias_correction"],
    }


def _decay(given: Mapping[str, Any]) -> dict[str, Any]:
    decay = given["weight_decay"]
    kind = str(getattr(given["weight_decay_type"], "name", given["weight_decay_type"]))
    if decay != 0.0 and kind == "INDEPENDENT":
        peak = given["lr"] if given["peak_lr"] is None else given["peak_lr"]
        require(peak > 0.0, "lr", peak, "> 0.0 with WeightDecayType.INDEPENDENT")
        decay = decay / peak
    else:
        require(
            decay == 0.0 or kind in ("L2", "DECOUPLED"),
            "weight_decay_type",
            given["weight_decay_type"],
            "L2, DECOUPLED or INDEPENDENT; what CORRECTED does is DECOUPLED while lr does not"
            " change, and else weight_decay * lr / peak_lr, set by the schedule of lr",
        )
    return {"weight_decay": decay, "decoupled_weight_decay": kind != "L2"}


def _momentum(given: Mapping[str, Any]) -> dict[str, Any]:
    name = "iterate_averaging_config"
    if given[name] is None:
        return {"momentum": 0.0, "nesterov": False}
    config = read_config(name, given[name], _AVERAGING)
    config.require(
        config["dampening"] == 0.0,
        "dampening",
        "0.0; lr * (1 - dampening) in its place is the same step",
    )
    return {"momentum": config["momentum"], "nesterov": config["use_nesterov"]}


def _grafting(given: Mapping[str, Any]) -> dict[str, Any]:
    if given["grafting_config"] is None:
        return {"grafting": "none"}
    config = read_config("grafting_config", given["grafting_config"], _GRAFTING)
    method = config.name.removesuffix("PreconditionerConfig").lower()
    found = {"grafting": method}
    if "epsilon" in config.values:
        found["grafting_eps"] = config["epsilon"]
    if "beta2" in config.values:
        _check_weight(config)
        bound = "> 0.0 and < 1.0; what adds up for ever is AdaGradPreconditionerConfig"
        config.require(0.0 < config["beta2"] < 1.0, "beta2", bound)
        found["grafting_beta2"] = config["beta2"]
    return found


def _check_weight(config: Config) -> None:
    config.require(
        not config["drop_weighting_factor_on_gsquare"],
        "drop_weighting_factor_on_gsquare",
        "False; what it does is a second moment 1 / (1 - beta2) times as large and no bias"
        " correction",
    )


def _blocks(given: Mapping[str, Any], sharing: Config) -> dict[str, Any]:
    longest, dims = given["max_preconditioner_dim"], sharing["target_parameter_dimensionality"]
    sharing.require(
        dims in (1, 2),
        "target_parameter_dimensionality",
        '1 or 2; math.inf keeps dimensions of size 1, and is merge_dims="none", added to what is'
        " returned, for parameters that have none",
    )
    return {
        "max_preconditioner_dim": 1 << 53 if longest == math.inf else longest,
        "merge_dims": "full" if dims == 1 else "matrix",
        "precondition_1d": True,
        "large_dim_method": "blocking",
    }


def _schedule(given: Mapping[str, Any]) -> dict[str, Any]:
    start, frequency = given["start_preconditioning_step"], given["precondition_frequency"]
    require(
        start == -1 or start >= frequency,
        "start_preconditioning_step",
        start,
        f"-1 or >= precondition_frequency={frequency}, as in DistributedShampoo; an earlier one can"
        " be set in what is returned",
    )
    return {"precondition_frequency": frequency, "start_preconditioning_step": start}


def _factors(given: Mapping[str, Any], config: Config) -> dict[str, Any]:
    _check_weight(config)
    config.require(
        not config["use_trace_scaling"],
        "use_trace_scaling",
        "False: with a graft, what scales a factor does not change the step, apart from epsilon",
    )
    dtype = config.dtype("factor_matrix_dtype")
    names = [name for name in config.values if name.endswith("_dtype")]
    for name in names:
        config.require(
            config.dtype(name) == dtype and dtype in ("float32", "float64"),
            name,
            f"torch.float32 or torch.float64, the same for {' and '.join(names)}",
        )
    return {
        "preconditioner": "shampoo",
        "preconditioner_dtype": _DTYPES[dtype],
        "exponent": _exponent(config),
    }


def _exponent(config: Config) -> str | list[float]:
    """The roots by order, 0 for those that are twice the order, as they all are by default."""
    name = "inverse_exponent_override"
    overrides: Mapping[int, Any] = config[name]
    powers: list[float] = [0.0] * max((int(order) for order in overrides), default=0)
    for order, value in overrides.items():
        if not order:
            continue
        usual = 1.0 / (2.0 * order)
        is_by_mode = isinstance(value, Mapping)
        exponents = {value.get(k, usual) for k in range(order)} if is_by_mode else {value}
        exponent = exponents.pop()
        config.require(
            not exponents and exponent > 0.0,
            name,
            "above 0, and the same for all dimensions of an order: Shampoo raises all factors of a"
            " block to one power",
        )
        power = 1.0 / exponent
        is_whole = math.isclose(power, round(power), rel_tol=1e-12)
        powers[order - 1] = float(round(power)) if is_whole else power
    return powers if any(powers) else "paper"


def _roots(given: Mapping[str, Any], factors: Config) -> dict[str, Any]:
    is_cached = factors.name.startswith("RootInv")
    default = "EigenConfig" if is_cached else "EighEigendecompositionConfig"
    choices = _ROOTS if is_cached else _EIGENDECOMPOSITIONS
    config = factors.inner("amortized_computation_config", choices, default)
    found = {"eps": given["epsilon"], "relative_eps": 0.0}
    if config.name == "CoupledNewtonConfig":
        for name, value in CLASSES[config.name].items():
            bound = f"{value}: Shampoo's iteration ends where nothing is to be gained"
            config.require(config[name] == value, name, bound)
        return {**found, "root_method": "coupled_newton"}
    bound = "0.0: Shampoo computes whole eigendecompositions"
    config.require(config["tolerance"] == 0.0, "tolerance", bound)
    stability = config.inner(
        "rank_deficient_stability_config",
        {"PerturbationConfig": "", "PseudoInverseConfig": ""},
        "PerturbationConfig",
    )
    if stability.name == "PseudoInverseConfig":
        require(given["epsilon"] == 0.0, "epsilon", given["epsilon"], "0.0 with a pseudo-inverse")
        bound = "None: Shampoo's pseudo-inverse cuts at the size times the machine epsilon"
        stability.require(stability["rank_rtol"] is None, "rank_rtol", bound)
        stability.require(stability["rank_atol"] == 0.0, "rank_atol", "0.0, with rank_rtol=None")
    return {**found, "root_method": "eigh"}


def _sharing(config: Config) -> dict[str, Any]:
    if "Shard" in config.name:
        strategy = config["param_assignment_strategy"]
        config.require(
            str(getattr(strategy, "name", strategy)) in ("REPLICATE", "ROUND_ROBIN"),
            "param_assignment_strategy",
            "REPLICATE or ROUND_ROBIN: Shampoo cuts blocks of whole parameters, as these do, and"
            " DEFAULT blocks of the shards that there are; with one of them named the run is"
            " another one, and starts anew",
        )
    if config.name == "SingleDeviceDistributedConfig":
        return {"num_trainers_per_group": 1}
    found: dict[str, Any] = {}
    if "communication_dtype" in config.values:
        dtype = config.dtype("communication_dtype")
        bound = f"one of {', '.join(f'torch.{each}' for each in _WIRES)}"
        config.require(dtype in _WIRES, "communication_dtype", bound)
        config.require(
            not config["communicate_params"] or dtype == "float32",
            "communicate_params",
            "False where communication_dtype is narrow: Shampoo sends directions, which rounding"
            " does not hurt as much",
        )
        found["communication_dtype"] = _WIRES[dtype]
    if config.name == "DDPDistributedConfig":
        found["num_trainers_per_group"] = config["num_trainers_per_group"]
    return found
