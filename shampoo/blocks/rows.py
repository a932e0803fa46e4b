"""Some rows of a stack: views where they lie together, else copies that are put back."""

from torch import Tensor

Rows = Tensor | None  # [R] int64 on the device of the stack; None stands for all rows


def take(stack: Tensor, rows: Rows) -> Tensor:
    """The rows of a stack: itself, or a copy of some."""
    return stack if rows is None else stack.index_select(0, rows)


def put(stack: Tensor, rows: Rows, taken: Tensor) -> None:
    """Puts back what has become of rows that were taken."""
    if rows is not None:
        stack.index_copy_(0, rows, taken)
