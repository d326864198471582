"""Cylinder3D: points to cylindrical voxels, an asymmetric sparse U-Net, scores of voxels (arXiv:2011.10033).

Submanifold convolutions come in pairs of flat kernels, one in the plane of azimuth and height, (1, 3, 3), one in that
of radius and height, (3, 1, 3). The published program gives the rulebooks of a block's convolutions one name although
their kernels differ, and spconv 1 then reuses the first: the released weights were trained, and give their scores, with
every submanifold convolution of a block looking where its first one looks. `kernel_mode` chooses between that and the
paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointcept_kd.host import InputError, kd
from pointcept_kd.ops.grid import Groups, Partition
from pointcept_kd.ops.sparse import (
    SparseConv3d,
    SparseConvTensor,
    SparseInverseConv3d,
    SparseModule,
    SubMConv3d,
)

from .layers import BatchNorm
from .voxels import (
    PointCells,
    VoxelScores,
    build_partition,
    encode_points,
    point_layers,
    voxel_groups,
)

KERNEL_MODES = ("intended", "as_released")
# The grid that the released weights of Cylinder3D were trained with.
PARTITION: dict[str, Any] = dict(
    low=(0.0, -3.1415926, -4.0), high=(50.0, 3.1415926, 2.0), shape=(480, 360, 32)
)
SLOPE = 0.01  # of the leaky ReLUs

Kernel = tuple[int, int, int]
# Declared kernels (radius, azimuth, height) of the convolutions that share a rulebook in the published program, by
# kind of block and in the order in which they run: the first one's kernel is the one that all of them execute there.
KERNELS: dict[str, dict[str, Kernel]] = {
    "downCntx": dict(conv1=(1, 3, 3), conv1_2=(3, 1, 3), conv2=(3, 1, 3), conv3=(1, 3, 3)),
    "resBlock": dict(conv1=(3, 1, 3), conv1_2=(1, 3, 3), conv2=(1, 3, 3), conv3=(3, 1, 3)),
    "upBlock": dict(conv1=(1, 3, 3), conv2=(3, 1, 3), conv3=(3, 3, 3)),
    "ReconNet": dict(conv1=(3, 1, 1), conv1_2=(1, 3, 1), conv1_3=(1, 1, 3)),
}


def block_kernels(block: str, kernel_mode: str) -> dict[str, Kernel]:
    """Kernels by convolution of a block such as `resBlock2`; empty for layers that have a rulebook of their own."""
    declared = KERNELS.get(block.rstrip("0123456789"), {})
    if kernel_mode == "intended" or not declared:
        return dict(declared)
    return dict.fromkeys(declared, next(iter(declared.values())))


def _conv(in_channels: int, out_channels: int, kernel: Kernel) -> SubMConv3d:
    return SubMConv3d(in_channels, out_channels, kernel, bias=False)


def _norm_of_act(x: SparseConvTensor, norm: nn.Module) -> SparseConvTensor:
    # Not in place: a tap may hold the output of the convolution.
    return x.replace_feature(norm(F.leaky_relu(x.features, SLOPE)))


class _TwoBranches(SparseModule):
    """The sum of two branches, each a pair of flat convolutions, in opposite order."""

    def __init__(self, in_channels: int, channels: int, kernels: Mapping[str, Kernel]) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, kernels["conv1"])
        self.bn0 = BatchNorm(channels)
        self.conv1_2 = _conv(channels, channels, kernels["conv1_2"])
        self.bn0_2 = BatchNorm(channels)
        self.conv2 = _conv(in_channels, channels, kernels["conv2"])
        self.bn1 = BatchNorm(channels)
        self.conv3 = _conv(channels, channels, kernels["conv3"])
        self.bn2 = BatchNorm(channels)

    def sum(self, x: SparseConvTensor) -> SparseConvTensor:
        """Same cells, `channels` features."""
        a = _norm_of_act(self.conv1(x), self.bn0)
        a = _norm_of_act(self.conv1_2(a), self.bn0_2)
        b = _norm_of_act(self.conv2(x), self.bn1)
        b = _norm_of_act(self.conv3(b), self.bn2)
        return a.replace_feature(a.features + b.features)


class ContextBlock(_TwoBranches):
    """The two branches at the finest level."""

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Same cells, `channels` features."""
        return self.sum(x)


class DownBlock(_TwoBranches):
    """The two branches, then a strided convolution; the inverse of the latter goes by `key`."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernels: Mapping[str, Kernel],
        stride: Kernel,
        key: str,
    ) -> None:
        super().__init__(in_channels, channels, kernels)
        self.pool = SparseConv3d(
            channels, channels, 3, stride=stride, padding=1, bias=False, indice_key=key
        )

    def forward(self, x: SparseConvTensor) -> tuple[SparseConvTensor, SparseConvTensor]:
        """The coarser cells, and the finer ones for the decoder."""
        skip = self.sum(x)
        return self.pool(skip), skip


class UpBlock(SparseModule):
    """Back to the cells before the strided convolution `key`; the skip is added, three convolutions follow."""

    def __init__(
        self, in_channels: int, channels: int, kernels: Mapping[str, Kernel], key: str
    ) -> None:
        super().__init__()
        self.trans_dilao = _conv(in_channels, channels, (3, 3, 3))
        self.trans_bn = BatchNorm(channels)
        self.up_subm = SparseInverseConv3d(channels, channels, 3, key, bias=False)
        self.conv1 = _conv(channels, channels, kernels["conv1"])
        self.bn1 = BatchNorm(channels)
        self.conv2 = _conv(channels, channels, kernels["conv2"])
        self.bn2 = BatchNorm(channels)
        self.conv3 = _conv(channels, channels, kernels["conv3"])
        self.bn3 = BatchNorm(channels)

    def forward(self, x: SparseConvTensor, skip: SparseConvTensor) -> SparseConvTensor:
        """Cells of `skip`, `channels` features."""
        x = self.up_subm(_norm_of_act(self.trans_dilao(x), self.trans_bn))
        x = x.replace_feature(x.features + skip.features)
        x = _norm_of_act(self.conv1(x), self.bn1)
        x = _norm_of_act(self.conv2(x), self.bn2)
        return _norm_of_act(self.conv3(x), self.bn3)


class AxisGates(SparseModule):
    """Features times the sum of three sigmoid gates, one per axis ("dimension-decomposition context")."""

    def __init__(self, channels: int, kernels: Mapping[str, Kernel]) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels, kernels["conv1"])
        self.bn0 = BatchNorm(channels)
        self.conv1_2 = _conv(channels, channels, kernels["conv1_2"])
        self.bn0_2 = BatchNorm(channels)
        self.conv1_3 = _conv(channels, channels, kernels["conv1_3"])
        self.bn0_3 = BatchNorm(channels)

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Same cells and width."""
        gates = self.bn0(self.conv1(x).features).sigmoid()
        gates = gates + self.bn0_2(self.conv1_2(x).features).sigmoid()
        gates = gates + self.bn0_3(self.conv1_3(x).features).sigmoid()
        return x.replace_feature(gates * x.features)


class PointEncoder(nn.Module):
    """Points to features of their voxels, see `encode_points`."""

    def __init__(self, in_channels: int, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.PPmodel, self.fea_compression = point_layers(in_channels, widths, widths[-1], channels)

    def forward(self, features: Tensor, groups: Groups) -> Tensor:
        """(m, channels) from the (n, in_channels) of the points."""
        return encode_points(self.PPmodel, self.fea_compression, features, groups)


class AsymmetricUNet(nn.Module):
    """The sparse part: voxel features to class scores of the same voxels.

    Args:
        in_channels: width of the voxel features.
        width: of the first block; the four levels have 2, 4, 8 and 16 times as many channels.
        num_classes: width of the result.
        kernel_mode: see `Cylinder3D`.
    """

    def __init__(self, in_channels: int, width: int, num_classes: int, kernel_mode: str) -> None:
        super().__init__()

        def kernels(block: str) -> dict[str, Kernel]:
            return block_kernels(block, kernel_mode)

        w = width
        self.downCntx = ContextBlock(in_channels, w, kernels("downCntx"))
        flat, cube = (2, 2, 1), (2, 2, 2)
        self.resBlock2 = DownBlock(w, 2 * w, kernels("resBlock2"), cube, "down2")
        self.resBlock3 = DownBlock(2 * w, 4 * w, kernels("resBlock3"), cube, "down3")
        self.resBlock4 = DownBlock(4 * w, 8 * w, kernels("resBlock4"), flat, "down4")
        self.resBlock5 = DownBlock(8 * w, 16 * w, kernels("resBlock5"), flat, "down5")
        self.upBlock0 = UpBlock(16 * w, 16 * w, kernels("upBlock0"), "down5")
        self.upBlock1 = UpBlock(16 * w, 8 * w, kernels("upBlock1"), "down4")
        self.upBlock2 = UpBlock(8 * w, 4 * w, kernels("upBlock2"), "down3")
        self.upBlock3 = UpBlock(4 * w, 2 * w, kernels("upBlock3"), "down2")
        self.ReconNet = AxisGates(2 * w, kernels("ReconNet"))
        self.logits = SubMConv3d(4 * w, num_classes, 3, bias=True)

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """(m, num_classes) at the cells of x."""
        d1, b1 = self.resBlock2(self.downCntx(x))
        d2, b2 = self.resBlock3(d1)
        d3, b3 = self.resBlock4(d2)
        d4, b4 = self.resBlock5(d3)
        u4 = self.upBlock0(d4, b4)
        u3 = self.upBlock1(u4, b3)
        u2 = self.upBlock2(u3, b2)
        u1 = self.upBlock3(u2, b1)
        u0 = self.ReconNet(u1)
        return self.logits(u0.replace_feature(torch.cat((u0.features, u1.features), dim=1)))


@kd.MODELS.register_module()
class Cylinder3D(nn.Module):
    """Cylinder3D, a voxel network that scores the occupied cells of a cylindrical grid.

    Takes a batch dict with `coord` (n, 3) in metres, `feat` (n, in_channels) that begins with the coordinates, and
    `offset`; returns `VoxelScores`. With the default sizes it has 55,853,366 parameters, of which the released weights
    use the 49,586,486 of `as_released`; keys are those of the released weights, which `tools/convert.py` converts.

    Tensors of every level can be tapped, in front of each path comes `cylinder_3d_spconv_seg.`; strides are along
    (radius, azimuth, height), channels those of width 32:

        resBlock2.pool  64, (2, 2, 2)        upBlock0  512, (8, 8, 4)
        resBlock3.pool  128, (4, 4, 4)       upBlock1  256, (4, 4, 4)
        resBlock4.pool  256, (8, 8, 4)       upBlock2  128, (2, 2, 2)
        resBlock5.pool  512, (16, 16, 4)     upBlock3  64, (1, 1, 1)
        logits  num_classes, (1, 1, 1)       ReconNet  64, (1, 1, 1), the layer before the classes

    Args:
        in_channels: width of `feat`.
        num_classes: width of the scores; 20 with class 0 for "unlabelled", as the released weights have.
        partition: the grid, `dict(low=..., high=..., shape=..., frame=..., spacing=...)`; by default that of the
            released weights. It belongs to the weights: under another one they see what they were not trained on.
        voxel_channels: width of a voxel's features.
        width: channels of the first sparse block; the deepest has 16 times as many.
        point_channels: widths of the layers over points; the last one is also that of the maximum over a voxel.
        kernel_mode: "intended" executes every kernel as the paper draws it and is what a new teacher should be trained
            with; "as_released" executes what the released weights were trained with, see the module's docstring. The
            weights of one have other shapes than those of the other, so neither loads in the other's place.

    Raises:
        InputError: for an unknown `kernel_mode`, sizes below 1, or a partition that is none.
    """

    def __init__(
        self,
        in_channels: int = 4,
        num_classes: int = 20,
        partition: Mapping[str, Any] | Partition | None = None,
        voxel_channels: int = 16,
        width: int = 32,
        point_channels: Sequence[int] = (64, 128, 256),
        kernel_mode: str = "intended",
    ) -> None:
        super().__init__()
        if kernel_mode not in KERNEL_MODES:
            raise InputError(f"kernel_mode={kernel_mode!r} is none of {', '.join(KERNEL_MODES)}")
        sizes = dict(num_classes=num_classes, voxel_channels=voxel_channels, width=width)
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name}={size}: at least 1")
        if not point_channels or min(point_channels) < 1:
            raise InputError(f"point_channels={tuple(point_channels)}: widths of at least 1")
        grid = build_partition(PARTITION if partition is None else partition)
        self.num_classes = num_classes
        self.kernel_mode = kernel_mode
        self.partition = PointCells(grid, in_channels)
        self.cylinder_3d_generator = PointEncoder(
            self.partition.out_channels, point_channels, voxel_channels
        )
        self.cylinder_3d_spconv_seg = AsymmetricUNet(
            voxel_channels, width, num_classes, kernel_mode
        )

    def forward(self, batch: Mapping[str, Any]) -> VoxelScores:
        """Scores of the occupied voxels, those in ascending order, and the voxel of every point."""
        points = self.partition(batch)
        grid = self.partition.partition
        groups, indices = voxel_groups(points, grid)
        voxels = SparseConvTensor(
            self.cylinder_3d_generator(points.features, groups),
            indices,
            grid.shape,
            points.batch_size,
        )
        scores = self.cylinder_3d_spconv_seg(voxels)
        return VoxelScores(scores.features, indices, groups.inverse)
