"""The device that refuses to be read, on which other tests build, refuses, and computes."""

import pytest
import torch
from far import DEVICE, Far, FarTensor, far, near
from tape import HostReadError


@pytest.fixture(autouse=True)
def device():
    with Far():
        yield


READS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "bool": lambda x: bool((x > 0).any()),
    "if": lambda x: 1 if x[0] > 0 else 0,
    "all": lambda x: all(x > 0),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", non_blocking=True),
    "copy": lambda x: torch.empty(3).copy_(x),
    "copy of integers": lambda x: x.long().to("cpu"),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "assignment by a mask": lambda x: x.__setitem__(x > 0, x[:1].expand(3)),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones_like(x).long()),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "eigh": lambda x: torch.linalg.eigh(x[:, None] * x),
    "format": lambda x: f"{x[0]:.3f}",
    "index": lambda x: [1, 2, 3][x.long()[0]],
    "a copy to the device that waits": lambda x: torch.ones(3).to(DEVICE),
    "another": lambda x: x.copy_(torch.ones(3)),
}


@pytest.mark.parametrize("way", READS)
def test_the_device_refuses_to_be_read(way):
    with pytest.raises((HostReadError, TypeError)):
        READS[way](far(torch.tensor([1.0, 2.0, -1.0])))


def test_the_device_computes():
    x = far(torch.arange(6.0))
    x[2:4] += 1
    y = torch.zeros(2, device=DEVICE)
    y.copy_(x.view(2, 3).sum(1))
    assert isinstance(y, FarTensor)
    assert near(y).tolist() == [4.0, 13.0]
    assert near(torch.where(x > 3, x, 0.0)).tolist() == [0, 0, 0, 4, 4, 5]
