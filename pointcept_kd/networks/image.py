"""Images to pixel features: a frozen residual network, and small heads on it.

The trunk is ResNet-50 with torchvision's parameter names. Its three later strides may be replaced by dilation, so that
the features keep a quarter of the image's side. A head is a 1 x 1 convolution; its maps are brought to the image's size
by bilinear interpolation with aligned corners, and every pixel's feature to length 1. Both can be done for chosen
pixels alone, which gives the same numbers for a fraction of the memory.

ResNet: He et al., 2016, arXiv:1512.03385. As teacher of points: Sautier et al., 2022, arXiv:2203.16258 (SLidR);
Zhang et al., 2024, arXiv:2405.14271 (two heads).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pointcept_kd.host import InputError, kd
from pointcept_kd.host.checkpoint import load_checkpoint

DEPTHS = (3, 4, 6, 3)
WIDTHS = (64, 128, 256, 512)
EXPANSION = 4
# ImageNet's, of channels in 0 .. 1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Published weight files: under which key the tensors are, which prefix they have, what to leave out.
WEIGHTS: dict[str, tuple[str | None, str, tuple[str, ...]]] = {
    "moco_v1": ("state_dict", "module.encoder_q.", ("fc",)),
    "moco_v2": ("state_dict", "module.encoder_q.", ("fc",)),
    "moco_coco": ("state_dict", "module.encoder_q.", ("fc",)),
    "swav": (None, "module.", ("pro",)),
    "deepcluster_v2": (None, "module.", ("pro",)),
    "dino": (None, "", ()),
    "obow": ("network", "", ("fc.",)),
    "pixpro": ("model", "module.encoder.", ()),
    "imagenet": (None, "", ("fc.",)),
}


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolution, each with BatchNorm, around which the input is added."""

    def __init__(
        self, in_channels: int, width: int, stride: int, dilation: int, project: bool
    ) -> None:
        super().__init__()
        out = width * EXPANSION
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(
            width, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(in_channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out)
            )
            if project
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) to (n, 4 width, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet-50 without pooling and classes; 23,508,032 parameters, 318 entries, torchvision's names.

    Args:
        stride: pixels of the image per feature, 4, 8, 16 or 32. Less than 32 is reached by dilation: 4 has 3 x 3
            convolutions of dilation 2, 4 and 8 in the later stages, each stage's first one that of the stage before.

    Raises:
        InputError: for another stride.
    """

    out_channels = WIDTHS[-1] * EXPANSION

    def __init__(self, stride: int = 4) -> None:
        super().__init__()
        if stride not in (4, 8, 16, 32):
            raise InputError(f"stride={stride!r} is none of 4, 8, 16, 32")
        self.stride = stride
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels, reached, dilation = 64, 4, 1
        for number, (depth, width) in enumerate(zip(DEPTHS, WIDTHS), start=1):
            before, step = dilation, 1
            if number > 1 and reached < stride:
                step, reached = 2, reached * 2
            elif number > 1:
                dilation *= 2
            blocks = []
            for index in range(depth):
                first = index == 0
                blocks.append(
                    Bottleneck(
                        channels,
                        width,
                        step if first else 1,
                        before if first else dilation,
                        project=first,
                    )
                )
                channels = width * EXPANSION
            self.add_module(f"layer{number}", nn.Sequential(*blocks))

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 2048 i j"]:
        """Features of normalised images."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return x


def load_trunk(trunk: nn.Module, path: str | Path, kind: str) -> None:
    """Fill a trunk with published weights.

    Args:
        trunk: a `ResNet50`.
        path: a local file; nothing is ever fetched.
        kind: where the file is from, a key of `WEIGHTS`.

    Raises:
        InputError: for an unknown kind, a file that cannot be read, and one that lacks an entry of the trunk or has one
            of another shape; the text names them.
    """
    if kind not in WEIGHTS:
        raise InputError(f"weights of {kind!r}: known are {', '.join(WEIGHTS)}")
    place, prefix, without = WEIGHTS[kind]
    content = load_checkpoint(path)
    found: Any = content if place is None else content.get(place)
    if place is None and isinstance(content.get("state_dict"), Mapping):
        found = content["state_dict"]  # where a bare file's weights are put
    if not isinstance(found, Mapping):
        raise InputError(f"{path}: no {place!r}, where {kind} weights are; is it another file?")
    weights = {
        key.removeprefix(prefix): value
        for key, value in found.items()
        if key.startswith(prefix) and not key.removeprefix(prefix).startswith(without or ("\0",))
    }
    wanted = trunk.state_dict()
    missing = [key for key in wanted if key not in weights]
    if missing:
        raise InputError(
            f"{path}: lacks {len(missing)} of the {len(wanted)} entries of the trunk, the first is "
            f"{prefix}{missing[0]} ({kind})"
        )
    odd = [key for key, value in wanted.items() if weights[key].shape != value.shape]
    if odd:
        raise InputError(
            f"{path}: {prefix}{odd[0]} is {tuple(weights[odd[0]].shape)}, the trunk's {tuple(wanted[odd[0]].shape)}"
        )
    unused = len(weights) - len(wanted)
    trunk.load_state_dict({key: weights[key] for key in wanted})
    logging.getLogger("pointcept_kd").info(
        "Image trunk: %d entries of %s (%s), %d not used", len(wanted), path, kind, unused
    )


@kd.MODELS.register_module()
class ImageEncoder(nn.Module):
    """Unit-length pixel features of images, from a frozen trunk by trained heads.

    Args:
        weight: file of the trunk's weights. None leaves it random, and only with `allow_random`.
        kind: where the file is from, see `WEIGHTS`.
        heads: width of every head by its name; by default two of 64, called as those of the 3-D networks.
        stride: of the trunk, see `ResNet50`.
        allow_random: accept a trunk without weights, which teaches nothing; for tests.

    Raises:
        InputError: for a trunk without weights, no heads, or weights that do not fit.
    """

    def __init__(
        self,
        weight: str | None = None,
        kind: str = "moco_v2",
        heads: Mapping[str, int] | None = None,
        stride: int = 4,
        allow_random: bool = False,
    ) -> None:
        super().__init__()
        heads = {"final": 64, "final_class_level": 64} if heads is None else dict(heads)
        if not heads or any(width < 1 for width in heads.values()):
            raise InputError(f"heads={heads}: expected widths of 1 or more by name")
        if weight is None and not allow_random:
            raise InputError(
                "the image trunk has no weights: give weight=FILE and its kind "
                f"({', '.join(WEIGHTS)}), or allow_random=True to mean it"
            )
        self.trunk = ResNet50(stride)
        if weight is not None:
            load_trunk(self.trunk, weight, kind)
        self.trunk.requires_grad_(False)
        self.heads = nn.ModuleDict(
            {name: nn.Conv2d(ResNet50.out_channels, width, 1) for name, width in heads.items()}
        )
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.train(self.training)

    def train(self, mode: bool = True) -> ImageEncoder:
        """Training or evaluation of the heads; the trunk stays in evaluation."""
        super().train(mode)
        self.trunk.eval()
        return self

    def coarse(self, images: Float[Tensor, "n 3 h w"]) -> dict[str, Float[Tensor, "n c i j"]]:
        """Maps of the heads at the trunk's stride, neither enlarged nor of length 1, by the names of the heads.

        Args:
            images: values in 0 .. 1, sides that the trunk's stride divides.

        Raises:
            InputError: for other sides.
        """
        if images.shape[2] % self.trunk.stride or images.shape[3] % self.trunk.stride:
            raise InputError(
                f"images are {images.shape[2]} x {images.shape[3]}; both sides must be multiples of {self.trunk.stride}"
            )
        with torch.no_grad():
            features = self.trunk((images - self.mean) / self.std)
        return {name: head(features) for name, head in self.heads.items()}

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> dict[str, Float[Tensor, "n c h w"]]:
        """Features of every pixel, of length 1, by the names of the heads; see `coarse`."""
        return {
            name: F.normalize(enlarge(maps, images.shape[2:]), dim=1)
            for name, maps in self.coarse(images).items()
        }

    def at(
        self, images: Float[Tensor, "n 3 h w"], pixels: Int[Tensor, "m 3"]
    ) -> dict[str, Float[Tensor, "m c"]]:
        """`forward` at chosen pixels alone.

        Args:
            images: as in `coarse`.
            pixels: image, row and column of each.

        Raises:
            InputError: for pixels outside of the images.
        """
        return {
            name: F.normalize(interpolate_at(maps, pixels, images.shape[2:]), dim=1)
            for name, maps in self.coarse(images).items()
        }


def enlarge(maps: Float[Tensor, "n c i j"], size: Sequence[int]) -> Float[Tensor, "n c h w"]:
    """Maps at another size, bilinear with aligned corners."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


def interpolate_at(
    maps: Float[Tensor, "n c i j"], pixels: Int[Tensor, "m 3"], size: Sequence[int]
) -> Float[Tensor, "m c"]:
    """What `enlarge` gives at chosen pixels: memory for those alone.

    Args:
        maps: to be enlarged.
        pixels: image, row and column of each in the enlarged maps.
        size: height and width of those.

    Raises:
        InputError: for pixels outside.
    """
    count = torch.tensor([len(maps), *size], device=pixels.device)
    if len(pixels) and bool(((pixels < 0) | (pixels >= count)).any()):
        raise InputError(f"pixels lie outside of {len(maps)} images of {size[0]} x {size[1]}")
    lower, upper, share = [], [], []
    for axis in (0, 1):
        cells, fine = maps.shape[2 + axis], int(size[axis])
        place = pixels[:, 1 + axis].to(maps.dtype) * ((cells - 1) / max(fine - 1, 1))
        below = place.floor().long().clamp(0, cells - 1)
        lower.append(below)
        upper.append((below + 1).clamp(max=cells - 1))
        share.append((place - below)[:, None])
    image = pixels[:, 0].long()
    corner = maps.permute(0, 2, 3, 1)
    top = torch.lerp(corner[image, lower[0], lower[1]], corner[image, lower[0], upper[1]], share[1])
    bottom = torch.lerp(
        corner[image, upper[0], lower[1]], corner[image, upper[0], upper[1]], share[1]
    )
    return torch.lerp(top, bottom, share[0])
