"""SwiftNet: a residual trunk, pyramid pooling, and a light decoder with lateral connections, for images.

The trunk's first convolution has stride 1, so its four stages are at 1/2, 1/4, 1/8 and 1/16 of the image. What a stage
hands sideways to the decoder is its sum before the last ReLU. Every change of size is bilinear with aligned corners.

Oršić et al., 2019, arXiv:1903.08469 (there with stride 2 in front); trunk: He et al., 2016, arXiv:1512.03385.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pointcept_kd.host import InputError, kd

from .image import enlarge
from .image_segmentor import ImageSegmentor
from .resnet import RESNETS, BasicBlock, ResNet

LEVELS = 4
GRIDS = (8, 4, 2)  # rows of the pooled maps
SMALLEST = 32  # pixels; below it the last stage has a single place, which has no variance
_POOL_MOMENTUM = 0.012


class Norm2d(nn.BatchNorm2d):
    """BatchNorm of maps that also takes a single place while training, as `layers.BatchNorm` does a single row.

    Such a place is normalised with the running statistics, which it does not change. Maps without any place stay
    without. Same state-dict keys as `nn.BatchNorm2d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (n, c, h, w)."""
        if self.training and input.numel() == input.shape[1] and self.track_running_stats:
            return F.batch_norm(
                input,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                False,
                0.0,
                self.eps,
            )
        return super().forward(input)


class Unit(nn.Module):
    """BatchNorm, ReLU, convolution without bias.

    Args:
        in_channels, out_channels: widths.
        kernel: 1 or 3.
        momentum: of the normalisation.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.norm = Norm2d(in_channels, momentum=momentum)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        """Same size."""
        return self.conv(F.relu(self.norm(x)))

    def rows(self, x: Float[Tensor, "m c"]) -> Float[Tensor, "m d"]:
        """The same on places of their own, one per row; for a 1 x 1 kernel. Without rows the result has none."""
        x = F.relu(self.norm(x[:, :, None, None]))[:, :, 0, 0]
        return F.linear(x, self.conv.weight[:, :, 0, 0])


class PyramidPooling(nn.Module):
    """Means over coarse grids, appended to the map that they are of.

    The map is narrowed to `width`; means over 8, 4 and 2 rows and as many columns as keep cells square, narrowed to
    `width // 3`, are enlarged again and appended; a last unit brings all to `width`.

    Args:
        in_channels: of the map.
        width: of the result, 3 or more.
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        share = width // len(GRIDS)
        self.narrow = Unit(in_channels, width, momentum=_POOL_MOMENTUM)
        self.pools = nn.ModuleList(Unit(width, share, momentum=_POOL_MOMENTUM) for _ in GRIDS)
        self.merge = Unit(width + len(GRIDS) * share, width, momentum=_POOL_MOMENTUM)

    @staticmethod
    def grids(height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of the pooled maps of a map of this size."""
        return [(rows, max(1, round(rows * width / height))) for rows in GRIDS]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        """Same size."""
        size = x.shape[2:]
        x = self.narrow(x)
        parts = [x]
        for grid, pool in zip(self.grids(*size), self.pools):
            parts.append(enlarge(pool(F.adaptive_avg_pool2d(x, grid)), size))
        return self.merge(torch.cat(parts, 1))


class Decoder(nn.Module):
    """From the coarsest map to half of the image's size, one lateral connection per step.

    Args:
        laterals: channels of the maps at 1/2, 1/4 and 1/8, in that order.
        width: of the coarsest map and of the result.
    """

    def __init__(self, laterals: Sequence[int], width: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(Unit(channels, width) for channels in laterals)
        self.blends = nn.ModuleList(Unit(width, width, 3) for _ in laterals)

    def forward(self, skips: Sequence[Tensor], x: Float[Tensor, "n d i j"]) -> Tensor:
        """Maps at 1/2, 1/4, 1/8 and the coarsest one to (n, width, h / 2, w / 2)."""
        for skip, lateral, blend in zip(
            reversed(skips), reversed(self.laterals), reversed(self.blends), strict=True
        ):
            x = blend(enlarge(x, skip.shape[2:]) + lateral(skip))
        return x


def _before_relu(block: BasicBlock, x: Tensor) -> Tensor:
    y = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    return y + (x if block.downsample is None else block.downsample(x))


def _residual(trunk: str | Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of a trunk of `BasicBlock`.

    Raises:
        InputError: for another.
    """
    sizes = RESNETS.get(trunk) if isinstance(trunk, str) else dict(trunk)
    if sizes is None or sizes.get("bottleneck", True):
        raise InputError(
            f"trunk={trunk!r}: SwiftNet takes resnet18, resnet34 or dict(depths=..., width=..., bottleneck=False)"
        )
    return dict(sizes)


@kd.MODELS.register_module()
class SwiftNet(ImageSegmentor):
    """SwiftNet-18 as a segmentor of images, and its parts for networks that use it together with points.

    As a segmentor it takes and returns what `kd.ImageSegmentor` does; images may have any sides of 32 pixels or more.
    Trunk 11,176,512 parameters, pyramid pooling 116,476, decoder 501,376, classifier 2,432 for 17 classes.

    Args:
        num_classes: K.
        trunk: "resnet18", "resnet34", or `dict(depths=..., width=..., bottleneck=False)` for one of another size.
        width: of pyramid pooling and decoder.
        criteria: see `kd.ImageSegmentor`.
        weight, kind: file that the trunk starts from, see `trunks.load_trunk`; "imagenet" for the state dict of
            torchvision's or timm's model. None leaves it random, and only with `allow_random`.
        allow_random: accept a trunk without weights.
        freeze_trunk: train the rest alone, the trunk in evaluation.

    Raises:
        InputError: for no classes, a width below 3, a trunk without weights, and a trunk or weights that do not fit.
    """

    trunk: ResNet

    def __init__(
        self,
        num_classes: int,
        trunk: str | Mapping[str, Any] = "resnet18",
        width: int = 128,
        criteria: Sequence[Mapping[str, Any]] | None = None,
        weight: str | None = None,
        kind: str = "imagenet",
        allow_random: bool = False,
        freeze_trunk: bool = False,
    ) -> None:
        if weight is None and not allow_random:
            raise InputError(
                "the image trunk has no weights: give weight=FILE, e.g. torchvision's resnet18, or allow_random=True "
                "to mean it"
            )
        if width < len(GRIDS):
            raise InputError(f"width={width}: expected {len(GRIDS)} or more")
        super().__init__(num_classes, _residual(trunk), 32, criteria, weight, kind, freeze_trunk)
        if weight is None:
            logging.getLogger("pointcept_kd").warning("Image trunk: no weights, random")
            for module in self.trunk.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # Weights do not know of strides: half the stride in front is half the stride everywhere.
        self.trunk.conv1.stride = (1, 1)
        self.trunk.stride, self.trunk.multiple = 16, 1
        stem = self.trunk.conv1.out_channels
        self.stages = tuple(stem * 2**i for i in range(LEVELS))  # channels of the stages' results
        self.channels = (*self.stages[:-1], width)  # the same once the last is pooled
        self.pooling = PyramidPooling(self.stages[-1], width)
        self.decoder = Decoder(self.stages[:-1], width)
        self.classifier = Unit(width, num_classes)

    def start(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c i j"]:
        """Images of values in 0 .. 1 to what the first stage reads, at half their size.

        Raises:
            InputError: for sides below 32.
        """
        if min(images.shape[2:]) < SMALLEST:
            raise InputError(
                f"images are {images.shape[2]} x {images.shape[3]}; both sides must be at least {SMALLEST}"
            )
        x = F.relu(self.trunk.bn1(self.trunk.conv1((images - self.mean) / self.std)))
        return F.max_pool2d(x, 3, stride=2, padding=1)

    def stage(
        self, level: int, x: Float[Tensor, "n c h w"]
    ) -> tuple[Float[Tensor, "n d i j"], Float[Tensor, "n d i j"]]:
        """Stage 1 .. 4 of the trunk: its result, and the same before the last ReLU."""
        *first, last = self.trunk.get_submodule(f"layer{level}").children()
        for block in first:
            x = block(x)
        out = _before_relu(last, x)
        return F.relu(out), out

    def half(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d i j"]:
        """The decoder's map, at half of the images' size."""
        x, skips = self.start(images), []
        for level in range(1, LEVELS + 1):
            x, skip = self.stage(level, x)
            skips.append(skip)
        return self.decoder(skips[:-1], self.pooling(skips[-1]))

    def read(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d h w"]:
        """What the classifier reads, at the images' size."""
        return enlarge(self.half(images), images.shape[2:])
