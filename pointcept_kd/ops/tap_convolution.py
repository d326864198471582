"""Convolution along a kernel map: gather, multiply and add, one tap of the kernel at a time.

The centre of a submanifold kernel is one dense product. Every other tap gathers the input rows that
meet an output row, multiplies them, and adds the products in place. Rows are handled in blocks that
stay in the cache, and large float32 products on CPU go to oneDNN (see `backend`).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import onednn_linear
from .kernel_map import KernelMap

# Rows that are gathered, multiplied and added at a time: what they need stays in the cache.
_BLOCK = 8192
# oneDNN compiles a kernel for every new number of rows, so it is shown multiples of this only.
_GRAIN = 256
# Multiplications, and entries of a sum of outer products, from which oneDNN is the faster one.
_LEAST_PRODUCT = 1_000_000
_LEAST_OUTER = 8192


def _block(pairs: KernelMap) -> int:
    """Pairs to handle at a time: on CUDA a whole tap, as each step there costs a launch."""
    longest = max(pairs.counts)
    return max(1, longest if pairs.src.is_cuda else min(_BLOCK, longest))


def _blocks(pairs: KernelMap) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(tap, rows of the input, rows of the output), one tap's pairs block by block."""
    start, block = 0, _block(pairs)
    for tap, count in enumerate(pairs.counts):
        stop = start + count
        for begin in range(start, stop, block):
            part = slice(begin, min(begin + block, stop))
            yield tap, pairs.src[part], pairs.dst[part]
        start = stop


class _Rows:
    """Blocks of rows gathered from a matrix (n, c) into one buffer, and products with them."""

    def __init__(self, matrix: Tensor, block: int) -> None:
        self.matrix = matrix
        self.buffer = matrix.new_zeros((_grains(block), matrix.shape[1]))
        fast = matrix.dtype == torch.float32 and matrix.device.type == "cpu"
        self.linear: Callable[[Tensor, Tensor], Tensor] | None = onednn_linear() if fast else None

    def gather(self, rows: Tensor) -> Tensor:
        """The rows; they stay valid until the next call. Zeros follow, up to the next grain."""
        count = len(rows)
        if self.linear is not None:
            self.buffer[count : _grains(count)].zero_()
        return torch.index_select(self.matrix, 0, rows, out=self.buffer[:count])

    def times(self, count: int, kernel: Tensor) -> Tensor:
        """The first `count` rows of the buffer by kernel (o, c), transposed."""
        if (
            self.linear is not None
            and count * kernel.numel() > _LEAST_PRODUCT
            and 2 * count > _GRAIN
        ):
            return self.linear(self.buffer[: _grains(count)], kernel)[:count]
        return torch.mm(self.buffer[:count], kernel.t())

    def add_outer(self, total: Tensor, count: int, other: "_Rows") -> None:
        """Add to total (c, other c) the sum over `count` gathered rows of their outer products."""
        if self.linear is not None and total.numel() > _LEAST_OUTER and 2 * count > _GRAIN:
            padded = _grains(count)
            total += self.linear(self.buffer[:padded].t(), other.buffer[:padded].t())
        else:
            total.addmm_(self.buffer[:count].t(), other.buffer[:count])

    def all_times(self, kernel: Tensor) -> Tensor:
        """The whole matrix by kernel (o, c), transposed."""
        count = len(self.matrix)
        if self.linear is None or count * kernel.numel() <= _LEAST_PRODUCT:
            return torch.mm(self.matrix, kernel.t())
        out = self.matrix.new_empty((count, len(kernel)))
        whole = count // _GRAIN * _GRAIN
        for begin in range(0, whole, _BLOCK):
            part = slice(begin, min(begin + _BLOCK, whole))
            out[part] = self.linear(self.matrix[part], kernel)
        torch.mm(self.matrix[whole:], kernel.t(), out=out[whole:])
        return out

    def all_outer(self, total: Tensor, other: "_Rows") -> None:
        """Add to total (c, other c) the sum over all rows of their outer products."""
        if self.linear is None or total.numel() <= _LEAST_OUTER:
            total.addmm_(self.matrix.t(), other.matrix)
            return
        whole = len(self.matrix) // _GRAIN * _GRAIN
        for begin in range(0, whole, _BLOCK):
            part = slice(begin, min(begin + _BLOCK, whole))
            total += self.linear(self.matrix[part].t(), other.matrix[part].t())
        total.addmm_(self.matrix[whole:].t(), other.matrix[whole:])


def _grains(count: int) -> int:
    return -(-count // _GRAIN) * _GRAIN


class _TapConvolution(torch.autograd.Function):
    """Sum over taps of gather, matrix product and scatter; features (n, i), weight (o, taps, i).

    Within one tap every output row of a submanifold map occurs once. Backward gathers once more
    instead of keeping the gathered rows, which would be some six times the features.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, pairs: KernelMap) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.pairs = pairs
        kernels = weight.transpose(0, 1).contiguous()
        rows = _Rows(features, _block(pairs))
        if pairs.centre >= 0:
            out = rows.all_times(kernels[pairs.centre])
        else:
            out = features.new_zeros((pairs.n_out, weight.shape[0]))
        for tap, src, dst in _blocks(pairs):
            rows.gather(src)
            out.index_add_(0, dst, rows.times(len(src), kernels[tap]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        features, weight = ctx.saved_tensors
        pairs = ctx.pairs
        need_features, need_weight, _ = ctx.needs_input_grad
        # The caller may run backward under autocast; the products stay in the features' type.
        with torch.autocast(features.device.type, enabled=False):
            grad = grad.contiguous()
            block = _block(pairs)
            of_grad, of_features = _Rows(grad, block), _Rows(features, block)
            d_features = d_weight = None
            if need_weight:
                d_kernels = weight.new_zeros((weight.shape[1], weight.shape[0], weight.shape[2]))
                d_weight = d_kernels.transpose(0, 1)
                if pairs.centre >= 0:
                    of_grad.all_outer(d_kernels[pairs.centre], of_features)
            if need_features:
                kernels = weight.permute(1, 2, 0).contiguous()
                if pairs.centre >= 0:
                    d_features = of_grad.all_times(kernels[pairs.centre])
                else:
                    d_features = torch.zeros_like(features)
            for tap, src, dst in _blocks(pairs):
                of_grad.gather(dst)
                if need_weight:
                    of_features.gather(src)
                    of_grad.add_outer(d_kernels[tap], len(src), of_features)
                if d_features is not None:
                    d_features.index_add_(0, src, of_grad.times(len(src), kernels[tap]))
        return d_features, d_weight, None


def tap_convolution(
    features: Tensor, weight: Tensor, bias: Tensor | None, pairs: KernelMap
) -> Tensor:
    """Convolve rows along a kernel map.

    features (n_in, i), weight (o, kx, ky, kz, i), bias (o,) or None; returns (n_out, o). Half and
    bfloat16 features, as autocast makes them, are first cast to the weight's type: a sum over some
    hundred products in float32 costs no more on CPU and loses nothing. Not twice differentiable.
    """
    dtype = torch.promote_types(features.dtype, weight.dtype)
    with torch.autocast(features.device.type, enabled=False):
        out = _TapConvolution.apply(features.to(dtype), weight.flatten(1, 3).to(dtype), pairs)
        return out if bias is None else out.add_(bias)
