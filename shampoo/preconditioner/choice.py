"""Which kind moves a tensor, and how the tensor is cut for it (algorithm.md 3.1 to 3.4)."""

from collections.abc import Sequence

from shampoo.blocks.blocking import cut, merge_dims
from shampoo.blocks.cost import Cost
from shampoo.blocks.layout import AUTO, Geometry, Layout, affordable
from shampoo.preconditioner import KINDS
from shampoo.preconditioner.adagrad import AdaGrad
from shampoo.preconditioner.base import Preconditioner
from shampoo.preconditioner.grafted import Grafted


def layout_of(shape: Sequence[int], geometry: Geometry) -> Layout:
    """The layout of a tensor with at least one element, and the name of the kind that moves it."""
    limit = geometry.max_preconditioner_dim
    merged = merge_dims(shape, limit, geometry.merge_dims)
    is_vector = sum(size > 1 for size in shape) <= 1
    is_large = max(merged) > limit
    kind, sizes, diagonal = geometry.preconditioner, [limit] * len(merged), [False] * len(merged)
    if not geometry.precondition or (is_vector and not geometry.precondition_1d):
        kind = AdaGrad.name if geometry.grafting == "none" else Grafted.name
    elif is_large and geometry.large_dim_method == "adagrad":
        kind = AdaGrad.name
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
