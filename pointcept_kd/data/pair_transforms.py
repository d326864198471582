"""Transforms of scans with camera images, which keep the pairs of points and pixels right.

They work on the samples of `pixel_pairs.PointPixelDataset`: `images`, and where there are any `superpixels` and
`weak_labels`, lists with one entry per camera; `pair_point` (m,) ids of points, `pair_pixel` (m, 3) image, row and
column, `pair_label` (m,). Transforms of the cloud alone need not know of pairs: those name points by id, and
`point_id` goes with the points.

Crop, its limits and the map of pixels are those of SLidR (Sautier et al., CVPR 2022). Draws come from numpy's global
generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from pointcept_kd.host import InputError, kd

from .arrays import Array, Data, bounds, coord_of, lookup, need, ratio_of, select

MAPS = ("superpixels", "weak_labels")  # keys of maps beside the images
_DRAWS = 10  # of a box that fits into the image, before it is put in the middle


def rows_of_ids(ids: Array, wanted: Array) -> Array:
    """Row (m,) int64 in `ids` (n,) of each of `wanted` (m,), the first one; -1 where it is not there."""
    table = np.full(max(ids.max(initial=-1), wanted.max(initial=-1)) + 1, -1, np.int64)
    table[ids[::-1]] = np.arange(len(ids) - 1, -1, -1)
    return table[wanted]


def keep_pairs(data: Data, kept: Array) -> None:
    """Leave out the pairs that the mask or the rows `kept` do not name."""
    for key in ("pair_point", "pair_pixel", "pair_label"):
        if key in data:
            data[key] = data[key][kept]


def drop_lost_pairs(data: Data, who: str) -> None:
    """Leave out the pairs whose points are gone.

    Raises:
        InputError: for a sample without pairs or `point_id`.
    """
    ids, wanted = lookup(data, "point_id", who), lookup(data, "pair_point", who)
    there = rows_of_ids(ids, wanted) >= 0
    if not there.all():
        keep_pairs(data, there)


def _images(data: Data, who: str) -> list[Array]:
    images = lookup(data, "images", who)
    need(
        isinstance(images, list) and all(i.ndim == 3 and i.shape[2] == 3 for i in images),
        f"{who}: images is a list of (h, w, 3) arrays; put {who} before PairsToRows",
    )
    return images


def _counts(data: Data) -> Array:
    """Pairs of each image."""
    return np.bincount(data["pair_pixel"][:, 0], minlength=len(data["images"]))


def _size_of(size: Sequence[int], who: str) -> tuple[int, int]:
    whole = len(size) == 2 and all(isinstance(s, (int, np.integer)) and s > 0 for s in size)
    need(whole, f"{who}: size is the height and width in pixels, got {size!r}")
    return int(size[0]), int(size[1])


def _limits(values: Sequence[float], name: str) -> tuple[float, float]:
    need(
        len(values) == 2 and 0 < values[0] <= values[1],
        f"{name} is two positive limits, got {values!r}",
    )
    return float(values[0]), float(values[1])


def resized_image(
    image: Array, box: tuple[int, int, int, int], size: tuple[int, int], antialias: bool
) -> Array:
    """A part of an image at another size, bilinear with pixel centres at halves.

    Args:
        image: (h, w, 3) uint8.
        box: top, left, height, width.
        size: (h', w').
        antialias: average over what a pixel of the result covers, not only over its four neighbours.
    Returns: (h', w', 3) uint8, within 1 of the exact value.
    """
    top, left, height, width = box
    part = np.ascontiguousarray(image[top : top + height, left : left + width])
    if part.shape[:2] == size:
        return part.copy()
    if not part.flags.writeable:  # torch takes no such arrays
        part = part.copy()
    # Bytes with channels last, as the array lies, have a fast path of their own.
    result = torch.nn.functional.interpolate(
        torch.from_numpy(part).permute(2, 0, 1)[None],
        size,
        mode="bilinear",
        align_corners=False,
        antialias=antialias,
    )
    return result[0].permute(1, 2, 0).contiguous().numpy()


def resized_map(values: Array, box: tuple[int, int, int, int], size: tuple[int, int]) -> Array:
    """A part of a map (h, w) of labels at another size (h', w'): row r shows row floor(r height / h') of the part."""
    top, left, height, width = box
    rows = top + np.arange(size[0]) * height // size[0]
    columns = left + np.arange(size[1]) * width // size[1]
    return values[rows[:, None], columns]


def moved_pixels(
    pixels: Array, box: tuple[int, int, int, int], size: tuple[int, int]
) -> tuple[Array, Array]:
    """Where pixels (m, 2), row and column, are in a part of the image at another size.

    Returns: (m, 2) int64, round((row - top) h' / height) and likewise the column, halves to even; inside (m,) bool.
    """
    top, left, height, width = box
    # One product and one quotient: exact halves stay exact.
    row = np.rint((pixels[:, 0] - top) * size[0] / height).astype(np.int64)
    column = np.rint((pixels[:, 1] - left) * size[1] / width).astype(np.int64)
    inside = (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
    return np.stack([row, column], 1), inside


@kd.TRANSFORMS.register_module()
class ShuffleImages:
    """Put the cameras into random order."""

    def __call__(self, data: Data) -> Data:
        images = _images(data, "ShuffleImages")
        order = np.random.permutation(len(images))
        place = np.argsort(order)  # old number to new
        for key in ("images", *MAPS):
            if key in data:
                data[key] = [data[key][i] for i in order]
        pixels = lookup(data, "pair_pixel", "ShuffleImages").copy()
        pixels[:, 0] = place[pixels[:, 0]]
        data["pair_pixel"] = pixels
        return data


@kd.TRANSFORMS.register_module()
class DropCuboid:
    """Remove the points inside a box around a random point, and their pairs; honours `index_valid_keys`.

    The box is s times as long as the cloud on every axis, s uniform in [0, max_share]. Nothing is removed where an
    image would be left with fewer pairs than `least_pairs` or, if it had fewer before, than it had; nor where no point
    would be left.

    Args:
        max_share: largest s, 0 to 1.
        least_pairs: pairs that every image keeps.
    """

    def __init__(self, max_share: float = 0.2, least_pairs: int = 1024) -> None:
        self.max_share = ratio_of(max_share, "DropCuboid: max_share")
        self.least_pairs = least_pairs

    def __call__(self, data: Data) -> Data:
        coord = coord_of(data, "DropCuboid")
        _images(data, "DropCuboid")
        drop_lost_pairs(data, "DropCuboid")
        share = np.random.uniform(0, self.max_share)
        centre = coord[np.random.randint(len(coord))].astype(np.float64)
        low, high = bounds(coord)
        inside = np.ones(len(coord), bool)
        for axis in range(3):
            half = share * (float(high[axis]) - float(low[axis])) / 2
            inside &= np.abs(coord[:, axis].astype(np.float64) - centre[axis]) < half
        if not inside.any() or inside.all():
            return data
        kept = ~inside[rows_of_ids(data["point_id"], data["pair_point"])]
        before = _counts(data)
        after = np.bincount(data["pair_pixel"][kept, 0], minlength=len(before))
        if (after < np.minimum(before, self.least_pairs)).any():
            return data
        keep_pairs(data, kept)
        return select(data, ~inside, "DropCuboid")


@kd.TRANSFORMS.register_module()
class CropImages:
    """Cut a random part out of every image and resize it; pairs outside it are dropped.

    A draw is taken when more than `least_pairs` or more than `least_share` of the image's pairs stay; after `tries` of
    them, that with the most pairs. An image without pairs takes its first.

    Args:
        size: height and width of the result, pixels.
        area: limits of the part's share of the image's area, uniform.
        aspect: limits of its width / height, uniform in the logarithm. Where no such part fits, the middle of the image
            is taken, cut to these limits.
        least_pairs, least_share, tries: see above.
        antialias: see `resized_image`; False is what the published models were trained with.
    """

    def __init__(
        self,
        size: Sequence[int] = (224, 416),
        area: Sequence[float] = (0.3, 1.0),
        aspect: Sequence[float] = (14 / 9, 17 / 9),
        least_pairs: int = 1024,
        least_share: float = 0.75,
        tries: int = 10,
        antialias: bool = False,
    ) -> None:
        self.size = _size_of(size, "CropImages")
        self.area = _limits(area, "CropImages: area")
        need(self.area[1] <= 1, f"CropImages: area is a share of the image, got {area!r}")
        self.aspect = _limits(aspect, "CropImages: aspect")
        need(tries >= 1, f"CropImages: tries is 1 or more, got {tries!r}")
        self.least_pairs, self.tries = least_pairs, tries
        self.least_share = ratio_of(least_share, "CropImages: least_share")
        self.antialias = antialias

    def __call__(self, data: Data) -> Data:
        images = _images(data, "CropImages")
        drop_lost_pairs(data, "CropImages")
        pixels = data["pair_pixel"].copy()
        kept = np.zeros(len(pixels), bool)
        boxes = []
        for number, image in enumerate(images):
            here = np.flatnonzero(pixels[:, 0] == number)
            box, places, inside = self._draw(image.shape[:2], pixels[here, 1:])
            boxes.append(box)
            pixels[here, 1:], kept[here] = places, inside
        data["pair_pixel"] = pixels
        keep_pairs(data, kept)
        _resize(data, boxes, self.size, self.antialias)
        return data

    def _draw(
        self, shape: tuple[int, int], pixels: Array
    ) -> tuple[tuple[int, int, int, int], Array, Array]:
        best = None
        for _ in range(self.tries):
            box = self.box(*shape)
            places, inside = moved_pixels(pixels, box, self.size)
            count = int(inside.sum())
            if best is None or count > best[0]:
                best = count, box, places, inside
            enough = count > self.least_pairs or count > self.least_share * len(pixels)
            if enough or not len(pixels):
                break
        return best[1:]

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Draw a part of an image: top, left, height, width."""
        low, high = (math.log(value) for value in self.aspect)
        for _ in range(_DRAWS):
            area = height * width * np.random.uniform(*self.area)
            aspect = math.exp(np.random.uniform(low, high))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top = int(np.random.randint(height - h + 1))
                return top, int(np.random.randint(width - w + 1)), h, w
        w, h = width, height
        if width / height < self.aspect[0]:
            h = max(round(width / self.aspect[0]), 1)
        elif width / height > self.aspect[1]:
            w = max(round(height * self.aspect[1]), 1)
        return (height - h) // 2, (width - w) // 2, h, w


def _resize(
    data: Data, boxes: Sequence[tuple[int, int, int, int]], size: tuple[int, int], antialias: bool
) -> None:
    data["images"] = [
        resized_image(image, box, size, antialias)
        for image, box in zip(data["images"], boxes, strict=True)
    ]
    for key in MAPS:
        if key in data:
            data[key] = [
                resized_map(values, box, size) for values, box in zip(data[key], boxes, strict=True)
            ]


@kd.TRANSFORMS.register_module()
class ResizeImages:
    """Resize whole images; no pair is lost: row and column become round(row h' / h), at most the last one.

    Args:
        size: height and width of the result, pixels.
        antialias: see `resized_image`.
    """

    def __init__(self, size: Sequence[int] = (224, 416), antialias: bool = False) -> None:
        self.size = _size_of(size, "ResizeImages")
        self.antialias = antialias

    def __call__(self, data: Data) -> Data:
        images = _images(data, "ResizeImages")
        pixels = lookup(data, "pair_pixel", "ResizeImages").copy()
        boxes = [(0, 0, *image.shape[:2]) for image in images]
        last = np.array(self.size) - 1
        for number, box in enumerate(boxes):
            here = pixels[:, 0] == number
            pixels[here, 1:] = np.minimum(moved_pixels(pixels[here, 1:], box, self.size)[0], last)
        data["pair_pixel"] = pixels
        _resize(data, boxes, self.size, self.antialias)
        return data


@kd.TRANSFORMS.register_module()
class FlipImages:
    """Mirror each image left to right with probability p; the cloud stays as it is."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = ratio_of(p, "FlipImages: p")

    def __call__(self, data: Data) -> Data:
        images = _images(data, "FlipImages")
        flipped = np.random.random(len(images)) < self.p
        pixels = lookup(data, "pair_pixel", "FlipImages").copy()
        widths = np.array([image.shape[1] for image in images])
        turned = flipped[pixels[:, 0]]
        pixels[turned, 2] = widths[pixels[turned, 0]] - 1 - pixels[turned, 2]
        data["pair_pixel"] = pixels
        for key in ("images", *MAPS):
            if key in data:
                data[key] = [
                    np.ascontiguousarray(values[:, ::-1]) if turn else values
                    for values, turn in zip(data[key], flipped, strict=True)
                ]
        return data


@kd.TRANSFORMS.register_module()
class PairsToRows:
    """Make arrays of images and pairs that can be joined to batches; the last transform that knows of ids.

    `images` becomes (v, 3, h, w) float32 in 0..1, `superpixels` and `weak_labels` (v, h, w) int64, `pair_point` (m,)
    int64 rows of the sample's points. Pairs whose points are gone are dropped.

    Raises:
        InputError: for images of different sizes.
    """

    def __call__(self, data: Data) -> Data:
        images = _images(data, "PairsToRows")
        sizes = sorted({image.shape[:2] for image in images})
        if len(sizes) != 1:
            raise InputError(
                f"PairsToRows: sample {data.get('name', '?')} has images of {len(sizes)} sizes, {sizes}; put "
                "CropImages or ResizeImages before"
            )
        drop_lost_pairs(data, "PairsToRows")
        data["pair_point"] = rows_of_ids(data["point_id"], data["pair_point"])
        stacked = np.empty((len(images), 3, *sizes[0]), np.float32)
        for number, image in enumerate(images):
            stacked[number] = image.transpose(2, 0, 1)
        stacked /= 255
        data["images"] = stacked
        for key in MAPS:
            if key in data:
                data[key] = np.stack(data[key]).astype(np.int64)
        return data
