"""Ranks whose devices passed other kernels move their replicas alike, to the bit."""

import math

import pytest
import torch
from compiled import load_compiled
from layouts import digest, inject
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shampoo import Shampoo, agreement, ops
from shampoo.certificates import loading, shared
from shampoo.certificates.cases import CASES
from shampoo.certificates.shared import Offer
from shampoo.ops import OPS, routes
from shampoo.ops.licence import REFERENCE, Licence

BOTH = ["cuda", "triton"]


def other_bits(op):
    """As right as the reference, which it calls, and not the same: another order of roundings."""

    def run(*arguments):
        OPS[op].reference(*arguments)
        for moved in arguments[0]:
            moved.copy_(moved.nextafter(torch.tensor(math.inf, dtype=moved.dtype)))

    return run


def everything_but(*refused):
    """A licence of all kernels of the CPU except some."""
    keys = [(name, "cpp") for name, op in OPS.items() if "cpp" in op.kinds("cpu")]
    dtypes = frozenset({"float32", "float64"})
    passed = {key: dtypes for key in keys if key[0] not in refused}
    return Licence(passed, {(op, "cpp"): {"float32": "it failed here"} for op in refused})


def train(rank, agree, op="update_blocks_", trainers=-1):
    """The digest of the parameters, and whether a kernel is used, which rank 1 refuses."""
    before = loading.licence_of, agreement.certificates.offers
    refused = (op,) if rank == 1 else ()
    loading.licence_of = lambda device: everything_but(*refused)
    if not agree:
        agreement.certificates.offers = lambda *_: {}
    load_compiled()
    kernel = torch.library.Library("shampoo", "IMPL")
    kernel.impl(op, other_bits(op), "CPU")
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 6))
        hyper = {"num_trainers_per_group": trainers, "check_replicas_every": 1000}
        optimizer = Shampoo(model.parameters(), lr=0.01, precondition_frequency=2, **hyper)
        for step in range(4):
            inject(model.parameters(), step)
            optimizer.step()
        return digest(list(model.parameters())), ops.runs_kernel_on_cpu(op)
    finally:
        loading.licence_of, agreement.certificates.offers = before
        routes._imposed.clear()
        del kernel
        ops.load_kernels(required=True)


def test_what_one_rank_refused_none_of_them_uses(ranks: Ranks):
    (first, uses_first), (second, uses_second) = ranks.returns(train, 2, True)
    assert first == second
    assert (uses_first, uses_second) == (False, False)


def test_without_an_agreement_replicas_would_drift(ranks: Ranks):
    """So that the test above tests something."""
    (first, uses_first), (second, uses_second) = ranks.returns(train, 2, False)
    assert first != second
    assert (uses_first, uses_second) == (True, False)


def test_where_blocks_have_several_owners_all_ops_are_shared(ranks: Ranks):
    """Each of two ranks computes all blocks, as each of two nodes does."""
    (first, uses_first), (second, uses_second) = ranks.returns(train, 2, True, "gram_ema_", 1)
    assert first == second
    assert (uses_first, uses_second) == (False, False)
    (first, _), (second, _) = ranks.returns(train, 2, False, "gram_ema_", 1)
    assert first != second


def test_what_only_an_owner_computes_is_its_own(ranks: Ranks):
    (first, uses_first), (second, uses_second) = ranks.returns(train, 2, True, "gram_ema_", 2)
    assert first == second
    assert (uses_first, uses_second) == (True, False)


def is_redundant(rank, trainers, is_sharded):
    model = nn.Linear(64, 64)
    if is_sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    how = {"num_trainers_per_group": trainers, "check_replicas_every": 1000}
    optimizer = Shampoo(model.parameters(), **how)
    asked, offers = [], agreement.certificates.offers

    def noted(devices, is_redundant):
        asked.append(is_redundant)
        return offers(devices, is_redundant)

    agreement.certificates.offers = noted
    try:
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()
    finally:
        agreement.certificates.offers = offers
    return asked


@pytest.mark.parametrize(
    ("trainers", "is_sharded"), [(1, False), (2, False), (-1, True), (1, True)]
)
def test_blocks_of_a_mesh_have_one_owner(ranks: Ranks, trainers, is_sharded):
    wanted = trainers == 1 and not is_sharded
    assert ranks.returns(is_redundant, 2, trainers, is_sharded) == [[wanted]] * 2


def test_all_take_what_the_first_chose_and_all_allow():
    infinite = math.inf
    one = Offer(
        {"float32": [(64, "cuda"), (256, REFERENCE), (infinite, "cuda")]}, {"float32": BOTH}
    )
    other = Offer({"float32": [(128, "triton"), (infinite, "cuda")]}, {"float32": BOTH})
    assert shared._common([one, one]) == one.chosen
    assert shared._common([one, other]) == {
        "float32": [(64, "cuda"), (128, REFERENCE), (256, REFERENCE), (infinite, "cuda")]
    }
    refused = Offer({"float32": [(128, "triton"), (infinite, REFERENCE)]}, {"float32": ["triton"]})
    assert {kind for _, kind in shared._common([one, refused])["float32"]} == {REFERENCE}
    assert {kind for _, kind in shared._common([refused, one])["float32"]} == {"triton", REFERENCE}
    insisted = one._replace(allowed={"float32": []})  # SHAMPOO_BACKEND, whatever has passed
    assert shared._common([one, insisted]) == one.chosen


def test_the_shared_ops_have_cases():
    assert set(shared.SHARED) <= set(CASES)
