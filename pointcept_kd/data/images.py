"""Transforms of the camera images of a sample, in plain torch.

`ImgAugmentation` runs the others on `data["images"]`, a tensor (views, 3, h, w) of float32 in 0..1,
and keeps `data["correspondence"]` (points, views, 2), row and column of every point in every image
or -1, in step with its crop. Names, draws and results are Pointcept's.

Not here: ImgRandomHorizontalFlip and ImgRandomResizedCrop, which move pixels without moving the
correspondences, and ImgRandomColorJitter; all three only wrap torchvision.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pointcept_kd.host import TRANSFORMS, InputError, kd, stand_in

from .arrays import Data, lookup, need

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ImgToTensor")
class ImgToTensor:
    """An image (h, w) or (h, w, c), array or Pillow image, to (c, h, w); bytes become 0..1 float32."""

    def __call__(self, image: Any) -> Tensor:
        pixels = np.array(image)
        need(pixels.ndim in (2, 3), f"ImgToTensor: an image has 2 or 3 axes, got {pixels.shape}")
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        tensor = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        return tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ImgGaussianBlur")
class ImgGaussianBlur:
    """Blur with a 9 x 9 Gaussian with probability `p`.

    Args:
        p: probability.
        radius_min: lower bound of the standard deviation in pixels.
        radius_max: upper bound.
    """

    SIZE = 9

    def __init__(self, *, p: float = 0.5, radius_min: float = 0.1, radius_max: float = 2.0) -> None:
        need(0 < radius_min <= radius_max, "ImgGaussianBlur: 0 < radius_min <= radius_max")
        self.p = p
        self.radius_min = radius_min
        self.radius_max = radius_max

    def __call__(self, image: Tensor) -> Tensor:
        if np.random.rand() >= self.p:
            return image
        sigma = torch.empty(1).uniform_(self.radius_min, self.radius_max).item()
        half = self.SIZE // 2
        need(
            min(image.shape[-2:]) > half,
            f"ImgGaussianBlur: images must be larger than {half} pixels, got {tuple(image.shape)}",
        )
        steps = torch.linspace(-half, half, self.SIZE)
        line = torch.exp(-0.5 * (steps / sigma) ** 2)
        line = line / line.sum()
        planes = image.reshape(-1, 1, *image.shape[-2:])
        planes = F.pad(planes, [half] * 4, mode="reflect")
        return F.conv2d(planes, torch.outer(line, line)[None, None]).reshape(image.shape)


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ImgChromaticJitter")
class ImgChromaticJitter:
    """Add one step per channel, uniform in 0..`std`, with probability `p`; the result stays in 0..1."""

    def __init__(self, p: float = 0.95, std: float = 0.005) -> None:
        self.p = p
        self.std = std

    def __call__(self, image: Tensor) -> Tensor:
        if np.random.rand() >= self.p:
            return image
        step = torch.rand(3) * self.std
        return torch.clip(image + step[:, None, None], 0, 1)


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ImgPixelContrast")
class ImgPixelContrast:
    """Replace a share `threshold` of all pixels by 255 minus their value, with probability `p`."""

    def __init__(self, threshold: float, p: float = 0.2) -> None:
        self.threshold = threshold
        self.p = p

    def __call__(self, image: Tensor) -> Tensor:
        if np.random.rand() >= self.p:
            return image
        n, _, h, w = image.shape
        chosen = torch.randint(0, n * h * w, (int(self.threshold * h * w * n),))
        pixels = image.permute(0, 2, 3, 1).reshape(-1, 3).clone()
        pixels[chosen] = 255 - pixels[chosen]
        return pixels.reshape(n, h, w, 3).permute(0, 3, 1, 2)


@stand_in(TRANSFORMS, kd.TRANSFORMS, "Imgnormalize")
class Imgnormalize:
    """Subtract `mean` and divide by `std`, per channel."""

    def __init__(
        self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
    ) -> None:
        need(all(s > 0 for s in std), f"Imgnormalize: std must be positive, got {std!r}")
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        return (image - self.mean.to(image)) / self.std.to(image)


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ImgRandomGrayscale")
class ImgRandomGrayscale:
    """Make all three channels the luma, with probability `p` (drawn by torch)."""

    def __init__(self, p: float = 0.1) -> None:
        self.p = p

    def __call__(self, image: Tensor) -> Tensor:
        if torch.rand(1).item() >= self.p:
            return image
        red, green, blue = image.unbind(dim=-3)
        luma = (0.2989 * red + 0.587 * green + 0.114 * blue).to(image.dtype)
        return luma.unsqueeze(-3).expand(image.shape).clone()


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ImgRandomSolarize")
class ImgRandomSolarize:
    """Invert all values from `threshold` up, with probability `p` (drawn by torch)."""

    def __init__(self, threshold: float, p: float = 0.1) -> None:
        self.threshold = threshold
        self.p = p

    def __call__(self, image: Tensor) -> Tensor:
        if torch.rand(1).item() >= self.p:
            return image
        top = 1 if image.is_floating_point() else 255
        need(self.threshold <= top, f"ImgRandomSolarize: threshold {self.threshold} is above {top}")
        return torch.where(image >= self.threshold, top - image, image)


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ImgAugmentation")
class ImgAugmentation:
    """Crop the images of a sample and transform them; correspondences outside the crop become -1.

    Args:
        imgtransforms: transforms of the image tensor, in order.
        crop_h: height of the crop in pixels.
        crop_w: width.
        patch_h: height of an image in patches.
        patch_w: width in patches.
        patch_size: edge of a patch in pixels.

    The corner of the crop is drawn once, when the transform is built.
    """

    def __init__(
        self,
        imgtransforms: Sequence[dict[str, Any]],
        crop_h: int = 518,
        crop_w: int = 518,
        patch_h: int = 37,
        patch_w: int = 37,
        patch_size: int = 14,
    ) -> None:
        self.transforms = [TRANSFORMS.build(cfg) for cfg in imgtransforms]
        spare = patch_h * patch_size - crop_h, patch_w * patch_size - crop_w
        need(
            min(spare) >= 0,
            f"ImgAugmentation: a crop of {crop_h} x {crop_w} is larger than {patch_h} x {patch_w} "
            f"patches of {patch_size}",
        )
        self.size = crop_h, crop_w
        self.start = [random.randint(0, room) for room in spare]

    def __call__(self, data: Data) -> Data:
        images = lookup(data, "images", "ImgAugmentation")
        rows, columns = (slice(at, at + n) for at, n in zip(self.start, self.size))
        if images.shape[-2] < rows.stop or images.shape[-1] < columns.stop:
            raise InputError(
                f"ImgAugmentation: sample {data.get('name', '?')} has images of "
                f"{tuple(images.shape[-2:])} pixels, the crop ends at {rows.stop}, {columns.stop}"
            )
        images = images[..., rows, columns]
        for transform in self.transforms:
            images = transform(images)
        matches = lookup(data, "correspondence", "ImgAugmentation")
        shifted = matches - np.array(self.start)
        inside = ((shifted >= 0) & (shifted < np.array(self.size))).all(axis=-1, keepdims=True)
        data["images"] = images
        data["correspondence"] = np.where(inside, shifted, -1).astype(matches.dtype)
        return data
