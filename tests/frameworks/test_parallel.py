"""What torch itself wraps around an optimizer: ZeRO, PostLocalSGD, steps in the backward pass.

The first two step on each rank by itself: Shampoo gets a group of that rank alone.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from small import ARGUMENTS, batches, model, weights
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from shampoo import Shampoo

pytestmark = pytest.mark.frameworks


def group_of_one(rank):
    return [dist.new_group([each]) for each in range(dist.get_world_size())][rank]


def trained(module, optimizer, part):
    for tokens, labels in part:
        optimizer.zero_grad()
        cross_entropy(module(tokens), labels).backward()
        optimizer.step()


def zero_run(rank):
    """ZeRO owns whole parameters: the same bits as Shampoo's own sharing of blocks."""
    part = batches(8, rank, 2)
    alone = group_of_one(rank)

    def own():
        module = DistributedDataParallel(model())
        arguments = {**ARGUMENTS, "process_group": alone}

        def inner(params, **defaults):
            return Shampoo(params, **{**defaults, **arguments})

        return module, ZeroRedundancyOptimizer(module.parameters(), inner)

    module, optimizer = own()
    trained(module, optimizer, part[:4])
    optimizer.consolidate_state_dict(to=0)
    saved = [copy.deepcopy(optimizer.state_dict()) if rank == 0 else None]
    dist.broadcast_object_list(saved)
    half = copy.deepcopy(module.state_dict())
    trained(module, optimizer, part[4:])
    resumed, other = own()
    resumed.load_state_dict(half)
    other.load_state_dict(saved[0])
    trained(resumed, other, part[4:])
    shared = DistributedDataParallel(model())
    trained(shared, Shampoo(shared.parameters(), **ARGUMENTS), part)
    return weights(module), weights(resumed), weights(shared)


def test_zero_redundancy_optimizer_has_the_bits_of_shampoos_own_sharing(ranks):
    for straight, resumed, shared in ranks.returns(zero_run, 2):
        assert all(map(torch.equal, straight, shared))
        assert all(map(torch.equal, resumed, shared))


def local_run(rank):
    """Each rank steps alone, and every second step weights are averaged."""
    module = model()
    local = Shampoo(module.parameters(), **ARGUMENTS, process_group=group_of_one(rank))
    averager = PeriodicModelAverager(period=2, warmup_steps=0)
    optimizer = PostLocalSGDOptimizer(local, averager)
    trained(module, optimizer, batches(6, rank, 2)[:3])
    state = optimizer.state_dict()
    other = model()
    other.load_state_dict(module.state_dict())
    again = PostLocalSGDOptimizer(
        Shampoo(other.parameters(), **ARGUMENTS, process_group=group_of_one(rank)),
        PeriodicModelAverager(period=2, warmup_steps=0),
    )
    again.load_state_dict(state)
    trained(module, optimizer, batches(6, rank, 2)[3:])
    trained(other, again, batches(6, rank, 2)[3:])
    return weights(module), weights(other)


def expected_of_local_runs():
    modules = [model(), model()]
    optimizers = [Shampoo(each.parameters(), **ARGUMENTS) for each in modules]
    parts = [batches(6, rank, 2) for rank in range(2)]
    for step in range(6):
        for module, optimizer, part in zip(modules, optimizers, parts, strict=True):
            trained(module, optimizer, part[step : step + 1])
        if step % 2 == 0:  # the averager counts from 0
            with torch.no_grad():
                for pair in zip(*(module.parameters() for module in modules), strict=True):
                    mean = (pair[0] / 2) + (pair[1] / 2)
                    for param in pair:
                        param.copy_(mean)
    return [weights(module) for module in modules]


def test_post_local_sgd_steps_on_each_rank_alone(ranks):
    for found, expected in zip(ranks.returns(local_run, 2), expected_of_local_runs(), strict=True):
        straight, resumed = found
        assert all(map(torch.equal, straight, resumed))
        for here, there in zip(straight, expected, strict=True):
            torch.testing.assert_close(here, there)


def test_steps_in_the_backward_pass_have_the_bits_of_steps_after_it():
    def hooked(module):
        optimizers = {param: Shampoo([param], **ARGUMENTS) for param in module.parameters()}

        def step(param):
            optimizers[param].step()
            optimizers[param].zero_grad()

        for param in module.parameters():
            param.register_post_accumulate_grad_hook(step)
        return list(optimizers.values())

    def run(module, part):
        for tokens, labels in part:
            cross_entropy(module(tokens), labels).backward()

    part = batches(8)
    module = model()
    optimizers = hooked(module)
    run(module, part[:4])
    other = model()
    other.load_state_dict(module.state_dict())
    for optimizer, saved in zip(hooked(other), optimizers, strict=True):
        optimizer.load_state_dict(saved.state_dict())
    run(module, part[4:])
    run(other, part[4:])
    after = model()
    trained(after, Shampoo(after.parameters(), **ARGUMENTS), part)
    for found in (weights(module), weights(other)):
        assert all(map(torch.equal, found, weights(after)))
