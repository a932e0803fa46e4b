"""Some rows of a stack: views where they lie together, else copies that are put back."""

from collections.abc import Iterable, Mapping

from torch import Tensor

Rows = Tensor | None  # [R] int64 on the device of the stack; None stands for all rows


def take(stack: Tensor, rows: Rows) -> Tensor:
    """The rows of a stack: itself, or a copy of some."""
    return stack if rows is None else stack.index_select(0, rows)


def put(stack: Tensor, rows: Rows, taken: Tensor) -> None:
    """Puts back what has become of rows that were taken."""
    if rows is not None:
        stack.index_copy_(0, rows, taken)


class Copies(dict[str, Tensor]):
    """Copies of some rows of stacks, by name, each made when it is first asked for.

    Args:
        stacks: by name.
        rows: [R] int64 on their device.
    """

    def __init__(self, stacks: Mapping[str, Tensor], rows: Tensor) -> None:
        super().__init__()
        self._stacks = stacks
        self._rows = rows

    def __missing__(self, name: str) -> Tensor:
        copy = self[name] = self._stacks[name].index_select(0, self._rows)
        return copy

    def put_back(self, names: Iterable[str]) -> None:
        """Puts back what has become of those that were copied, among ``names``."""
        for name in names:
            if name in self:
                self._stacks[name].index_copy_(0, self._rows, self[name])
