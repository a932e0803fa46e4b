"""Arguments of DistributedShampoo, translated: what comes out, and what is refused by name."""

import math

import official
import pytest
import torch
from torch.nn import Parameter

from shampoo import Shampoo
from shampoo.migrate import from_distributed_shampoo

DEFAULTS = {
    **{"lr": 1e-2, "betas": (0.9, 1.0), "nesterov_average": False, "bias_correction": True},
    **{"weight_decay": 0.0, "decoupled_weight_decay": True, "momentum": 0.0, "nesterov": False},
    **{"grafting": "none", "max_preconditioner_dim": 1024, "merge_dims": "full"},
    **{"precondition_1d": True, "large_dim_method": "blocking", "precondition_frequency": 1},
    **{"start_preconditioning_step": -1, "preconditioner": "shampoo"},
    **{"preconditioner_dtype": torch.float32, "exponent": "paper"},
    **{"eps": 1e-12, "relative_eps": 0.0, "root_method": "eigh", "num_trainers_per_group": 1},
}


def test_what_is_not_given_is_what_it_is_there():
    assert from_distributed_shampoo() == DEFAULTS


def root_inv(**values):
    return {"preconditioner_config": official.RootInvShampooPreconditionerConfig(**values)}


def roots(config, **values):
    return root_inv(amortized_computation_config=config) | values


PSEUDO = official.PseudoInverseConfig(rank_rtol=None)
TRANSLATED = [
    ({"lr": 0.5, "betas": (0.5, 0.75)}, {"lr": 0.5, "betas": (0.5, 0.75)}),
    ({"beta3": 0.9}, {}),
    ({"use_bias_correction": False}, {"bias_correction": False}),
    ({"epsilon": 1e-5}, {"eps": 1e-5}),
    ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
    (
        {"weight_decay": 0.1, "weight_decay_type": official.WeightDecayType.L2},
        {"weight_decay": 0.1, "decoupled_weight_decay": False},
    ),
    (
        {"weight_decay": 0.1, "weight_decay_type": official.WeightDecayType.INDEPENDENT, "lr": 0.5},
        {"weight_decay": 0.2, "lr": 0.5},
    ),
    (
        {"weight_decay": 0.1, "weight_decay_type": "INDEPENDENT", "lr": 0.5, "peak_lr": 1.0},
        {"weight_decay": 0.1, "lr": 0.5},
    ),
    ({"weight_decay_type": official.WeightDecayType.CORRECTED}, {}),  # of nothing
    ({"max_preconditioner_dim": 7}, {"max_preconditioner_dim": 7}),
    ({"max_preconditioner_dim": math.inf}, {"max_preconditioner_dim": 1 << 53}),
    (
        {"precondition_frequency": 3, "start_preconditioning_step": 5},
        {"precondition_frequency": 3, "start_preconditioning_step": 5},
    ),
    (
        {"iterate_averaging_config": official.ClassicMomentumConfig(use_nesterov=True)},
        {"momentum": 0.5, "nesterov": True},
    ),
    ({"grafting_config": official.SGDPreconditionerConfig()}, {"grafting": "sgd"}),
    (
        {"grafting_config": official.AdaGradPreconditionerConfig(1e-4)},
        {"grafting": "adagrad", "grafting_eps": 1e-4},
    ),
    (
        {"grafting_config": official.RMSpropPreconditionerConfig()},
        {"grafting": "rmsprop", "grafting_eps": 1e-10, "grafting_beta2": 0.99},
    ),
    (
        {"grafting_config": official.AdamPreconditionerConfig()},
        {"grafting": "adam", "grafting_eps": 1e-10, "grafting_beta2": 0.999},
    ),
    (
        {"grafting_config": {"_target_": "distributed_shampoo.AdamPreconditionerConfig"}},
        {"grafting": "adam", "grafting_eps": 1e-10, "grafting_beta2": 0.999},
    ),
    (root_inv(inverse_exponent_override={2: 0.5}), {"exponent": [0.0, 2.0]}),
    (root_inv(inverse_exponent_override={1: 0.4, 3: 0.2}), {"exponent": [2.5, 0.0, 5.0]}),
    (root_inv(inverse_exponent_override={2: {0: 0.25}}), {"exponent": [0.0, 4.0]}),
    (
        root_inv(factor_matrix_dtype=torch.float64, inv_factor_matrix_dtype=torch.float64),
        {"preconditioner_dtype": torch.float64},
    ),
    (root_inv(num_tolerated_failed_amortized_computations=0), {}),
    (root_inv(use_symmetric_packing=False), {}),
    (roots(official.CoupledNewtonConfig()), {"root_method": "coupled_newton"}),
    (roots(official.EigenConfig(PSEUDO), epsilon=0.0), {"eps": 0.0}),
    (
        {
            "preconditioner_config": {
                "_target_": "distributed_shampoo.RootInvShampooPreconditionerConfig",
                "factor_matrix_dtype": "torch.float64",
                "inv_factor_matrix_dtype": "float64",
                "amortized_computation_config": {"_target_": "x.CoupledNewtonConfig"},
            }
        },
        {"preconditioner_dtype": torch.float64, "root_method": "coupled_newton"},
    ),
    ({"preconditioner_config": official.EigendecomposedShampooPreconditionerConfig()}, {}),
    (
        {"distributed_config": official.SingleDeviceDistributedConfig(2)},
        {"merge_dims": "matrix"},
    ),
    (
        {"distributed_config": official.DDPDistributedConfig(communication_dtype=torch.float16)},
        {"num_trainers_per_group": -1, "communication_dtype": torch.float16},
    ),
    ({"use_pin_memory": True, "shampoo_pt2_compile_config": object()}, {}),
]


@pytest.mark.parametrize(("given", "expected"), TRANSLATED, ids=lambda each: str(each)[:60])
def test_an_argument_is_translated(given, expected):
    found = from_distributed_shampoo(**given)
    assert found == {**DEFAULTS, **expected}
    Shampoo([Parameter(torch.ones(3, 2))], **found)  # which checks their ranges


def test_sharded_parameters_are_for_those_who_cut_whole_ones():
    config = official.FullyShardDistributedConfig(
        param_assignment_strategy=official.FSDPParamAssignmentStrategy.ROUND_ROBIN
    )
    found = from_distributed_shampoo(distributed_config=config)
    assert "num_trainers_per_group" not in found


REFUSED = [
    ({"betas": (0.9, 0.0)}, "betas", "memory"),
    ({"beta3": 0.5}, "beta3=0.5", "nesterov_average=True"),
    (
        {"weight_decay": 0.1, "weight_decay_type": official.WeightDecayType.CORRECTED},
        "weight_decay_type",
        "schedule",
    ),
    ({"precondition_frequency": 10, "start_preconditioning_step": 1}, "start_pre", "returned"),
    (
        {"iterate_averaging_config": official.ClassicMomentumConfig(dampening=0.1)},
        "iterate_averaging_config.dampening=0.1",
        r"lr \* \(1 - dampening\)",
    ),
    (
        {"iterate_averaging_config": official.GeneralizedPrimalAveragingConfig()},
        "iterate_averaging_config=GeneralizedPrimalAveragingConfig",
        "ClassicMomentumConfig",
    ),
    ({"iterate_averaging_config": official.ScheduleFreeConfig()}, "ScheduleFree", "schedule of lr"),
    (
        {"grafting_config": official.AdamPreconditionerConfig(beta2=1.0)},
        "grafting_config.beta2=1.0",
        "AdaGradPreconditionerConfig",
    ),
    (
        {"grafting_config": official.RMSpropPreconditionerConfig(1e-8, 0.9, True)},
        "grafting_config.drop_weighting_factor_on_gsquare=True",
        "False",
    ),
    ({"grafting_config": official.ScheduleFreeConfig()}, "grafting_config", "one of SGD"),
    ({"grafting_config": {"beta2": 0.9}}, "grafting_config", "_target_"),
    (root_inv(drop_weighting_factor_on_gsquare=True), "drop_weighting", "False"),
    (root_inv(use_trace_scaling=True), "use_trace_scaling=True", "False"),
    (root_inv(factor_matrix_dtype=torch.bfloat16), "factor_matrix_dtype", "float64"),
    (root_inv(inv_factor_matrix_dtype=torch.float64), "inv_factor_matrix_dtype", "the same"),
    (root_inv(inverse_exponent_override={2: {0: 0.5}}), "inverse_exponent_override", "one power"),
    (root_inv(inverse_exponent_override={2: 0.0}), "inverse_exponent_override", "above 0"),
    (roots(official.CoupledNewtonConfig(5)), "max_iterations=5", "100"),
    (roots(official.CoupledHigherOrderConfig()), "CoupledHigherOrderConfig", "minimax"),
    (roots(official.EigenConfig(official.PseudoInverseConfig()), epsilon=0.0), "rank_rtol", "None"),
    (roots(official.EigenConfig(PSEUDO)), "epsilon", "0.0 with a pseudo-inverse"),
    (
        {"preconditioner_config": official.EigenvalueCorrectedShampooPreconditionerConfig()},
        "preconditioner_config=EigenvalueCorrected",
        "SOAP",
    ),
    (
        {"preconditioner_config": official.RootInvKLShampooPreconditionerConfig()},
        "preconditioner_config=RootInvKL",
        "kl_shampoo",
    ),
    ({"preconditioner_config": official.AdamPreconditionerConfig()}, "Adam", "precondition=False"),
    (
        {
            "preconditioner_config": official.EigendecomposedShampooPreconditionerConfig(
                official.QREigendecompositionConfig()
            )
        },
        "amortized_computation_config=QREigendecompositionConfig",
        "whole",
    ),
    (
        {"distributed_config": official.SingleDeviceDistributedConfig(math.inf)},
        "target_parameter_dimensionality=inf",
        'merge_dims="none"',
    ),
    (
        {"distributed_config": official.DDPDistributedConfig(1, torch.float16, -1, True)},
        "communicate_params=True",
        "directions",
    ),
    ({"distributed_config": official.FSDPDistributedConfig()}, "FSDPDistributed", "fully_shard"),
    (
        {"distributed_config": official.FullyShardDistributedConfig()},
        "param_assignment_strategy",
        "ROUND_ROBIN",
    ),
    ({"momentum": 0.9}, "momentum=0.9", "ClassicMomentumConfig"),
    ({"no_such": 1}, "no_such=1", "left out"),
]


@pytest.mark.parametrize(("given", "named", "remedy"), REFUSED, ids=lambda each: str(each)[:40])
def test_what_has_no_counterpart_is_refused_by_name(given, named, remedy):
    with pytest.raises(ValueError, match=f"(?s)Invalid .*{named}.*Must be .*{remedy}"):
        from_distributed_shampoo(**given)


def test_a_value_that_a_class_is_not_known_to_have_is_refused():
    config = official.AdamPreconditionerConfig()
    config.later = 1
    with pytest.raises(ValueError, match=r"grafting_config\.later=1"):
        from_distributed_shampoo(grafting_config=config)


def test_groups_are_translated_one_by_one():
    common = {"lr": 0.5, "distributed_config": official.DDPDistributedConfig()}
    first, second = Parameter(torch.ones(3, 2)), Parameter(torch.ones(2, 2))
    groups = [{"params": [first], "epsilon": 1e-4}, {"params": [second], "lr": 0.25}]
    opt = Shampoo([from_distributed_shampoo(**{**common, **group}) for group in groups])
    assert [(g["lr"], g["eps"]) for g in opt.param_groups] == [(0.5, 1e-4), (0.25, 1e-12)]
    assert "num_trainers_per_group" not in opt.param_groups[0]
