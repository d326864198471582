"""Cameras beside a LiDAR: where a point appears in an image, and pictures that show it.

A pixel position is (u, v): u to the right, v down, both from the upper left corner of the image, so
that pixel (column, row) covers [column, column + 1) x [row, row + 1).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pointcept_kd.host import InputError

from .pictures import read_image

# Near to far, as RGB: red, orange, yellow, green, cyan, blue.
_RAMP = np.array(
    [[230, 30, 40], [250, 140, 20], [250, 230, 40], [60, 200, 80], [50, 200, 230], [60, 80, 230]],
    np.float64,
)


@dataclass(frozen=True, eq=False)
class Camera:
    """A pinhole camera without distortion and its place relative to the LiDAR.

    Args:
        name: such as `CAM_FRONT` or `image_2`.
        intrinsics: (3, 3) pixels; camera coordinates (x right, y down, z forward) to pixels.
        lidar_to_camera: (4, 4) LiDAR to camera coordinates, metres.
        width, height: of the image, pixels.

    Raises:
        InputError: for matrices of another shape, values that are not finite, or no pixels.
    """

    name: str
    intrinsics: NDArray
    lidar_to_camera: NDArray
    width: int
    height: int

    def __post_init__(self) -> None:
        for key, shape in (("intrinsics", (3, 3)), ("lidar_to_camera", (4, 4))):
            try:
                matrix = np.array(getattr(self, key), np.float64)
            except (TypeError, ValueError):
                matrix = np.empty(0)
            if matrix.shape != shape or not np.isfinite(matrix).all():
                raise InputError(
                    f"camera {self.name}: {key} should be {shape[0]} x {shape[1]} finite numbers, "
                    f"got shape {matrix.shape}; correct the calibration"
                )
            object.__setattr__(self, key, matrix)
        if self.width < 1 or self.height < 1:
            raise InputError(
                f"camera {self.name}: an image of {self.width} x {self.height} has no pixels"
            )

    def project(
        self, points: ArrayLike, min_depth: float = 1.0
    ) -> tuple[NDArray, NDArray, NDArray]:
        """Where points appear.

        Args:
            points: (n, 3) LiDAR coordinates, metres; further columns are not looked at.
            min_depth: nearer points, and those behind the camera, are not visible; 0 or more.
        Returns: pixels (n, 2) float64 (u, v), meaningful where visible; depth (n,) float64, metres
            along the optical axis; visible (n,) bool: inside the image and deeper than `min_depth`.
        """
        points = np.asarray(points, np.float64)[:, :3]
        place = points @ self.lidar_to_camera[:3, :3].T + self.lidar_to_camera[:3, 3]
        image = place @ self.intrinsics.T
        depth = image[:, 2]
        visible = depth > max(min_depth, 0.0)
        pixels = image[:, :2] / np.where(visible, depth, 1.0)[:, None]
        visible &= (pixels >= 0).all(1) & (pixels < (self.width, self.height)).all(1)
        return pixels, depth, visible

    def resized(self, width: int, height: int) -> Camera:
        """The same camera with its image scaled to `width` x `height` pixels."""
        scale = np.diag([width / self.width, height / self.height, 1.0])
        return replace(self, intrinsics=scale @ self.intrinsics, width=width, height=height)


def point_pixel_pairs(
    points: ArrayLike, cameras: Sequence[Camera], min_depth: float = 1.0
) -> tuple[NDArray, NDArray, NDArray]:
    """All pairs of a point and a pixel that shows it; a point may be in several images.

    Args:
        points: (n, 3) LiDAR coordinates, metres.
    Returns: point_index (m,) int64 and camera_index (m,) int64, by camera, then by point;
        pixels (m, 2) float64 (u, v).
    """
    views = [camera.project(points, min_depth) for camera in cameras]
    rows = [np.flatnonzero(visible) for _, _, visible in views]
    return (
        np.concatenate([np.empty(0, np.int64), *rows]),
        np.repeat(np.arange(len(rows)), [len(r) for r in rows]),
        np.concatenate([np.empty((0, 2)), *(v[0][r] for v, r in zip(views, rows, strict=True))]),
    )


def kitti_camera(calib: Mapping[str, NDArray], name: str, width: int, height: int) -> Camera:
    """A KITTI camera: `project` equals P R0 Tr X.

    P is K [I | t]: its fourth column, the offset of this camera from camera 0, moves into
    `lidar_to_camera`.

    Args:
        calib: matrices by name: `P0`..`P3` (3, 4), and `Tr` (odometry) or `Tr_velo_to_cam`, (3, 4)
            or (4, 4), with `R0_rect` (3, 3) where there is one (detection).
        name: `image_0`..`image_3`, which take P0..P3.
        width, height: of the image, pixels.

    Raises:
        InputError: when a matrix is missing, or P has no inverse.
    """
    row = "P" + name.removeprefix("image_")
    transform = "Tr" if "Tr" in calib else "Tr_velo_to_cam"
    for key in (row, transform):
        if key not in calib:
            raise InputError(
                f"camera {name}: the calibration has no row {key} but {', '.join(calib) or 'none'}"
            )
    projection = np.asarray(calib[row], np.float64)
    try:
        offset = np.linalg.solve(projection[:, :3], projection[:, 3])
    except np.linalg.LinAlgError as error:
        raise InputError(f"camera {name}: the first three columns of {row} are singular") from error
    place, rectify = np.eye(4), np.eye(4)
    place[:3] = np.asarray(calib[transform], np.float64)[:3]
    rectify[:3, :3] = calib.get("R0_rect", np.eye(3))
    place = rectify @ place
    place[:3, 3] += offset
    return Camera(name, projection[:, :3], place, width, height)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height of a PNG or JPEG file, from its header alone.

    Raises:
        InputError: for a file that cannot be read or is neither.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(24)
            if head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR":
                return struct.unpack(">II", head[16:24])
            if head[:2] == b"\xff\xd8":
                file.seek(2)
                # Segments: FF, kind, length (itself included). C0..CF begin a frame (size inside),
                # but for C4, C8 and CC, which are tables.
                while len(segment := file.read(4)) == 4 and segment[0] == 0xFF:
                    kind, length = segment[1], struct.unpack(">H", segment[2:])[0]
                    if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
                        _, height, width = struct.unpack(">BHH", file.read(5))
                        return width, height
                    file.seek(length - 2, os.SEEK_CUR)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except struct.error as error:
        raise InputError(f"{path}: the picture is cut off; copy it again") from error
    raise InputError(f"{path}: neither PNG nor JPEG; copy the picture again")


def read_rgb(path: str | os.PathLike[str]) -> NDArray:
    """A picture file as (h, w, 3) uint8; grey ones get three equal channels.

    Raises:
        InputError: for a file that cannot be read, and without Pillow.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: the image is missing; copy it, or work without images")
    image = read_image(path)
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, 2).astype(np.uint8)


def ramp(values: ArrayLike, low: float, high: float) -> NDArray:
    """RGB (n, 3) uint8 from red (`low` and below) over yellow and green to blue (`high`)."""
    span = max(high - low, np.finfo(np.float64).tiny)
    place = np.clip((np.asarray(values, np.float64) - low) / span, 0, 1) * (len(_RAMP) - 1)
    steps = np.arange(len(_RAMP))
    return np.stack([np.interp(place, steps, c) for c in _RAMP.T], -1).round().astype(np.uint8)


def paint(image: NDArray, pixels: ArrayLike, values: ArrayLike, radius: int = 2) -> NDArray:
    """A copy of an image with points drawn on it, coloured from red (near) to blue (far).

    Args:
        image: (h, w, 3) uint8.
        pixels: (n, 2) (u, v); what lies outside the image is left out.
        values: (n,) depths in metres: small ones are drawn last and so stay visible, and colours go
            with their logarithm from 3 m to 60 m; or (n, 3) uint8 colours, drawn in order.
        radius: of a point, pixels; 0 is a single pixel.
    """
    picture = np.array(image, np.uint8)
    height, width = picture.shape[:2]
    pixels, values = np.asarray(pixels, np.float64).reshape(-1, 2), np.asarray(values)
    if values.ndim == 2:
        colors = values.astype(np.uint8)
    else:
        order = np.argsort(-values, kind="stable")
        pixels, values = pixels[order], values[order]
        colors = ramp(np.log(np.maximum(values, 1e-3)), np.log(3.0), np.log(60.0))
    step = np.arange(-radius, radius + 1)
    across, down = (a.reshape(-1) for a in np.meshgrid(step, step))
    disc = across**2 + down**2 <= (radius + 0.3) ** 2
    corner = np.floor(pixels).astype(np.int64)
    column = (corner[:, :1] + across[disc]).reshape(-1)
    row = (corner[:, 1:] + down[disc]).reshape(-1)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    # With repeated places numpy keeps the last one.
    picture[row[inside], column[inside]] = np.repeat(colors, int(disc.sum()), axis=0)[inside]
    return picture


def contact_sheet(
    points: ArrayLike,
    cameras: Sequence[Camera],
    images: Sequence[NDArray],
    columns: int = 3,
    shrink: int = 1,
    radius: int = 2,
    colors: NDArray | None = None,
) -> NDArray:
    """All images of a scan in one picture, the points painted on each.

    Args:
        points: (n, 3) LiDAR coordinates, metres.
        cameras, images: one each, in the same order; images (h, w, 3) uint8.
        columns: images side by side; rows are filled from the left.
        shrink: every side of the images is divided by this whole number.
        radius: of a point in the shrunk image, pixels.
        colors: (n, 3) uint8, such as those of classes; by depth if None.
    Returns: (h, w, 3) uint8, with a dark line between the images.

    Raises:
        ValueError: when the images do not belong to the cameras.
    """
    if len(cameras) != len(images) or not cameras:
        raise ValueError(f"{len(cameras)} cameras and {len(images)} images: one image per camera")
    tiles = []
    for camera, image in zip(cameras, images, strict=True):
        if image.shape[:2] != (camera.height, camera.width):
            raise ValueError(
                f"camera {camera.name}: {camera.width} x {camera.height} pixels, but its image is "
                f"{image.shape[1]} x {image.shape[0]}"
            )
        height, width = image.shape[0] // shrink, image.shape[1] // shrink
        small = image[: height * shrink, : width * shrink].reshape(height, shrink, width, shrink, 3)
        # What the crop took away is at the right and at the bottom: the scale stays 1 / shrink.
        pixels, depth, visible = camera.project(points)
        tiles.append(
            paint(
                small.mean((1, 3)).round(),
                pixels[visible] / shrink,
                depth[visible] if colors is None else np.asarray(colors)[visible],
                radius,
            )
        )
    gap, columns = 4, min(columns, len(tiles))
    height, width = (max(t.shape[i] for t in tiles) for i in (0, 1))
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 16, np.uint8)
    for position, tile in enumerate(tiles):
        top, left = (height + gap) * (position // columns), (width + gap) * (position % columns)
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet
