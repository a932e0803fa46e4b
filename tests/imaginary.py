"""Certificates of a card that is not there."""

from collections.abc import Mapping

import torch

from shampoo.certificates.certificate import Certificate
from shampoo.certificates.report import Report, Timing

CARD = torch.device("cuda", 0)
FASTER, SLOWER = 2.0, 1.02


def imaginary(speeds: Mapping[int, float], failure: str = "") -> Certificate:
    """One that has timed size classes: how many times as fast they are, by their side.

    Args:
        speeds: by side.
        failure: why the kernel of classes did not pass.
    """
    timings = tuple(Timing(side, 1e-3, speed * 1e-3) for side, speed in speeds.items())
    reports = [
        Report("minimax_class_root_", "triton", "float32", 9, 0.1, 1.0, "", failure, timings)
    ]
    facts = {"device": "cuda", "name": "an imaginary card"}
    return Certificate(facts, tuple(reports), True, "", 1.0)
