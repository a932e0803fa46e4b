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
    """The smallest norms found in one refresh."""

    arena: Arena
    due: Sequence[FactorRows]
    eps: float
    share: float
    smallest: Letter  # [2, due] float64: norm, which of the rows


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
        smallest = torch.stack([_smallest(factors, scalars) for factors in due], dim=1)
        self._looks[id(arena)] = _Look(arena, due, hyper.eps, share, Letter(smallest))
        self._read(members)

    def _read(self, members: Sequence[PlannedParam]) -> None:
        """Judges what has arrived."""
        for key, look in list(self._looks.items()):
            if not look.smallest.has_arrived():
                continue
            del self._looks[key]
            norms, rows = look.smallest.read().tolist()
            for factors, norm, row in zip(look.due, norms, rows, strict=True):
                if look.eps > look.share * norm and not self._has_warned:
                    self._warn(look, factors, norm, int(row), members)

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


def _smallest(factors: FactorRows, scalars: Scalars) -> Tensor:
    """The smallest Frobenius norm that is not zero, and which of the rows it is, [2] float64.

    Zero is a factor that has seen nothing, such as that of a layer without a gradient so far. In a
    step that is not taken no factor has moved, and none is looked at: the norm is Inf.
    """
    stack = factors.take(factors.stack.statistic)
    # In float64: the squares of what is compared with eps leave the range of float32.
    norms = torch.cat(
        [
            torch.linalg.vector_norm(stack[rows], dim=(1, 2), dtype=torch.float64)
            for rows in chunks(stack)
        ]
    )
    norms = norms / factor_correction(factors, scalars)
    is_seen = norms > 0 if scalars.accepted is None else (norms > 0) & scalars.accepted
    smallest, row = torch.where(is_seen, norms, math.inf).min(dim=0)
    return torch.stack((smallest, row.double()))
