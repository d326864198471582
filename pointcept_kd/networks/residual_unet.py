"""Sparse residual U-Net of image-to-LiDAR pre-training, SR-UNet34 (MinkUNet34, arXiv:1904.08755; SLidR, 2203.16258).

A stem, four times down and up by 2 with 2 x 2 x 2 kernels, residual blocks of 3 x 3 x 3 ones between, 1 x 1 x 1 heads.
Every convolution is followed by a normalisation, and by ReLU but for the second of a block, where the sum with the
shortcut comes first. The finer level's features are appended behind the ones that come up.

Cells are those of MinkowskiEngine: the grid has no bounds, a cell c of one level lies in the cell floor(c / 2) of the
next, also below 0. So a scan moved by a multiple of 16 cells gives the same result, one moved by another number does
not, and `grid_coord` is taken as it is given.

State-dict keys are those of the released weights, with `weight` for `kernel`; `released_residual_unet` converts those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointcept_kd.host import InputError, kd
from pointcept_kd.host.point import Point
from pointcept_kd.ops.sparse import (
    SparseConv3d,
    SparseConvTensor,
    SparseInverseConv3d,
    SparseModule,
    SparseSequential,
    SubMConv3d,
)

from .layers import BatchNorm, Linear, check_features

CHANNELS = (32, 64, 128, 256, 256, 128, 96, 96)
# Residual blocks of block1 to block8 by the number of layers that the network is called by.
PLANS = {
    14: (1, 1, 1, 1, 1, 1, 1, 1),
    18: (2, 2, 2, 2, 2, 2, 2, 2),
    34: (2, 3, 4, 6, 2, 2, 2, 2),
}
LEVELS = 4
DOWNS = tuple(f"conv{i}p{2 ** (i - 1)}s2" for i in (1, 2, 3, 4))
UPS = tuple(f"convtr{i}p{2 ** (8 - i)}s2" for i in (4, 5, 6, 7))
_EPS = 1e-5


class _Norm(SparseModule):
    """Batch normalisation over all cells of the batch, under the name `bn`."""

    def __init__(self, channels: int, momentum: float) -> None:
        super().__init__()
        self.bn = BatchNorm(channels, eps=_EPS, momentum=momentum)

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Same cells and width."""
        return x.replace_feature(self.bn(x.features))


class BasicBlock(SparseModule):
    """relu(norm2(conv2(relu(norm1(conv1(x))))) + downsample(x)); `downsample` only where the width changes.

    The two norms inside have a momentum of their own, `inner`: the released training never handed them the configured
    one.
    """

    def __init__(self, in_channels: int, channels: int, momentum: float, inner: float) -> None:
        super().__init__()
        self.conv1 = SubMConv3d(in_channels, channels, 3, bias=False)
        self.norm1 = _Norm(channels, inner)
        self.conv2 = SubMConv3d(channels, channels, 3, bias=False)
        self.norm2 = _Norm(channels, inner)
        self.downsample = SparseSequential()
        if in_channels != channels:
            self.downsample.extend(
                [Linear(in_channels, channels, bias=False), _Norm(channels, momentum)]
            )

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Same cells, `channels` features."""
        out = self.norm2(self.conv2(_relu(self.norm1(self.conv1(x)))))
        return out.replace_feature(F.relu(out.features + self.downsample(x).features))


def _relu(x: SparseConvTensor) -> SparseConvTensor:
    return x.replace_feature(F.relu(x.features))


@kd.MODELS.register_module()
class ResidualUNet(nn.Module):
    """SR-UNet34; 37,855,392 parameters with the two heads of pre-training, 37,844,625 with one of 17 classes.

    Takes a batch dict with `grid_coord` (n, 3) integers, also negative, `feat` (n, in_channels) and `offset` (b,).
    Returns (n, num_classes), or (n, channels[-1]) if `num_classes` is 0; rows in input order. With `class_level` it
    returns `dict(final=(n, num_classes), final_class_level=(n, class_level))` instead, pre-training's features of
    points and of their classes; `embed` returns such a dict also for one head.

    Args:
        in_channels: width of `feat`; the published networks take the intensity alone.
        num_classes: width of the head `final`; 64 in pre-training; 0 for none.
        class_level: width of the head `final_class_level`; 64 in pre-training with classes; 0 for none.
        normalise: give every row of a result the length 1, as in pre-training.
        base_channels: width of the stem.
        channels: widths of block1 to block8: strides 2, 4, 8, 16, then 8, 4, 2, 1.
        layers: residual blocks of the same; `PLANS` has the published ones.
        bn_momentum: of the norms behind stem, down and up convolutions and shortcuts: 0.05 in pre-training, 0.02 in
            fine-tuning.
        block_bn_momentum: of the two norms in a residual block, 0.1 in both.

    Raises:
        InputError: for sizes that are none, other than eight `channels` or `layers`, a second head without a first.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 64,
        class_level: int = 0,
        normalise: bool = False,
        base_channels: int = 32,
        channels: Sequence[int] = CHANNELS,
        layers: Sequence[int] = PLANS[34],
        bn_momentum: float = 0.05,
        block_bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        channels, layers = tuple(channels), tuple(layers)
        if len(channels) != 2 * LEVELS or len(layers) != 2 * LEVELS:
            raise InputError(
                f"channels={channels}, layers={layers}: expected {2 * LEVELS} entries each, four on the way down and "
                "four on the way up"
            )
        if min(in_channels, base_channels, *channels, *layers) < 1:
            raise InputError(
                f"in_channels={in_channels}, base_channels={base_channels}, channels={channels}, layers={layers}: "
                "all must be at least 1"
            )
        if num_classes < 0 or class_level < 0 or (class_level and not num_classes):
            raise InputError(
                f"num_classes={num_classes}, class_level={class_level}: widths of heads, 0 for none; class_level "
                "needs num_classes besides"
            )
        for name, value in (
            ("bn_momentum", bn_momentum),
            ("block_bn_momentum", block_bn_momentum),
        ):
            if not 0 < value <= 1:
                raise InputError(f"{name}={value}: expected above 0 and at most 1")
        self.in_channels = in_channels
        self.normalise = normalise
        momenta = (bn_momentum, block_bn_momentum)
        self.conv0p1s1 = SubMConv3d(in_channels, base_channels, 3, bias=False)
        self.bn0 = _Norm(base_channels, bn_momentum)
        width, skips = base_channels, [base_channels]
        for i, name in enumerate(DOWNS):
            self.add_module(
                name, SparseConv3d(width, width, 2, stride=2, bias=False, indice_key=f"down{i}")
            )
            self.add_module(f"bn{i + 1}", _Norm(width, bn_momentum))
            self.add_module(f"block{i + 1}", _stage(width, channels[i], layers[i], momenta))
            width = channels[i]
            skips.append(width)
        for i, name in enumerate(UPS, LEVELS):
            out, finer = channels[i], skips[2 * LEVELS - 1 - i]
            up = SparseInverseConv3d(width, out, 2, f"down{2 * LEVELS - 1 - i}", bias=False)
            # A fine cell has one coarse cell: MinkowskiEngine draws by the width that goes out.
            bound = (out * 8) ** -0.5
            nn.init.uniform_(up.weight, -bound, bound)
            self.add_module(name, up)
            self.add_module(f"bntr{i}", _Norm(out, bn_momentum))
            self.add_module(f"block{i + 1}", _stage(out + finer, out, layers[i], momenta))
            width = out
        self.final = Linear(width, num_classes) if num_classes else nn.Identity()
        self.final_class_level = Linear(width, class_level) if class_level else None

    def forward(self, batch: Mapping) -> Tensor | dict[str, Tensor]:
        """Run the network.

        Raises:
            InputError: for a batch without points or `grid_coord`, cells that are no integers, and entries of unlike
                length.
        """
        made = self.embed(batch)
        return made["final"] if self.final_class_level is None else made

    def embed(self, batch: Mapping) -> dict[str, Tensor]:
        """Results by name of the head, `final` also where there is none; errors as `forward`."""
        point = Point(batch)
        check_features(point, self.in_channels)
        features = self.trunk(self._cells(point)).features
        made = {"final": self.final(features)}
        if self.final_class_level is not None:
            made["final_class_level"] = self.final_class_level(features)
        if self.normalise:
            # Under autocast in the input's precision: in bfloat16 a length is off by as much as 0.4 %.
            dtype = point["feat"].dtype
            made = {name: F.normalize(out.to(dtype), dim=1) for name, out in made.items()}
        return made

    def trunk(self, x: SparseConvTensor) -> SparseConvTensor:
        """What the heads read, (n, channels[-1]) on the given cells."""
        x = _relu(self.bn0(self.conv0p1s1(x)))
        skips = [x]
        for i, name in enumerate(DOWNS, 1):
            x = _relu(getattr(self, f"bn{i}")(getattr(self, name)(x)))
            x = getattr(self, f"block{i}")(x)
            skips.append(x)
        skips.pop()
        for i, name in enumerate(UPS, LEVELS):
            x = _relu(getattr(self, f"bntr{i}")(getattr(self, name)(x)))
            x = x.replace_feature(torch.cat([x.features, skips.pop().features], 1))
            x = getattr(self, f"block{i + 1}")(x)
        return x

    def _cells(self, point: Point) -> SparseConvTensor:
        if "grid_coord" not in point:
            raise InputError(
                "the batch has no grid_coord; collect it in the transforms (GridSample returns it)"
            )
        cells, feat, batch = point["grid_coord"], point["feat"], point["batch"]
        if not len(cells):
            raise InputError(
                "the batch has no points; check the crop, the range filter and the input files"
            )
        if cells.dim() != 2 or cells.shape[1] != 3 or not len(cells) == len(feat) == len(batch):
            raise InputError(
                f"grid_coord {tuple(cells.shape)}, feat {tuple(feat.shape)} and offset, which ends at {len(batch)}, do "
                "not fit: expected (n, 3), (n, channels) and an end of n"
            )
        if cells.is_floating_point() or cells.dtype == torch.bool:
            raise InputError(
                f"grid_coord has the type {cells.dtype}: expected integers, coordinates divided by the cell size and "
                "rounded down"
            )
        indices = torch.cat([batch[:, None], cells.long()], 1)
        # From offset: the last sample of a batch may be empty.
        return SparseConvTensor(feat, indices, None, point["offset"].shape[0])


def _stage(
    in_channels: int, channels: int, depth: int, momenta: tuple[float, float]
) -> SparseSequential:
    return SparseSequential(
        *(BasicBlock(channels if i else in_channels, channels, *momenta) for i in range(depth))
    )
