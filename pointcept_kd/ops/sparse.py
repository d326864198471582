"""Sparse 3D convolution in plain PyTorch: submanifold, strided and inverse, on CPU and CUDA.

All three are cross-correlations over occupied cells with weights (out, kx, ky, kz, in); the kernel
axes follow the columns x, y, z of the indices. The dense equivalent is `conv3d` with the weight
permuted to (out, in, kx, ky, kz).

* Submanifold (Graham, Engelcke & van der Maaten, 2018, arXiv:1711.10275): the output rows are the
  input rows, in the same order; the kernel is centred.
* Strided: an output cell `o` exists where a tap `t` and an occupied cell `c` meet,
  `o * stride + t - padding = c`; output rows are sorted by (batch, x, y, z).
* Inverse: undoes the cells of one strided convolution, found by its `indice_key`; the output rows
  are that convolution's input rows.

A convolution first makes a kernel map, the list of (input row, output row) pairs of each tap, and
then runs one matrix product per tap. LiDAR cells have some 6 of 26 neighbours, so gathering only
the pairs that exist beats building (n, 27 * in) rows. Maps depend on the cells alone; they are
kept with the cells and shared by every tensor derived with `replace_feature`.

Grids. `spatial_shape` bounds the cells to 0 .. shape - 1 and the output of a strided convolution to
`floor((shape + 2 * padding - kernel) / stride) + 1` as in dense convolution; `None` means an
unbounded grid. Cells may be negative in submanifold convolutions and, where the kernel equals the
stride without padding, in strided ones: the output cell is then `floor(c / stride)`, the tap
`c mod stride`, both rounded towards minus infinity.

Duplicate cells (two rows with the same batch, x, y, z). In a submanifold convolution the centre tap
of each row reads the row itself; every other tap reads the lowest row of the neighbouring cell. In
a strided convolution every row adds its share, and in an inverse one every row receives the value
of its cell. So no result depends on more than the order of the rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernel_map import Cells, KernelMap, Triple, triple
from .tap_convolution import tap_convolution


@dataclass(frozen=True)
class _Strided:
    """What a strided convolution leaves under its `indice_key`."""

    fine: Cells
    coarse: Cells
    geometry: tuple[Triple, Triple, Triple]
    pairs: KernelMap


class SparseConvTensor:
    """Features on occupied cells of a batched grid.

    features: float (n, c); indices: integer (n, 4), rows (batch, x, y, z); spatial_shape: number of
    cells along x, y, z, or None for an unbounded grid; batch_size: number of scans. Raises
    ValueError when shapes or types do not fit. Kernel maps are kept with the tensor and shared by
    the tensors that `replace_feature` and the convolutions make from it.
    """

    def __init__(
        self,
        features: Tensor,
        indices: Tensor,
        spatial_shape: Sequence[int] | Tensor | None,
        batch_size: int,
    ) -> None:
        if indices.dim() != 2 or indices.shape[1] != 4:
            raise ValueError(
                f"indices must have the shape (n, 4), rows (batch, x, y, z); got "
                f"{tuple(indices.shape)}"
            )
        if indices.is_floating_point() or indices.dtype == torch.bool:
            raise ValueError(f"indices must be integers; got {indices.dtype}")
        if features.dim() != 2 or len(features) != len(indices):
            raise ValueError(
                f"features must have the shape ({len(indices)}, channels), one row per index; got "
                f"{tuple(features.shape)}"
            )
        shape = None
        if spatial_shape is not None:
            shape = triple([int(s) for s in spatial_shape], "spatial_shape", 1)
        self.features = features
        self._cells = Cells(indices, shape, int(batch_size))
        self._strided: dict[str, _Strided] = {}

    @property
    def indices(self) -> Tensor:
        """Integer (n, 4): batch, x, y, z of every row."""
        return self._cells.indices

    @property
    def spatial_shape(self) -> Triple | None:
        """Cells along x, y, z; None for an unbounded grid."""
        return self._cells.shape

    @property
    def batch_size(self) -> int:
        """Number of scans."""
        return self._cells.batch_size

    def replace_feature(self, features: Tensor) -> "SparseConvTensor":
        """The same cells with other features (n, c'); kernel maps are shared."""
        if features.dim() != 2 or len(features) != len(self.indices):
            raise ValueError(
                f"features must have the shape ({len(self.indices)}, channels), one row per index; "
                f"got {tuple(features.shape)}"
            )
        return self._derive(features, self._cells)

    def _derive(self, features: Tensor, cells: Cells) -> "SparseConvTensor":
        tensor = object.__new__(SparseConvTensor)
        tensor.features = features
        tensor._cells = cells
        tensor._strided = self._strided
        return tensor

    def dense(self) -> Tensor:
        """A dense (batch_size, c, X, Y, Z) tensor, zero where no cell is; duplicates are added."""
        shape = self.spatial_shape
        if shape is None:
            raise ValueError("dense() needs a spatial_shape; this tensor's grid is unbounded")
        b, x, y, z = self.indices.long().unbind(1)
        sizes = torch.tensor((self.batch_size, *shape), device=self.indices.device)
        if bool(((self.indices < 0) | (self.indices >= sizes)).any()):
            raise ValueError(f"dense() needs cells inside spatial_shape {shape}; some lie outside")
        grid = self.features.new_zeros((self.batch_size, *shape, self.features.shape[1]))
        return grid.index_put((b, x, y, z), self.features, accumulate=True).permute(0, 4, 1, 2, 3)


def submanifold_conv(
    x: SparseConvTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int | Sequence[int] = 1,
) -> SparseConvTensor:
    """Submanifold convolution: weight (o, kx, ky, kz, i) with odd kernel axes; rows stay."""
    kernel = _check(x, weight)
    if any(k % 2 == 0 for k in kernel):
        raise ValueError(f"a submanifold kernel must be odd along each axis; got {kernel}")
    step = triple(dilation, "dilation", 1)
    if kernel == (1, 1, 1):
        dtype = torch.promote_types(x.features.dtype, weight.dtype)
        with torch.autocast(x.features.device.type, enabled=False):
            matrix = weight.flatten(1).to(dtype)
            added = None if bias is None else bias.to(dtype)
            return x.replace_feature(F.linear(x.features.to(dtype), matrix, added))
    pairs = x._cells.submanifold(kernel, step)
    return x.replace_feature(tap_convolution(x.features, weight, bias, pairs))


def strided_conv(
    x: SparseConvTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    indice_key: str | None = None,
) -> SparseConvTensor:
    """Strided convolution onto new, sorted rows; its map is kept under `indice_key`.

    Raises ValueError when `indice_key` already names a convolution of other cells or geometry.
    """
    kernel = _check(x, weight)
    geometry = (kernel, triple(stride, "stride", 1), triple(padding, "padding", 0))
    made = x._strided.get(indice_key) if indice_key is not None else None
    if made is None:
        coarse, pairs = x._cells.strided(*geometry)
        made = _Strided(x._cells, coarse, geometry, pairs)
        if indice_key is not None:
            x._strided[indice_key] = made
    elif made.fine is not x._cells or made.geometry != geometry:
        raise ValueError(
            f"indice_key {indice_key!r} already names a strided convolution of other cells or of "
            f"another kernel, stride, padding {made.geometry}; give this one a key of its own"
        )
    return x._derive(tap_convolution(x.features, weight, bias, made.pairs), made.coarse)


def inverse_conv(
    x: SparseConvTensor, weight: Tensor, bias: Tensor | None, indice_key: str
) -> SparseConvTensor:
    """Back onto the rows that the strided convolution `indice_key` started from.

    For kernel = stride the value at a fine cell p is W[p mod stride] times the feature of the
    coarse cell floor(p / stride). Raises ValueError for an unknown key, another kernel size, or
    an input that is not on the cells of that convolution's output.
    """
    kernel = _check(x, weight)
    made = x._strided.get(indice_key)
    if made is None:
        known = ", ".join(sorted(x._strided)) or "none"
        raise ValueError(
            f"no strided convolution ran under indice_key {indice_key!r}; known: {known}"
        )
    if made.geometry[0] != kernel:
        raise ValueError(
            f"the inverse of {indice_key!r} needs its kernel {made.geometry[0]}; got {kernel}"
        )
    if x._cells is not made.coarse:
        raise ValueError(f"the input of the inverse of {indice_key!r} is not on its output cells")
    features = tap_convolution(x.features, weight, bias, made.pairs.swapped())
    return x._derive(features, made.fine)


def _check(x: SparseConvTensor, weight: Tensor) -> Triple:
    if weight.dim() != 5:
        raise ValueError(f"weight must be (out, kx, ky, kz, in); got {tuple(weight.shape)}")
    if x.features.shape[1] != weight.shape[4]:
        raise ValueError(
            f"the convolution takes {weight.shape[4]} channels; the tensor has "
            f"{x.features.shape[1]}"
        )
    return (weight.shape[1], weight.shape[2], weight.shape[3])


class SparseModule(nn.Module):
    """Marks modules that take and return a `SparseConvTensor`."""


class _Convolution(SparseModule):
    """Weight (out, kx, ky, kz, in) and bias (out,), uniform within 1 / sqrt(in * kx * ky * kz)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        bias: bool,
        indice_key: str | None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = triple(kernel_size, "kernel_size", 1)
        self.indice_key = indice_key
        self.weight = nn.Parameter(torch.empty(out_channels, *self.kernel_size, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew."""
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def taps(self) -> Tensor:
        """The weight as the functions take it, (out, kx, ky, kz, in).

        spconv (2.3) reads the numbers of a 1 x 1 x 1 weight as a matrix (in, out), although its shape
        says (out, 1, 1, 1, in). Weights trained there only mean the same here if they are read alike.
        """
        if self.kernel_size != (1, 1, 1):
            return self.weight
        matrix = self.weight.reshape(self.in_channels, self.out_channels)
        return matrix.t().reshape(self.weight.shape)

    def extra_repr(self) -> str:
        """Sizes for `print(module)`."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        text += "" if self.bias is not None else ", bias=False"
        return text + ("" if self.indice_key is None else f", indice_key={self.indice_key!r}")


class SubMConv3d(_Convolution):
    """Submanifold convolution with an odd kernel; rows stay as they are.

    `padding` and `indice_key` are accepted for the signature's sake: the kernel is always centred,
    and maps are shared by cells and kernel, not by name.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        bias: bool = True,
        indice_key: str | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias, indice_key)
        if any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(
                f"a submanifold kernel must be odd along each axis; got {self.kernel_size}"
            )
        if triple(stride, "stride", 1) != (1, 1, 1):
            raise ValueError(f"a submanifold convolution has stride 1; got {stride}")
        triple(padding, "padding", 0)
        self.dilation = triple(dilation, "dilation", 1)

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Convolve."""
        return submanifold_conv(x, self.taps(), self.bias, self.dilation)


class SparseConv3d(_Convolution):
    """Strided convolution; `indice_key` names its map for a `SparseInverseConv3d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        bias: bool = True,
        indice_key: str | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias, indice_key)
        self.stride = triple(stride, "stride", 1)
        self.padding = triple(padding, "padding", 0)

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Convolve."""
        weight = self.taps() if self.stride == (1, 1, 1) else self.weight
        return strided_conv(x, weight, self.bias, self.stride, self.padding, self.indice_key)


class SparseInverseConv3d(_Convolution):
    """Back to the rows before the strided convolution with the same `indice_key`."""

    indice_key: str

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        indice_key: str,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias, indice_key)

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Convolve."""
        return inverse_conv(x, self.weight, self.bias, self.indice_key)


class SparseSequential(nn.Sequential, SparseModule):
    """`nn.Sequential` over sparse tensors: other modules are applied to the features alone."""

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Apply the modules in turn."""
        for module in self:
            if isinstance(module, SparseModule):
                x = module(x)
            else:
                x = x.replace_feature(module(x.features))
        return x
