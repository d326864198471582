"""VoxelNet encoders: the 3D backbones of OpenPCDet's SECOND, PV-RCNN, CenterPoint and Part-A2 detectors.

`VoxelBackBone8x` (twelve convolutions), `VoxelResBackBone8x` (residual blocks) and `UNetV2` (the first with a decoder)
have the state-dict keys, shapes and results of OpenPCDet's classes of these names, so that weights change hands by the
prefix `backbone_3d.` alone. Yan, Mao & Li, 2018, "SECOND", doi 10.3390/s18103337; Shi et al., 2020, "From Points to
Parts", arXiv:1907.03670.

Axes. The sparse tensors here have indices (scan, z, y, x), as the detectors do; weights then are (out, kz, ky, kx, in).
Coordinates, partitions and their cells are (x, y, z) as everywhere else.

Voxels. A voxel's features are the mean over its first `max_points` points in input order; it has no parameters. Points
outside the partition's bounds have no voxel: they are dropped, not counted in the border cells.

Features of points. The two encoders end in a bird's-eye view with cells of eight voxels, which every point reads
bilinearly at (coord - low) / (8 cell size), without a shift by half a cell: the middle of an output cell's kernel is
the voxel 8 o. Weights come from the floor before it is clamped to the map. (Clamping first, as the code of OLIVINE,
arXiv:2310.15562, does, makes everything zero in the last row and column.) The decoder gives a point what its voxel has.
Points without a voxel, and those where no cell is near, have zeros: losses that want unit length leave out rows shorter
than `SHORTEST`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointcept_kd.host import MODELS, InputError, kd
from pointcept_kd.host.point import offset2batch
from pointcept_kd.ops.grid import Partition, group_rows
from pointcept_kd.ops.scatter import segment_mean
from pointcept_kd.ops.sparse import (
    SparseConv3d,
    SparseConvTensor,
    SparseInverseConv3d,
    SparseModule,
    SparseSequential,
    SubMConv3d,
)

from .layers import BatchNorm, check_features
from .voxels import build_partition

# Pre-training on nuScenes: voxels of 0.1, 0.1, 0.2 m, and a bird's-eye view one cell high.
PARTITION = dict(
    low=(-51.2, -51.2, -5.0),
    high=(51.2, 51.2, 3.0),
    shape=(1024, 1024, 40),
    frame="cartesian",
    spacing="n",
)
# Detection on KITTI: voxels of 0.05, 0.05, 0.1 m; used with extra_z=1.
KITTI_PARTITION = dict(
    low=(0.0, -40.0, -3.0),
    high=(70.4, 40.0, 1.0),
    shape=(1408, 1600, 40),
    frame="cartesian",
    spacing="n",
)
STRIDE = 8  # voxels per cell of the bird's-eye view, along x and y
SHORTEST = 1e-6  # a feature shorter than that has no direction


class Voxels(NamedTuple):
    """Occupied voxels of a batch.

    x: sparse tensor, indices (scan, z, y, x), features the means; inverse: (n,) int64, the row of every point, -1 for a
    point without a voxel.
    """

    x: SparseConvTensor
    inverse: Tensor


class Encoding(NamedTuple):
    """What an encoder makes of voxels.

    levels: at strides 1, 2, 4, 8; out: the bird's-eye view, indices (scan, z, y, x) at stride 8 with few cells along z.
    """

    levels: tuple[SparseConvTensor, ...]
    out: SparseConvTensor


class _Norm(BatchNorm):
    """BatchNorm as OpenPCDet sets it, which also takes no rows at all.

    The convolutions do not reach the topmost cells of a grid, so a crop may leave nothing for a coarse level.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (n, c)."""
        return super().forward(x) if len(x) else x * self.weight + self.bias


def _block(conv: SparseModule, channels: int) -> SparseSequential:
    return SparseSequential(conv, _Norm(channels), nn.ReLU())


def _same(before: int, after: int) -> SparseSequential:
    return _block(SubMConv3d(before, after, 3, bias=False, padding=1), after)


def _down(before: int, after: int, key: str, padding: int | Sequence[int] = 1) -> SparseSequential:
    conv = SparseConv3d(before, after, 3, stride=2, padding=padding, bias=False, indice_key=key)
    return _block(conv, after)


def _up(before: int, after: int, key: str) -> SparseSequential:
    return _block(SparseInverseConv3d(before, after, 3, key, bias=False), after)


class BasicBlock(SparseModule):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + x), of one width."""

    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = SubMConv3d(channels, channels, 3, bias=bias, padding=1)
        self.bn1 = _Norm(channels)
        self.relu = nn.ReLU()
        self.conv2 = SubMConv3d(channels, channels, 3, bias=bias, padding=1)
        self.bn2 = _Norm(channels)

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Same cells, same width."""
        out = self.conv1(x)
        out = self.conv2(out.replace_feature(self.relu(self.bn1(out.features))))
        return out.replace_feature(self.relu(self.bn2(out.features) + x.features))


def bev_map(x: SparseConvTensor) -> Tensor:
    """Dense bird's-eye view (b, c * Z, Y, X) of a tensor with indices (scan, z, y, x); heights within channels."""
    return x.dense().flatten(1, 2)


def read_bev(grid: Tensor, place: Tensor, scan: Tensor) -> Tensor:
    """Bilinear values of a map at points; beyond the outermost cells those of the border.

    Args:
        grid: (b, c, Y, X).
        place: float (n, 2), column (along x) and row (along y) of every point in cells; whole numbers are cells.
        scan: int64 (n,), 0 .. b - 1.

    Returns:
        (n, c) in the dtype of `grid`, with graph to it.
    """
    lower = place.floor()
    # Of the floor as it is: once clamped it would give both neighbours in the last cell the weight 0.
    right, above = (place - lower).to(grid.dtype).unbind(1)
    rows, columns = grid.shape[2:]
    # Of the map as rows of channels, so that a look-up reads neighbours in memory.
    table = grid.permute(0, 2, 3, 1).flatten(0, 2)
    out = grid.new_zeros((len(place), grid.shape[1]))
    for dy, along_y in ((0, 1 - above), (1, above)):
        y = (lower[:, 1].long() + dy).clamp(0, rows - 1)
        for dx, along_x in ((0, 1 - right), (1, right)):
            x = (lower[:, 0].long() + dx).clamp(0, columns - 1)
            out = out + table[(scan * rows + y) * columns + x] * (along_x * along_y)[:, None]
    return out


class _Encoder(nn.Module):
    """Voxelisation and the forward pass that the networks share; subclasses make the layers.

    Takes a batch dict with `coord` (n, 3) in metres, `feat` (n, in_channels), usually coordinates and intensity, and
    `offset`. `forward` returns features of points (n, out_channels).
    """

    conv_input: SparseSequential
    conv1: SparseSequential
    conv2: SparseSequential
    conv3: SparseSequential
    conv4: SparseSequential
    conv_out: SparseSequential

    def __init__(
        self,
        in_channels: int,
        partition: Mapping[str, Any] | Partition,
        extra_z: int,
        max_points: int,
        max_voxels: int,
    ) -> None:
        super().__init__()
        self.partition = build_partition(partition)
        kind = (self.partition.frame, self.partition.spacing)
        if kind != ("cartesian", "n"):
            raise InputError(
                f"partition has frame {kind[0]!r} and spacing {kind[1]!r}; VoxelNet takes 'cartesian' and 'n'"
            )
        if min(in_channels, max_points) < 1 or min(extra_z, max_voxels) < 0:
            raise InputError(
                f"in_channels={in_channels}, max_points={max_points}: expected 1 or more; extra_z={extra_z}, "
                f"max_voxels={max_voxels}: expected 0 or more"
            )
        self.in_channels = in_channels
        self.max_points = max_points
        self.max_voxels = max_voxels
        x, y, z = self.partition.shape
        self.sparse_shape = (z + extra_z, y, x)
        sizes = [z + extra_z]
        for pad in (1, 1, 0, 0):
            sizes.append((sizes[-1] + 2 * pad - 3) // 2 + 1)
        if min(sizes) < 1:
            raise InputError(
                f"partition is {z} cells high and extra_z={extra_z}: the levels have {sizes} cells along z, and each "
                "needs one"
            )
        self.bev_height = sizes[-1]

    def _encoder(self, widths: Sequence[int], residual: bool, bias: bool) -> None:
        """Make the layers down to the bird's-eye view, in OpenPCDet's order and under its names."""
        self.conv_input = _block(
            SubMConv3d(self.in_channels, widths[0], 3, bias=False, padding=1), widths[0]
        )
        more = (lambda c: BasicBlock(c, bias)) if residual else (lambda c: _same(c, c))
        first = [more(widths[0]) for _ in range(2 if residual else 1)]
        self.conv1 = SparseSequential(*first)
        for level, (before, after) in enumerate(pairwise(widths), start=2):
            padding = (0, 1, 1) if level == 4 else 1
            down = _down(before, after, f"spconv{level}", padding)
            self.add_module(f"conv{level}", SparseSequential(down, more(after), more(after)))
        conv = SparseConv3d(
            widths[-1], 128, (3, 1, 1), stride=(2, 1, 1), bias=False, indice_key="out"
        )
        self.conv_out = _block(conv, 128)

    def voxelise(self, batch: Mapping[str, Any]) -> Voxels:
        """Voxels of a batch dict, see the module.

        Raises:
            InputError: for `feat` of another width, coordinates that are not finite, and a batch without any point
                inside the bounds.
        """
        check_features(batch, self.in_channels)
        coord = batch["coord"].detach()
        # Half precision would move points by more than a voxel.
        coord = coord if coord.dtype == torch.float64 else coord.float()
        if not bool(coord.isfinite().all()):
            first = int((~coord.isfinite()).any(1).nonzero()[0])
            raise InputError(f"coord has values that are not finite, first in row {first}")
        part, scans = self.partition, offset2batch(batch["offset"])
        if len(scans) != len(coord):
            raise InputError(f"offset ends at {len(scans)} but coord has {len(coord)} rows")
        low, high = (
            torch.tensor(v, dtype=torch.float64, device=coord.device) for v in (part.low, part.high)
        )
        inside = ((coord >= low) & (coord < high)).all(1).nonzero().squeeze(1)
        if not len(inside):
            raise InputError(
                f"no point of the batch lies in {part.low} to {part.high} m; check the partition and the input files"
            )
        groups = group_rows(part.keys(scans[inside], part.cells(coord[inside])))
        begin = groups.counts.cumsum(0) - groups.counts
        scan, cells = part.unpack(groups.keys)
        row = groups.inverse
        if self.max_voxels:
            # The voxels that come first in their scan, by their first point.
            by_point = torch.sort(groups.order[begin]).indices
            by_scan = by_point[torch.sort(scan[by_point], stable=True).indices]
            counts = torch.bincount(scan)
            start = (counts.cumsum(0) - counts).repeat_interleave(counts)
            early = torch.arange(len(scan), device=scan.device) - start < self.max_voxels
            kept = by_scan[early].sort().values
            renamed = torch.full_like(scan, -1)
            renamed[kept] = torch.arange(len(kept), device=scan.device)
            scan, cells, row = scan[kept], cells[kept], renamed[row]
        within = torch.empty_like(groups.order)
        within[groups.order] = torch.arange(len(row), device=row.device) - begin.repeat_interleave(
            groups.counts
        )
        used = (within < self.max_points) & (row >= 0)
        feat = batch["feat"][inside[used]]
        means = segment_mean(
            feat if feat.dtype == torch.float64 else feat.float(), row[used], len(scan)
        )
        indices = torch.cat((scan[:, None], cells.flip(1)), dim=1)
        inverse = row.new_full((len(coord),), -1)
        inverse[inside] = row
        return Voxels(
            SparseConvTensor(means, indices, self.sparse_shape, len(batch["offset"])), inverse
        )

    def encode(self, x: SparseConvTensor) -> Encoding:
        """Run the encoder on voxels with indices (scan, z, y, x) within `sparse_shape`."""
        levels = [self.conv1(self.conv_input(x))]
        for conv in (self.conv2, self.conv3, self.conv4):
            levels.append(conv(levels[-1]))
        return Encoding(tuple(levels), self.conv_out(levels[-1]))

    def places(self, batch: Mapping[str, Any]) -> Tensor:
        """Float (n, 2): column and row of every point in the bird's-eye view, see `read_bev`."""
        coord = batch["coord"].detach().double()
        low, size = (
            coord.new_tensor(v[:2]) for v in (self.partition.low, self.partition.cell_size)
        )
        return (coord[:, :2] - low) / (size * STRIDE)

    def read(self, out: SparseConvTensor, batch: Mapping[str, Any], inverse: Tensor) -> Tensor:
        """Features (n, c * bev_height) of points from cells of the bird's-eye view; 0 for points without a voxel."""
        known = inverse >= 0
        places = self.places(batch)
        # Points far outside have no column that fits an integer.
        places = places.where(known[:, None], torch.zeros_like(places))
        features = read_bev(bev_map(out), places, offset2batch(batch["offset"]))
        return features * known[:, None].to(features.dtype)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Features of points (n, out_channels), rows in input order."""
        voxels = self.voxelise(batch)
        return self.read(self.encode(voxels.x).out, batch, voxels.inverse)


@kd.MODELS.register_module()
class VoxelBackBone8x(_Encoder):
    """The encoder of SECOND and PV-RCNN; see the module. 711,872 parameters with four input channels.

    Args:
        in_channels: width of `feat`; four (x, y, z, intensity) fit the detectors' configs.
        partition: Cartesian grid with spacing `n`.
        extra_z: cells put on top of the partition's; detectors have one, which makes their map two cells high.
        max_points: a voxel is the mean of this many points.
        max_voxels: of a scan, by their first points; 0 for all.

    Attributes:
        out_channels: width of the result, 128 times the height of the bird's-eye view.

    Raises:
        InputError: for other partitions, and numbers that give no network.
    """

    def __init__(
        self,
        in_channels: int = 4,
        partition: Mapping[str, Any] | Partition = PARTITION,
        extra_z: int = 0,
        max_points: int = 10,
        max_voxels: int = 60_000,
    ) -> None:
        super().__init__(in_channels, partition, extra_z, max_points, max_voxels)
        self._encoder((16, 32, 64, 64), False, False)
        self.out_channels = 128 * self.bev_height


@kd.MODELS.register_module()
class VoxelResBackBone8x(_Encoder):
    """The encoder with residual blocks; 2,694,880 parameters with four input channels.

    Args:
        use_bias: the residual blocks' convolutions have a bias; OpenPCDet's `USE_BIAS`.
        in_channels, partition, extra_z, max_points, max_voxels: see `VoxelBackBone8x`.
    """

    def __init__(
        self,
        in_channels: int = 4,
        partition: Mapping[str, Any] | Partition = PARTITION,
        extra_z: int = 0,
        max_points: int = 10,
        max_voxels: int = 60_000,
        use_bias: bool = True,
    ) -> None:
        super().__init__(in_channels, partition, extra_z, max_points, max_voxels)
        self._encoder((16, 32, 64, 128), True, use_bias)
        self.out_channels = 128 * self.bev_height


@kd.MODELS.register_module()
class UNetV2(_Encoder):
    """`VoxelBackBone8x` with a decoder, of Part-A2; every point gets the 16 features of its voxel.

    1,922,784 parameters with four input channels. The bird's-eye view is left to `encode`.

    Args:
        in_channels, partition, extra_z, max_points, max_voxels: see `VoxelBackBone8x`.
    """

    def __init__(
        self,
        in_channels: int = 4,
        partition: Mapping[str, Any] | Partition = PARTITION,
        extra_z: int = 0,
        max_points: int = 10,
        max_voxels: int = 60_000,
    ) -> None:
        super().__init__(in_channels, partition, extra_z, max_points, max_voxels)
        widths = (16, 32, 64, 64)
        self._encoder(widths, False, False)
        for level in (4, 3, 2, 1):
            width = widths[level - 1]
            self.add_module(f"conv_up_t{level}", BasicBlock(width, bias=False))
            self.add_module(f"conv_up_m{level}", _same(2 * width, width))
            if level > 1:
                up = _up(width, widths[level - 2], f"spconv{level}")
                self.add_module(f"inv_conv{level}", up)
        self.conv5 = SparseSequential(_same(16, 16))
        self.out_channels = 16

    def decode(self, levels: Sequence[SparseConvTensor]) -> SparseConvTensor:
        """From the levels of `encode` to 16 features on the finest cells."""
        x = levels[-1]
        for level in (4, 3, 2, 1):
            beside = getattr(self, f"conv_up_t{level}")(levels[level - 1])
            joined = torch.cat((x.features, beside.features), 1)
            x = getattr(self, f"conv_up_m{level}")(beside.replace_feature(joined))
            # Neighbouring channels of what went in are added in pairs, beside the convolution.
            x = x.replace_feature(x.features + joined.unflatten(1, (-1, 2)).sum(2))
            x = self.conv5(x) if level == 1 else getattr(self, f"inv_conv{level}")(x)
        return x

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Features of points (n, 16), rows in input order."""
        x, inverse = self.voxelise(batch)
        features = self.decode(self.encode(x).levels).features
        known = (inverse >= 0)[:, None].to(features.dtype)
        return features[inverse.clamp(min=0)] * known


@kd.MODELS.register_module()
class VoxelEmbedding(nn.Module):
    """An encoder with linear heads on the cells of its bird's-eye view, as it is pre-trained from images.

    Each head is a 1 x 1 x 1 convolution without bias. Its cells are made unit length, points read them bilinearly, and
    what they read is made unit length again, which the reference leaves out: between two cells it is shorter. Points
    that read nothing keep zeros.

    Takes a batch dict as the encoder does, and returns `dict(name=(n, embed_dim))`.

    Args:
        backbone: config of a `kd.VoxelBackBone8x` or `kd.VoxelResBackBone8x`, or the module. Its view must be one cell
            high.
        embed_dim: width of an embedding.
        heads: their names.

    Raises:
        InputError: for other backbones.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any] | nn.Module,
        embed_dim: int = 64,
        heads: Sequence[str] = ("final", "final_class_level"),
    ) -> None:
        super().__init__()
        self.backbone = backbone if isinstance(backbone, nn.Module) else MODELS.build(backbone)
        if not isinstance(self.backbone, (VoxelBackBone8x, VoxelResBackBone8x)):
            raise InputError(
                f"backbone is a {type(self.backbone).__name__}; expected kd.VoxelBackBone8x or kd.VoxelResBackBone8x"
            )
        if self.backbone.bev_height != 1:
            raise InputError(
                f"the backbone's bird's-eye view is {self.backbone.bev_height} cells high and must be one; use "
                "extra_z=0 with 25 to 40 cells along z"
            )
        self.heads = tuple(heads)
        if len(set(self.heads)) < len(self.heads) or "backbone" in self.heads:
            raise InputError(f"heads={self.heads}: expected different names other than 'backbone'")
        for name in self.heads:
            self.add_module(name, SubMConv3d(128, embed_dim, 1, bias=False))

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Unit vectors of points from every head, rows in input order."""
        x, inverse = self.backbone.voxelise(batch)
        out = self.backbone.encode(x).out
        embeddings = {}
        for name in self.heads:
            cells = getattr(self, name)(out)
            cells = cells.replace_feature(F.normalize(cells.features, dim=1, eps=SHORTEST))
            read = self.backbone.read(cells, batch, inverse)
            long = read.norm(dim=1, keepdim=True) >= SHORTEST
            embeddings[name] = F.normalize(read, dim=1, eps=SHORTEST) * long.to(read.dtype)
        return embeddings
