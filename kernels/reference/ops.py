"""Every op in plain PyTorch: what it means, on any device.

A *segment* is a run of blocks that lie one after another in flat tensors of one dtype. A small CPU
table says where they come from:

``tiles`` ``[T, 2 + 4 K]`` int64, one row per tile, a tile being a grid of equal blocks of one
    tensor: ``source, offset, dims, start, grid, extent``, the last four of length K each (padded in
    front with 1, 0, 1, 1). ``dims`` is the merged shape of tensor ``source``; block ``g`` of the
    grid is the box of extent ``extent`` at ``start + g * extent`` in it, and the blocks lie in the
    segment from element ``offset`` on, row-major in the grid. Blocks count through the table.

Merged shapes are logical: tensors may have any strides, and are never asked for a view that can
fail. Shapes: B blocks, d_1 .. d_o the sizes of one block. A *number* may be a 0-d float64 tensor on
the device of the others, which is then read there, when a graph is replayed. Numbers that depend on
how many steps a block has taken (``correction1``, ``correction2``, ``step``) may also be [B], one
for each block that the table describes.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo.kernels.reference.philox import philox

Number = float | Tensor  # a tensor is float64 on the device, and never read on the host


_TINY = 1e-16  # keeps the ratio of two lengths finite where the preconditioned one is zero


def _read(number: Number) -> Number:
    """A number that the host may read without waiting, read: bits do not depend on where it was."""
    is_here = isinstance(number, Tensor) and number.dim() == 0 and number.device.type == "cpu"
    return float(number) if is_here else number


def _for_blocks(number: Number, blocks: slice, dtype: torch.dtype) -> Number:
    """A number as it enters into ``[count, size]`` elements of some blocks."""
    if isinstance(number, Tensor) and number.dim() == 1:
        return number[blocks].to(dtype)[:, None]
    return _read(number)


_TileRow = tuple[int, int, list[int], list[int], list[int], list[int]]


def _tile_rows(tiles: Tensor) -> Iterator[_TileRow]:
    order = (tiles.shape[1] - 2) // 4
    for source, offset, *box in tiles.tolist():
        dims, start, grid, extent = (box[i * order : (i + 1) * order] for i in range(4))
        yield source, offset, dims, start, grid, extent


def _blocks_of(merged: Tensor, start: list[int], grid: list[int], extent: list[int]) -> Tensor:
    """The tile as a strided view ``[*grid, *extent]`` of a tensor of the merged shape."""
    order = len(grid)
    for mode in range(order):
        merged = merged.narrow(mode, start[mode], grid[mode] * extent[mode])
    for mode in reversed(range(order)):
        merged = merged.unflatten(mode, (grid[mode], extent[mode]))  # type: ignore[no-untyped-call]
    return merged.permute(*range(0, 2 * order, 2), *range(1, 2 * order, 2))


def gather_blocks_(
    out: Tensor, sources: Sequence[Tensor], tiles: Tensor, alpha: Number, accumulate: bool
) -> None:
    """Copies the tiles into the segment: ``out <- alpha * blocks (+ out)``, in its dtype.

    ``alpha = 0`` stands for blocks of zeros, whatever they hold: a NaN times zero is no zero.

    Args:
        out: [N] float32 or float64, contiguous: the segment, written where a tile lies.
        sources: Tensors of any shape, strides and floating dtype, read.
        tiles: [T, 2 + 4 K] int64 on the CPU, the table of :mod:`shampoo.kernels.reference.ops`.
        alpha: The factor of the blocks.
        accumulate: Whether ``out`` is added to.

    """
    alpha = _read(alpha)
    is_nothing: Any = alpha == 0.0  # a tensor where alpha is one
    for rows, first, count, size in _runs(tiles):
        for source, offset, dims, start, grid, extent in rows:
            blocks = _blocks_of(sources[source].reshape(dims), start, grid, extent)
            region = out.narrow(0, offset, blocks.numel()).view(blocks.shape)
            if not accumulate:
                region.copy_(blocks)
            elif isinstance(alpha, Tensor):
                region.add_(torch.where(is_nothing, 0.0, blocks.to(out.dtype) * alpha))
            elif not is_nothing:
                region.add_(blocks.to(out.dtype), alpha=alpha)
        if accumulate:
            continue
        run = out[first : first + count * size]  # a tile at a time would be a launch for each
        if isinstance(alpha, Tensor):
            run.mul_(alpha).masked_fill_(is_nothing, 0.0)
        elif is_nothing:
            run.zero_()
        elif alpha != 1.0:
            run.mul_(alpha)


def magnitudes_(out: Tensor, tensors: Sequence[Tensor]) -> None:
    """``out[i] <- max |x|`` of every tensor: NaN or Inf if it holds one.

    Args:
        out: One float64 for each tensor, contiguous, written.
        tensors: Of any shape, strides and floating dtype, read; none is empty.

    """
    norms = torch._foreach_norm(list(tensors), ord=math.inf)
    out.copy_(torch.stack([norm.to(out.device) for norm in norms]))


def graft_moments_(
    grad: Tensor | None,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    direction: Tensor | None,
    norm: Tensor,
    sources: Sequence[Tensor],
    tiles: Tensor,
    alpha: Number,
    accumulate: bool,
    beta1: Number,
    correction1: Number,
    beta2: Number,
    weight2: Number,
    correction2: Number,
    eps: float,
    normalized: bool,
    ahead: Tensor | None = None,
) -> None:
    """Moves the moments by one gradient and measures the grafted direction D of every block.

    ``G <- alpha * blocks (+ grad)`` as in :func:`gather_blocks_`, and ``grad <- G`` if given;
    ``exp_avg <- beta1 exp_avg + (1 - beta1) G``, filtered = ``exp_avg / correction1`` (``G``
    where there is no ``exp_avg``); ``exp_avg_sq <- beta2 exp_avg_sq + weight2 G^2``, of the
    block scaled to norm 1 if ``normalized``; ``D = filtered / (sqrt(exp_avg_sq / correction2) +
    eps)`` (filtered where there is no ``exp_avg_sq``); ``norm[b] <- |D_b|``, and
    ``direction <- D`` if given; ``ahead <- beta1 exp_avg + (1 - beta1) G`` of the average that has
    moved, if given: what it will be when the same gradient comes again. A source may be ``grad`` or
    ``direction`` itself, if its blocks lie where they go to.

    Args:
        grad: [N] in the dtype of ``norm``, contiguous: read if ``accumulate``, written; or None.
        exp_avg: The same, read and written: the moving average of G (Kingma & Ba, 2015); or None.
        exp_avg_sq: The same, read and written: the second moment of G; or None.
        direction: The same, written; or None.
        norm: [B] float32 or float64, contiguous, written.
        sources: As in :func:`gather_blocks_`.
        tiles: As in :func:`gather_blocks_`.
        alpha: The factor of the blocks.
        accumulate: Whether the blocks are added to ``grad``.
        beta1: Decay of ``exp_avg``.
        correction1: What ``exp_avg`` is divided by, above 0; or [B] float64, one for each block.
        beta2: Decay of ``exp_avg_sq``.
        weight2: The weight of the new square.
        correction2: What ``exp_avg_sq`` is divided by, above 0; or [B] float64.
        eps: Added to the root of the second moment.
        normalized: Whether the square is that of the block at norm 1.
        ahead: As ``direction``, written, where there is an ``exp_avg``; or None.

    """
    runs = list(_runs(tiles))
    if not runs:
        return
    if grad is None:
        grad = norm.new_empty(max(start + count * size for _, start, count, size in runs))
    gather_blocks_(grad, sources, tiles, alpha, accumulate)
    beta1, beta2, weight2 = _read(beta1), _read(beta2), _read(weight2)
    block = 0
    for _, start, count, size in runs:
        rows = slice(block, block + count)
        region = slice(start, start + count * size)
        raw = grad[region].view(count, size)
        blocks = raw
        if exp_avg is not None:
            average, share = exp_avg[region].view(count, size), 1.0 - beta1
            average.lerp_(raw, share.to(raw.dtype) if isinstance(share, Tensor) else share)
            blocks = average / _for_blocks(correction1, rows, raw.dtype)
            if ahead is not None:
                # One rounding an operation: a lerp would round otherwise where a vector ends.
                moved = (raw - average).mul_(share).add_(average)
                ahead[region].view(count, size).copy_(moved)
        if exp_avg_sq is not None:
            if normalized:
                length = torch.linalg.vector_norm(raw, dim=1, keepdim=True, dtype=torch.float64)
                raw = torch.where(length > 0, raw / length.to(raw.dtype), torch.zeros_like(raw))
            square = exp_avg_sq[region].view(count, size)
            square.mul_(beta2)
            if isinstance(weight2, Tensor):
                square.addcmul_(raw * weight2, raw)
            else:
                square.addcmul_(raw, raw, value=weight2)
            corrected = square / _for_blocks(correction2, rows, raw.dtype)
            blocks = blocks / corrected.sqrt_().add_(eps)
        length = torch.linalg.vector_norm(blocks, dim=1, dtype=torch.float64)
        norm[rows].copy_(length)
        if direction is not None:
            direction[region].view(count, size).copy_(blocks)
        block += count


def _runs(tiles: Tensor) -> Iterator[tuple[list[_TileRow], int, int, int]]:
    """Tiles of blocks of one size that lie one after another, joined: they, start, count, size."""
    rows: list[_TileRow] = []
    start = count = size = 0
    for row in _tile_rows(tiles):
        offset, grid, extent = row[1], row[4], row[5]
        numel = math.prod(extent)
        if rows and (offset != start + count * size or numel != size):
            yield rows, start, count, size
            rows = []
        if not rows:
            start, size, count = offset, numel, 0
        rows.append(row)
        count += math.prod(grid)
    if rows:
        yield rows, start, count, size


def graft_scale_(
    scale: Tensor,
    norm: Tensor,
    length: Tensor | None,
    is_own: Tensor | None,
    correction: Number,
    grafted: bool,
    most: float,
    accepted: Tensor | None = None,
) -> None:
    """``scale <- norm / (length / correction + 1e-16) / correction``, 0 for what takes no step.

    The bias correction of the average from which a direction was made is a factor of it, and joins
    the scale. A block that follows the grafted direction has the scale 1. It is 0 for a block whose
    scaled direction would be longer than ``most``, or is NaN, and for all if ``accepted`` is False.

    Args:
        scale: [B] float32 or float64, contiguous, written.
        norm: [B] in the same dtype, read: the lengths of the grafted directions.
        length: The same, read: those of the blocks' own; or None, where all follow the grafted.
        is_own: [B] bool, read: which blocks go their own way; None for all.
        correction: What a direction is to be divided by, above 0; or [B] float64.
        grafted: Whether directions take the grafted length; else they keep their own.
        most: The length up to which a direction is kept.
        accepted: 0-d bool on the device, read: whether anything is to move; None for yes.

    """
    if length is None:
        found, reach = torch.ones_like(norm), norm
    else:
        divisor = correction.to(norm.dtype) if isinstance(correction, Tensor) else correction
        if grafted:
            found = norm / (length / divisor + _TINY) / divisor
        else:
            found = torch.ones_like(norm).mul_(1.0 / correction)
        reach = length
        if is_own is not None:
            found, reach = torch.where(is_own, found, 1.0), torch.where(is_own, length, norm)
    is_kept = found * reach <= most
    if accepted is not None:
        is_kept = is_kept & accepted
    scale.copy_(torch.where(is_kept, found, 0.0))


def _unfold(blocks: Tensor, mode: int) -> Tensor:
    """``mat_k``: ``[B, d_1 .. d_o] -> [B, d_k, rest]``; a copy only for a mode in the middle."""
    count, size = blocks.shape[0], blocks.shape[mode + 1]
    before, after = math.prod(blocks.shape[1 : mode + 1]), math.prod(blocks.shape[mode + 2 :])
    if after == 1:
        return blocks.reshape(count, before, size).mT
    return blocks.reshape(count, before, size, after).transpose(1, 2).reshape(count, size, -1)


def gram_ema_(
    factors: Sequence[Tensor],
    grads: Sequence[Tensor],
    modes: Sequence[int],
    beta: Number,
    weight: Number,
) -> None:
    """``A_k <- beta A_k + weight mat_k(G) mat_k(G)^T`` (Gupta et al., 2018), or its diagonal.

    Args:
        factors: S stacks of one dtype, [B, d_k, d_k], symmetric, or [B, d_k] for a diagonal mode,
            read and written; B and d differ from stack to stack.
        grads: [S], [B, d_1 .. d_o] in the dtype of the factors, read; one may occur several times.
        modes: [S], k, from 0.
        beta: Decay.
        weight: The weight of the new Gram matrix.

    """
    beta, weight = _read(beta), _read(weight)
    for factor, grad, k in zip(factors, grads, modes, strict=True):
        unfolded = _unfold(grad, k)
        if isinstance(weight, Tensor):
            diagonal = factor.dim() == 2
            gram = unfolded.square().sum(2) if diagonal else torch.bmm(unfolded, unfolded.mT)
            factor.mul_(beta).addcmul_(gram, weight.to(gram.dtype))
        elif factor.dim() == 2:
            factor.mul_(beta).add_(unfolded.square().sum(2), alpha=weight)
        else:
            factor.baddbmm_(unfolded, unfolded.mT, beta=float(beta), alpha=weight)


def precondition_(
    outs: Sequence[Tensor],
    norms: Sequence[Tensor],
    grads: Sequence[Tensor],
    roots: Sequence[Tensor | None],
) -> None:
    """``out <- G x_1 X_1 ... x_o X_o`` (Gupta et al., 2018) and ``norm[b] <- |out_b|``.

    Args:
        outs: S stacks, [B, d_1 .. d_o], all in the dtype of the blocks, contiguous, written; B, d
            and o differ from stack to stack.
        norms: [S], [B] in the same dtype, written.
        grads: [S], [B, d_1 .. d_o], read.
        roots: One for every mode of the first stack, then of the second and so on, read: [B, d_k,
            d_k] symmetric, [B, d_k] for a diagonal mode, or None for one that stays as it is.

    """
    modes, begin = sum(grad.dim() - 1 for grad in grads), 0
    if len(roots) != modes:
        raise ValueError(
            f"Invalid roots: {len(roots)}. Must be {modes}, one for each mode of grads."
        )
    for out, norm, grad in zip(outs, norms, grads, strict=True):
        end = begin + grad.dim() - 1
        _apply_roots(out, grad, roots[begin:end])
        norm.copy_(torch.linalg.vector_norm(out.view(len(out), -1), dim=1, dtype=torch.float64))
        begin = end


def _apply_roots(out: Tensor, grad: Tensor, roots: Sequence[Tensor | None]) -> None:
    """``out <- G x_1 X_1 ... x_o X_o`` of one stack."""
    count, order = grad.shape[0], grad.dim() - 1
    blocks = grad
    for mode, root in enumerate(roots):
        last = mode == order - 1
        if root is None:
            if last:
                out.copy_(blocks)
        elif root.dim() == 2:
            shape = [count] + [root.shape[1] if k == mode else 1 for k in range(order)]
            blocks = torch.mul(blocks, root.view(shape), out=out if last else None)
        elif last:
            rows = (count, -1, root.shape[1])
            torch.bmm(blocks.reshape(rows), root, out=out.view(rows))
        else:
            size, sizes = root.shape[1], blocks.shape
            before, after = math.prod(sizes[1 : mode + 1]), math.prod(sizes[mode + 2 :])
            product = torch.bmm(root, _unfold(blocks, mode))
            blocks = product.view(count, size, before, after).transpose(1, 2).reshape(sizes)


def eigh_(values: Tensor, vectors: Tensor, stack: Tensor) -> None:
    """Eigenvalues and eigenvectors of symmetric matrices; NaN where LAPACK gives up on one.

    Args:
        values: [B, n], written, ascending.
        vectors: [B, n, n], written, one a column.
        stack: [B, n, n] float32 or float64, symmetric, read.

    """
    try:
        torch.linalg.eigh(stack, out=(values, vectors))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if len(stack) == 1:
            values.fill_(torch.nan)
            vectors.fill_(torch.nan)
            return
        # Halving finds the failing matrices in few calls.
        middle = len(stack) // 2
        for half in (slice(None, middle), slice(middle, None)):
            eigh_(values[half], vectors[half], stack[half])


def update_blocks_(
    params: Sequence[Tensor],
    momentum: Tensor | None,
    direction: Tensor,
    scale: Tensor,
    tiles: Tensor,
    lr: Number,
    weight_decay: Number,
    mu: Number,
    nesterov: bool,
    seed: int | None = None,
    step: Number | None = 0.0,
) -> None:
    """Moves the parameters: ``P = scale[b] * direction``, then steps 8 to 10 of the algorithm.

    ``scale[b] = 0`` stands for a P of zeros, whatever the direction of the block holds.
    Without ``momentum``: ``W <- (1 - lr weight_decay) W - lr P``. With it: ``P <- P + weight_decay
    W``, ``M <- mu M + P``, ``W <- W - lr (P + mu M if nesterov else M)``. ``weight_decay`` is
    decoupled. Computed in the wider dtype of W and P; W is rounded once: to nearest, or if there is
    a ``seed``, and W is bfloat16, up or down at random with W as the mean. The random numbers
    depend on ``seed``, ``step``, a whole number, and the place in the segment alone.

    Args:
        params: Tensors of any shape, strides and floating dtype, read and written under the tiles.
        momentum: [N] in the dtype of ``direction``, contiguous, read and written; or None.
        direction: [N] float32 or float64, contiguous, read.
        scale: [B] in the dtype of ``direction``, read.
        tiles: As in :func:`gather_blocks_`; a tile's source is one of ``params``.
        lr: Learning rate.
        weight_decay: Decoupled from the gradient.
        mu: Decay of ``momentum``.
        nesterov: Whether the step looks ahead by ``mu M``.
        seed: Of stochastic rounding; None rounds to nearest.
        step: The count that random numbers depend on; or [B] float64, one for each block.

    """
    lr, weight_decay, mu = _read(lr), _read(weight_decay), _read(mu)
    kept, drawn = 1.0 - lr * weight_decay, 0.0 if step is None else step
    block = 0
    for rows, first, total, size in _runs(tiles):
        own = scale[block : block + total, None]
        # For all tiles of a run at once: a tile at a time would be launches for each.
        moves = direction[first : first + total * size].view(total, size) * own
        moves.masked_fill_(own == 0.0, 0.0)
        if momentum is None:
            moves.mul_(lr)
        moves = moves.view(-1)
        for source, offset, dims, start, grid, extent in rows:
            param, count = params[source], math.prod(grid)
            merged = param.reshape(dims)
            weight = _blocks_of(merged, start, grid, extent)
            numel = weight.numel()
            move = moves[offset - first : offset - first + numel].view(weight.shape)
            wide = weight.to(torch.promote_types(weight.dtype, move.dtype))
            if momentum is None:
                wide = (wide * kept).sub_(move)
            else:
                buffer = momentum[offset : offset + numel].view(weight.shape)
                along = momentum_direction(move, buffer, wide, weight_decay, mu, nesterov)
                wide = wide - lr * along
            if seed is not None and weight.dtype == torch.bfloat16:
                places = torch.arange(offset, offset + numel, device=weight.device)
                each = drawn
                if isinstance(drawn, Tensor) and drawn.dim() == 1:
                    each = drawn[block : block + count].repeat_interleave(numel // count)
                wide = _dithered(wide.float(), seed, each, places)
            weight.copy_(wide)
            if merged.untyped_storage().data_ptr() != param.untyped_storage().data_ptr():
                param.copy_(merged.view(param.shape))
            block += count


def momentum_direction(
    move: Tensor,
    buffer: Tensor,
    weight: Tensor | None,
    weight_decay: Number,
    mu: Number,
    nesterov: bool,
) -> Tensor:
    """D of steps 8 and 9: ``P <- P + weight_decay W``, ``M <- mu M + P``, D = M, or ``P + mu M``.

    Args:
        move: P, any shape, read.
        buffer: M, likewise, moved.
        weight: W, likewise, read; None without decay.
        weight_decay: Decoupled from the gradient.
        mu: Decay of M.
        nesterov: Whether the step looks ahead by ``mu M``.
    """
    if weight is not None:
        move = move + weight_decay * weight
    buffer.mul_(mu).add_(move)
    # In two roundings: addcmul_, or add_ with alpha, would make one of them.
    return move + mu * buffer if nesterov else buffer


def _dithered(wide: Tensor, seed: int, step: Number, places: Tensor) -> Tensor:
    """float32 values of which bfloat16 loses nothing: what it would lose decides, by chance."""
    high = step.long() if isinstance(step, Tensor) else int(step)  # one for all, or for each place
    words = philox(seed, high, places // 4).gather(1, places[:, None] % 4)
    bits = wide.view(torch.int32) + (words.view(wide.shape) & 0xFFFF).int()
    return torch.where(wide.isfinite(), (bits & ~0xFFFF).view(torch.float32), wide)
