"""The protocol of a kind: what it declares, and the five things that a step asks of it.

Shared by all kinds are the graft, masks, decay, momentum, the schedule of refreshes, sharding and
checkpoints. A kind is handed stacks, never single blocks: all stacks of a segment, each B blocks of
one shape, so that an op can take them together; or K factors of one size. It writes in place.
"""

from collections.abc import Sequence

from torch import Tensor

from shampoo.blocks.declared import Kind
from shampoo.blocks.segments import FactorRows, TakenRows
from shampoo.blocks.statistics import Statistics
from shampoo.hyperparameters import Hyperparameters
from shampoo.ops import Number
from shampoo.scalars import Scalars


class Preconditioner(Kind):
    """A kind. Stateless: what it keeps is what it declares.

    The base is a kind that keeps nothing and has no direction.
    """

    def check(self, hyper: Hyperparameters, order: int) -> None:
        """Refuses values that this kind cannot take, for blocks of some order.

        Raises:
            ValueError: naming the value, its bound and the remedy.
        """

    def accumulate(
        self,
        statistics: Sequence[Statistics],
        grads: Sequence[Tensor],
        hyper: Hyperparameters,
        scalars: Scalars,
    ) -> None:
        """Moves the statistics of blocks by their gradients; in every step, before a refresh.

        Args:
            statistics: of S stacks of blocks.
            grads: [S], [B, d_1 .. d_o], read only.
            scalars: of the segment; see :func:`of_blocks`.
        """

    def together(
        self, due: Sequence[FactorRows], hyper: Hyperparameters
    ) -> Sequence[Sequence[FactorRows]]:
        """What of all that is due one :meth:`refresh` is given: by default every stack by itself.

        Args:
            due: of one arena.
        """
        return [[rows] for rows in due]

    def refresh(
        self, rows: Sequence[TakenRows], hyper: Hyperparameters, scalars: Sequence[Scalars]
    ) -> None:
        """Renews what is dear, and sets ``ready`` of all rows; when it is due.

        What fails keeps what it had. If ``accepted`` of the scalars is a tensor, the host waits for
        nothing, and nothing changes where it is False.

        Args:
            rows: those that :meth:`together` has put together, each K factors of one size.
            scalars: for each of these, with a ``correction2`` for all its rows, or [K].
        """

    def apply(
        self,
        outs: Sequence[Tensor],
        norms: Sequence[Tensor],
        statistics: Sequence[Statistics],
        filtered: Sequence[Tensor],
        hyper: Hyperparameters,
        scalars: Scalars,
    ) -> None:
        """Computes the directions of blocks. No graft, and no mask: blocks that are not ready too.

        Args:
            outs: S stacks, [B, d_1 .. d_o], written.
            norms: [S], [B], written: the lengths of the blocks.
            statistics: [S], read only.
            filtered: [S], [B, d_1 .. d_o], the gradients or their averages, without bias
                correction.
            scalars: of the segment; see :func:`of_blocks`.
        """
        raise NotImplementedError(f"{self.name} has no direction of its own")


def of_blocks(number: Number, statistics: Statistics) -> Number:
    """A number of a segment as it concerns some of its blocks, each of which may have its own."""
    if isinstance(number, Tensor) and number.dim() > 0:
        return number[statistics.blocks]
    return number
