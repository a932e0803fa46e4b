"""Cases of the op on numbers of which every block has one."""

import itertools
import math

import torch

from shampoo.certificates.cases.case import Arguments, Case

_MOST = 1e6


def _scale(flat: torch.dtype, count: int, grafted: bool, follows: str, accepted: bool) -> Case:
    """``follows``: which blocks follow the grafted direction: none, some or all."""

    def arguments() -> Arguments:
        norm, length = torch.rand(2, count, dtype=flat).add_(0.1).unbind()
        norm, length = norm.clone(), length.clone()
        # One each that is too long, no number, and has no length, where there are so many.
        for place, value in enumerate((math.inf, math.nan, 0.0, 1e9)[: count - 1]):
            length[place + 1] = norm[-place - 1] = value
        is_own = torch.arange(count) % 3 > 0 if follows == "some" else None
        return {
            "scale": torch.zeros(count, dtype=flat),
            "norm": norm,
            "length": None if follows == "all" else length,
            "is_own": is_own,
            "correction": 0.271,
            "grafted": grafted,
            "most": _MOST,
            "accepted": torch.tensor(True) if accepted else None,
        }

    words = f"{count} blocks, {follows} follow the graft" + ("" if grafted else ", own lengths")
    return Case(
        "graft_scale_",
        flat,
        words + (", accepted" if accepted else ""),
        arguments,
        overwritten=("scale",),
        stacked=("scale", "norm", "length", "is_own"),
    )


def number_cases() -> dict[str, list[Case]]:
    """Those of the op on numbers of blocks."""
    ways = itertools.product((torch.float32, torch.float64), (1, 9, 300), ("none", "some", "all"))
    cases = [
        _scale(flat, count, grafted, follows, accepted=count != 9)
        for flat, count, follows in ways
        for grafted in ((True, False) if follows != "all" else (True,))
    ]
    return {"graft_scale_": cases}
