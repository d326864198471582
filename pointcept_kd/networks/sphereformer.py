"""SphereFormer (arXiv:2303.12766): a sparse U-Net with cubic and spherical window attention at every level.

Pre-activation residual blocks of 3 x 3 x 3 convolutions, between the levels 2 x 2 x 2 ones; behind the encoder's blocks
of each level, the finest included, one `SphereFormerBlock`. The decoder appends what comes up behind the level's own
features. A token of the finest level is where `coord` says, one of a coarser level at the mean of those it was made of.

Cells have no bounds. The released code bounds the grid at the largest cell, which leaves the last layer of cells of an
axis of odd length out of the coarser levels. State-dict keys and layouts are those of the released weights.

    data set        voxel     spherical windows     angle_factor
    nuScenes        0.1 m     2, 2 deg, 120 m       2
    SemanticKITTI   0.05 m    2, 2 deg, 80 m        1.5
    Waymo           0.1 m     1.5, 1.5 deg, 80 m    1.5
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pointcept_kd.host import InputError, kd
from pointcept_kd.host.point import Point
from pointcept_kd.ops.scatter import segment_mean
from pointcept_kd.ops.sparse import (
    SparseConv3d,
    SparseConvTensor,
    SparseInverseConv3d,
    SparseModule,
    SparseSequential,
    SubMConv3d,
)

from .layers import BatchNorm, Linear, check_features, ramp
from .point_voxel_unet import rows_above, sparse_batch
from .window_attention import SphereFormerBlock, window_plan

CHANNELS = (32, 64, 128, 256, 256)
# Rates of stochastic depth are spread over seven places; level l takes the l-th.
_PLACES = 7


def _norm(channels: int) -> BatchNorm:
    return BatchNorm(channels, eps=1e-4, momentum=0.1)


class _Residual(SparseModule):
    """conv(relu(bn(conv(relu(bn x))))) + x, or + a 1 x 1 x 1 convolution of x where the width changes."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.i_branch = SparseSequential(
            nn.Identity()
            if in_channels == channels
            else SubMConv3d(in_channels, channels, 1, bias=False)
        )
        self.conv_branch = SparseSequential(
            _norm(in_channels),
            nn.ReLU(),
            SubMConv3d(in_channels, channels, 3, bias=False),
            _norm(channels),
            nn.ReLU(),
            SubMConv3d(channels, channels, 3, bias=False),
        )

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Same cells, `channels` features."""
        out = self.conv_branch(x)
        return out.replace_feature(out.features + self.i_branch(x).features)


def _residuals(in_channels: int, channels: int, depth: int) -> SparseSequential:
    stage = SparseSequential()
    for i in range(depth):
        stage.add_module(f"block{i}", _Residual(channels if i else in_channels, channels))
    return stage


class _Level(nn.Module):
    """One level of the U with all those below it inside."""

    def __init__(
        self,
        channels: Sequence[int],
        depth: int,
        blocks: Sequence[SphereFormerBlock],
        number: int,
    ) -> None:
        super().__init__()
        width = channels[0]
        self.blocks = _residuals(width, width, depth)
        self.transformer_block = blocks[0]
        self.u = None
        if len(channels) > 1:
            key = f"down{number}"
            self.conv = SparseSequential(
                _norm(width),
                nn.ReLU(),
                SparseConv3d(width, channels[1], 2, stride=2, bias=False, indice_key=key),
            )
            self.u = _Level(channels[1:], depth, blocks[1:], number + 1)
            self.deconv = SparseSequential(
                _norm(channels[1]),
                nn.ReLU(),
                SparseInverseConv3d(channels[1], width, 2, key, bias=False),
            )
            self.blocks_tail = _residuals(2 * width, width, depth)

    def forward(self, x: SparseConvTensor, xyz: Tensor) -> SparseConvTensor:
        """Same cells and width; xyz (n, 3) are the tokens' positions."""
        x = self.blocks(x)
        batch = x.indices[:, 0].long()
        x = x.replace_feature(self.transformer_block(x.features, xyz, batch))
        if self.u is None:
            return x
        below = self.conv(x)
        above = rows_above(x.indices, below.indices)
        below = self.u(below, segment_mean(xyz, above, len(below.indices)))
        up = self.deconv(below)
        return self.blocks_tail(x.replace_feature(torch.cat([x.features, up.features], 1)))


@kd.MODELS.register_module()
class SphereFormer(nn.Module):
    """The published network; 32,311,616 / 32,311,715 / 32,311,814 parameters with 16 / 19 / 22 classes.

    Takes a batch dict with `grid_coord` (n, 3) integers, one row per voxel, `coord` (n, 3) metres, `feat` (n,
    in_channels; published means of x, y, z, intensity in the voxel) and `offset` (b,). Returns (n, num_classes), or
    (n, channels[0]) if `num_classes` is 0; rows in input order.

    Args:
        in_channels: width of `feat`.
        num_classes: width of the head; 0 for none.
        channels: widths of the levels from fine to coarse, as many as there are levels; at most seven.
        depth: residual blocks per level, in encoder and decoder.
        head_size: channels per attention head.
        voxel_size: edge of a voxel, metres; the finest level's cubic windows are six of them.
        spherical: the finest level's spherical windows: theta, beta in degrees, r in metres.
        cubic_factor, angle_factor: what cubic windows, and theta and beta, grow by from level to level.
        drop_path: end of the ramp of stochastic depth over seven places, of which level l takes the l-th.
        origin, wrap, method, enable_flash: as `SphereFormerBlock`.

    Raises:
        InputError: for sizes that do not fit and unknown names.
    """

    def __init__(
        self,
        in_channels: int = 4,
        num_classes: int = 16,
        channels: Sequence[int] = CHANNELS,
        depth: int = 2,
        head_size: int = 16,
        voxel_size: float = 0.1,
        spherical: Sequence[float] = (2.0, 2.0, 120.0),
        cubic_factor: float = 2.0,
        angle_factor: float = 2.0,
        drop_path: float = 0.3,
        origin: str = "min",
        wrap: bool = False,
        method: str = "buckets",
        enable_flash: bool = False,
    ) -> None:
        super().__init__()
        channels = tuple(channels)
        if not 1 <= len(channels) <= _PLACES:
            raise InputError(f"channels={channels}: expected 1 to {_PLACES} levels")
        if min(in_channels, depth, *channels) < 1 or num_classes < 0:
            raise InputError(
                f"in_channels={in_channels}, num_classes={num_classes}, channels={channels}, depth={depth}: all sizes "
                "must be at least 1, num_classes at least 0"
            )
        if not 0 <= drop_path < 1:
            raise InputError(f"drop_path={drop_path}: expected 0 or more and below 1")
        if not voxel_size > 0:
            raise InputError(f"voxel_size={voxel_size}: expected metres above 0")
        self.in_channels = in_channels
        plan = window_plan(len(channels), 6 * voxel_size, spherical, cubic_factor, angle_factor)
        blocks = [
            SphereFormerBlock(
                width,
                head_size=head_size,
                drop_path=rate,
                origin=origin,
                wrap=wrap,
                method=method,
                enable_flash=enable_flash,
                **geometry,
            )
            for width, rate, geometry in zip(channels, ramp(drop_path, _PLACES), plan)
        ]
        self.input_conv = SparseSequential(SubMConv3d(in_channels, channels[0], 3, bias=False))
        self.unet = _Level(channels, depth, blocks, 0)
        self.output_layer = SparseSequential(_norm(channels[0]), nn.ReLU())
        self.linear = Linear(channels[0], num_classes) if num_classes else nn.Identity()

    def forward(self, batch: Mapping) -> Tensor:
        """Run the network.

        Raises:
            InputError: for a batch without points, `grid_coord` or `coord`, for cells that are no integers, and for
                entries of unlike length.
        """
        point = Point(batch)
        check_features(point, self.in_channels)
        x = self.unet(self.input_conv(sparse_batch(point)), point["coord"])
        return self.linear(self.output_layer(x).features)
