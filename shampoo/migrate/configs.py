"""Configuration objects of ``distributed_shampoo``, read by name without the package.

An object stands for itself, or a dictionary for it that names its class under ``_target_``, as in
files of Hydra.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shampoo.errors import require

_FACTORS: dict[str, Any] = {
    "amortized_computation_config": None,  # None: the default of the class
    "drop_weighting_factor_on_gsquare": False,
    "factor_matrix_dtype": "float32",
    "num_tolerated_failed_amortized_computations": 3,
    "use_symmetric_packing": True,
    "use_trace_scaling": False,
    "trace_scaling_exponent": 0.5,
    "inverse_exponent_override": {},
}
_EIGH: dict[str, Any] = {
    "rank_deficient_stability_config": None,
    "tolerance": 0.0,
    "retry_double_precision": True,
    "eigendecomposition_offload_device": "",
}
_DDP: dict[str, Any] = {
    "target_parameter_dimensionality": 1,
    "communication_dtype": "float32",
    "num_trainers_per_group": -1,
    "communicate_params": False,
    "load_balancing_config": None,
}
_SHARDED: dict[str, Any] = {
    "target_parameter_dimensionality": 1,
    "param_assignment_strategy": "DEFAULT",
    "num_sub_groups": 1,
    "load_balancing_config": None,
}

# Every class with a counterpart here, and the value of each of its attributes where none is given.
CLASSES: dict[str, dict[str, Any]] = {
    "SGDPreconditionerConfig": {},
    "AdaGradPreconditionerConfig": {"epsilon": 1e-10},
    "RMSpropPreconditionerConfig": {
        "epsilon": 1e-10,
        "beta2": 0.99,
        "drop_weighting_factor_on_gsquare": False,
    },
    "AdamPreconditionerConfig": {
        "epsilon": 1e-10,
        "beta2": 0.999,
        "drop_weighting_factor_on_gsquare": False,
    },
    "RootInvShampooPreconditionerConfig": {**_FACTORS, "inv_factor_matrix_dtype": "float32"},
    "EigendecomposedShampooPreconditionerConfig": {
        **_FACTORS,
        "factor_matrix_eigenvectors_dtype": "float32",
        "factor_matrix_eigenvalues_dtype": "float32",
    },
    "EigenConfig": _EIGH,
    "EighEigendecompositionConfig": _EIGH,
    "CoupledNewtonConfig": {"max_iterations": 100, "tolerance": 1e-6},
    "PerturbationConfig": {"perturb_before_computation": True},
    "PseudoInverseConfig": {"rank_atol": 0.0, "rank_rtol": 0.0},
    "ClassicMomentumConfig": {"momentum": 0.5, "dampening": 0.0, "use_nesterov": False},
    "SingleDeviceDistributedConfig": {"target_parameter_dimensionality": 1},
    "DDPDistributedConfig": _DDP,
    "FullyShardDistributedConfig": _SHARDED,
    "HybridShardDistributedConfig": {**_SHARDED, **_DDP, "device_mesh": None},
}


@dataclass(frozen=True)
class Config:
    """One configuration: the argument that it stands in, the name of its class, its values."""

    where: str
    name: str
    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def require(self, valid: bool, name: str, bound: str) -> None:
        """Raises ValueError with the place of a value, the value, and what it must be."""
        require(valid, f"{self.where}.{name}", self.values[name], bound)

    def dtype(self, name: str) -> str:
        """The name of a dtype, such as ``"float32"``."""
        return str(self.values[name]).removeprefix("torch.")

    def inner(self, name: str, choices: Mapping[str, str], default: str) -> "Config":
        """The configuration in one of the values.

        Args:
            choices: as :func:`read_config` takes them.
            default: the class where there is none.
        """
        where = f"{self.where}.{name}"
        if self.values[name] is None:
            return Config(where, default, CLASSES[default])
        return read_config(where, self.values[name], choices)


def read_config(where: str, value: Any, choices: Mapping[str, str]) -> Config:
    """Reads a configuration.

    Args:
        where: the argument that it stands in.
        value: an object, or a dictionary with ``_target_``.
        choices: classes that may stand there, by name, and what is said of others: the remedy under
            their name, or under ``""``.

    Raises:
        ValueError: for another class, or a value that the class is not known to have.
    """
    if isinstance(value, Mapping):
        given = {str(name): each for name, each in value.items()}
        target = given.pop("_target_", None)
        given.pop("_partial_", None)
        bound = 'an object of distributed_shampoo, or a dictionary that has its class as "_target_"'
        require(isinstance(target, str), where, value, bound)
        name = str(target).rpartition(".")[2]
    else:
        name = type(value).__name__
        attributes = getattr(value, "__dict__", {})
        given = {key: each for key, each in attributes.items() if not key.startswith("_")}
    if name not in choices or choices[name]:
        known = ", ".join(each for each in choices if each and not choices[each])
        remedy = choices.get(name) or choices.get("", "")
        require(False, where, Named(name), f"one of {known}{': ' if remedy else ''}{remedy}")
    for unknown in given.keys() - CLASSES[name].keys():
        bound = f"left out: this version does not know it. {name} has {', '.join(CLASSES[name])}"
        require(False, f"{where}.{unknown}", given[unknown], bound)
    return Config(where, name, {**CLASSES[name], **given})


class Named:
    """Shows in a message as a name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name
