"""Letters hold what was there when they were sent, and arrive."""

import pytest
import torch

from shampoo.ops.transit import Letter, is_near


def test_the_host_may_look_at_its_own_memory():
    assert is_near(torch.device("cpu"))
    assert not is_near(torch.device("cuda", 1))


def test_a_letter_holds_what_was_there_when_it_was_sent():
    values = torch.arange(3.0)
    letter = Letter(values)
    values.zero_()
    assert letter.has_arrived()
    assert letter.read().tolist() == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_letter_from_a_gpu_is_on_its_way_for_a_while():
    values = torch.arange(3.0, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    letter = Letter(values)
    values.zero_()
    assert not letter.has_arrived()
    assert letter.read().tolist() == [0, 1, 2]
    assert letter.has_arrived()
