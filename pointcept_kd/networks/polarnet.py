"""PolarNet: points to pillars of a polar grid, a 2-D U-Net over the bird's-eye view, scores of voxels.

Every point is encoded by itself, a pillar takes the maximum of its points, a U-Net runs over the dense map (radius,
azimuth), and the 64 channels of a pillar give the class scores of all its voxels. On a full circle the convolutions
wrap around in azimuth. A Cartesian partition makes it an ordinary pillar network.

Zhang et al., 2020, "PolarNet", arXiv:2003.14032; in the form that Jiang et al., 2023, arXiv:2304.11393, distil.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointcept_kd.host import InputError, kd
from pointcept_kd.ops.grid import Groups, Partition, merge_groups

from .voxels import (
    PointCells,
    VoxelScores,
    build_partition,
    encode_points,
    point_layers,
    voxel_groups,
)

PARTITION = dict(low=(3.0, -math.pi, -3.0), high=(50.0, math.pi, 1.5), shape=(480, 360, 32))
# Width of each level in multiples of the first.
LEVELS = (1, 2, 4, 8, 8)
SMALLEST = 32  # cells along an axis: the fourth halving still leaves two
SLOPE = 0.01


class RingConv(nn.Sequential):
    """Convolution 3x3, batch normalisation, leaky ReLU over (b, c, r, p), of the same size.

    In evaluation the normalisation is part of the convolution's weight.

    Args:
        ring: the last axis is a circle; otherwise zeros lie beyond its ends, as they do beyond those of the other.
    """

    def __init__(self, in_channels: int, out_channels: int, ring: bool) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=(1, 0 if ring else 1)),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(SLOPE),
        )
        self.ring = ring

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that does the work of both in evaluation."""
        conv, norm = self[0], self[1]
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = conv.weight * scale[:, None, None, None]
        return weight, (conv.bias - norm.running_mean) * scale + norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """(b, c_in, r, p) to (b, c_out, r, p)."""
        if self[1].training:
            return super().forward(torch.cat((x[..., -1:], x, x[..., :1]), 3) if self.ring else x)
        weight, bias = self.folded()
        y = F.conv2d(x, weight, bias, padding=1)
        if self.ring:
            # What the end columns missed by meeting zeros: cheaper than a copy of the map, though not to differentiate.
            y[..., :1] += F.conv2d(x[..., -1:], weight[..., :1], padding=(1, 0))
            y[..., -1:] += F.conv2d(x[..., :1], weight[..., 2:], padding=(1, 0))
        # In place where no gradient asks for what was there before.
        return F.leaky_relu(y, SLOPE, inplace=not y.requires_grad)


class DoubleConv(nn.Module):
    """Two `RingConv`."""

    def __init__(self, in_channels: int, out_channels: int, ring: bool) -> None:
        super().__init__()
        self.conv1 = RingConv(in_channels, out_channels, ring)
        self.conv2 = RingConv(out_channels, out_channels, ring)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c_in, r, p) to (b, c_out, r, p)."""
        return self.conv2(self.conv1(x))


class DropBlock(nn.Module):
    """Drop squares of a map while training, the same ones of all channels (arXiv:1810.12890).

    A cell is the middle of a dropped square with `probability / size ** 2`; what is left is scaled up so that the share
    of the dropped cells of the batch is made good.
    """

    def __init__(self, size: int = 7, probability: float = 0.5) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0 or not 0 <= probability < 1:
            raise InputError(
                f"drop_block=dict(size={size}, probability={probability}): expected an odd size and a "
                "probability from 0 to below 1"
            )
        self.size = size
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, r, p), of the same shape."""
        if not self.training or self.probability == 0:
            return x
        middles = torch.rand(x.shape[0], 1, *x.shape[2:], device=x.device)
        middles = (middles < self.probability / self.size**2).float()
        keep = 1 - F.max_pool2d(middles, self.size, stride=1, padding=self.size // 2)
        # A map without a cell left is 0, not NaN.
        return x * (keep * (keep.numel() / keep.sum().clamp(min=1))).to(x.dtype)

    def extra_repr(self) -> str:
        """Size and probability for `print(module)`."""
        return f"size={self.size}, probability={self.probability}"


class First(nn.Module):
    """Batch normalisation of the pillar map, then a `DoubleConv`."""

    def __init__(self, in_channels: int, out_channels: int, ring: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.BatchNorm2d(in_channels), DoubleConv(in_channels, out_channels, ring)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, c_in, r, p) to (b, c_out, r, p)."""
        return self.conv(x)


class Down(nn.Module):
    """Halve the map, rounding down, by the maximum of 2x2 cells, then a `DoubleConv`."""

    def __init__(self, in_channels: int, out_channels: int, ring: bool) -> None:
        super().__init__()
        self.mpconv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(in_channels, out_channels, ring))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c_in, r, p) to (b, c_out, r // 2, p // 2)."""
        return self.mpconv(x)


class Up(nn.Module):
    """Double the coarse map, put it behind the fine one's channels, then a `DoubleConv` and a `DropBlock`."""

    def __init__(
        self, in_channels: int, out_channels: int, ring: bool, drop_block: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.conv = DoubleConv(in_channels, out_channels, ring)
        self.drop_block = DropBlock(**drop_block)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """(b, c_1, r', p') and (b, c_2, r, p) to (b, c_out, r, p)."""
        x = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=True)
        high, wide = (f - c for f, c in zip(fine.shape[2:], x.shape[2:]))
        if high or wide:
            # What an odd size lost in halving comes back as zeros: the smaller half in front.
            x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        return self.drop_block(self.conv(torch.cat((fine, x), dim=1)))


class VoxelHead(nn.Module):
    """Linear layer from a pillar's channels to Z x K scores, channel z * K + c, as a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, r, p) to (b, Z * K, r, p), of every cell of the map."""
        return self.conv(x)

    def at(self, features: Tensor, pillar: Tensor, height: Tensor, heights: int) -> Tensor:
        """Scores (m, K) of voxels alone, each from its own slice of the weight.

        Args:
            features: (q, c), the map's rows.
            pillar: (m,) row in `features` of every voxel.
            height: (m,) z-cell of every voxel, 0 .. Z - 1.
            heights: Z.
        """
        order = torch.sort(height, stable=True).indices
        counts = torch.bincount(height, minlength=heights).tolist()
        weight = self.conv.weight.view(heights, -1, features.shape[1])
        slices = zip(
            features[pillar[order]].split(counts), weight, self.conv.bias.view(heights, -1)
        )
        scores = torch.cat([F.linear(*parts) for parts in slices])
        return torch.empty_like(scores).index_copy(0, order, scores)


class BirdsEyeUNet(nn.Module):
    """U-Net over a bird's-eye map: four halvings, four doublings, and the head.

    Its output is the last map; the head `outc` is the caller's, who knows which cells matter.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        base: int,
        ring: bool,
        drop_block: Mapping[str, Any],
    ) -> None:
        super().__init__()
        w = [base * level for level in LEVELS]
        self.inc = First(in_channels, w[0], ring)
        self.down1 = Down(w[0], w[1], ring)
        self.down2 = Down(w[1], w[2], ring)
        self.down3 = Down(w[2], w[3], ring)
        self.down4 = Down(w[3], w[4], ring)
        self.up1 = Up(w[4] + w[3], w[2], ring, drop_block)
        self.up2 = Up(w[2] + w[2], w[1], ring, drop_block)
        self.up3 = Up(w[1] + w[1], w[0], ring, drop_block)
        self.up4 = Up(w[0] + w[0], w[0], ring, drop_block)
        self.outc = VoxelHead(w[0], out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c_in, r, p) to (b, base, r, p)."""
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x = self.up1(self.down4(x4), x4)
        x = self.up2(x, x3)
        x = self.up3(x, x2)
        return self.up4(x, x1)


@kd.MODELS.register_module()
class PolarNet(nn.Module):
    """Points to pillars, a bird's-eye U-Net, and scores of the occupied voxels.

    Takes a batch dict with `coord`, `feat` (its first three columns are the coordinates) and `offset`, returns
    `VoxelScores` with a row per occupied voxel in ascending order. The usual place is the backbone of
    `kd.VoxelSegmentor`. The weights have the names and shapes of the published students: 163 entries,
    13,644,530 parameters with 20 classes.

    Maps to tap, tensors (b, c, R, P) with the sizes of the default arguments; shorter sides are rounded down:

        partition                          every point's scan and cell, and its 9 features
        BEV_model.network.down1            128 x 240 x 180
        BEV_model.network.down3            512 x 60 x 45
        BEV_model.network.up1              256 x 60 x 45, after DropBlock, as the next two
        BEV_model.network.up3              64 x 240 x 180
        BEV_model.network.up4              64 x 480 x 360, what the head reads
        BEV_model.network.outc             Z * K x 480 x 360, with `dense_head` alone

    Args:
        in_channels: width of `feat`.
        num_classes: K, a class "unlabelled" included where there is one.
        partition: the grid, see `ops.grid.Partition`; by default the published 480 x 360 x 32 cells of 3 to 50 m.
        point_channels: widths of the point encoder.
        compressed: channels of the pillar map.
        base: width of the U-Net's finest level.
        drop_block: `size` and `probability` of the dropped squares.
        max_points: in training at most so many random points of a pillar; 0 for all. In evaluation always all.
        dense_head: the head runs over all cells, so that its map can be tapped; costs Z * K channels of the full map.

    Raises:
        InputError: for arguments that make no network.
    """

    def __init__(
        self,
        in_channels: int = 4,
        num_classes: int = 20,
        partition: Mapping[str, Any] | Partition | None = None,
        point_channels: Sequence[int] = (64, 128, 256, 512),
        compressed: int = 32,
        base: int = 64,
        drop_block: Mapping[str, Any] | None = None,
        max_points: int = 256,
        dense_head: bool = False,
    ) -> None:
        super().__init__()
        grid = build_partition(PARTITION if partition is None else partition)
        if min(grid.shape[:2]) < SMALLEST:
            raise InputError(
                f"partition.shape={grid.shape}: four halvings need at least {SMALLEST} cells along the first two axes"
            )
        if num_classes < 1 or len(point_channels) < 2 or max_points < 0:
            raise InputError(
                f"num_classes={num_classes}, point_channels={tuple(point_channels)}, max_points={max_points}: expected "
                "at least one class, two widths, and 0 or more points"
            )
        unknown = set(drop_block or ()) - {"size", "probability"}
        if unknown:
            raise InputError(
                f"drop_block has {', '.join(sorted(unknown))}; it takes size and probability"
            )
        self.partition = PointCells(grid, in_channels)
        self.num_classes = num_classes
        self.max_points = max_points
        self.dense_head = dense_head
        self.PPmodel, self.fea_compression = point_layers(
            self.partition.out_channels, point_channels[:-1], point_channels[-1], compressed
        )
        network = BirdsEyeUNet(
            compressed, grid.shape[2] * num_classes, base, grid.full_circle, drop_block or {}
        )
        self.BEV_model = nn.ModuleDict({"network": network})

    @property
    def network(self) -> BirdsEyeUNet:
        """The U-Net."""
        network = self.BEV_model["network"]
        assert isinstance(network, BirdsEyeUNet)
        return network

    def forward(self, batch: Mapping[str, Any]) -> VoxelScores:
        """Scores of the occupied voxels."""
        bev, voxels, indices = self._map(batch)
        heights = self.partition.partition.shape[2]
        pillar, height = voxels.keys // heights, indices[:, 3]
        if self.dense_head:
            logits = _rows(self.network.outc(bev)).unflatten(1, (heights, -1))[pillar, height]
        else:
            logits = self.network.outc.at(_rows(bev), pillar, height, heights)
        return VoxelScores(logits, indices, voxels.inverse)

    def dense_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Scores (b, K, R, P, Z) of every voxel, occupied or not."""
        scores = self.network.outc(self._map(batch)[0])
        heights = self.partition.partition.shape[2]
        return scores.unflatten(1, (heights, self.num_classes)).permute(0, 2, 3, 4, 1)

    def _map(self, batch: Mapping[str, Any]) -> tuple[Tensor, Groups, Tensor]:
        """The last map (b, c, R, P), the points by voxel, and the voxels' indices (m, 4)."""
        grid = self.partition.partition
        points = self.partition(batch)
        voxels, indices = voxel_groups(points, grid)
        columns, _ = merge_groups(voxels, grid.shape[2])
        cap = self.max_points if self.training else 0
        features = encode_points(self.PPmodel, self.fea_compression, points.features, columns, cap)
        r, p, _ = grid.shape
        empty = features.new_zeros(points.batch_size * r * p, features.shape[1])
        # Channels are the last axis in memory, which convolutions on the CPU prefer.
        pillar_map = empty.index_copy(0, columns.keys, features).view(points.batch_size, r, p, -1)
        return self.network(pillar_map.permute(0, 3, 1, 2)), voxels, indices


def _rows(dense: Tensor) -> Tensor:
    """(b, c, r, p) as (b * r * p, c): the row of a pillar is its key."""
    return dense.permute(0, 2, 3, 1).flatten(0, 2)
