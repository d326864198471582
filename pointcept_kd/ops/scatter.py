"""Reductions of rows that share a segment number: sum, mean, maximum, softmax, count.

`index` gives the segment of every row, in any order; `size` is the number of segments. A segment
without rows gives 0. Everything is differentiable in `values`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows handled at a time in the backward pass of the maximum, so that they stay in the cache.
_BLOCK = 4096
# Values handled at a time in the maximum of sorted rows, for the same reason.
_PIECE = 2**18


def _check(index: Tensor, size: int) -> None:
    """Refuse segment numbers outside 0 .. size - 1 (on CUDA the kernels refuse them)."""
    if index.is_cuda or not len(index):
        return
    low, high = (int(v) for v in torch.aminmax(index))
    if low < 0 or high >= size:
        raise ValueError(f"segment numbers must lie in 0 .. {size - 1}; found {low} .. {high}")


def segment_count(index: Int[Tensor, " n"], size: int) -> Int64[Tensor, " m"]:
    """Rows per segment, int64 (size,)."""
    _check(index, size)
    return torch.bincount(index, minlength=size)


def segment_sum(
    values: Float[Tensor, "n c"], index: Int[Tensor, " n"], size: int
) -> Float[Tensor, "m c"]:
    """Sum of the rows of each segment, (size, c)."""
    _check(index, size)
    return values.new_zeros((size, values.shape[1])).index_add(0, index, values)


def segment_mean(
    values: Float[Tensor, "n c"], index: Int[Tensor, " n"], size: int
) -> Float[Tensor, "m c"]:
    """Mean of the rows of each segment, (size, c)."""
    counts = segment_count(index, size).clamp_(min=1).unsqueeze(1)
    return segment_sum(values, index, size) / counts.to(values.dtype)


def _amax(values: Tensor, index: Tensor, size: int) -> Tensor:
    out = values.new_zeros((size, values.shape[1]))
    # The index is an expanded view: a materialised copy costs eight times as much.
    places = index.long().unsqueeze(1).expand(-1, values.shape[1])
    return out.scatter_reduce_(0, places, values, "amax", include_self=False)


class _SegmentMax(torch.autograd.Function):
    """Maximum per segment; equal maxima share the gradient, as in torch's own amax."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, size: int) -> Tensor:
        out = _amax(values, index, size)
        ctx.save_for_backward(values, index, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        values, index, out = ctx.saved_tensors
        # First the mask of the maxima, as 1.0 and 0.0, then, in its place, the gradient.
        d_values = torch.empty_like(values, memory_format=torch.contiguous_format)
        # A block's float32 sum of ones stays exact below 2 ** 24 of them.
        block = max(1, min(_BLOCK, 2**24 // max(1, values.shape[1])))
        length = max(1, len(values) if values.is_cuda else min(block, len(values)))
        buffer = values.new_empty((length, values.shape[1]))
        parts = [slice(begin, begin + length) for begin in range(0, len(values), length)]
        maxima = 0
        for part in parts:
            rows, mask = index[part], d_values[part]
            highest = torch.index_select(out, 0, rows, out=buffer[: len(rows)])
            torch.eq(values[part], highest, out=mask)
            if not values.is_cuda:
                maxima += int(mask.sum(dtype=torch.float32))
        # One maximum per occupied segment and channel: no ties, and the costly count is spared.
        # (On CUDA the question would make the device wait, and counting is cheap.)
        share = grad
        if values.is_cuda or bool(out.isnan().any()) or maxima != _occupied(index, out):
            ties = torch.zeros_like(out)
            for part in parts:
                ties.index_add_(0, index[part], d_values[part])
            # A NaN equals nothing: a NaN maximum has 0 ties here and hands NaN to its segment.
            share = grad / ties
        for part in parts:
            rows = index[part]
            d_values[part] *= torch.index_select(share, 0, rows, out=buffer[: len(rows)])
        return d_values, None, None


def _occupied(index: Tensor, out: Tensor) -> int:
    """Number of entries of `out` (m, c) that at least one row of `index` leads to."""
    return int(torch.bincount(index, minlength=len(out)).count_nonzero()) * out.shape[1]


def segment_max(
    values: Float[Tensor, "n c"], index: Int[Tensor, " n"], size: int
) -> Float[Tensor, "m c"]:
    """Maximum of the rows of each segment and channel, (size, c).

    Equal maxima share the gradient equally. A NaN makes the maximum of its segment NaN in that
    channel, and the gradient of every row of the segment NaN there, so that it cannot go unnoticed.
    Not twice differentiable.
    """
    _check(index, size)
    return _SegmentMax.apply(values, index, size)


def segment_softmax(
    values: Float[Tensor, "n c"], index: Int[Tensor, " n"], size: int
) -> Float[Tensor, "n c"]:
    """Softmax over the rows of each segment, per channel, (n, c).

    The maximum of the segment is subtracted first, so that large values do not overflow.
    """
    _check(index, size)
    with torch.no_grad():
        highest = _amax(values, index, size).index_select(0, index)
    weights = (values - highest).exp()
    return weights / segment_sum(weights, index, size).index_select(0, index)


def _array(values: Tensor) -> NDArray:
    """A CPU tensor as an array, half precision as float32, which is exact."""
    values = values.detach()
    return (values.float() if values.element_size() == 2 else values).numpy()


def _pieces(index: Tensor, counts: Tensor, channels: int) -> Iterator[tuple[slice, slice, NDArray]]:
    """Whole runs of rows, together small enough for the cache: the runs, their rows, and the run of each row from 0."""
    length = max(1, _PIECE // max(1, channels))
    ends, of_row = counts.cumsum(0).numpy(), index.numpy()
    first = begin = 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(ends, begin + length, side="right")))
        rows = slice(begin, int(ends[last - 1]))
        yield slice(first, last), rows, of_row[rows] - first
        first, begin = last, rows.stop


class _SortedSegmentMax(torch.autograd.Function):
    """Maximum per run of rows on a CPU; keeps one bit per value, which says whether it is the maximum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, counts: Tensor) -> Tensor:
        out = _amax(values, index, len(counts))
        bits = torch.empty((len(values), -(-values.shape[1] // 8)), dtype=torch.uint8)
        # The sum is NaN with any NaN, and with both infinities, where a closer look does no harm.
        look = bool(out.sum().isnan())
        tied, ties = [index[:0]], [torch.zeros(0, values.shape[1])]
        for runs, rows, place in _pieces(index, counts, values.shape[1]):
            highest = _array(out[runs])
            mask = _array(values[rows]) == np.take(highest, place, axis=0)
            bits.numpy()[rows] = np.packbits(mask, axis=1)
            maxima = int(counts[runs].count_nonzero()) * values.shape[1]
            if look or np.count_nonzero(mask) != maxima:
                winners = torch.zeros(highest.shape)
                winners.index_add_(0, index[rows] - runs.start, torch.from_numpy(mask).float())
                odd = (winners != 1).any(1).nonzero()[:, 0]
                tied.append(odd + runs.start)
                ties.append(winners[odd])
        ctx.save_for_backward(index, counts, bits, torch.cat(tied), torch.cat(ties))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, counts, bits, tied, ties = ctx.saved_tensors
        channels = grad.shape[1]
        share = grad.contiguous()
        if len(tied):
            # Nothing equals NaN: such a maximum has 0 winners, and times their mask the quotient is NaN.
            share = share.float() if share.element_size() == 2 else share.clone()
            share[tied] /= ties
        d_values = torch.empty((len(index), channels), dtype=grad.dtype)
        for runs, rows, place in _pieces(index, counts, channels):
            mask = np.unpackbits(bits.numpy()[rows], axis=1, count=channels).view(bool)
            of_row = np.take(_array(share[runs]), place, axis=0)
            with np.errstate(invalid="ignore"):
                if grad.element_size() == 2:
                    d_values[rows] = torch.from_numpy(mask * of_row)
                else:
                    np.multiply(mask, of_row, out=d_values.numpy()[rows])
        return d_values, None, None


def sorted_segment_max(
    values: Float[Tensor, "n c"], counts: Int64[Tensor, " m"]
) -> Float[Tensor, "m c"]:
    """Maximum of runs of neighbouring rows and of each channel, (m, c): the first `counts[0]` rows, the next, ...

    Equal maxima share the gradient equally, and NaN is passed on, both as in `segment_max`; a run without rows gives 0.
    Not twice differentiable.

    Raises:
        ValueError: for counts below 0, or that do not add up to n (on CUDA they are not looked at).
    """
    size = len(counts)
    index = torch.arange(size, device=counts.device)
    if counts.is_cuda:
        index = index.repeat_interleave(counts, output_size=len(values))
        return _SegmentMax.apply(values, index, size)
    least, total = (int(counts.min()), int(counts.sum())) if size else (0, 0)
    if least < 0 or total != len(values):
        raise ValueError(
            f"counts must be 0 or more and add up to {len(values)} rows; the least is {least}, the sum {total}"
        )
    index = index.repeat_interleave(counts)
    if torch.is_grad_enabled() and values.requires_grad:
        return _SortedSegmentMax.apply(values, index, counts)
    return _amax(values, index, size)
