"""Weak labels: class masks as a network that looks at an image would predict them.

From what a pixel really shows, with the errors of such networks: wavering borders, smoothed thin
structure, small things overlooked, whole regions taken for a similar class or left without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter, uniform_filter
from scipy.spatial import cKDTree

from ..superpixels import components

PATCHES = 24


@dataclass(frozen=True)
class Errors:
    """How wrong weak labels are.

    Attributes:
        jitter: how far borders waver, in widths of the image.
        smooth: side of the square whose majority decides, in widths of the image.
        missed: chance to overlook a thing of less than `small` of the image's pixels.
        small: share of the image's pixels.
        confusion: chance that a thing, or a patch of what is no thing, gets a similar class.
        blank: chance that it gets none.
    """

    jitter: float = 0.002
    smooth: float = 0.005
    missed: float = 0.5
    small: float = 0.0008
    confusion: float = 0.08
    blank: float = 0.02


def weak_mask(
    label: NDArray,
    classes: Mapping[int, int],
    unknown: int,
    similar: Mapping[int, tuple[int, ...]],
    rng: Generator,
    errors: Errors = Errors(),
) -> NDArray:
    """A class mask with errors.

    Args:
        label: (h, w) uint32, raw class in the low 16 bits, instance in the high ones.
        classes: raw class to class of the mask; what is not in it is unknown.
        unknown: value of pixels without a class.
        similar: class of the mask to those that it is taken for.
        rng: of the errors.
    Returns: (h, w) uint8.
    """
    height, width = label.shape
    table = np.full(1 << 16, unknown, np.uint8)
    for raw, value in classes.items():
        table[raw] = value
    mask = table[label & 0xFFFF]
    # A thing is one region, however many poles stand before it. What else is connected is cut into
    # patches: a network is wrong about a part of a road, not about the road.
    instance = (label >> 16).astype(np.int64)
    patch = _patches(height, width, rng)
    region = np.where(instance > 0, -instance, components(mask) * PATCHES + patch)
    _, region = np.unique(region, return_inverse=True)
    region = region.reshape(height, width)
    sizes = np.bincount(region.ravel())
    value, thing = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), bool)
    value[region] = mask
    thing[region] = instance > 0
    gone = np.zeros(len(sizes), bool)
    for i in np.flatnonzero(value != unknown):
        chances = rng.random(4)
        if thing[i] and sizes[i] < errors.small * mask.size and chances[0] < errors.missed:
            gone[i] = True
        elif chances[1] < errors.blank:
            value[i] = unknown
        elif chances[2] < errors.confusion and (others := similar.get(int(value[i]), ())):
            value[i] = others[int(chances[3] * len(others))]
    mask = value[region].astype(np.uint8)
    away = gone[region]
    if away.any() and not away.all():
        _, (row, column) = distance_transform_edt(away, return_indices=True)
        mask = mask[row, column]
    return _wavering(_majority(mask, round(errors.smooth * width)), errors.jitter * width, rng)


def _patches(height: int, width: int, rng: Generator) -> NDArray:
    """Numbers (h, w) below `PATCHES` of the nearest of as many random places."""
    row, column = np.mgrid[:height, :width]
    places = rng.random((PATCHES, 2)) * [height, width]
    return cKDTree(places).query(np.stack([row, column], -1))[1]


def _majority(mask: NDArray, side: int) -> NDArray:
    """The most frequent class of the square of `side` pixels around every pixel."""
    if side < 2:
        return mask
    values = np.unique(mask)
    shares = [uniform_filter((mask == v).astype(np.float32), side) for v in values]
    return values[np.argmax(shares, axis=0)]


def _wavering(mask: NDArray, reach: float, rng: Generator) -> NDArray:
    """Every pixel takes the class of a place about `reach` pixels away; the way changes smoothly."""
    height, width = mask.shape
    ways = rng.normal(size=(2, height, width))
    if reach <= 0:
        return mask
    for way in ways:
        way[:] = gaussian_filter(way, 2.5 * reach)
        way *= reach / max(float(way.std()), 1e-12)
    row, column = np.mgrid[:height, :width]
    row = np.clip(np.rint(row + ways[0]), 0, height - 1).astype(np.int64)
    column = np.clip(np.rint(column + ways[1]), 0, width - 1).astype(np.int64)
    return mask[row, column]
