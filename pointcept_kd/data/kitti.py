"""KITTI object detection: single frames with a camera image and boxes around objects.

    data_root/training/velodyne/NNNNNN.bin           float32 x, y, z, reflectance
                      /velodyne_reduced/NNNNNN.bin   the same, only what camera 2 sees
                      /calib/NNNNNN.txt              P0..P3 (3 x 4), R0_rect (3 x 3), Tr_velo_to_cam (3 x 4)
                      /image_2/NNNNNN.png
                      /label_2/NNNNNN.txt            15 columns, camera coordinates
                      /weak_labels/, /superpixels/   where they were made: NNNNNN.png, see `image_maps`
             /testing/...                            without label_2
             /ImageSets/{train,val,trainval,test}.txt  file numbers, one a line

Geiger, Lenz & Urtasun, "Are we ready for autonomous driving?", CVPR 2012; development kit, readme.txt.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import InputError, kd
from pointcept_kd.host.loader import DefaultDataset

from .boxes import box_of_points
from .camera import Camera, image_size, kitti_camera, read_rgb
from .image_maps import CLASSES_FILE, ImageMapReader
from .scans import finite_numbers, finite_rows, numbers_of_row, read_rows, require_choice
from .semantic_kitti import read_scan

CLASS_NAMES = ("Car", "Pedestrian", "Cyclist")
DONT_CARE = "DontCare"
FOLDERS = ("training", "testing")


def read_calib(path: str | os.PathLike[str]) -> dict[str, NDArray]:
    """The matrices of a detection calibration by name, float64: (3, 4), and `R0_rect` (3, 3).

    Raises:
        InputError: for a file that cannot be read or a row without 12 (9) numbers.
    """
    table = {}
    for row, line in read_rows(path):
        name, _, rest = line.partition(":")
        columns = 3 if name.strip() == "R0_rect" else 4
        table[name.strip()] = numbers_of_row(path, row, rest, 3 * columns).reshape(3, columns)
    return table


def lidar_to_rectified(calib: Mapping[str, NDArray], path: str | os.PathLike[str]) -> NDArray:
    """LiDAR to rectified camera coordinates, (4, 4): R0_rect Tr_velo_to_cam.

    Args:
        path: of the calibration, for the message.

    Raises:
        InputError: when one of them is missing.
    """
    missing = [key for key in ("R0_rect", "Tr_velo_to_cam") if key not in calib]
    if missing:
        raise InputError(f"{path}: no row {' and '.join(missing)}; copy the file again")
    place, rectify = np.eye(4), np.eye(4)
    place[:3], rectify[:3, :3] = calib["Tr_velo_to_cam"], calib["R0_rect"]
    return rectify @ place


def read_boxes(path: str | os.PathLike[str], to_camera: NDArray) -> dict[str, Any]:
    """The objects of a label file in the LiDAR's frame.

    A file gives h, w, l, the middle of the lower face and the angle about the camera's y; a box here is its centre, l,
    w, h and the heading, seen from above in the LiDAR's frame (see `boxes`).

    Args:
        to_camera: (4, 4) LiDAR to rectified camera coordinates.
    Returns: boxes (m, 7) float64, names (m,) str, truncation (m,) float64 0 to 1, occlusion (m,) int64 0 to 3; and
        ignored (k, 4) float64, left, top, right, bottom of image regions whose objects nobody labelled (DontCare).

    Raises:
        InputError: for a file that cannot be read or a row that is no label.
    """
    rows, names, ignored = [], [], []
    for row, line in read_rows(path):
        words = line.split()
        values = finite_numbers(words[1:15], 14)
        if values is None:
            raise InputError(
                f"{path}: row {row} should hold a class and 14 numbers, got {line[:60]!r}"
            )
        if words[0] == DONT_CARE:
            ignored.append(values[3:7])
        else:
            names.append(words[0])
            rows.append(values)
    table = np.array(rows).reshape(-1, 14)
    height, width, length = table[:, 7:10].T
    centre = table[:, 10:13] - np.stack([0 * height, height / 2, 0 * height], 1)
    to_lidar = np.linalg.inv(to_camera)
    # The length lies along x at angle 0; about y, which points down, x turns towards -z.
    angle = table[:, 13]
    heading = np.stack([np.cos(angle), 0 * angle, -np.sin(angle)], 1) @ to_lidar[:3, :3].T
    centre = centre @ to_lidar[:3, :3].T + to_lidar[:3, 3]
    yaw = np.arctan2(heading[:, 1], heading[:, 0])
    return {
        "boxes": np.column_stack([centre, length, width, height, yaw]),
        "names": np.array(names, str),
        "truncation": table[:, 0],
        "occlusion": table[:, 1].astype(np.int64),
        "ignored": np.array(ignored).reshape(-1, 4),
    }


@kd.DATASETS.register_module()
class KITTIObjectDataset(ImageMapReader, DefaultDataset):
    """Frames of the detection benchmark: coord, strength, and weak labels from boxes.

    Args:
        split: `training` or `testing`, all frames of that folder; `train`, `val`, `trainval` or `test`, those listed in
            `ImageSets`; or a list of these.
        velodyne: folder of the scans, `velodyne` or `velodyne_reduced`.
        classes: names of boxes; points in a box of the i-th are labelled i. Without it there are no labels.
        background: label of points that the camera sees and no box contains, except in image regions that nobody
            labelled; None: they have none.
        data_root, transform, test_mode, test_cfg, cache, ignore_index, loop: see `DefaultDataset`.

    A box is a weak label: it also holds the road below a car. Points in boxes of other classes have none, nor has a
    folder without `label_2`.

    Raises:
        InputError: for folders and files that cannot be used; the text names the file.
    """

    def __init__(
        self,
        split: str | Sequence[str] = "training",
        data_root: str = "data/kitti",
        transform: Sequence[Mapping[str, Any]] | None = None,
        test_mode: bool = False,
        test_cfg: Mapping[str, Any] | None = None,
        cache: bool | str = False,
        ignore_index: int = -1,
        loop: int = 1,
        velodyne: str = "velodyne",
        classes: Sequence[str] | None = None,
        background: int | None = None,
    ) -> None:
        require_choice("velodyne", velodyne, ("velodyne", "velodyne_reduced"))
        if isinstance(classes, str):
            raise InputError(f"classes={classes!r}: expected a list such as {list(CLASS_NAMES)}")
        if background is not None and classes is None:
            raise InputError(f"background={background} needs classes such as {list(CLASS_NAMES)}")
        self.velodyne, self.background = velodyne, background
        self.classes = None if classes is None else list(classes)
        super().__init__(
            split=split, data_root=data_root, transform=transform, test_mode=test_mode,
            test_cfg=test_cfg, cache=cache, ignore_index=ignore_index, loop=loop,
        )  # fmt: skip

    def get_data_list(self) -> list[str]:
        """Paths of the scans."""
        paths = []
        for split in [self.split] if isinstance(self.split, str) else self.split:
            if split in FOLDERS:
                folder = Path(self.data_root) / split / self.velodyne
                found = sorted(folder.glob("[!.]*.bin"))
                if not found:
                    raise InputError(
                        f"{folder}: no *.bin; correct data_root, split or velodyne={self.velodyne!r}"
                    )
                paths += found
            else:
                paths += self._listed(split)
        return [str(path) for path in paths]

    def _listed(self, split: str) -> list[Path]:
        if split not in ("train", "val", "trainval", "test"):
            raise InputError(
                f"split {split!r} is unknown; use training, testing, train, val, trainval, test"
            )
        path = Path(self.data_root) / "ImageSets" / f"{split}.txt"
        if not path.is_file():
            raise InputError(
                f"{path} is missing: split {split!r} is what it lists; put it there, or use "
                "'training' for all frames"
            )
        folder = Path(self.data_root) / FOLDERS[split == "test"] / self.velodyne
        scans = [(row, folder / f"{line.strip()}.bin") for row, line in read_rows(path)]
        for row, scan in scans:
            if not scan.is_file():
                raise InputError(f"{path}: row {row}: {scan} is missing")
        return [scan for _, scan in scans]

    def _file(self, idx: int, folder: str, suffix: str) -> Path:
        path = Path(self.data_list[idx % len(self.data_list)])
        return path.parent.parent / folder / f"{path.stem}{suffix}"

    def get_data_name(self, idx: int) -> str:
        """File number, after the folder's name for frames of `testing`, whose numbers begin anew."""
        path = self._file(idx, self.velodyne, ".bin")
        folder = path.parent.parent.name
        return path.stem if folder == "training" else f"{folder}_{path.stem}"

    def get_data(self, idx: int) -> dict[str, Any]:
        """One frame: coord (n, 3), strength (n, 1) float32, segment (n,) int32, name."""
        path = self._file(idx, self.velodyne, ".bin")
        scan = read_scan(path)
        finite_rows(path, scan, drop=False, remedy="copy the file again")
        return {
            "coord": np.ascontiguousarray(scan[:, :3]),
            "strength": np.ascontiguousarray(scan[:, 3:]),
            "segment": self._segment(idx, scan),
            "name": self.get_data_name(idx),
        }

    def _segment(self, idx: int, scan: NDArray) -> NDArray:
        segment = np.full(len(scan), self.ignore_index, np.int32)
        if self.classes is None or not self._file(idx, "label_2", ".txt").parent.is_dir():
            return segment
        objects = self.boxes(idx)
        label_of = {name: label for label, name in enumerate(self.classes)}
        labels = [label_of.get(name, self.ignore_index) for name in objects["names"]]
        rows = box_of_points(scan, objects["boxes"])
        if self.background is not None:
            segment[(rows < 0) & ~self._unlabelled(idx, scan, objects["ignored"])] = self.background
        segment[rows >= 0] = np.array(labels, np.int32)[rows[rows >= 0]]
        return segment

    def _unlabelled(self, idx: int, scan: NDArray, regions: NDArray) -> NDArray:
        """Points that appear in one of the image regions (k, 4), or not in the image: only it was labelled."""
        pixels, _, visible = self.cameras(idx)[0].project(scan, min_depth=0.0)
        left, top, right, bottom = (regions[:, i] for i in range(4))
        inside = (
            (pixels[:, :1] >= left)
            & (pixels[:, :1] <= right)
            & (pixels[:, 1:] >= top)
            & (pixels[:, 1:] <= bottom)
        )
        return inside.any(1) | ~visible

    def calib(self, idx: int) -> dict[str, NDArray]:
        """The matrices of a frame's calibration, see `read_calib`."""
        return read_calib(self._file(idx, "calib", ".txt"))

    def boxes(self, idx: int) -> dict[str, Any]:
        """The labelled objects of a frame in the LiDAR's frame, see `read_boxes`."""
        transform = lidar_to_rectified(self.calib(idx), self._file(idx, "calib", ".txt"))
        return read_boxes(self._file(idx, "label_2", ".txt"), transform)

    def cameras(self, idx: int) -> list[Camera]:
        """The left colour camera."""
        return [
            kitti_camera(
                self.calib(idx), "image_2", *image_size(self._file(idx, "image_2", ".png"))
            )
        ]

    def images(self, idx: int) -> list[NDArray]:
        """The image (h, w, 3) uint8 of that camera."""
        return [read_rgb(self._file(idx, "image_2", ".png"))]

    def weak_label_files(self, idx: int) -> list[Path]:
        """`weak_labels/NNNNNN.png`."""
        return [self._file(idx, "weak_labels", ".png")]

    def superpixel_files(self, idx: int, folder: str | None = None) -> list[Path]:
        """`superpixels/NNNNNN.png`."""
        return [self._file(idx, folder or "superpixels", ".png")]

    def weak_class_files(self) -> list[Path]:
        """`weak_labels/classes.json` of `training`, `testing` or both."""
        folders = dict.fromkeys(Path(path).parent.parent for path in self.data_list)
        return [folder / "weak_labels" / CLASSES_FILE for folder in folders]
