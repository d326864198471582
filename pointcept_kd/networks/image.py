"""Images to pixel features: a frozen trunk, and small heads on it.

A head is a 1 x 1 convolution; its maps are brought to the image's size by bilinear interpolation with aligned corners,
and every pixel's feature to length 1. Both can be done for chosen pixels alone, which gives the same numbers for a
fraction of the memory. Trunks: `trunks.py`.

As teacher of points: Sautier et al., 2022, arXiv:2203.16258 (SLidR); Zhang et al., 2024, arXiv:2405.14271 (two heads);
Puy et al., 2024, arXiv:2310.17504 (ScaLR, the trunk's features themselves).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pointcept_kd.host import InputError, kd

from .trunks import KINDS, ImageModel, build_trunk, load_trunk


@kd.MODELS.register_module()
class ImageEncoder(ImageModel):
    """Pixel features of images, from a frozen trunk: its own, or of length 1 by trained heads.

    Args:
        weight: file of the trunk's weights. None leaves it random, and only with `allow_random`.
        kind: where the file is from, see `trunks.WEIGHTS`; "segmentor" for a checkpoint of `kd.ImageSegmentor`, "timm"
            for trunks of timm.
        heads: width of every head by its name; by default two of 64, called as those of the 3-D networks. An empty dict
            for none: then nothing is trained, and `features` and `features_at` hand out what the trunk gives.
        stride: pixels of the image per feature, see `trunks.build_trunk`.
        allow_random: accept a trunk without weights, which teaches nothing; for tests.
        trunk: "resnet50", "resnet34", "resnet18"; `dict(depths=..., width=..., bottleneck=...)` for a residual network
            of another size; or "timm:NAME".

    Raises:
        InputError: for a trunk without weights, heads without width, or weights that do not fit.
    """

    def __init__(
        self,
        weight: str | None = None,
        kind: str = "moco_v2",
        heads: Mapping[str, int] | None = None,
        stride: int | None = None,
        allow_random: bool = False,
        trunk: str | Mapping[str, Any] = "resnet50",
    ) -> None:
        heads = {"final": 64, "final_class_level": 64} if heads is None else dict(heads)
        if any(width < 1 for width in heads.values()):
            raise InputError(f"heads={heads}: expected widths of 1 or more by name")
        if weight is None and not allow_random:
            raise InputError(
                f"the image trunk has no weights: give weight=FILE and its kind ({', '.join(KINDS)}), or "
                "allow_random=True to mean it"
            )
        super().__init__(build_trunk(trunk, stride))
        if weight is not None:
            load_trunk(self.trunk, weight, kind)
        self.trunk.requires_grad_(False)
        self.heads = nn.ModuleDict(
            {name: nn.Conv2d(self.trunk.out_channels, width, 1) for name, width in heads.items()}
        )
        self.train(self.training)

    def train(self, mode: bool = True) -> ImageEncoder:
        """Training or evaluation of the heads; the trunk stays in evaluation."""
        super().train(mode)
        self.trunk.eval()
        return self

    @torch.no_grad()
    def features(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c i j"]:
        """What the trunk gives, at its stride, neither enlarged nor of length 1; without gradient.

        Args:
            images: values in 0 .. 1, sides that the trunk's stride divides.

        Raises:
            InputError: for other sides.
        """
        return self.read(images)

    @torch.no_grad()
    def features_at(
        self, images: Float[Tensor, "n 3 h w"], pixels: Int[Tensor, "m 3"]
    ) -> Float[Tensor, "m c"]:
        """`features` enlarged to the images' size, at chosen pixels alone; not of length 1, without gradient.

        Args:
            images: as in `features`.
            pixels: image, row and column of each.

        Raises:
            InputError: for pixels outside of the images.
        """
        return interpolate_at(self.features(images), pixels, images.shape[2:])

    def coarse(self, images: Float[Tensor, "n 3 h w"]) -> dict[str, Float[Tensor, "n c i j"]]:
        """Maps of the heads at the trunk's stride, neither enlarged nor of length 1, by the names of the heads.

        Args:
            images: as in `features`.

        Raises:
            InputError: for images of other sides, and where there are no heads.
        """
        if not self.heads:
            raise InputError(
                "the image encoder has no heads: give heads=dict(NAME=WIDTH), or take features_at"
            )
        features = self.features(images)
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
