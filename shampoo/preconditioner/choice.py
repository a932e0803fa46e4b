"""Which kind moves a tensor, and how the tensor is cut for it (algorithm.md 3.1 to 3.4)."""

from collections.abc import Sequence

from shampoo.blocks.blocking import cut, merge_dims
from shampoo.blocks.cost import Cost
from shampoo.blocks.layout import AUTO, Geometry, Layout, affordable
from shampoo.preconditioner import KINDS
from shampoo.preconditioner.adagrad import AdaGrad
from shampoo.preconditioner.base import Preconditioner
from shampoo.preconditioner.grafted import Grafted

LONG = "too long a side"


def why_plain(shape: Sequence[int], geometry: Geometry) -> str | None:
    """Why a tensor is not preconditioned, in words for a user; None if it is."""
    if not geometry.precondition:
        return "precondition=False"
    if not geometry.precondition_1d and sum(size > 1 for size in shape) <= 1:
        return "a vector"
    limit = geometry.max_preconditioner_dim
    if geometry.large_dim_method == "adagrad" and max(shape, default=1) > limit:
        return LONG  # merging makes no side longer than this that was not
    return None


def layout_of(shape: Sequence[int], geometry: Geometry) -> Layout:
    """The layout of a tensor with at least one element, and the name of the kind that moves it."""
    limit = geometry.max_preconditioner_dim
    merged = merge_dims(shape, limit, geometry.merge_dims)
    why = why_plain(shape, geometry)
    kind, sizes, diagonal = geometry.preconditioner, [limit] * len(merged), [False] * len(merged)
    if why is not None:
        is_grafted = why != LONG and geometry.grafting != "none"
        kind = Grafted.name if is_grafted else AdaGrad.name
    elif geometry.large_dim_method == "diagonal":
        sizes = [max(limit, size) for size in merged]
        diagonal = [size > limit for size in merged]
    elif geometry.large_dim_method == AUTO:
        sizes, diagonal = affordable(merged, limit, KINDS[kind].mode_numbers)
    return Layout(kind, tuple(cut(merged, sizes)), tuple(diagonal))


def kind_of(layout: Layout) -> Preconditioner:
    """The kind that moves a tensor."""
    return KINDS[layout.kind]


def cost_of(layout: Layout, extent: Sequence[int]) -> Cost:
    """The work of a block of a tensor, by its sides."""
    kind = KINDS[layout.kind]
    return kind.cost(extent, kind.modes(extent, layout.diagonal))
