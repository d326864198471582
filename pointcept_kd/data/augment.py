"""Augmentation: transforms that move points or take values away, and keep every point."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import interpolate, ndimage

from pointcept_kd.host import TRANSFORMS, kd, stand_in

from .arrays import (
    Array,
    Data,
    bounds,
    box_of,
    clear_rows,
    coord_of,
    moved,
    need,
    ratio_of,
    valid_keys,
)


def _rotate(data: Data, angle: float, center: Any, axis: str, who: str) -> Data:
    coord = coord_of(data, who)
    c, s = np.cos(angle), np.sin(angle)
    matrix = {
        "x": [[1, 0, 0], [0, c, -s], [0, s, c]],
        "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
        "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]],
    }[axis]
    turn = np.array(matrix, dtype=np.float64).T
    if center is None:
        low, high = bounds(coord)
        center = [(a + b) / 2 for a, b in zip(low, high)]
    center = np.asarray(center, dtype=np.float64)
    centred = moved(coord, -center).astype(np.float64, copy=False)
    data["coord"] = moved(np.dot(centred, turn), center)
    if "normal" in data:
        data["normal"] = np.dot(data["normal"].astype(np.float64, copy=False), turn)
    return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "RandomRotate")
class RandomRotate:
    """Turn `coord` and `normal` by a uniform angle; the result is float64.

    Args:
        angle: lower and upper bound in multiples of pi.
        center: of the rotation, in metres; None is the middle of the bounding box.
        axis: "x", "y" or "z".
        always_apply: the same as p=1.
        p: probability.
    """

    def __init__(
        self,
        angle: Sequence[float] | None = None,
        center: Sequence[float] | None = None,
        axis: str = "z",
        always_apply: bool = False,
        p: float = 0.5,
    ) -> None:
        need(axis in ("x", "y", "z"), f"{type(self).__name__}: axis is x, y or z, got {axis!r}")
        self.angle = [-1, 1] if angle is None else angle
        self.center = center
        self.axis = axis
        self.p = 1 if always_apply else p

    def draw(self) -> float:
        """The angle in radians."""
        return np.random.uniform(self.angle[0], self.angle[1]) * np.pi

    def __call__(self, data: Data) -> Data:
        if random.random() > self.p:
            return data
        return _rotate(data, self.draw(), self.center, self.axis, type(self).__name__)


@stand_in(TRANSFORMS, kd.TRANSFORMS, "RandomRotateTargetAngle")
class RandomRotateTargetAngle(RandomRotate):
    """Turn by one of the listed angles (multiples of pi); otherwise as `RandomRotate`."""

    def __init__(
        self,
        angle: Sequence[float] = (1 / 2, 1, 3 / 2),
        center: Sequence[float] | None = None,
        axis: str = "z",
        always_apply: bool = False,
        p: float = 0.75,
    ) -> None:
        super().__init__(angle, center, axis, always_apply, p)

    def draw(self) -> float:
        """One of the angles, in radians."""
        return np.random.choice(self.angle) * np.pi


@stand_in(TRANSFORMS, kd.TRANSFORMS, "RandomScale")
class RandomScale:
    """Multiply by one uniform factor, or by one per axis if `anisotropic`."""

    def __init__(self, scale: Sequence[float] | None = None, anisotropic: bool = False) -> None:
        self.scale = [0.95, 1.05] if scale is None else scale
        self.anisotropic = anisotropic

    def __call__(self, data: Data) -> Data:
        coord = coord_of(data, "RandomScale")
        factor = np.random.uniform(self.scale[0], self.scale[1], 3 if self.anisotropic else 1)
        scaled = coord.astype(np.float64)
        scaled *= factor
        data["coord"] = scaled.astype(coord.dtype, copy=False)
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "RandomFlip")
class RandomFlip:
    """Negate x with probability `p`, then independently y, of `coord` and `normal`."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, data: Data) -> Data:
        data["coord"] = coord_of(data, "RandomFlip")
        axes = [axis for axis in (0, 1) if np.random.rand() < self.p]
        for key in ("coord", "normal"):
            if axes and key in data:
                data[key] = data[key].copy()
                for axis in axes:
                    np.negative(data[key][:, axis], out=data[key][:, axis])
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "RandomJitter")
class RandomJitter:
    """Add Gaussian noise of `sigma` metres, clipped to +-`clip`, to every coordinate."""

    def __init__(self, sigma: float = 0.01, clip: float = 0.05) -> None:
        need(clip > 0, f"RandomJitter: clip must be positive, got {clip}")
        self.sigma = sigma
        self.clip = clip

    def __call__(self, data: Data) -> Data:
        coord = coord_of(data, "RandomJitter")
        noise = np.random.randn(len(coord), 3)
        noise *= self.sigma
        np.clip(noise, -self.clip, self.clip, out=noise)
        noise += coord
        data["coord"] = noise.astype(coord.dtype, copy=False)
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "RandomShift")
class RandomShift:
    """Add one uniform shift per cloud; `shift` holds (low, high) in metres for x, y and z."""

    def __init__(
        self, shift: Sequence[Sequence[float]] = ((-0.2, 0.2), (-0.2, 0.2), (0, 0))
    ) -> None:
        ranges = np.asarray(shift, dtype=np.float64)
        need(
            ranges.shape == (3, 2), f"RandomShift: shift is three (low, high) pairs, got {shift!r}"
        )
        self.shift = shift

    def __call__(self, data: Data) -> Data:
        coord = coord_of(data, "RandomShift")
        data["coord"] = moved(coord, [np.random.uniform(low, high) for low, high in self.shift])
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "CenterShift")
class CenterShift:
    """Subtract the middle of the bounding box in x and y and, with `apply_z`, the lowest z."""

    def __init__(self, apply_z: bool = True) -> None:
        self.apply_z = apply_z

    def __call__(self, data: Data) -> Data:
        coord = coord_of(data, "CenterShift")
        low, high = bounds(coord)
        middle = [(a + b) / 2 for a, b in zip(low, high)]
        data["coord"] = moved(coord, [-middle[0], -middle[1], -low[2] if self.apply_z else 0])
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "PositiveShift")
class PositiveShift:
    """Subtract the smallest coordinate of each axis."""

    def __call__(self, data: Data) -> Data:
        coord = coord_of(data, "PositiveShift")
        data["coord"] = moved(coord, [-low for low in bounds(coord)[0]])
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "NormalizeCoord")
class NormalizeCoord:
    """Centre on the mean and scale into the unit sphere; coinciding points are only centred."""

    def __call__(self, data: Data) -> Data:
        coord = coord_of(data, "NormalizeCoord")
        coord = coord - np.mean(coord, axis=0)
        reach = np.max(np.sqrt(np.sum(coord**2, axis=1)))
        data["coord"] = coord / reach if reach > 0 else coord
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ElasticDistortion")
class ElasticDistortion:
    """Move points by a smooth random field, with probability 0.95.

    Args:
        distortion_params: (granularity, magnitude) pairs in metres, applied one after the other;
            None is [[0.2, 0.4], [0.8, 1.6]].

    Raises:
        InputError: when the noise grid would not fit into memory.
    """

    MAX_CELLS = 10**8

    def __init__(self, distortion_params: Sequence[Sequence[float]] | None = None) -> None:
        params = [[0.2, 0.4], [0.8, 1.6]] if distortion_params is None else distortion_params
        need(
            all(len(pair) == 2 and pair[0] > 0 for pair in params),
            f"ElasticDistortion: expected (granularity > 0, magnitude) pairs, got {params!r}",
        )
        self.distortion_params = params

    def __call__(self, data: Data) -> Data:
        data["coord"] = coord_of(data, "ElasticDistortion")
        if random.random() < 0.95:
            for granularity, magnitude in self.distortion_params:
                data["coord"] = self.distort(data["coord"], granularity, magnitude)
        return data

    def distort(self, coord: Array, granularity: float, magnitude: float) -> Array:
        """Add trilinearly read noise: Gaussian on a grid of cells `granularity` wide, blurred twice."""
        low = coord.min(axis=0)
        shape = ((coord - low).max(axis=0) // granularity).astype(int) + 3
        need(
            int(np.prod(shape)) <= self.MAX_CELLS,
            f"ElasticDistortion: granularity {granularity} m gives a noise grid of "
            f"{shape.tolist()} cells for this scan; use a coarser one or crop first",
        )
        noise = np.random.randn(*shape, 3).astype(np.float32)
        box = np.full(3, np.float32(1) / np.float32(3), dtype=np.float32)
        for axis in (0, 1, 2) * 2:
            noise = ndimage.convolve1d(noise, box, axis=axis, mode="constant", cval=0)
        axes = [
            np.linspace(start, stop, steps)
            for start, stop, steps in zip(low - granularity, low + granularity * (shape - 2), shape)
        ]
        field = interpolate.RegularGridInterpolator(axes, noise, bounds_error=False, fill_value=0)
        return (coord + field(coord) * magnitude).astype(coord.dtype, copy=False)


@stand_in(TRANSFORMS, kd.TRANSFORMS, "PointClip")
class PointClip:
    """Clamp coordinates to a box; far points pile up on its faces. `kd.RangeCrop` removes them.

    Args:
        point_cloud_range: x, y, z minimum, then maximum, in metres.
    """

    def __init__(self, point_cloud_range: Sequence[float] = (-80, -80, -3, 80, 80, 1)) -> None:
        self.low, self.high = box_of(point_cloud_range, "PointClip")

    def __call__(self, data: Data) -> Data:
        coord = coord_of(data, "PointClip").astype(np.float64)
        for axis in range(3):
            column = coord[:, axis]
            np.clip(column, self.low[axis], self.high[axis], out=column)
        data["coord"] = coord
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ClipGaussianJitter")
class ClipGaussianJitter:
    """Add Gaussian noise that is cut off at 1.96 standard deviations, there `scalar` metres.

    Pointcept draws it around a mean of one number, which numpy refuses; the mean here is zero.

    Args:
        scalar: the largest step in metres.
        store_jitter: keep the noise (n, 3) as `jitter`.
    """

    QUANTILE = 1.96

    def __init__(self, scalar: float = 0.02, store_jitter: bool = False) -> None:
        self.scalar = scalar
        self.store_jitter = store_jitter

    def __call__(self, data: Data) -> Data:
        coord = coord_of(data, "ClipGaussianJitter")
        noise = np.random.multivariate_normal(np.zeros(3), np.identity(3), len(coord))
        noise = self.scalar * np.clip(noise / self.QUANTILE, -1, 1)
        data["coord"] = (coord + noise).astype(coord.dtype, copy=False)
        if self.store_jitter:
            data["jitter"] = noise
            data["index_valid_keys"] = [*valid_keys(data), "jitter"]
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "RandomDropNormal")
class RandomDropNormal:
    """Set a random share of the normals to zero, with probability `drop_application_ratio`."""

    def __init__(self, drop_ratio: float = 0.2, drop_application_ratio: float = 0.5) -> None:
        self.drop_ratio = ratio_of(drop_ratio, "RandomDropNormal: drop_ratio")
        self.drop_application_ratio = drop_application_ratio

    def __call__(self, data: Data) -> Data:
        return clear_rows(data, "normal", self.drop_ratio, self.drop_application_ratio)
