"""Colour of points: `color` (n, 3 or more), red, green and blue in 0..255 first."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pointcept_kd.host import TRANSFORMS, kd, stand_in

from .arrays import Array, Data, clear_rows, need, ratio_of


@stand_in(TRANSFORMS, kd.TRANSFORMS, "NormalizeColor")
class NormalizeColor:
    """Colour from 0..255 to 0..1."""

    def __call__(self, data: Data) -> Data:
        if "color" in data:
            data["color"] = data["color"] / 255
        return data


def _recolor(data: Data, p: float, change: Callable[[Array], Array]) -> Data:
    """Change the first three columns of `color` (0..255) with probability `p`, in their type."""
    if "color" in data and np.random.rand() < p:
        color = data["color"].copy()
        color[:, :3] = change(color[:, :3])
        data["color"] = color
    return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ChromaticAutoContrast")
class ChromaticAutoContrast:
    """Blend with the colours stretched to 0..255 per channel; a random blend if `blend_factor` is None."""

    def __init__(self, p: float = 0.2, blend_factor: float | None = None) -> None:
        self.p = p
        self.blend_factor = blend_factor

    def __call__(self, data: Data) -> Data:
        return _recolor(data, self.p, self.change)

    def change(self, color: Array) -> Array:
        """Stretch; a channel of one value stays."""
        low, high = np.min(color, 0, keepdims=True), np.max(color, 0, keepdims=True)
        flat = high == low
        stretched = np.where(flat, color, (color - low) * (255 / np.where(flat, 1, high - low)))
        blend = np.random.rand() if self.blend_factor is None else self.blend_factor
        return (1 - blend) * color + blend * stretched


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ChromaticTranslation")
class ChromaticTranslation:
    """Add one shift per channel, up to `ratio` of the range either way."""

    def __init__(self, p: float = 0.95, ratio: float = 0.05) -> None:
        self.p = p
        self.ratio = ratio

    def __call__(self, data: Data) -> Data:
        return _recolor(data, self.p, self.change)

    def change(self, color: Array) -> Array:
        """Shift and clip to 0..255."""
        shift = (np.random.rand(1, 3) - 0.5) * 255 * 2 * self.ratio
        return np.clip(shift + color, 0, 255)


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ChromaticJitter")
class ChromaticJitter:
    """Add Gaussian noise of `std` of the range to every value."""

    def __init__(self, p: float = 0.95, std: float = 0.005) -> None:
        self.p = p
        self.std = std

    def __call__(self, data: Data) -> Data:
        return _recolor(data, self.p, self.change)

    def change(self, color: Array) -> Array:
        """Add noise and clip to 0..255."""
        noise = np.random.randn(len(color), 3)
        noise *= self.std * 255
        return np.clip(noise + color, 0, 255)


def gray_of(color: Array) -> Array:
    """Luma (n, 1) of red, green and blue, in the type of `color`; ITU-R BT.601 weights."""
    red, green, blue = (color[:, channel] for channel in range(3))
    return (0.2989 * red + 0.587 * green + 0.114 * blue).astype(color.dtype)[:, None]


def hsv_of(rgb: Array) -> tuple[Array, Array, Array]:
    """Hue, saturation and value (n,) of colours (n, 3); saturation lies in 0..1, grey has hue 0.

    Hue is in parts of a circle from -1/6 to 5/6, not yet wrapped.
    """
    red, green, blue = (rgb[:, channel] for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    grey = spread == 0
    saturation = spread / np.where(grey, 1.0, value.astype(np.float64))
    divisor = np.where(grey, 1.0, spread.astype(np.float64))
    # How far each channel lies below the largest one, in units of the spread.
    below_r, below_g, below_b = ((value - channel) / divisor for channel in (red, green, blue))
    sector = np.where(
        red == value,
        below_b - below_g,
        np.where(green == value, 2 + below_r - below_b, 4 + below_g - below_r),
    )
    return sector / 6, saturation, value


def rgb_of(hue: Array, saturation: Array, value: Array) -> Array:
    """Colours (n, 3) of hue, saturation and value (n,); the inverse of `hsv_of`."""
    sector = np.floor(hue * 6)
    part = hue * 6 - sector
    low = value * (1 - saturation)
    falling = value * (1 - saturation * part)
    rising = value * (1 - saturation * (1 - part))
    sector = sector.astype(np.int64) % 6
    return np.stack(
        [
            np.choose(sector, [value, falling, low, low, rising, value]),
            np.choose(sector, [rising, value, value, falling, low, low]),
            np.choose(sector, [low, low, rising, value, value, falling]),
        ],
        axis=1,
    )


@stand_in(TRANSFORMS, kd.TRANSFORMS, "RandomColorGrayScale")
class RandomColorGrayScale:
    """Make all three channels the luma, with probability `p`."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, data: Data) -> Data:
        if np.random.rand() < self.p and "color" in data:
            data["color"] = np.repeat(gray_of(data["color"]), 3, axis=1)
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "RandomColorJitter")
class RandomColorJitter:
    """Change brightness, contrast, saturation and hue, in random order, each with probability `p`.

    A number v means factors in [1 - v, 1 + v] (from 0 at least), for `hue` shifts in [-v, v] of a
    full circle; a pair gives the bounds. The order is drawn by torch, everything else by numpy.
    """

    def __init__(
        self,
        brightness: float | Sequence[float] = 0,
        contrast: float | Sequence[float] = 0,
        saturation: float | Sequence[float] = 0,
        hue: float | Sequence[float] = 0,
        p: float = 0.95,
    ) -> None:
        self.ranges = [
            self.range_of(value, name)
            for name, value in zip(
                ("brightness", "contrast", "saturation", "hue"),
                (brightness, contrast, saturation, hue),
            )
        ]
        self.p = p

    @staticmethod
    def range_of(value: float | Sequence[float], name: str) -> tuple[float, float] | None:
        """Bounds to draw from, or None where nothing would change."""
        middle = 0.0 if name == "hue" else 1.0
        low, high = (-0.5, 0.5) if name == "hue" else (0.0, float("inf"))
        if isinstance(value, numbers.Real):
            need(value >= 0, f"RandomColorJitter: {name} must not be negative, got {value}")
            start, stop = middle - float(value), middle + float(value)
            if name != "hue":
                start = max(start, 0.0)
        else:
            need(
                isinstance(value, (list, tuple)) and len(value) == 2,
                f"RandomColorJitter: {name} is a number or a (low, high) pair, got {value!r}",
            )
            start, stop = value
        need(
            low <= start <= stop <= high,
            f"RandomColorJitter: {name} must lie within [{low}, {high}], got {value!r}",
        )
        return None if start == stop == middle else (start, stop)

    def __call__(self, data: Data) -> Data:
        order = torch.randperm(4).tolist()
        factors = [None if r is None else np.random.uniform(r[0], r[1]) for r in self.ranges]
        for which in order:
            factor = factors[which]
            if factor is not None and np.random.rand() < self.p and "color" in data:
                data["color"] = self.change(data["color"], which, float(factor))
        return data

    @staticmethod
    def change(color: Array, which: int, factor: float) -> Array:
        """One of the four changes of colours (n, 3) in 0..255, in their type."""
        if which == 3:
            hue, saturation, value = hsv_of(color / 255.0)
            return (rgb_of(((hue + 1) % 1 + factor) % 1, saturation, value) * 255).astype(
                color.dtype
            )
        if which == 0:
            other: Any = np.zeros_like(color)
        else:
            other = gray_of(color)
            if which == 1:
                other = np.mean(other)
        return (factor * color + (1.0 - factor) * other).clip(0, 255).astype(color.dtype)


@stand_in(TRANSFORMS, kd.TRANSFORMS, "HueSaturationTranslation")
class HueSaturationTranslation:
    """Shift the hue by up to `hue_max` of a circle and scale the saturation by 1 +- `saturation_max`.

    The result is cut down to whole numbers, 0..255.
    """

    def __init__(self, hue_max: float = 0.5, saturation_max: float = 0.2) -> None:
        self.hue_max = hue_max
        self.saturation_max = saturation_max

    def __call__(self, data: Data) -> Data:
        if "color" in data:
            color = data["color"].copy()
            hue, saturation, value = hsv_of(color[:, :3].astype(np.float64))
            shift = (np.random.rand() - 0.5) * 2 * self.hue_max
            ratio = 1 + (np.random.rand() - 0.5) * 2 * self.saturation_max
            hue = (shift + hue % 1 + 1) % 1
            saturation = np.clip(ratio * saturation, 0, 1)
            color[:, :3] = rgb_of(hue, saturation, value).astype(np.uint8)
            data["color"] = color
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "RandomDropColor")
class RandomDropColor:
    """Set a random share of the colours to zero, with probability `drop_application_ratio`."""

    def __init__(self, drop_ratio: float = 0.2, drop_application_ratio: float = 0.5) -> None:
        self.drop_ratio = ratio_of(drop_ratio, "RandomDropColor: drop_ratio")
        self.drop_application_ratio = drop_application_ratio

    def __call__(self, data: Data) -> Data:
        return clear_rows(data, "color", self.drop_ratio, self.drop_application_ratio)
