"""Pictures of objects: cut out of the image that shows an object best, blended into images of other scans.

A picture fits only where its camera saw it. So an object with a patch keeps its place relative to that camera: in
another scan it goes in front of the camera of the same name, at the same pixels and depths, neither turned nor shifted.
(Ours; in the published code no camera sees what is pasted.)
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import ConvexHull, QhullError

from pointcept_kd.host import InputError

from .arrays import Data, lookup, need
from .camera import Camera
from .camera_views import CAMERAS, MIN_DEPTH, VIEWS, aligned_samples, camera_views, hidden_points
from .pair_transforms import rows_of_ids

VISIBLE = 0.9  # the least share of an object's points that its camera sees
HIDDEN = 0.1  # the most that may be behind other points
MARGIN = 1.1  # of the hull, about the mean of its corners
FOCAL = 0.01  # the most by which focal lengths of two cameras may differ, as a share


@dataclass(frozen=True, eq=False)
class Patch:
    """The picture of an object of k points.

    Attributes:
        camera: that took it.
        corner: row and column of the crop's upper left pixel in the camera's image.
        crop: (h, w, 3) uint8.
        hull: (h, w) bool, pixels whose middle is in the object's hull.
        pixels: (k, 2) float32 u, v of the object's points; they mean something where the camera sees the point.
        depth: (k,) float32, metres along the optical axis.
    """

    camera: Camera
    corner: tuple[int, int]
    crop: NDArray
    hull: NDArray
    pixels: NDArray
    depth: NDArray

    @property
    def seen(self) -> NDArray:
        """Which points the camera sees, (k,) bool."""
        inside = (self.pixels > 0) & (self.pixels < (self.camera.width - 1, self.camera.height - 1))
        return inside.all(1) & (self.depth > MIN_DEPTH)

    def covers(self, pixels: NDArray) -> NDArray:
        """Which pixel positions (m, 2) u, v lie in a pixel of the hull: (m,) bool."""
        place = np.floor(pixels[:, ::-1]).astype(np.int64) - self.corner
        inside = ((place >= 0) & (place < self.hull.shape)).all(1)
        covered = np.zeros(len(pixels), bool)
        covered[inside] = self.hull[tuple(place[inside].T)]
        return covered

    def fits(self, camera: Camera) -> bool:
        """Whether another scan's camera has the same image size, and focal lengths within 1 %."""
        own, other = (np.diag(c.intrinsics)[:2] for c in (self.camera, camera))
        size = (camera.width, camera.height) == (self.camera.width, self.camera.height)
        return size and bool((np.abs(other - own) <= FOCAL * np.abs(own)).all())

    def placed(self, points: ArrayLike, camera: Camera) -> NDArray:
        """The object before another scan's camera, at the same pixels and depths.

        Args:
            points: (k, 3) LiDAR coordinates of the object's own scan, metres.
        Returns: (k, 3) float64 LiDAR coordinates of the other scan.

        Raises:
            InputError: for a camera whose matrices have no inverse.
        """
        try:
            move = np.linalg.solve(_to_image(camera), _to_image(self.camera))
        except np.linalg.LinAlgError as error:
            raise InputError(
                f"camera {camera.name}: its matrices have no inverse; correct the calibration"
            ) from error
        return np.asarray(points, np.float64)[:, :3] @ move[:3, :3].T + move[:3, 3]


def _to_image(camera: Camera) -> NDArray:
    """(4, 4) LiDAR coordinates to u depth, v depth, depth."""
    lens = np.eye(4)
    lens[:3, :3] = camera.intrinsics
    return lens @ camera.lidar_to_camera


# ------------------------------------------------------------------------------------------------ cutting out


class Sight:
    """What one camera sees of a cloud (n, 3).

    Attributes:
        pixels: (n, 2) float64 u, v; depth: (n,) float64, metres.
        seen: (n,) bool, as `camera_views` has it; place: (n, 2) float32, its coordinates, 0 where not seen.
    """

    def __init__(self, points: NDArray, camera: Camera) -> None:
        self.camera = camera
        self.pixels, self.depth, _ = camera.project(points, MIN_DEPTH)
        rows, _, place = camera_views(points, [camera])
        self.seen, self.place = np.zeros(len(points), bool), np.zeros((len(points), 2), np.float32)
        self.seen[rows], self.place[rows] = True, place

    def shows(self, members: NDArray) -> bool:
        """Whether 90 % of an object (rows (k,) of the cloud) are seen and at most 10 % are behind other points."""
        own = members[self.seen[members]]
        if len(own) < max(VISIBLE * len(members), 1):
            return False
        others = self.seen.copy()
        others[members] = False
        before = self.pixels[others], self.depth[others]
        hidden = hidden_points(self.pixels[own], self.depth[own], before=before)
        return bool(hidden.sum() <= HIDDEN * len(members))

    def cut(self, members: NDArray, image: NDArray) -> Patch | None:
        """The picture of an object, out of the camera's whole image (h, w, 3) uint8; None where it has no area."""
        own = members[self.seen[members]]
        found = hull_pixels(self.pixels[own], self.camera.width, self.camera.height)
        if found is None:
            return None
        (top, left), hull = found
        crop = image[top : top + hull.shape[0], left : left + hull.shape[1]].copy()
        pixels, depth = (a[members].astype(np.float32) for a in (self.pixels, self.depth))
        return Patch(self.camera, (top, left), crop, hull, pixels, depth)


def hull_pixels(pixels: NDArray, width: int, height: int) -> tuple[tuple[int, int], NDArray] | None:
    """Pixels whose middle is in the convex hull of positions, grown by 10 %.

    Args:
        pixels: (m, 2) u, v.
        width, height: of the image; beyond it there are no pixels.
    Returns: row and column of the upper left corner, mask (h, w) bool; None for positions in less than three pixels or
        on a line, and where no pixel's middle is in the hull.
    """
    if len(np.unique(np.floor(pixels), axis=0)) < 3:
        return None
    try:
        hull = ConvexHull(pixels)
    except QhullError:
        return None  # they lie on a line
    corners = pixels[hull.vertices]
    middle = corners.mean(0)
    grown = middle + MARGIN * (corners - middle)
    left, top = np.floor(grown.min(0)).astype(np.int64).clip(0)
    right, bottom = np.minimum(np.ceil(grown.max(0)), (width, height)).astype(np.int64)
    columns, rows = np.arange(left, right) + 0.5, np.arange(top, bottom)[:, None] + 0.5
    mask = np.ones((len(rows), len(columns)), bool)
    # Each edge moves away from the middle along its normal.
    for across, down, shift in hull.equations:
        centre = across * middle[0] + down * middle[1]
        mask &= across * columns + down * rows <= centre - MARGIN * (shift + centre)
    return ((int(top), int(left)), mask) if mask.any() else None


# ------------------------------------------------------------------------------------------------------ files


def patch_bytes(patch: Patch) -> bytes:
    """A patch as an .npz file, the same bytes whenever it is written; the camera's name is not in it."""
    camera = patch.camera
    parts = {
        "crop": patch.crop,
        "corner": np.array(patch.corner, np.int64),
        "hull": patch.hull,
        "pixels": patch.pixels,
        "depth": patch.depth,
        "intrinsics": camera.intrinsics,
        "size": np.array([camera.width, camera.height], np.int64),
        "lidar_to_camera": camera.lidar_to_camera,
    }
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for key, values in parts.items():
            # A date of its own: numpy leaves it to the library.
            entry = zipfile.ZipInfo(f"{key}.npy", (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            with file.open(entry, "w") as member:
                np.lib.format.write_array(member, np.ascontiguousarray(values), allow_pickle=False)
    return content.getvalue()


def read_patch(path: Path, camera: str, points: int) -> Patch:
    """Read `patch_bytes`.

    Args:
        camera: name of the camera.
        points: of the object.

    Raises:
        InputError: for a file that is missing or not such a patch.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = {key: file[key] for key in file.files}
        crop, hull, pixels, depth = (parts[key] for key in ("crop", "hull", "pixels", "depth"))
        (top, left), (width, height) = parts["corner"].tolist(), parts["size"].tolist()
        fits = (
            crop.dtype == np.uint8
            and hull.dtype == bool
            and (hull.ndim, crop.shape) == (2, (*hull.shape, 3))
            and (pixels.shape, depth.shape) == ((points, 2), (points,))
            and bool(np.isfinite(pixels).all() and np.isfinite(depth).all())
            and 0 <= top <= height - hull.shape[0]
            and 0 <= left <= width - hull.shape[1]
        )
        if not fits:
            raise ValueError(f"a crop of {crop.shape} and {len(pixels)} points")
        taken = Camera(camera, parts["intrinsics"], parts["lidar_to_camera"], width, height)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: no picture of an object of {points} points ({error}); make the database again with "
            "tools/prepare_data.py instances --image-patches"
        ) from error
    return Patch(taken, (top, left), crop, hull, pixels, depth)


# ---------------------------------------------------------------------------------------------------- blending


def blended(image: NDArray, patch: Patch) -> NDArray:
    """An image with the picture of an object in it; `image` stays as it is.

    Hull and crop are resized just as `aligned_resize` resized the image, so that pixels all of whose sources are in the
    hull become those of the resized crop, those without such a source stay, and the others are mixed by their shares.

    Args:
        image: (h', w', 3) uint8, the image of a camera of the same size as the patch's, resized by `aligned_resize`.
    """
    rows, columns = patch.hull.shape
    top, down = _resizing(patch.camera.height, image.shape[0], patch.corner[0], rows)
    left, across = _resizing(patch.camera.width, image.shape[1], patch.corner[1], columns)
    alpha = down @ patch.hull.astype(np.float64) @ across.T
    crop = np.where(patch.hull[..., None], patch.crop, 0).astype(np.float64)
    color = np.stack([down @ crop[..., c] @ across.T for c in range(3)], -1)
    result = image.copy()
    part = result[top : top + len(down), left : left + len(across)]
    part[:] = np.rint((1 - alpha[..., None]) * part + color).clip(0, 255)
    return result


def _resizing(old: int, new: int, start: int, count: int) -> tuple[int, NDArray]:
    """The first new pixel that takes from old ones start .. start + count - 1; weights (new pixels, count) float64."""
    step, low, high, weight = aligned_samples(old, new)
    matrix = np.zeros((new, count))
    for part, share in ((low, 1 - weight), (high, weight)):
        for more in range(step):
            # The last pixel is repeated where the last average is not whole.
            source = np.minimum(part * step + more, old - 1) - start
            there = np.flatnonzero((source >= 0) & (source < count))
            np.add.at(matrix, (there, source[there]), share[there] / step)
    used = np.flatnonzero(matrix.any(1))
    first = int(used[0]) if len(used) else 0
    return first, matrix[first : first + len(used)]


class PatchScene:
    """The cameras of a sample while objects with patches are put into it.

    Args:
        data: a sample of `CameraViewDataset`, coordinates as the reader gave them.
        coord: (n, 3) its own points, without those of sweeps.

    Raises:
        InputError: for a sample without cameras and views.
    """

    def __init__(self, data: Data, coord: NDArray) -> None:
        who = "PasteInstances with image='patch' (it stands in the transforms of kd.CameraViewDataset)"
        for key in (*VIEWS, "images", "point_id"):
            lookup(data, key, who)
        kept, dropped = (lookup(data, key, who) for key in CAMERAS)
        need(len(kept) == len(data["images"]), f"{who}: one camera per image, got {len(kept)}")
        self.coord = coord
        self.images = {camera.name: number for number, camera in enumerate(kept)}
        self.cameras: dict[str, Camera] = {camera.name: camera for camera in (*dropped, *kept)}
        self.added: list[Patch] = []
        self.rows: set[int] = set()
        self._sights: dict[str, Sight] = {}

    def place(self, patch: Patch, points: NDArray) -> NDArray | None:
        """Where an object (k, 3) goes, (k, 3) float64; None without a camera that fits."""
        camera = self.cameras.get(patch.camera.name)
        if camera is None or not patch.fits(camera):
            return None
        return patch.placed(points, camera)

    def hides(self, patch: Patch) -> bool:
        """Whether more than 10 % of an object would be behind points of the scan, or what this camera shows already."""
        name = patch.camera.name
        if name not in self._sights:
            self._sights[name] = Sight(self.coord, self.cameras[name])
        sight = self._sights[name]
        others = [(p.pixels[p.seen], p.depth[p.seen]) for p in self.added if p.camera.name == name]
        others.append((sight.pixels[sight.seen], sight.depth[sight.seen]))
        before = tuple(np.concatenate(parts) for parts in zip(*others, strict=True))
        seen = patch.seen
        hidden = hidden_points(patch.pixels[seen], patch.depth[seen], before=(before[0], before[1]))
        return bool(hidden.sum() > HIDDEN * len(patch.depth))

    def add(self, row: int, patch: Patch) -> None:
        """Take note of an object that is pasted, row `row` of the database."""
        self.added.append(patch)
        self.rows.add(row)

    def show(self, data: Data) -> Data:
        """Blend the pictures of all objects into the images that are kept, and bring the views into step.

        Args:
            data: the sample, with the points of the objects behind its own ones, in the order of `add`.
        """
        ends = len(self.coord) + np.cumsum([len(patch.depth) for patch in self.added])
        coord, ids = data["coord"][: ends[-1]], data["point_id"][: ends[-1]]
        images, views = list(data["images"]), [data[key] for key in VIEWS]
        rows = rows_of_ids(ids, views[0])
        for name, image in self.images.items():
            # Far ones first: what is nearer covers them.
            numbers = [i for i, patch in enumerate(self.added) if patch.camera.name == name]
            numbers.sort(key=lambda i: -np.median(self.added[i].depth))
            if not numbers:
                continue
            sight, owner = Sight(coord, self.cameras[name]), np.full(len(coord), -1)
            for i in numbers:
                owner[ends[i] - len(self.added[i].depth) : ends[i]] = i
            new = np.flatnonzero(sight.seen & (owner >= 0))
            rows = np.concatenate([rows, new])
            more = ids[new], np.full(len(new), image), sight.place[new]
            views = [np.concatenate(pair) for pair in zip(views, more, strict=True)]
            lost = np.zeros(len(rows), bool)
            here = np.flatnonzero((views[1] == image) & (rows >= 0))
            at = rows[here]
            for i in numbers:
                patch = self.added[i]
                images[image] = blended(images[image], patch)
                behind = sight.depth[at] > np.median(patch.depth)
                lost[here] |= patch.covers(sight.pixels[at]) & behind & (owner[at] != i)
            rows, views = rows[~lost], [values[~lost] for values in views]
        order = np.lexsort(views[:2])
        data["images"] = images
        data.update(zip(VIEWS, (values[order] for values in views), strict=True))
        return data
