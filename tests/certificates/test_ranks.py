"""Ranks whose devices passed other kernels move their replicas alike, to the bit."""

import math
from types import SimpleNamespace

import torch
from compiled import load_compiled
from imaginary import CARD, FASTER, SLOWER, imaginary
from layouts import digest, inject
from ranks import Ranks
from torch import nn

from shampoo import Shampoo, agreement, ops
from shampoo.certificates import loading, shared
from shampoo.certificates.cases import CASES
from shampoo.ops import OPS, backends, routes
from shampoo.ops.licence import REFERENCE, Licence
from shampoo.roots.size_classes import pays

CPU = torch.device("cpu")


def other_bits(*arguments):
    """As right as the reference, which it calls, and not the same: another order of roundings."""
    OPS["update_blocks_"].reference(*arguments)
    for param in arguments[0]:
        param.copy_(param.nextafter(torch.tensor(math.inf, dtype=param.dtype)))


def everything_but(*refused):
    """A licence of all kernels of the CPU except some."""
    keys = [(name, "cpp") for name, op in OPS.items() if "cpp" in op.kinds("cpu")]
    dtypes = frozenset({"float32", "float64"})
    passed = {key: dtypes for key in keys if key[0] not in refused}
    return Licence(passed, {(op, "cpp"): {"float32": "it failed here"} for op in refused})


def train(rank, agree):
    """The digest of the parameters, and whether the kernel of the update is used."""
    before = loading.licence_of, shared.SHARED
    refused = ("update_blocks_",) if rank == 1 else ()
    loading.licence_of = lambda device: everything_but(*refused)
    if not agree:
        shared.SHARED = ()
    load_compiled()
    kernel = torch.library.Library("shampoo", "IMPL")
    kernel.impl("update_blocks_", other_bits, "CPU")
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 6))
        optimizer = Shampoo(model.parameters(), lr=0.01, precondition_frequency=2)
        for step in range(4):
            inject(model.parameters(), step)
            optimizer.step()
        return digest(list(model.parameters())), ops.runs_kernel_on_cpu("update_blocks_")
    finally:
        loading.licence_of, shared.SHARED = before
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


def sides_of_classes(rank, agree):
    """Up to which of three sides this rank pads on a card of its own, which is imaginary."""
    before = backends.card_of, routes._route, agreement.certificates.shared_choices
    others = shared.shared_choices if agree else lambda devices: {}
    agreement.certificates.shared_choices = lambda devices: others([*devices, CARD])
    backends.card_of, routes._route = lambda device: "17.0", lambda: None
    speeds = {64: FASTER, 256: FASTER, 512: SLOWER}
    if rank == 1:
        speeds |= {64: SLOWER, 512: FASTER}
    try:
        optimizer = Shampoo(nn.Linear(20, 12).parameters(), lr=0.01)
        routes._state[2] = frozenset({"triton"})
        routes._licences[CARD] = imaginary(speeds).licence
        inject(optimizer.param_groups[0]["params"], 0)
        optimizer.step()
        like = SimpleNamespace(device=CARD, dtype=torch.float32)
        return [side for side in speeds if pays(like, side)]
    finally:
        backends.card_of, routes._route, agreement.certificates.shared_choices = before
        routes._licences.pop(CARD, None)
        routes._imposed.clear()
        ops.load_kernels(required=True)


def test_ranks_pad_alike_whatever_their_cards_say(ranks: Ranks):
    assert ranks.returns(sides_of_classes, 2, True) == [[256], [256]]
    assert ranks.returns(sides_of_classes, 2, False) == [[64, 256], [256, 512]]


def test_all_take_what_all_chose_by_size():
    infinite = math.inf
    one = {"float32": [(64, "cuda"), (256, REFERENCE), (infinite, "cuda")]}
    other = {"float32": [(128, "cuda"), (infinite, "cuda")]}
    assert shared._common([one, one]) == one
    assert shared._common([one, other]) == {
        "float32": [(64, "cuda"), (128, REFERENCE), (256, REFERENCE), (infinite, "cuda")]
    }


def test_the_shared_ops_have_cases():
    assert set(shared.SHARED) <= set(CASES)
