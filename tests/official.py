"""Stand-ins for the configuration objects of ``distributed_shampoo``, which need not be installed.

They have its names and its defaults, which is all that ``shampoo.migrate`` goes by; where the
package is there, ``tests/migrate/test_official_package.py`` compares both.
"""

import enum
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class PerturbationConfig:
    perturb_before_computation: bool = True


@dataclass
class PseudoInverseConfig:
    rank_atol: float = 0.0
    rank_rtol: float | None = 0.0


@dataclass
class EigenConfig:
    rank_deficient_stability_config: Any = field(default_factory=PerturbationConfig)
    tolerance: float = 0.0
    retry_double_precision: bool = True
    eigendecomposition_offload_device: str = ""


class EighEigendecompositionConfig(EigenConfig):
    pass


@dataclass
class QREigendecompositionConfig:
    max_iterations: int = 1


@dataclass
class CoupledNewtonConfig:
    max_iterations: int = 100
    tolerance: float = 1e-6


@dataclass
class CoupledHigherOrderConfig:
    rel_epsilon: float = 0.0
    abs_epsilon: float = 0.0


@dataclass
class RootInvShampooPreconditionerConfig:
    amortized_computation_config: Any = field(default_factory=EigenConfig)
    drop_weighting_factor_on_gsquare: bool = False
    factor_matrix_dtype: torch.dtype = torch.float32
    num_tolerated_failed_amortized_computations: int = 3
    use_symmetric_packing: bool = True
    use_trace_scaling: bool = False
    trace_scaling_exponent: float = 0.5
    inverse_exponent_override: dict[int, Any] = field(default_factory=dict)
    inv_factor_matrix_dtype: torch.dtype = torch.float32


class RootInvKLShampooPreconditionerConfig(RootInvShampooPreconditionerConfig):
    pass


@dataclass
class EigendecomposedShampooPreconditionerConfig:
    amortized_computation_config: Any = field(default_factory=EighEigendecompositionConfig)
    inverse_exponent_override: dict[int, Any] = field(default_factory=dict)


@dataclass
class EigenvalueCorrectedShampooPreconditionerConfig:
    pass


@dataclass
class SGDPreconditionerConfig:
    pass


@dataclass
class AdaGradPreconditionerConfig:
    epsilon: float = 1e-10


@dataclass
class RMSpropPreconditionerConfig:
    epsilon: float = 1e-10
    beta2: float = 0.99
    drop_weighting_factor_on_gsquare: bool = False


@dataclass
class AdamPreconditionerConfig:
    epsilon: float = 1e-10
    beta2: float = 0.999
    drop_weighting_factor_on_gsquare: bool = False


@dataclass
class ClassicMomentumConfig:
    momentum: float = 0.5
    dampening: float = 0.0
    use_nesterov: bool = False


@dataclass
class GeneralizedPrimalAveragingConfig:
    eval_interp_coeff: float = 0.9
    train_interp_coeff: float = 0.8


@dataclass
class ScheduleFreeConfig:
    train_interp_coeff: float = 0.8


class WeightDecayType(enum.Enum):
    L2 = "L2"
    DECOUPLED = "DECOUPLED"
    CORRECTED = "CORRECTED"
    INDEPENDENT = "INDEPENDENT"


class FSDPParamAssignmentStrategy(enum.Enum):
    DEFAULT = enum.auto()
    REPLICATE = enum.auto()
    ROUND_ROBIN = enum.auto()


@dataclass
class SingleDeviceDistributedConfig:
    target_parameter_dimensionality: float = 1


@dataclass
class DDPDistributedConfig:
    target_parameter_dimensionality: float = 1
    communication_dtype: torch.dtype = torch.float32
    num_trainers_per_group: int = -1
    communicate_params: bool = False
    load_balancing_config: Any = None


@dataclass
class FSDPDistributedConfig:
    param_to_metadata: Any = None


@dataclass
class FullyShardDistributedConfig:
    target_parameter_dimensionality: float = 1
    param_assignment_strategy: Any = FSDPParamAssignmentStrategy.DEFAULT
    num_sub_groups: int = 1
    load_balancing_config: Any = None
