"""Sparse U-Net with point links and window attention: the LiDAR branch of U2MKD (doi 10.1109/TPAMI.2024.3451658).

SPVCNN (arXiv:2007.16100) with one SphereFormer block behind each of its four encoder levels. A "point" is a voxel of
stride 1; z are features on points, x features on voxels of stride 2^l:

    x0 = stem(x)                                       z0 = x0
    x_l = attention_l(residuals(down_l(x_{l-1})))      l = 1 .. 4
    z1 = D16(x4) + link0(z0);   y = dropout(P16(z1));  up0 with skip x3, up1 with skip x2 -> y2
    z2 = D4(y2)  + link1(z1);   y = dropout(P4(z2));   up2 with skip x1, up3 with skip x0 -> y4
    z3 = y4      + link2(z2);   logits = head(z3)

D_s reads a point's features off the 8 voxels of stride s around it, trilinearly, a voxel's value sitting at its lowest
corner; the weights of those that exist are divided by their sum. P_s is the mean over the points of every voxel. At
stride 1 both are the identity. What they need is found once per scan and stride.

Cells have no bounds and the voxel of stride 2s above a cell c is floor(c / 2s). State-dict keys are those of the
released code with `weight` for `kernel`; `released_sphereformer` converts weights laid out for torchsparse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointcept_kd.host import InputError, kd
from pointcept_kd.host.point import Point
from pointcept_kd.ops.grid import CellKeys
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
from .window_attention import SphereFormerBlock, window_plan

LEVELS = 4
CHANNELS = (32, 32, 64, 128, 256, 256, 128, 96, 96)
# Rates of stochastic depth are spread over seven places, of which the blocks take the second to the fifth.
_PLACES = 7


# ----------------------------------------------------------------------------------------- between points and voxels


@dataclass
class Scan:
    """What belongs to the points of a batch: cells, positions, and what was found for voxels of each stride.

    cells: int64 (n, 3), one row per voxel of stride 1; coord: (n, 3) metres; batch: int64 (n,).
    """

    cells: Tensor
    coord: Tensor
    batch: Tensor
    _own: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _corners: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def own(self, stride: int, indices: Tensor) -> Tensor:
        """Row int64 (n,) of every point's voxel; `indices` (m, 4), sample and cell of the voxels, count once."""
        if stride not in self._own:
            points = torch.cat([self.batch[:, None], self.cells], 1)
            self._own[stride] = rows_above(points, indices, stride)
        return self._own[stride]

    def corners(self, stride: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Rows int64 (8, n) of the voxels around every point and their weights (8, n); absent ones weigh 0."""
        if stride not in self._corners:
            self._corners[stride] = _corners(self.cells, self.batch, stride, indices)
        return self._corners[stride]


def _corners(cells: Tensor, batch: Tensor, stride: int, indices: Tensor) -> tuple[Tensor, Tensor]:
    indices = indices.long()
    base = torch.div(cells, stride, rounding_mode="floor")
    inside = (cells - base * stride).to(torch.float64) / stride
    keys = CellKeys.fit(indices[:, 0], indices[:, 1:], pad=1)
    known, order = torch.sort(keys.pack(indices[:, 0], indices[:, 1:]))
    own = keys.pack(batch, base)
    rows, weights = [], []
    for number in range(8):
        step = [number >> 2 & 1, number >> 1 & 1, number & 1]
        wanted = own + keys.step(*step)
        place = torch.searchsorted(known, wanted).clamp_(max=len(known) - 1)
        weight = torch.stack([f if s else 1 - f for s, f in zip(step, inside.unbind(1))]).prod(0)
        rows.append(order[place])
        weights.append(weight * (known[place] == wanted))
    share = torch.stack(weights)
    return torch.stack(rows), share / (share.sum(0) + 1e-8)


def rows_above(fine: Tensor, coarse: Tensor, factor: int = 2) -> Tensor:
    """Row of the voxel (m, 4) that every voxel (n, 4) of a finer level lies in, int64 (n,); rows (sample, x, y, z)."""
    coarse = coarse.long()
    keys = CellKeys.fit(coarse[:, 0], coarse[:, 1:])
    known, order = torch.sort(keys.pack(coarse[:, 0], coarse[:, 1:]))
    base = torch.div(fine[:, 1:].long(), factor, rounding_mode="floor")
    return order[torch.searchsorted(known, keys.pack(fine[:, 0], base))]


@dataclass(frozen=True)
class Level:
    """Voxels of one stride with their features, and the scan that they are of."""

    sparse: SparseConvTensor
    stride: int
    scan: Scan

    @property
    def features(self) -> Tensor:
        """(m, c), rows sorted by (sample, x, y, z) but at stride 1, where they are the points'."""
        return self.sparse.features

    def with_features(self, features: Tensor) -> Level:
        """The same voxels with other features (m, c')."""
        return replace(self, sparse=self.sparse.replace_feature(features))

    def to_points(self) -> Tensor:
        """D_s: features of the points (n, c), interpolated."""
        if self.stride == 1:
            return self.features
        x = self.features
        rows, weights = self.scan.corners(self.stride, self.sparse.indices)
        weights = weights.to(x.dtype)
        out = x.index_select(0, rows[0]) * weights[0].unsqueeze(1)
        for row, weight in zip(rows[1:], weights[1:]):
            out = out + x.index_select(0, row) * weight.unsqueeze(1)
        return out

    def mean_of_points(self, values: Tensor) -> Tensor:
        """P_s: mean of the points' values (n, c) in every voxel, (m, c)."""
        if self.stride == 1:
            return values
        rows = self.scan.own(self.stride, self.sparse.indices)
        return segment_mean(values, rows, len(self.features))


# -------------------------------------------------------------------------------------------------------------- layers


def _norm(channels: int) -> BatchNorm:
    return BatchNorm(channels, eps=1e-5, momentum=0.1)


class _Unit(SparseModule):
    """A convolution that changes the stride, normalisation, ReLU."""

    def __init__(self, convolution: SparseConv3d | SparseInverseConv3d) -> None:
        super().__init__()
        self.net = SparseSequential(convolution, _norm(convolution.out_channels), nn.ReLU())

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Onto the cells of the other stride."""
        return self.net(x)


class _Residual(SparseModule):
    """relu(net(x) + downsample(x)); `downsample` has parameters only where the width changes."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.net = SparseSequential(
            SubMConv3d(in_channels, channels, 3, bias=False),
            _norm(channels),
            nn.ReLU(),
            SubMConv3d(channels, channels, 3, bias=False),
            _norm(channels),
        )
        self.downsample = SparseSequential()
        if in_channels != channels:
            self.downsample.extend([Linear(in_channels, channels, bias=False), _norm(channels)])

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Same cells, `channels` features."""
        out = self.net(x)
        return out.replace_feature(F.relu(out.features + self.downsample(x).features))


def _residuals(in_channels: int, channels: int, depth: int) -> list[_Residual]:
    return [_Residual(channels if i else in_channels, channels) for i in range(depth)]


# ------------------------------------------------------------------------------------------------------------- network


@kd.MODELS.register_module()
class PointVoxelUNet(nn.Module):
    """LiDAR network of U2MKD; with 17 classes 23,033,729 parameters at width 1, 91,674,353 at width 2.

    Takes a batch dict with `grid_coord` (n, 3) integers, one row per voxel of stride 1, `coord` (n, 3) metres (where
    attention looks), `feat` (n, in_channels; published x, y, z, intensity) and `offset` (b,). Returns (n, num_classes),
    or (n, channels) of the last level if `num_classes` is 0; rows in input order.

    `forward` is `start`, four times `encode_level`, then `decode`; a network that changes features between levels calls
    these itself, with `to_points` and `to_voxels`.

    Args:
        in_channels: width of `feat`.
        num_classes: width of the head; 0 for none.
        width: multiplies all widths: 1 for students, 2 for the teacher.
        channels: widths before that: the stem's, the encoder's four from fine to coarse, the decoder's four back.
        depth: residual blocks per level, in encoder and decoder.
        attention: whether the encoder's levels end with window attention; without it this is SPVCNN.
        head_size: channels per attention head.
        voxel_size: edge of a voxel of stride 1, metres; cubic windows at stride 2 are six of them.
        spherical: windows at stride 2: theta, beta in degrees, r in metres. Theta and beta double from level to level.
        cells: "window" or "reference": spherical cells as meant or as the released code ran, see `window_plan`.
        origin, wrap, method, enable_flash: as `SphereFormerBlock`.
        drop_path: end of the ramp of stochastic depth over seven places, of which the blocks take the second to fifth.
        dropout: on the voxels that enter the decoder, and those halfway up.

    Raises:
        InputError: for sizes that do not fit and unknown names.
    """

    def __init__(
        self,
        in_channels: int = 4,
        num_classes: int = 17,
        width: float = 1.0,
        channels: Sequence[int] = CHANNELS,
        depth: int = 2,
        attention: bool = True,
        head_size: int = 16,
        voxel_size: float = 0.05,
        spherical: Sequence[float] = (2.0, 2.0, 120.0),
        cells: str = "window",
        origin: str = "min",
        wrap: bool = False,
        method: str = "buckets",
        enable_flash: bool = False,
        drop_path: float = 0.3,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if len(channels) != 2 * LEVELS + 1:
            raise InputError(
                f"channels={tuple(channels)}: expected {2 * LEVELS + 1} widths, the stem's, four down and four up"
            )
        c = tuple(int(width * base) for base in channels)
        if min(in_channels, depth, *c) < 1 or num_classes < 0:
            raise InputError(
                f"in_channels={in_channels}, num_classes={num_classes}, width={width}, channels={tuple(channels)}, "
                f"depth={depth}: all sizes must be at least 1, num_classes at least 0"
            )
        if not 0 <= dropout < 1 or not 0 <= drop_path < 1:
            raise InputError(
                f"dropout={dropout}, drop_path={drop_path}: expected 0 or more and below 1"
            )
        if not voxel_size > 0:
            raise InputError(f"voxel_size={voxel_size}: expected metres above 0")
        self.in_channels, self.num_classes, self.channels = in_channels, num_classes, c
        self.stem = SparseSequential(
            SubMConv3d(in_channels, c[0], 3, bias=False),
            _norm(c[0]),
            nn.ReLU(),
            SubMConv3d(c[0], c[0], 3, bias=False),
            _norm(c[0]),
            nn.ReLU(),
        )
        self.vox_downs = nn.ModuleList()
        for i in range(LEVELS):
            down = SparseConv3d(c[i], c[i], 2, stride=2, bias=False, indice_key=f"down{i}")
            self.vox_downs.append(SparseSequential(_Unit(down), *_residuals(c[i], c[i + 1], depth)))
        self.transformer_blocks = nn.ModuleList()
        if attention:
            plan = window_plan(LEVELS, 6 * voxel_size, spherical, cells=cells)
            rates = ramp(drop_path, _PLACES)[1:]
            for i in range(LEVELS):
                self.transformer_blocks.append(
                    SphereFormerBlock(
                        c[i + 1],
                        head_size=head_size,
                        drop_path=rates[i],
                        origin=origin,
                        wrap=wrap,
                        method=method,
                        enable_flash=enable_flash,
                        **plan[i],
                    )
                )
        self.vox_ups = nn.ModuleList()
        for j in range(LEVELS):
            came, out, skip = c[LEVELS + j], c[LEVELS + j + 1], c[LEVELS - 1 - j]
            up = SparseInverseConv3d(came, out, 2, f"down{LEVELS - 1 - j}", bias=False)
            residuals = SparseSequential(*_residuals(out + skip, out, depth))
            self.vox_ups.append(nn.ModuleList([_Unit(up), residuals]))
        self.point_transforms = nn.ModuleList(
            nn.Sequential(Linear(a, b), _norm(b), nn.ReLU())
            for a, b in ((c[0], c[4]), (c[4], c[6]), (c[6], c[8]))
        )
        self.classifier_vox = nn.Sequential()
        if num_classes:
            self.classifier_vox.append(Linear(c[8], num_classes))
        self.dropout = nn.Dropout(dropout)
        self.bottleneck = nn.Identity()  # for taps: D16(x4), features of points

    def start(self, batch: Mapping) -> Level:
        """x0: the stem's features on the voxels of stride 1.

        Raises:
            InputError: for a batch without points, `grid_coord` or `coord`, for cells that are no integers or occur
                twice in a sample, and for entries of unlike length.
        """
        point = Point(batch)
        check_features(point, self.in_channels)
        x = sparse_batch(point)
        scan = Scan(x.indices[:, 1:], point["coord"], point["batch"])
        return Level(self.stem(x), 1, scan)

    def encode_level(self, level: int, x: Level) -> Level:
        """x_level from the level before, 1 .. 4: strided convolution, residual blocks, attention."""
        sparse = self.vox_downs[level - 1](x.sparse)
        made = Level(sparse, 2 * x.stride, x.scan)
        if self.transformer_blocks:
            # A token is where the voxels of stride 1 inside it are on average.
            xyz = made.mean_of_points(x.scan.coord)
            batch = sparse.indices[:, 0].long()
            made = made.with_features(
                self.transformer_blocks[level - 1](sparse.features, xyz, batch)
            )
        return made

    def to_points(self, x: Level) -> Tensor:
        """D: (n, c) of the points, interpolated from the voxels of a level."""
        return x.to_points()

    def to_voxels(self, values: Tensor, x: Level) -> Level:
        """P: the level with the mean of its points' values (n, c')."""
        return x.with_features(x.mean_of_points(values))

    def decode(self, bottleneck: Tensor, skips: Sequence[Level]) -> Tensor:
        """Logits (n, num_classes) from the points' features of the coarsest level and x0 .. x4.

        Args:
            bottleneck: (n, c4), D16(x4), or what stands in for it. Of x4 itself only the voxels are used.
        """
        return self.head(self.decode_points(bottleneck, skips))

    def head(self, features: Tensor) -> Tensor:
        """Logits of z3, or z3 without a head."""
        return self.classifier_vox(features)

    def decode_points(self, bottleneck: Tensor, skips: Sequence[Level]) -> Tensor:
        """z3 (n, c8), what the head reads; arguments as `decode`."""
        if len(skips) != LEVELS + 1:
            raise InputError(f"{len(skips)} levels: expected the stem's and those of {LEVELS} more")
        z = bottleneck + self.point_transforms[0](skips[0].features)
        x = skips[LEVELS]
        for j in range(LEVELS):
            if j in (0, 2):
                if j:
                    z = x.to_points() + self.point_transforms[1](z)
                x = x.with_features(self.dropout(x.mean_of_points(z)))
            skip = skips[LEVELS - 1 - j]
            up, residuals = self.vox_ups[j]
            sparse = up(x.sparse)
            sparse = sparse.replace_feature(torch.cat([sparse.features, skip.features], 1))
            x = replace(skip, sparse=residuals(sparse))
        return x.features + self.point_transforms[2](z)

    def forward(self, batch: Mapping) -> Tensor:
        """Run the network; errors as `start`."""
        skips = [self.start(batch)]
        for level in range(1, LEVELS + 1):
            skips.append(self.encode_level(level, skips[-1]))
        return self.decode(self.bottleneck(self.to_points(skips[-1])), skips)


def sparse_batch(point: Point) -> SparseConvTensor:
    """`feat` on the cells `grid_coord` of a batch, whose `coord` fits too.

    Raises:
        InputError: for a batch without points, `grid_coord` or `coord`, for cells that are no integers, and for
            entries of unlike length.
    """
    for key in ("grid_coord", "coord"):
        if key not in point:
            raise InputError(f"the batch has no {key}; collect it in the transforms")
    cells, coord, feat, batch = (point[key] for key in ("grid_coord", "coord", "feat", "batch"))
    if not len(cells):
        raise InputError(
            "the batch has no points; check the crop, the range filter and the input files"
        )
    n = len(cells)
    if (
        tuple(cells.shape) != (n, 3)
        or tuple(coord.shape) != (n, 3)
        or {len(feat), len(batch)} != {n}
    ):
        raise InputError(
            f"grid_coord {tuple(cells.shape)}, coord {tuple(coord.shape)}, feat {tuple(feat.shape)} and offset, which "
            f"ends at {len(batch)}, do not fit: expected (n, 3), (n, 3), (n, channels) and an end of n"
        )
    if cells.is_floating_point() or cells.dtype == torch.bool:
        raise InputError(
            f"grid_coord has the type {cells.dtype}: expected integers, coordinates divided by the voxel size and "
            "rounded"
        )
    indices = torch.cat([batch[:, None], cells.long()], 1)
    # From offset: the last sample of a batch may be empty.
    return SparseConvTensor(feat, indices, None, point["offset"].shape[0])
