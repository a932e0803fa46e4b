"""Beside Meta's distributed_shampoo, where it is installed: the same steps, and runs that move.

Its learning rate is a float32 tensor whatever the parameters are, and its bias corrections are of
torch's default dtype: here they are exact, so that float64 runs agree to their rounding.
"""

import copy
import dataclasses
import importlib
import io
import types

import official
import pytest
import torch
from ranks import Ranks
from torch import nn
from torch.nn import Parameter
from trajectory import apply, assert_relative, random_grads, random_params, twins_of

from shampoo import BlockGridMismatchError, Shampoo
from shampoo.migrate import from_distributed_shampoo, load_distributed_shampoo
from shampoo.migrate.configs import CLASSES

_PACKAGE = importlib.import_module("distributed_shampoo")
_MODULES = ("shampoo_types", "preconditioner.matrix_functions_types")
_NAMES = [vars(importlib.import_module(f"distributed_shampoo.{module}")) for module in _MODULES]
package = types.SimpleNamespace(**{**_NAMES[0], **_NAMES[1], **vars(_PACKAGE)})
SHAPES = [(7, 5), (6,), (3, 2, 2), (4, 1, 3), (1,), (9, 4)]
LR = 2.0**-6


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def of_factors(dtype=torch.float64, **values):
    return package.RootInvShampooPreconditionerConfig(
        factor_matrix_dtype=dtype, inv_factor_matrix_dtype=dtype, **values
    )


def momentum(**values):
    return {"iterate_averaging_config": package.ClassicMomentumConfig(**values)}


def single(dims):
    return {
        "distributed_config": package.SingleDeviceDistributedConfig(
            target_parameter_dimensionality=dims
        )
    }


ADAM = {"grafting_config": package.AdamPreconditionerConfig(beta2=0.99, epsilon=1e-8)}
RMSPROP = {"grafting_config": package.RMSpropPreconditionerConfig(beta2=0.9, epsilon=1e-6)}
ADAGRAD = {"grafting_config": package.AdaGradPreconditionerConfig(epsilon=1e-4)}
SGD = {"grafting_config": package.SGDPreconditionerConfig()}
L2 = {"weight_decay": 0.25, "weight_decay_type": package.WeightDecayType.L2}
CONFIGS = {
    "plain": {},
    "adagrad": ADAGRAD,
    "rmsprop": {**RMSPROP, "betas": (0.9, 0.95)},
    "adam": {**ADAM, "betas": (0.9, 0.99)},
    "sgd": {**SGD, "betas": (0.0, 0.99)},
    "momentum": {**ADAM, **momentum(momentum=0.75), "weight_decay": 0.25},
    "nesterov": {**SGD, **momentum(momentum=0.5, use_nesterov=True), "weight_decay": 0.125},
    "decoupled": {**RMSPROP, "weight_decay": 0.25},
    "l2": {**ADAM, **L2},
    "independent": {
        **ADAM,
        "weight_decay": 2.0**-8,
        "weight_decay_type": package.WeightDecayType.INDEPENDENT,
    },
    "frequency": {**ADAM, "precondition_frequency": 3},
    "start": {**ADAGRAD, "precondition_frequency": 2, "start_preconditioning_step": 5},
    "start without a graft": {
        "epsilon": 1e-3,  # a factor of few gradients magnifies others by the root of it
        "precondition_frequency": 2,
        "start_preconditioning_step": 3,
    },
    "no correction": {**ADAM, "betas": (0.9, 0.9), "use_bias_correction": False},
    "exponents": {
        **ADAM,
        "preconditioner_config": of_factors(inverse_exponent_override={1: 0.4, 2: 0.5}),
    },
    "ragged blocks": {**ADAM, "max_preconditioner_dim": 3},
    "small blocks of momentum": {**SGD, **momentum(), "max_preconditioner_dim": 2},
    "matrices": {**ADAM, **single(2), "max_preconditioner_dim": 6},
    "whole": {**ADAM, "max_preconditioner_dim": float("inf")},
    "not packed": {**ADAM, "preconditioner_config": of_factors(use_symmetric_packing=False)},
    "pseudo-inverse": {
        "epsilon": 0.0,
        "preconditioner_config": of_factors(
            amortized_computation_config=package.EigenConfig(
                rank_deficient_stability_config=package.PseudoInverseConfig(rank_rtol=None)
            )
        ),
        **ADAM,
    },
    "eigendecomposed": {
        **ADAM,
        "precondition_frequency": 2,
        "preconditioner_config": package.EigendecomposedShampooPreconditionerConfig(
            factor_matrix_dtype=torch.float64,
            factor_matrix_eigenvectors_dtype=torch.float64,
            factor_matrix_eigenvalues_dtype=torch.float64,
        ),
    },
}
STEPS = 9
IDS = list(CONFIGS)


def config_of(name, **common):
    base = {"lr": LR, "epsilon": 1e-6, "max_preconditioner_dim": 8}
    return {**base, "preconditioner_config": of_factors(), **CONFIGS[name], **common}


def pair_of(config, dtype=torch.float64):
    """Both optimizers of twins of the same parameters."""
    theirs = random_params(*SHAPES, dtype=dtype)
    ours = twins_of(theirs)
    official_one = package.DistributedShampoo(theirs, **config)
    return theirs, official_one, ours, Shampoo(ours, **from_distributed_shampoo(**config))


@pytest.mark.parametrize("name", IDS)
@pytest.mark.usefixtures("float64_by_default")
def test_every_step_is_the_same(name):
    theirs, official_one, ours, opt = pair_of(config_of(name))
    for step, grads in enumerate(random_grads(ours, STEPS)):
        apply(official_one, theirs, grads)
        apply(opt, ours, grads)
        for mine, other in zip(ours, theirs, strict=True):
            assert_relative(mine, other, 1e-9, f"step {step}, {tuple(mine.shape)}:")


@pytest.mark.parametrize("name", ["adam", "nesterov", "ragged blocks", "start"])
def test_every_step_is_nearly_the_same_in_float32(name):
    """Of a model that is trained, with all that is float32 there."""
    config = config_of(name, epsilon=1e-4, preconditioner_config=of_factors(torch.float32))
    first = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    second = copy.deepcopy(first)
    inputs, target = torch.randn(32, 6), torch.randn(32, 3)
    runs = (
        (first, package.DistributedShampoo(first.parameters(), **config)),
        (second, Shampoo(second.parameters(), **from_distributed_shampoo(**config))),
    )
    for _ in range(STEPS):
        for model, opt in runs:
            opt.zero_grad()
            (model(inputs) - target).square().mean().backward()
            opt.step()
    for mine, other in zip(second.parameters(), first.parameters(), strict=True):
        assert_relative(mine, other, 1e-3)


@pytest.mark.usefixtures("float64_by_default")
def test_a_coupled_newton_iteration_is_the_same_up_to_its_tolerance():
    config = config_of(
        "adam",
        epsilon=1e-2,
        preconditioner_config=of_factors(
            amortized_computation_config=package.CoupledNewtonConfig()
        ),
    )
    theirs, official_one, ours, opt = pair_of(config)
    for grads in random_grads(ours, STEPS):
        apply(official_one, theirs, grads)
        apply(opt, ours, grads)
    for mine, other in zip(ours, theirs, strict=True):
        assert_relative(mine, other, 1e-4)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("steps", [0, 2, 5])
@pytest.mark.parametrize("name", [name for name in IDS if name != "eigendecomposed"])
@pytest.mark.usefixtures("float64_by_default")
def test_a_run_changes_over(name, steps):
    config = config_of(name)
    theirs, official_one, ours, _ = pair_of(config)
    history = random_grads(theirs, STEPS)
    for grads in history[:steps]:
        apply(official_one, theirs, grads)
    official_one.param_groups[0]["lr"] /= 2  # a schedule's: it comes with the checkpoint
    for mine, other in zip(ours, theirs, strict=True):
        mine.data.copy_(other.data)
    opt = Shampoo(ours, **from_distributed_shampoo(**config))
    load_distributed_shampoo(opt, through_a_file(official_one.state_dict()))
    for grads in history[steps:]:
        apply(official_one, theirs, grads)
        apply(opt, ours, grads)
    for mine, other in zip(ours, theirs, strict=True):
        assert_relative(mine, other, 1e-9)


def test_factors_that_are_kept_as_eigenvectors_are_refused():
    config = config_of("eigendecomposed")
    _, official_one, _, opt = pair_of(config)
    with pytest.raises(BlockGridMismatchError, match=r"factor_matrices_eigenvalues.*cannot be"):
        load_distributed_shampoo(opt, official_one.state_dict())


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks()  # of its own: the other package holds process groups for ever
    yield ranks
    ranks.close()


def ranks_of_ddp(rank, config):
    torch.set_default_dtype(torch.float64)
    params = [Parameter(torch.full(shape, 0.5)) for shape in SHAPES]
    sharing = package.DDPDistributedConfig(num_trainers_per_group=2)
    opt = package.DistributedShampoo(params, **config, distributed_config=sharing)
    history = random_grads(params, STEPS)
    for grads in history[:5]:
        apply(opt, params, grads)
    saved = [param.detach().clone() for param in params]
    state = opt.state_dict()
    state["state"] = {key: plain(value) for key, value in state["state"].items()}
    state = copy.deepcopy(state)
    for grads in history[5:]:
        apply(opt, params, grads)
    return saved, state, [param.detach().clone() for param in params]


def plain(value):
    """Without the process groups of DTensors, which do not travel."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return value.to_local() if hasattr(value, "to_local") else value


def ours_of_ddp(rank, config, saved, states):
    torch.set_default_dtype(torch.float64)
    params = [Parameter(value.clone()) for value in saved]
    opt = Shampoo(params, **config)
    load_distributed_shampoo(opt, *states)
    for grads in random_grads(params, STEPS)[5:]:
        apply(opt, params, grads)
    return [param.detach().clone() for param in params]


@pytest.mark.usefixtures("float64_by_default")
def test_a_run_of_ranks_changes_over(ranks):
    config = config_of("ragged blocks")
    results = ranks.returns(ranks_of_ddp, 2, config)
    saved, _, expected = results[0]
    states = [state for _, state, _ in results]
    translated = from_distributed_shampoo(**config)
    for world in (1, 2):
        ours = {**translated, "num_trainers_per_group": world}
        for found in ranks.returns(ours_of_ddp, world, ours, saved, states):
            for mine, other in zip(found, expected, strict=True):
                assert_relative(mine, other, 1e-6)  # directions travel in float32 there
    opt = Shampoo([Parameter(value.clone()) for value in saved], **translated)
    with pytest.raises(RuntimeError, match=r"lacks \d+ of \d+ blocks.*give the state of all"):
        load_distributed_shampoo(opt, states[0])


def dtensors_at_once(rank, config):
    torch.set_default_dtype(torch.float64)
    params = [Parameter(torch.full(shape, 0.5)) for shape in SHAPES]
    config["distributed_config"] = package.DDPDistributedConfig(
        num_trainers_per_group=1, communication_dtype=torch.float32
    )
    opt = package.DistributedShampoo(params, **config)
    history = random_grads(params, STEPS)
    for grads in history[:5]:
        apply(opt, params, grads)
    ours = twins_of(params)
    other = Shampoo(ours, **from_distributed_shampoo(**config))
    state = opt.state_dict()
    load_distributed_shampoo(other, state)
    for grads in history[5:]:
        apply(opt, params, grads)
        apply(other, ours, grads)
    is_dtensor = hasattr(state["state"][0]["block_0"]["adagrad"], "to_local")
    return is_dtensor, [p.detach().clone() for p in params], [p.detach().clone() for p in ours]


def test_dtensors_are_taken_as_they_are(ranks):
    """Of a group of one trainer, whose state is whole."""
    for is_dtensor, theirs, ours in ranks.returns(dtensors_at_once, 2, config_of("adam")):
        assert is_dtensor
        for mine, other in zip(ours, theirs, strict=True):
            assert_relative(mine, other, 1e-6)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_classes_have_the_values_that_are_read(name):
    """Ours and those of the stand-ins."""
    kind = getattr(package, name)
    for field in dataclasses.fields(kind):
        assert field.name in CLASSES[name], field.name
        if field.default is not dataclasses.MISSING and not isinstance(field.default, type(LR)):
            assert (
                str(field.default).removeprefix("torch.").endswith(str(CLASSES[name][field.name]))
            )
    stand_in = getattr(official, name, None)
    if stand_in is not None:
        assert {f.name for f in dataclasses.fields(stand_in)} <= CLASSES[name].keys()
