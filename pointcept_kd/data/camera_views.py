"""Scans with camera images for networks that fuse both, and two views of a scan for distillation.

A point at pixel (u, v) of an image of W x H pixels has the normalised coordinates

    n_x = 2 u / (W - 1) - 1        n_y = 2 v / (H - 1) - 1

-1 and 1 are the middles of the outermost pixels, so that resizing the image with aligned corners changes neither. A
camera sees a point that is more than 1 m deep and has both strictly in (-1, 1); a point in two images has two rows.
Both are computed before any transform: what turns or scales the cloud does not touch them (Sun et al., "Uni-to-Multi
Modal Knowledge Distillation for Bidirectional LiDAR-Camera Semantic Segmentation", TPAMI 46(12), 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pointcept_kd.host import TRANSFORMS, InputError, kd
from pointcept_kd.host.loader import Compose, DefaultDataset

from .arrays import Data, coord_of, lookup, need, per_point, select, valid_keys
from .camera import Camera, read_rgb
from .camera_source import CameraSource
from .nuscenes import NuScenesDataset
from .nuscenes_files import find_file
from .pair_transforms import rows_of_ids

MIN_DEPTH = 1.0  # metres
VIEWS = ("view_point", "view_image", "view_uv")
CAMERAS = ("cameras", "dropped_cameras")


def hidden_points(
    pixels: NDArray,
    depth: NDArray,
    stride: int = 8,
    metres: float = 1.0,
    share: float = 0.05,
    before: tuple[NDArray, NDArray] | None = None,
) -> NDArray:
    """Which points lie behind others in an image.

    Pixels are joined to cells of stride x stride; a point is hidden where it is deeper than the nearest point of its
    cell by more than `metres` and by more than `share` of that one's depth.

    Args:
        pixels: (m, 2) u, v, not negative.
        depth: (m,) metres.
        before: pixels (k, 2) and depth (k,) of the points that may hide them; None: they themselves.
    Returns: (m,) bool.
    """
    near_pixels, near_depth = (pixels, depth) if before is None else before
    cells, others = (np.floor(p / stride).astype(np.int64) for p in (pixels, near_pixels))
    width = int(max(cells[:, 0].max(initial=0), others[:, 0].max(initial=0))) + 1
    cell, other = (place[:, 1] * width + place[:, 0] for place in (cells, others))
    nearest = np.full(int(max(cell.max(initial=-1), other.max(initial=-1))) + 1, np.inf)
    np.minimum.at(nearest, other, near_depth)
    nearest = nearest[cell]
    return depth - nearest > np.maximum(metres, share * nearest)


def camera_views(
    points: ArrayLike, cameras: Sequence[Camera], occlusion: Mapping[str, Any] | None = None
) -> tuple[NDArray, NDArray, NDArray]:
    """What each camera sees of a cloud, by camera, then by point.

    Args:
        points: (n, 3) LiDAR coordinates, metres.
        occlusion: arguments of `hidden_points`, whose points are left out; None: what stands in between is not looked
            at.
    Returns: rows of points (m,) int64; cameras (m,) int64; normalised coordinates (m, 2) float32 in (-1, 1).
    """
    rows, numbers, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)], []
    for number, camera in enumerate(cameras):
        pixels, depth, visible = camera.project(points, MIN_DEPTH)
        last = np.array([camera.width - 1, camera.height - 1])
        visible &= ((pixels > 0) & (pixels < last)).all(1)
        seen = np.flatnonzero(visible)
        place = (2 * pixels[seen] / np.maximum(last, 1) - 1).astype(np.float32)
        # Rounding to float32 may reach the border.
        kept = (np.abs(place) < 1).all(1)
        if occlusion is not None:
            kept &= ~hidden_points(pixels[seen], depth[seen], **occlusion)
        rows.append(seen[kept])
        numbers.append(np.full(int(kept.sum()), number))
        places.append(place[kept])
    joined = np.concatenate([np.empty((0, 2), np.float32), *places])
    return np.concatenate(rows), np.concatenate(numbers), joined


def aligned_resize(image: NDArray, size: tuple[int, int]) -> NDArray:
    """An image at another size whose corner pixels stay corner pixels.

    Pixel r of h' shows row r (h - 1) / (h' - 1), bilinear; what shrinks by a factor of 2 or more is first averaged over
    that many whole pixels, so that nothing between the samples is lost.

    Args:
        image: (h, w, 3) uint8.
        size: (h', w').
    Returns: (h', w', 3) uint8.
    """
    if image.shape[:2] == tuple(size):
        return image
    samples = [aligned_samples(*lengths) for lengths in zip(image.shape, size)]
    values = _averaged(image, samples[0][0], samples[1][0])
    for axis, (_, low, high, between) in enumerate(samples):
        weight = between.astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (-1, 1))
        first, second = values.take(low, axis), values.take(high, axis)
        second -= first
        second *= weight
        second += first
        values = second
    return np.rint(values).astype(np.uint8)


def aligned_samples(old: int, new: int) -> tuple[int, NDArray, NDArray, NDArray]:
    """How `aligned_resize` makes `new` pixels of `old` along one axis.

    Returns: step, the number of pixels that are averaged; low and high (new,) int64, the averages between which each
        new pixel lies; weight (new,) float64 of high, 1 - weight of low.
    """
    step = max((old - 1) // (new - 1), 1) if new > 1 else old
    last = (old - 1) // step
    # Pixel j of the averages stands at j step + (step - 1) / 2.
    place = (np.arange(new) * ((old - 1) / max(new - 1, 1)) - (step - 1) / 2) / step
    place = place.clip(0, last)
    low = np.floor(place).astype(np.int64)
    return step, low, np.minimum(low + 1, last), place - low


def _averaged(image: NDArray, down: int, across: int) -> NDArray:
    """Means float32 of whole blocks of pixels; the last row and column are repeated where one is not whole."""
    rest = [(0, -n % step) for n, step in zip(image.shape, (down, across))]
    if any(more for _, more in rest):
        image = np.pad(image, [*rest, (0, 0)], mode="edge")
    kind = np.uint16 if 255 * down * across < 1 << 16 else np.uint32
    # Sums of strided slices of bytes: many times faster than a mean over axes.
    total = image[::down, ::across].astype(kind)
    for i in range(down):
        for j in range(across):
            if i or j:
                total += image[i::down, j::across]
    return total.astype(np.float32) / (down * across)


@kd.DATASETS.register_module()
class CameraViewDataset(CameraSource):
    """Scans with their camera images and what each camera sees of them.

    A sample has what the source gives, and

    * `point_id` (n,) int64, 0..n-1, which stays with its point through all transforms;
    * `images`: for each camera in use (h, w, 3) uint8; `camera_names` beside it, and `cameras`, what each of them is at
      its own size; `dropped_cameras` are those that `keep` left out;
    * `view_point` (m,) int64, values of `point_id`; `view_image` (m,) int64, entries of `images`; `view_uv` (m, 2)
      float32, normalised coordinates; by image, then by point. Of scans that are merged only the first one's points
      (`sweep` 0) are looked at.

    `kd.ViewsToRows` at the end of the transforms makes arrays of these that can be joined to batches. Submissions are
    those of the source, where it has such.

    Args:
        source: config of a reader with cameras (or the reader); its own transforms are not used. With keep=0 any
            reader.
        cameras: names of those to use, in this order, which matters where a network takes a point's features from the
            last camera that sees it; None: all, in the reader's order.
        keep: how many of them a sample keeps, drawn anew at every access, in their order (in test mode always the same
            ones); None: all. The images of the others are not read. 0: no images at all.
        image_size: height and width of the images, pixels; they are resized with aligned corners.
        occlusion: arguments of `hidden_points`, {} for its defaults; None: points behind others count as seen.
        transform, test_mode, test_cfg, cache, loop: see `DefaultDataset`. Images are read anew at every access.

    Raises:
        InputError: for a source without cameras, arguments that do not fit it, or files that cannot be used.
    """

    def __init__(
        self,
        source: Mapping[str, Any] | DefaultDataset,
        cameras: Sequence[str] | None = None,
        keep: int | None = None,
        image_size: Sequence[int] = (360, 640),
        occlusion: Mapping[str, Any] | None = None,
        transform: Sequence[Mapping[str, Any]] | None = None,
        test_mode: bool = False,
        test_cfg: Mapping[str, Any] | None = None,
        cache: bool | str = False,
        loop: int = 1,
    ) -> None:
        self.check_names(cameras)
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 0):
            raise InputError(f"keep={keep!r}: expected a number of cameras, or None for all")
        if len(image_size) != 2 or not all(isinstance(s, int) and s > 0 for s in image_size):
            raise InputError(f"image_size={image_size!r}: expected height and width in pixels")
        self.keep, self.image_size = keep, (int(image_size[0]), int(image_size[1]))
        self.occlusion = _occlusion(occlusion)
        super().__init__(
            source, cameras, blind=keep == 0, transform=transform, test_mode=test_mode,
            test_cfg=test_cfg, cache=cache, loop=loop,
        )  # fmt: skip
        # Testers ask whether a data set has these.
        if hasattr(self.source, "write_submission"):
            self.write_submission = self.source.write_submission
        if hasattr(self.source, "finish_submission"):
            self.finish_submission = partial(
                self.source.finish_submission, use_camera=self.keep != 0
            )

    def get_data(self, idx: int) -> dict[str, Any]:
        """One scan and what all cameras see of it, see the class; no images."""
        position = idx % len(self.data_list)
        data = self.source.load(position)
        cameras = []
        if self.keep != 0:
            found = self.source.cameras(position)
            cameras = [found[i] for i in self.chosen([camera.name for camera in found])]
        points = data["coord"]
        if "sweep" in data:
            points = points[: int(np.argmax(data["sweep"] > 0)) or None]
        views = camera_views(points, cameras, self.occlusion)
        data.update(zip(VIEWS, views, strict=True))
        data["camera_names"] = [camera.name for camera in cameras]
        self.number(data)
        return data

    def load(self, idx: int) -> dict[str, Any]:
        """A checked sample that the caller may change, with the images of the cameras it keeps."""
        position, data = idx % len(self.data_list), super().load(idx)
        names = data["camera_names"]
        kept = np.arange(len(names))
        if self.keep is not None and self.keep < len(names):
            draws = np.random.default_rng(position) if self.test_mode else np.random
            kept = np.sort(draws.choice(len(names), self.keep, replace=False))
            place = np.full(len(names), -1, np.int64)
            place[kept] = np.arange(len(kept))
            rows = place[data["view_image"]] >= 0
            for key in VIEWS:
                data[key] = data[key][rows]
            data["view_image"] = place[data["view_image"]]
            data["camera_names"] = [names[i] for i in kept]
        cameras = self.source.cameras(position) if names else []
        number = {camera.name: i for i, camera in enumerate(cameras)}
        chosen = [number[name] for name in data["camera_names"]]
        dropped = [number[name] for name in names if name not in data["camera_names"]]
        data["cameras"], data["dropped_cameras"] = (
            [cameras[i] for i in which] for which in (chosen, dropped)
        )
        data["images"], data["image_size"] = [], self.image_size
        for i, image in zip(chosen, read_images(self.source, position, chosen), strict=True):
            self.check_image(data["name"], cameras[i], image)
            data["images"].append(aligned_resize(image, self.image_size))
        return data


def _occlusion(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if given is None:
        return None
    unknown = sorted(set(given) - {"stride", "metres", "share"})
    values = {"stride": 8, "metres": 1.0, "share": 0.05, **given}
    fits = values["stride"] >= 1 and values["metres"] >= 0 and values["share"] >= 0
    if unknown or not fits:
        raise InputError(
            f"occlusion={dict(given)!r}: takes stride (pixels, 1 or more), metres and share (0 or more)"
        )
    return values


def read_images(source: Any, idx: int, chosen: Sequence[int]) -> list[NDArray]:
    """The images of the chosen cameras. Only one camera's file is read where the reader has one file each."""
    if not chosen:
        return []
    if isinstance(source, NuScenesDataset):
        cams = list(source.info(idx)["cams"].values())
        return [read_rgb(find_file(source.raw, cams[i]["data_path"])) for i in chosen]
    images = source.images(idx)
    return [images[i] for i in chosen]


@kd.TRANSFORMS.register_module()
class ViewsToRows:
    """Make arrays of images and views that can be joined to batches; the last transform that knows of ids.

    `images` becomes (v, 3, h, w) float32 in 0..1, `view_point` (m,) int64 rows of the sample's points, ascending within
    an image. Rows of points that are gone are dropped: of a voxel, those of the point that stands for it stay. The
    cameras leave the sample.
    `kd.Collect(offset_keys_dict=dict(offset="coord", view_offset="view_point", image_offset="images"))` counts both.

    Args:
        image_size: height and width of the images, pixels; None: what the data set says, also for a sample without.

    Raises:
        InputError: for images of different sizes, and samples that `CameraViewDataset` did not make.
    """

    def __init__(self, image_size: Sequence[int] | None = None) -> None:
        need(
            image_size is None
            or (len(image_size) == 2 and all(isinstance(s, int) and s > 0 for s in image_size)),
            f"ViewsToRows: image_size is height and width in pixels, got {image_size!r}",
        )
        self.image_size = None if image_size is None else tuple(image_size)

    def __call__(self, data: Data) -> Data:
        images = lookup(data, "images", "ViewsToRows")
        need(isinstance(images, list), "ViewsToRows: images is a list of arrays (h, w, 3)")
        ids, points = (lookup(data, key, "ViewsToRows") for key in ("point_id", "view_point"))
        size = self.image_size or tuple(lookup(data, "image_size", "ViewsToRows"))
        sizes = sorted({image.shape[:2] for image in images} | {size})
        if len(sizes) != 1:
            raise InputError(
                f"ViewsToRows: sample {data.get('name', '?')} has images of other sizes than image_size, {sizes}; "
                "give ViewsToRows and CameraViewDataset the same"
            )
        rows = rows_of_ids(ids, points)
        kept = np.flatnonzero(rows >= 0)
        # By image, then by point: transforms may have reordered the points.
        kept = kept[np.lexsort((rows[kept], data["view_image"][kept]))]
        data["view_point"] = rows[kept]
        data["view_image"], data["view_uv"] = data["view_image"][kept], data["view_uv"][kept]
        stacked = np.empty((len(images), 3, *size), np.float32)
        for number, image in enumerate(images):
            stacked[number] = image.transpose(2, 0, 1)
        stacked /= 255
        data["images"] = stacked
        for key in CAMERAS:
            data.pop(key, None)
        return data


@kd.TRANSFORMS.register_module()
class TwoViews:
    """A student's and a teacher's view of one scan, each with its own augmentation and its own voxels.

    The student gets the scan itself (`sweep` 0, where scans were merged), the teacher all points. The student's arrays
    stay where they are; the teacher's are written beside them as `teacher_KEY`, for every per-point key. `match` (n,)
    int64 is the row of the teacher's voxel that holds the point standing for each voxel of the student.

    Args:
        student, teacher: transforms of each view before its voxels are made; the teacher's see no images.
        student_voxel, teacher_voxel: config of `kd.VoxelSample` or `GridSample` (mode "train").

    Raises:
        InputError: for a sample without `point_id`, and when the teacher's transforms drop points that the student
            keeps: a crop belongs before this transform, where it serves both.
    """

    def __init__(
        self,
        student_voxel: Mapping[str, Any],
        teacher_voxel: Mapping[str, Any] | None = None,
        student: Sequence[Mapping[str, Any]] | None = None,
        teacher: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.student, self.teacher = Compose(student), Compose(teacher)
        self.student_voxel = TRANSFORMS.build(dict(student_voxel))
        wide = dict(student_voxel if teacher_voxel is None else teacher_voxel)
        self.teacher_voxel = TRANSFORMS.build({**wide, "return_inverse": True})

    def __call__(self, data: Data) -> Data:
        coord_of(data, "TwoViews")
        lookup(data, "point_id", "TwoViews")
        teacher = self._copy(data)
        if "sweep" in data:
            select(data, data["sweep"] == 0, "TwoViews")
        data = self.student_voxel(self.student(data))
        teacher = self.teacher(teacher)
        before = teacher["point_id"]
        teacher = self.teacher_voxel(teacher)
        rows = rows_of_ids(before, data["point_id"])
        if (rows < 0).any():
            raise InputError(
                f"TwoViews: the teacher's transforms dropped {int((rows < 0).sum())} of {len(rows)} points that stand "
                f"for the student's voxels in sample {data.get('name', '?')}; put crops before TwoViews"
            )
        data["match"] = teacher["inverse"][rows]
        for key in teacher["index_valid_keys"]:
            if key in teacher:
                data[f"teacher_{key}"] = teacher[key]
        data["index_valid_keys"] = list(dict.fromkeys([*valid_keys(data), "match"]))
        return data

    @staticmethod
    def _copy(data: Data) -> Data:
        """The per-point arrays and what is no view of a camera."""
        every = per_point(data, np.arange(len(data["coord"])), "TwoViews")
        of_images = (*VIEWS, *CAMERAS, "images", "camera_names")
        others = {k: v for k, v in data.items() if k not in of_images}
        return {**others, **every, "index_valid_keys": list(data["index_valid_keys"])}
