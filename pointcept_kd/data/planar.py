"""Augmentation of the cylindrical and polar recipes: scaling in the plane, and a Gaussian shift of the whole scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pointcept_kd.host import kd

from .arrays import coord_of, moved, need


@kd.TRANSFORMS.register_module()
class PlanarScale:
    """Multiply x and y, not z, by one uniform factor; `RandomScale` scales all three.

    Args:
        scale: lower and upper bound of the factor.
    """

    def __init__(self, scale: Sequence[float] = (0.95, 1.05)) -> None:
        need(
            len(scale) == 2 and 0 < scale[0] <= scale[1],
            f"PlanarScale: scale is two positive bounds, got {scale!r}",
        )
        self.scale = tuple(scale)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        coord = coord_of(data, "PlanarScale")
        factor = np.random.uniform(*self.scale)
        data["coord"] = coord * np.array([factor, factor, 1.0], dtype=coord.dtype)
        return data


@kd.TRANSFORMS.register_module()
class GaussianShift:
    """Move the whole scan by one normal draw per axis; `RandomShift` draws uniformly.

    Args:
        sigma: standard deviation in metres, one number or one per axis.
    """

    def __init__(self, sigma: float | Sequence[float] = 0.1) -> None:
        deviation = np.broadcast_to(np.asarray(sigma, dtype=np.float64), (3,))
        need(bool((deviation >= 0).all()), f"GaussianShift: sigma is 0 or more, got {sigma!r}")
        self.sigma = deviation

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        coord = coord_of(data, "GaussianShift")
        data["coord"] = moved(coord, np.random.normal(0, self.sigma).tolist())
        return data
