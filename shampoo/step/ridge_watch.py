"""Whether the absolute ridge outweighs the factors that it is added to: one warning says so.

``eps`` is added to factors, which are squares of gradients. AdamW's 1e-8, taken over from its call,
is harmless where gradients are of the order of 1e-2, and turns preconditioning off where they are
of the order of 1e-5: all eigenvalues are then the ridge.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo.blocks.segments import FactorRows
from shampoo.blocks.stacks import Arena
from shampoo.hyperparameters import Hyperparameters
from shampoo.ops.transit import Letter, is_near
from shampoo.roots.solver import chunks
from shampoo.scalars import Scalars
from shampoo.step.directions import factor_correction
from shampoo.step.param_plan import PlannedParam

logger = logging.getLogger(__name__)

# Of the norm of a factor: with as large a ridge the roots (p = 4) of its largest and its smallest
# eigenvalue are at most a factor of 3 apart, where they are 32 apart with the default ridge.
_SHARE = 1e-2


@dataclass
class _Look:
    """The norms of the factors of one refresh."""

    arena: Arena
    due: Sequence[FactorRows]
    eps: float
    share: float
    counts: list[int]  # of the rows of each of them
    norms: Letter  # of all rows, one after another, float64


class RidgeWatch:
    """Looks at the factors of every refresh until it has warned once.

    On a GPU nothing waits: norms travel while training goes on and are read at the next refresh, if
    they are there. Steps with ``capturable=True``, of which the host sees nothing, are not watched.
    """

    def __init__(self) -> None:
        self._has_warned = False
        self._looks: dict[int, _Look] = {}  # by arena

    def forget(self) -> None:
        """Lets go of looks at a plan that is no more."""
        self._looks.clear()

    def look(
        self,
        arena: Arena,
        due: Sequence[FactorRows],
        hyper: Hyperparameters,
        scalars: Scalars,
        members: Sequence[PlannedParam],
    ) -> None:
        """Looks at the factors whose roots this step has refreshed; warns of one too small.

        Args:
            due: these factors, all of one arena.
            members: the parameters of the plan, for their names.
        """
        if self._has_warned or hyper.geometry.capturable:
            return
        share = max(_SHARE, hyper.relative_eps)
        if is_near(arena.device):  # where the host may look first, and passes cost most
            due = [f for f in due if _may_be_outweighed(f, scalars, hyper.eps / share)]
            if not due:
                return
        self._read(members)
        norms = [_norms(factors, scalars) for factors in due]
        sent = torch.cat(norms)
        if scalars.accepted is not None:
            # In a step that is not taken no factor has moved, and none is looked at.
            sent *= scalars.accepted
        counts = [len(each) for each in norms]
        self._looks[id(arena)] = _Look(arena, due, hyper.eps, share, counts, Letter(sent))
        self._read(members)

    def _read(self, members: Sequence[PlannedParam]) -> None:
        """Judges what has arrived."""
        for key, look in list(self._looks.items()):
            if not look.norms.has_arrived():
                continue
            del self._looks[key]
            norms = look.norms.read()
            # Zero is a factor that has seen nothing, such as that of a layer without a gradient.
            norms = torch.where(norms > 0, norms, math.inf)
            split = torch.split(norms, look.counts)
            for factors, each in zip(look.due, split, strict=True):
                norm, row = each.min(dim=0)
                if look.eps > look.share * norm and not self._has_warned:
                    self._warn(look, factors, float(norm), int(row), members)

    def _warn(
        self,
        look: _Look,
        factors: FactorRows,
        norm: float,
        row: int,
        members: Sequence[PlannedParam],
    ) -> None:
        self._has_warned = True
        where = factors.where
        at = where.start + row if isinstance(where, slice) else int(where[row])
        place = factors.stack.statistic[at].data_ptr()
        name = next(
            f"{key} of {members[member].name}"
            for member, key, view in look.arena.views(())
            if view.data_ptr() == place and view.is_floating_point()
        )
        logger.warning(
            "shampoo: eps=%g outweighs %s, whose norm is %.1e: there, preconditioning is weak or"
            " off. eps is added to factors, which are squares of gradients: leave it at its"
            " default, 1e-12, or take a smaller one. AdamW's eps is grafting_eps here. This is said"
            " once.",
            look.eps,
            name,
            norm,
        )


def _may_be_outweighed(factors: FactorRows, scalars: Scalars, bound: float) -> bool:
    """Whether some norm may lie below a bound: that of the diagonal is no larger than it."""
    diagonals = factors.take(factors.stack.statistic.diagonal(dim1=1, dim2=2))
    norms = torch.linalg.vector_norm(diagonals, dim=1, dtype=torch.float64)
    norms = norms / factor_correction(factors, scalars)
    return bool(((norms > 0) & (norms < bound)).any())


def _norms(factors: FactorRows, scalars: Scalars) -> Tensor:
    """The Frobenius norms of the rows, [R] float64."""
    stack = factors.take(factors.stack.statistic)
    # In float64: the squares of what is compared with eps leave the range of float32.
    norms = [
        torch.linalg.vector_norm(stack[rows], dim=(1, 2), dtype=torch.float64)
        for rows in chunks(stack)
    ]
    every = norms[0] if len(norms) == 1 else torch.cat(norms)
    return every / factor_correction(factors, scalars)
