"""The protocol of a kind: what it declares, and the four things that a step asks of it.

Shared by all kinds are the graft, masks, decay, momentum, the schedule of refreshes, sharding and
checkpoints. A kind is handed stacks, never single blocks: B blocks of one shape, or K factors of
one size, whose tensors it writes in place.
"""

from torch import Tensor

from shampoo.blocks.declared import Kind
from shampoo.blocks.segments import TakenRows
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
        self, statistics: Statistics, grad: Tensor, hyper: Hyperparameters, scalars: Scalars
    ) -> None:
        """Moves the statistics of B blocks by their gradients; in every step, before a refresh.

        Args:
            statistics: of the blocks.
            grad: [B, d_1 .. d_o], read only.
            scalars: of the segment; see :func:`of_blocks`.
        """

    def refresh(self, rows: TakenRows, hyper: Hyperparameters, scalars: Scalars) -> None:
        """Renews what is dear, for K factors of one size, and sets ``rows.ready``; when it is due.

        What fails keeps what it had. If ``scalars.accepted`` is a tensor, the host waits for
        nothing, and nothing changes where it is False.

        Args:
            scalars: with a ``correction2`` for all rows, or [K].
        """

    def apply(
        self,
        out: Tensor,
        norm: Tensor,
        statistics: Statistics,
        filtered: Tensor,
        hyper: Hyperparameters,
        scalars: Scalars,
    ) -> None:
        """Computes the direction of B blocks. No graft, and no mask: blocks that are not ready too.

        Args:
            out: [B, d_1 .. d_o], written.
            norm: [B], written: its length.
            statistics: of the blocks, read only.
            filtered: [B, d_1 .. d_o], the gradient or its average, without bias correction.
            scalars: of the segment; see :func:`of_blocks`.
        """
        raise NotImplementedError(f"{self.name} has no direction of its own")


def of_blocks(number: Number, statistics: Statistics) -> Number:
    """A number of a segment as it concerns some of its blocks, each of which may have its own."""
    if isinstance(number, Tensor) and number.dim() > 0:
        return number[statistics.blocks]
    return number
