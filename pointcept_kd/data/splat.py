"""Pictures of point clouds, from above and in perspective: a z-buffer in NumPy, no window, no graphics library.

Every point is a small square, and the nearest one to the eye is seen. Pixels are drawn finer than asked for and
averaged, and a point behind the edge of a nearer one is darkened, which shows shape where colours are alike.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .pictures import BACKGROUND, IGNORED, write_png

# From low to high; even the lowest stands out from the background.
RAMP = np.array(
    [(62, 84, 168), (52, 134, 196), (60, 184, 176), (132, 208, 112), (238, 216, 88), (246, 150, 70), (226, 88, 92)]
)  # fmt: skip
SMOOTH = 2  # drawn pixels per asked-for pixel, along each axis
_LARGEST = 9  # pixels along the side of a point that is right before the eye
# Metres along the side of a point, at least and at most; the first for this many points within 50 m.
POINT, POINT_MOST, MANY = 0.07, 0.35, 120_000


@dataclass(frozen=True)
class View:
    """A pinhole camera in the sensor's frame: x forward, y left, z up, metres.

    Attributes:
        eye, target: where it stands and what is in the middle of its picture; not one above the other.
        fov: from the left edge to the right one, degrees.
        point: side of a point's square, metres.
    """

    eye: tuple[float, float, float] = (-24.0, 0.0, 16.0)
    target: tuple[float, float, float] = (8.0, 0.0, -2.0)
    fov: float = 62.0
    point: float = POINT

    def project(self, coord: NDArray, width: int, height: int) -> tuple[NDArray, NDArray, float]:
        """Places (n, 2) as column and row, depths (n,) in metres along the line of sight, and pixels per radian."""
        eye, up = np.array(self.eye), np.array([0.0, 0.0, 1.0])
        ahead = np.array(self.target) - eye
        right = np.cross(ahead, up)
        if not np.linalg.norm(right) > 1e-9 or not 0 < self.fov < 180:
            raise ValueError(f"{self}: the eye must look sideways, and fov lie between 0 and 180")
        ahead, right = ahead / np.linalg.norm(ahead), right / np.linalg.norm(right)
        down = np.cross(ahead, right)
        away = coord - eye
        focal = width / 2 / np.tan(np.radians(self.fov) / 2)
        depth = away @ ahead
        scale = focal / np.maximum(depth, 1e-9)
        place = np.stack([width / 2 + away @ right * scale, height / 2 + away @ down * scale], 1)
        return place, depth, focal


def height_span(*clouds: NDArray) -> tuple[float, float]:
    """Heights between which colours change: those of the lowest and highest hundredth of all points left out."""
    heights = np.concatenate([np.asarray(cloud)[:, 2] for cloud in clouds] or [np.zeros(0)])
    if not len(heights):
        return -2.0, 4.0
    low, high = np.percentile(heights, [1, 99])
    return float(low), float(max(high, low + 1.0))


def height_colors(height: NDArray, span: tuple[float, float]) -> NDArray:
    """Colours (n, 3) uint8 of heights (n,); those outside `span` get the colour of its nearer end."""
    low, high = span
    at = np.clip((np.asarray(height, np.float64) - low) / (high - low), 0, 1) * (len(RAMP) - 1)
    channels = [np.interp(at, np.arange(len(RAMP)), RAMP[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


def point_size(count: int, reach: float = 50.0) -> float:
    """Metres along the side of a point's square, so that clouds of few points are as easy to see as those of many.

    Args:
        count: points of the cloud.
        reach: metres from the sensor that they are spread over.
    """
    size = POINT * np.sqrt(MANY / max(count, 1)) * reach / 50
    return float(np.clip(size, POINT, POINT_MOST))


def splat(
    place: NDArray,
    depth: NDArray,
    colors: NDArray,
    shape: tuple[int, int],
    size: NDArray | int = 1,
) -> tuple[NDArray, NDArray]:
    """Draw points as squares; of those that meet in a pixel, the nearest is seen, and of equally near ones the last.

    Args:
        place: (n, 2) column and row of every point's middle; pixel (c, r) reaches from (c, r) to (c + 1, r + 1).
        depth: (n,) distance from the eye; points that are not finite are left out.
        colors: (n, 3) uint8.
        shape: (height, width) of the picture.
        size: pixels along the side of a square, one for all or (n,).

    Returns:
        (h, w, 3) uint8 with `BACKGROUND` where there is no point, and (h, w) depths, there infinite.
    """
    height, width = shape
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = BACKGROUND
    depths = np.full((height, width), np.inf)
    sizes = np.broadcast_to(np.asarray(size, np.int64), depth.shape)
    keep = np.isfinite(place).all(axis=1) & np.isfinite(depth)
    # Far outside, integers overflow before they are compared.
    keep &= (np.abs(place) < 2**30).all(axis=1)
    order = np.argsort(-depth[keep], kind="stable")
    place, depth, colors, sizes = (a[keep][order] for a in (place, depth, colors, sizes))
    corner = np.floor(place - (sizes[:, None] - 1) / 2).astype(np.int64)
    # Of equal squares only the nearest can be seen; dense clouds have many.
    near = (
        (corner >= -sizes[:, None]).all(axis=1) & (corner[:, 0] < width) & (corner[:, 1] < height)
    )
    order = np.flatnonzero(near)
    most = int(sizes.max(initial=1)) + 1
    squares = (corner[order, 1] + most) * (width + most) + corner[order, 0] + most
    _, last = np.unique((squares * most + sizes[order])[::-1], return_index=True)
    order = order[np.sort(len(order) - 1 - last)]
    corner, depth, colors, sizes = (a[order] for a in (corner, depth, colors, sizes))
    # All pixels of the first point, then of the second: where NumPy is told one pixel twice, it keeps the last.
    area = sizes * sizes
    number = np.arange(area.sum()) - np.repeat(area.cumsum() - area, area)
    side = np.repeat(sizes, area)
    column = np.repeat(corner[:, 0], area) + number % side
    row = np.repeat(corner[:, 1], area) + number // side
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    at = row[inside] * width + column[inside]
    point = np.repeat(np.arange(len(depth)), area)[inside]
    pixels.reshape(-1, 3)[at] = colors[point]
    depths.reshape(-1)[at] = depth[point]
    return pixels, depths


def _edges(depths: NDArray, reach: int) -> NDArray:
    """How far (h, w) every pixel lies behind its four neighbours in some distance, on average."""
    padded = np.pad(depths, reach, constant_values=np.inf)
    height, width = depths.shape
    total = np.zeros_like(depths)
    for dy, dx in ((-reach, 0), (reach, 0), (0, -reach), (0, reach)):
        other = padded[reach + dy : reach + dy + height, reach + dx : reach + dx + width]
        # The background, at infinity, neither casts nor takes a shadow.
        nearer = (other < depths) & np.isfinite(depths)
        total[nearer] += depths[nearer] - other[nearer]
    return total / 4


def _finish(pixels: NDArray, behind: NDArray, smooth: int) -> NDArray:
    """Darken what lies `behind`, and average squares of pixels."""
    shaded = pixels * (0.35 + 0.65 * np.exp(-behind))[:, :, None]
    height, width = pixels.shape[0] // smooth, pixels.shape[1] // smooth
    blocks = shaded.reshape(height, smooth, width, smooth, 3)
    return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)


def _prepare(
    coord: ArrayLike, colors: ArrayLike | None, span: tuple[float, float] | None
) -> tuple[NDArray, NDArray]:
    points: NDArray = np.asarray(coord, np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"expected (n, 3) coordinates, got {points.shape}")
    finite = np.isfinite(points).all(axis=1)
    if colors is None:
        kept = points[finite]
        return kept, height_colors(kept[:, 2], height_span(kept) if span is None else span)
    colors = np.asarray(colors)
    if colors.shape != points.shape or colors.dtype != np.uint8:
        raise ValueError(
            f"expected colours {points.shape} uint8, got {colors.shape} {colors.dtype}"
        )
    return points[finite], colors[finite]


def perspective(
    coord: ArrayLike,
    colors: ArrayLike | None = None,
    view: View | None = None,
    width: int = 1000,
    height: int = 600,
    span: tuple[float, float] | None = None,
    smooth: int = SMOOTH,
) -> NDArray:
    """A cloud as a camera sees it, by default one behind and above the sensor.

    Args:
        coord: (n, 3) metres; points that are not finite are left out.
        colors: (n, 3) uint8; those of the height if None.
        span: heights between which the colours change; those of this cloud if None.
        smooth: drawn pixels per pixel along each axis; 1 leaves edges jagged.

    Returns:
        (height, width, 3) uint8.

    Raises:
        ValueError: for other shapes or types, and for a view straight down.
    """
    points, colors = _prepare(coord, colors, span)
    view = view or View()
    shape = (height * smooth, width * smooth)
    place, depth, focal = view.project(points, shape[1], shape[0])
    seen = depth > 0.1  # metres; what is nearer would fill the picture
    place, depth, colors = place[seen], depth[seen], colors[seen]
    size = np.clip(np.rint(view.point * focal / depth), smooth, _LARGEST * smooth)
    pixels, depths = splat(place, depth, colors, shape, size)
    # In shares of the depth, so that near and far edges look alike.
    return _finish(pixels, 25 * _edges(np.log(depths), smooth), smooth)


def birdseye(
    coord: ArrayLike,
    colors: ArrayLike | None = None,
    half: float = 50.0,
    width: int = 1000,
    span: tuple[float, float] | None = None,
    smooth: int = SMOOTH,
    point: float = 0.0,
) -> NDArray:
    """A cloud from above: `2 half` metres square around the sensor, forward (x) up, left (y) left.

    Args:
        coord: (n, 3) metres; points that are not finite are left out.
        colors: (n, 3) uint8; those of the height if None.
        span: heights between which the colours change; those of this cloud if None.
        smooth: drawn pixels per pixel along each axis; 1 leaves edges jagged.
        point: side of a point's square, metres; about one pixel at least.

    Returns:
        (width, width, 3) uint8.

    Raises:
        ValueError: for other shapes or types.
    """
    points, colors = _prepare(coord, colors, span)
    side = width * smooth
    place = (half - points[:, [1, 0]]) * (side / (2 * half))
    size = int(np.clip(np.rint(point * side / (2 * half)), 2 * smooth - 1, _LARGEST * smooth))
    pixels, depths = splat(place, -points[:, 2], colors, (side, side), size)
    return _finish(pixels, 0.4 * _edges(depths, smooth), smooth)


def side_by_side(pictures: Sequence[NDArray], gap: int = 6) -> NDArray:
    """Pictures (h, w, 3) of one height in a row, with `gap` pixels of grey between them.

    Raises:
        ValueError: for pictures of different heights, or none.
    """
    if len({picture.shape[0] for picture in pictures}) != 1:
        shapes = [picture.shape for picture in pictures]
        raise ValueError(f"expected pictures of one height, got {shapes}")
    line = np.empty((pictures[0].shape[0], gap, 3), np.uint8)
    line[:] = IGNORED
    row = [pictures[0]]
    for picture in pictures[1:]:
        row += [line, picture]
    return np.concatenate(row, axis=1)


def _near(view: View, factor: float, point: float) -> View:
    """A view from nearer by a factor, but not so near that the first car hides the street."""
    factor = min(max(factor, 0.6), 1.0)
    x, y, z = (factor * value for value in view.eye)
    return replace(view, eye=(x, y, z), point=point)


def panels(
    clouds: Sequence[ArrayLike],
    kind: str = "perspective",
    view: View | None = None,
    width: int = 1000,
    half: float = 50.0,
    span: tuple[float, float] | None = None,
) -> NDArray:
    """Clouds side by side, such as partial, completed and true, in one scale of colours.

    Args:
        clouds: (n, 3) metres each.
        kind: `perspective` or `birdseye`.
        view: of `perspective`; by default the usual one, as much nearer as `half` is smaller than 50 m, with points of
            `point_size`, as they are in `birdseye`.
        width: pixels of one panel.
        half: metres from the sensor to the edges of `birdseye`.
        span: heights between which the colours change; those that most clouds share if None.

    Returns:
        (h, w, 3) uint8.

    Raises:
        ValueError: for another kind, no clouds, or clouds of other shapes.
    """
    if kind not in ("perspective", "birdseye"):
        raise ValueError(f"kind={kind!r}: expected perspective or birdseye")
    arrays = [_prepare(cloud, None, (0, 1))[0] for cloud in clouds]
    # The heights that most clouds share: a few stray points must not wash out the rest.
    span = height_span(*arrays) if span is None else span
    pictures = []
    for cloud in arrays:
        point = point_size(len(cloud), half)
        if kind == "birdseye":
            pictures.append(birdseye(cloud, half=half, width=width, span=span, point=point))
        else:
            seen = _near(View(), half / 50, point) if view is None else view
            pictures.append(perspective(cloud, None, seen, width, round(0.6 * width), span))
    return side_by_side(pictures)


def write_panels(
    path: str | os.PathLike[str],
    clouds: Sequence[ArrayLike],
    kind: str = "perspective",
    view: View | None = None,
    width: int = 1000,
    half: float = 50.0,
) -> None:
    """Write `panels` of clouds as a PNG; arguments and errors as there."""
    write_png(path, panels(clouds, kind, view, width, half))
