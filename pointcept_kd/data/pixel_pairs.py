"""Pairs of a LiDAR point and an image's pixel that shows it, for learning from images.

A point is paired with a camera where it lies more than 1 m deep and at 0 < u < W - 1, 0 < v < H - 1; its pixel is
(row, column) = (v, u), rounded to the nearest, halves to even. A point that two cameras see has two pairs; what stands
in between is not looked at (Sautier et al., "Image-to-Lidar Self-Supervised Distillation for Autonomous Driving Data",
CVPR 2022, arXiv:2203.16258, whose rule this is).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pointcept_kd.host import InputError, kd
from pointcept_kd.host.loader import DefaultDataset

from .camera import Camera
from .camera_source import CameraSource
from .scans import require_choice

MIN_DEPTH = 1.0  # metres
LABELS = ("weak", "segment", None)


def pixel_pairs(points: ArrayLike, cameras: Sequence[Camera]) -> tuple[NDArray, NDArray]:
    """All pairs of points and pixels, by camera, then by point.

    Args:
        points: (n, 3) LiDAR coordinates, metres.
    Returns: rows of points (m,) int64; camera, row and column (m, 3) int64.
    """
    rows, places = [np.empty(0, np.int64)], [np.empty((0, 3), np.int64)]
    for number, camera in enumerate(cameras):
        pixels, _, visible = camera.project(points, MIN_DEPTH)
        u, v = pixels[:, 0], pixels[:, 1]
        visible &= (u > 0) & (u < camera.width - 1) & (v > 0) & (v < camera.height - 1)
        seen = np.flatnonzero(visible)
        row, column = np.rint(v[seen]).astype(np.int64), np.rint(u[seen]).astype(np.int64)
        rows.append(seen)
        places.append(np.stack([np.full(len(seen), number), row, column], 1))
    return np.concatenate(rows), np.concatenate(places)


@kd.DATASETS.register_module()
class PointPixelDataset(CameraSource):
    """Scans with their camera images and the pairs between both.

    A sample has what the source gives, and

    * `point_id` (n,) int64, 0..n-1, which stays with its point through all transforms;
    * `images`: for each camera (h, w, 3) uint8;
    * `pair_point` (m,) int64, values of `point_id`; `pair_pixel` (m, 3) int64: image, row, column; `pair_label` (m,)
      int64: 0 none, 1..K;
    * where asked for, `superpixels` and `weak_labels`: for each camera (h, w) integers.

    `kd.PairsToRows` at the end of the transforms makes arrays of these that can be joined to batches.

    Args:
        source: config of a reader with cameras (or the reader); its own transforms are not used.
        labels: where `pair_label` comes from: "weak", the weak labels at the pixel; "segment", the points' own labels
            + 1, what labels without errors would be; None: all are 0.
        superpixels: whether to read them; or the name of their folder, where there are several kinds.
        maps: whether samples hold the weak labels of all pixels as `weak_labels`.
        cameras: names of those to use, in this order; None: all.
        num_classes: K as the rest of the config has it; other weak labels are refused. None: not looked at.
        transform, cache, loop: see `DefaultDataset`.
        test_mode: no `loop`; samples are whole, as in training. test_cfg has no effect.

    Raises:
        InputError: for a source without cameras, arguments that do not fit it, or files that cannot be used.
    """

    def __init__(
        self,
        source: Mapping[str, Any] | DefaultDataset,
        labels: str | None = "weak",
        superpixels: bool | str = False,
        maps: bool = False,
        cameras: Sequence[str] | None = None,
        num_classes: int | None = None,
        transform: Sequence[Mapping[str, Any]] | None = None,
        test_mode: bool = False,
        test_cfg: Mapping[str, Any] | None = None,
        cache: bool | str = False,
        loop: int = 1,
    ) -> None:
        require_labels(labels)
        self.check_names(cameras)
        self.labels, self.with_superpixels, self.with_maps = labels, superpixels, maps
        self.num_classes = num_classes
        super().__init__(
            source, cameras, transform=transform, test_mode=test_mode, test_cfg=test_cfg,
            cache=cache, loop=loop,
        )  # fmt: skip
        if labels == "weak" or maps:
            known = self.source.weak_classes()
            if num_classes is not None and len(known) != num_classes:
                raise InputError(
                    f"num_classes={num_classes}, but the weak labels below {self.source.data_root} have "
                    f"{len(known)} classes: {', '.join(known)}; correct one of them"
                )

    def weak_classes(self) -> list[str]:
        """Names of the classes 1..K of the weak labels."""
        return self.source.weak_classes()

    def get_data(self, idx: int) -> dict[str, Any]:
        """One scan with images and pairs, see the class."""
        position = idx % len(self.data_list)
        data = self.source.load(position)
        found = self.source.cameras(position)
        chosen = self.chosen([camera.name for camera in found])
        cameras, images = [found[i] for i in chosen], self.source.images(position)
        images = [images[i] for i in chosen]
        for camera, image in zip(cameras, images, strict=True):
            self.check_image(data["name"], camera, image)
        points, pixels = pixel_pairs(data["coord"], cameras)
        self.number(data)
        data.update(images=images, pair_point=points, pair_pixel=pixels)
        maps = None
        if self.labels == "weak" or self.with_maps:
            maps = self.source.weak_labels(position)
            maps = [maps[i] for i in chosen]
        data["pair_label"] = self._labels(data, maps)
        if self.with_maps:
            data["weak_labels"] = maps
        if self.with_superpixels:
            folder = self.with_superpixels if isinstance(self.with_superpixels, str) else None
            segments = self.source.superpixels(position, folder)
            data["superpixels"] = [segments[i] for i in chosen]
        return data

    def _labels(self, data: Mapping[str, Any], maps: list[NDArray] | None) -> NDArray:
        points, pixels = data["pair_point"], data["pair_pixel"]
        labels = np.zeros(len(points), np.int64)
        if self.labels == "weak" and maps is not None:
            for number, values in enumerate(maps):
                here = pixels[:, 0] == number
                labels[here] = values[pixels[here, 1], pixels[here, 2]]
        elif self.labels == "segment":
            own = data["segment"][points].astype(np.int64)
            labels = np.where((own == self.ignore_index) | (own < 0), 0, own + 1)
            most = int(labels.max(initial=0))
            if self.num_classes is not None and most > self.num_classes:
                raise InputError(
                    f"sample {data['name']}: a point of class {most - 1}, but num_classes={self.num_classes}"
                )
        return labels

    def _build_test_transforms(self) -> None:
        """Nothing to build: samples stay whole."""

    def prepare_test_data(self, idx: int) -> Any:
        """One sample through the transforms, not in fragments."""
        return self.transform(self.load(idx))


def require_labels(labels: object) -> None:
    """Refuse another source of labels.

    Raises:
        InputError: with the choices.
    """
    if labels is not None:
        require_choice("labels", labels, LABELS[:2])
