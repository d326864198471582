"""SemanticKITTI: scans, labels, calibration and poses.

    data_root/dataset/sequences/SS/velodyne/NNNNNN.bin   float32 x, y, z, remission
                                  /labels/NNNNNN.label   uint32: class in the low 16 bits
                                  /calib.txt             P0..P3, Tr (velodyne to camera 0), 3 x 4
                                  /poses.txt             camera-0 poses, row i belongs to scan i
                                  /image_2/NNNNNN.png    the left colour camera; beside it, where they were made,
                                  /weak_labels/NNNNNN.png, /weak_labels/classes.json   see `image_maps`
                                  /superpixels/NNNNNN.png

Behley et al., "SemanticKITTI", ICCV 2019; http://semantic-kitti.org.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import DATASETS, InputError, kd, stand_in
from pointcept_kd.host.loader import DefaultDataset

from .camera import Camera, image_size, kitti_camera, read_rgb
from .fractions import restrict
from .image_maps import CLASSES_FILE, ImageMapReader
from .scans import (
    NONFINITE,
    WarnOnce,
    class_table,
    finite_rows,
    in_file,
    keep_some_labels,
    map_classes,
    numbers_of_row,
    read_points,
    read_rows,
    read_values,
    require_choice,
)
from .submission_writers import index_of, rows_of_file, write_semantic_kitti
from .sweeps import LABELS, aggregate

logger = logging.getLogger(__name__)

CLASS_NAMES = (
    "car", "bicycle", "motorcycle", "truck", "other-vehicle", "person", "bicyclist", "motorcyclist",
    "road", "parking", "sidewalk", "other-ground", "building", "fence", "vegetation", "trunk",
    "terrain", "pole", "traffic-sign",
)  # fmt: skip

# Raw class id to train id; -1 is ignored. Moving classes (252..259) join the static ones.
LEARNING_MAP = {
    0: -1, 1: -1, 10: 0, 11: 1, 13: 4, 15: 2, 16: 4, 18: 3, 20: 4, 30: 5, 31: 6, 32: 7, 40: 8, 44: 9,
    48: 10, 49: 11, 50: 12, 51: 13, 52: -1, 60: 8, 70: 14, 71: 15, 72: 16, 80: 17, 81: 18, 99: -1,
    252: 0, 253: 6, 254: 5, 255: 7, 256: 4, 257: 4, 258: 3, 259: 4,
}  # fmt: skip

# Train id to the raw id that a submission writes.
LEARNING_MAP_INV = {
    -1: 0, 0: 10, 1: 11, 2: 15, 3: 18, 4: 20, 5: 30, 6: 31, 7: 32, 8: 40, 9: 44, 10: 48, 11: 49,
    12: 50, 13: 51, 14: 70, 15: 71, 16: 72, 17: 80, 18: 81,
}  # fmt: skip

# RGB of the train ids, as the dataset's own tools paint them.
COLORS = np.array(
    [
        [100, 150, 245], [100, 230, 245], [30, 60, 150], [80, 30, 180], [0, 0, 255], [255, 30, 30],
        [255, 40, 200], [150, 30, 90], [255, 0, 255], [255, 150, 255], [75, 0, 75], [175, 0, 75],
        [255, 200, 0], [255, 120, 50], [0, 175, 0], [135, 60, 0], [150, 240, 80], [255, 240, 150],
        [255, 0, 0],
    ],
    dtype=np.uint8,
)  # fmt: skip

SPLITS = {
    "train": ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10"),
    "val": ("08",),
    "test": tuple(f"{i:02d}" for i in range(11, 22)),
}

_TABLE = class_table(LEARNING_MAP, 1 << 16)

_WHERE_FROM = (
    "get it from http://semantic-kitti.org, or make a small one: "
    "python tools/prepare_data.py simulate --out FOLDER"
)


def map_labels(raw: NDArray, ignore_index: int = -1) -> NDArray:
    """Raw labels (n,), instance ids allowed in the high 16 bits, to train ids (n,) int32.

    Raises:
        ValueError: for class ids outside the official list; the text names the first.
    """
    ids = np.asarray(raw).astype(np.uint32) & 0xFFFF
    return map_classes(ids, _TABLE, "in SemanticKITTI's list", ignore_index)


def read_scan(path: str | os.PathLike[str]) -> NDArray:
    """Points (n, 4) float32: x, y, z in metres, remission. Non-finite values are left in.

    Raises:
        InputError: for a file that cannot be read, is cut off or holds no point.
    """
    return read_points(path, 4, "velodyne scan")


def read_labels(path: str | os.PathLike[str], points: int | None = None) -> NDArray:
    """Labels (n,) uint32: class in the low, instance in the high 16 bits.

    Raises:
        InputError: for a file that cannot be read, or whose length is not that of the scan.
    """
    return read_values(path, "<u4", points)


def load_calib(path: str | os.PathLike[str]) -> dict[str, NDArray]:
    """The matrices of a `calib.txt` by name, float64 (3, 4); `Tr` (and `Tr_*`) padded to (4, 4).

    Raises:
        InputError: for a file that cannot be read or a row without 12 numbers.
    """
    table = {}
    for row, line in read_rows(path):
        name, _, rest = line.partition(":")
        matrix = numbers_of_row(path, row, rest, 12).reshape(3, 4)
        name = name.strip()
        table[name] = np.vstack([matrix, [0, 0, 0, 1]]) if name.startswith("Tr") else matrix
    return table


def load_poses(sequence_dir: str | os.PathLike[str]) -> NDArray:
    """Velodyne poses (n, 4, 4) float64 of a sequence: inv(Tr) P_i Tr; row i belongs to scan i.

    Raises:
        InputError: when `poses.txt` or the `Tr` row of `calib.txt` is missing or malformed.
    """
    folder = Path(sequence_dir)
    calib = load_calib(folder / "calib.txt")
    if "Tr" not in calib:
        raise InputError(
            f"{folder / 'calib.txt'}: no row Tr (velodyne to camera); use the file of the "
            "SemanticKITTI download, not the one of the KITTI images"
        )
    path = folder / "poses.txt"
    rows = [numbers_of_row(path, row, line, 12) for row, line in read_rows(path)]
    if not rows:
        raise InputError(f"{path}: no poses; copy the file again")
    camera = np.zeros((len(rows), 4, 4))
    camera[:, :3] = np.stack(rows).reshape(-1, 3, 4)
    camera[:, 3, 3] = 1
    return np.linalg.inv(calib["Tr"]) @ camera @ calib["Tr"]


def _sequence(entry: str | int, key: str, choice: str) -> str:
    """A sequence's folder name.

    Raises:
        InputError: for anything but a number up to 99.
    """
    text = str(entry)
    if not (text.isdigit() and int(text) <= 99):
        raise InputError(f"{key}: {entry!r} is unknown; use {choice} such as 04")
    return text.zfill(2)


@stand_in(DATASETS, kd.DATASETS, "SemanticKITTIDataset")
class SemanticKITTIDataset(ImageMapReader, DefaultDataset):
    """Scans with 19 classes.

    Args:
        split: `train` (00-07, 09, 10), `val` (08), `test` (11-21), a sequence such as "04", or a
            list of these.
        data_root: the folder that holds `dataset/sequences`.
        sequences: sequences to read instead of those of the split.
        scans: a file of the scans to read, `SS_FFFFFF` a line (see `fractions`); all others are passed over. Names of
            sequences that are not read are passed over too; a name missing from one that is read is an error.
        unlabelled: sequences whose labels are withheld: their points are all `ignore_index`. Terms
            that need no labels still learn from them.
        label_fraction: share of a scan's points whose labels are kept, 0 to 1; the same points
            every time. The others are `ignore_index`, as where people label a few clicks a scan.
        nonfinite: what to do with NaN or infinite values: `error`, or `drop` those points.
        sweeps: scans merged into one: the scan itself and those with the `sweeps - 1` file numbers before it, as far
            as they exist, moved into its frame by their poses. Above 1 a sample also has `sweep` (n,), 0 for the scan
            itself, whose points come first.
        sweep_labels: `all`, or `reference`: past scans have no labels. Predictions cover all merged points, so
            `reference` is what evaluates, as without merging, each point of a scan once.
        transform, test_mode, test_cfg, cache, ignore_index, loop: see `DefaultDataset`.

    A scan without a label file is all `ignore_index`. Sequences of a split that are not there are
    passed over; a split without any scan is an error.

    Raises:
        InputError: for folders, files and labels that cannot be used; the text names the file.
    """

    def __init__(
        self,
        split: str | Sequence[str] = "train",
        data_root: str = "data/semantic_kitti",
        transform: Sequence[Mapping[str, Any]] | None = None,
        test_mode: bool = False,
        test_cfg: Mapping[str, Any] | None = None,
        cache: bool | str = False,
        ignore_index: int = -1,
        loop: int = 1,
        sequences: Sequence[str | int] | None = None,
        unlabelled: Sequence[str | int] = (),
        label_fraction: float = 1.0,
        nonfinite: str = "error",
        sweeps: int = 1,
        sweep_labels: str = "all",
        scans: str | None = None,
    ) -> None:
        require_choice("nonfinite", nonfinite, NONFINITE)
        if not 0 <= label_fraction <= 1:
            raise InputError(f"label_fraction={label_fraction}: expected a number from 0 to 1")
        if isinstance(sweeps, bool) or not isinstance(sweeps, int) or sweeps < 1:
            raise InputError(f"sweeps={sweeps!r}: expected a whole number of scans, 1 or more")
        require_choice("sweep_labels", sweep_labels, LABELS)
        self.sequences = sequences
        self.scans = scans
        self.label_fraction = label_fraction
        self.unlabelled = {_sequence(entry, "unlabelled", "a number") for entry in unlabelled}
        self.nonfinite = nonfinite
        self.sweeps = sweeps
        self.sweep_labels = sweep_labels
        self._poses: dict[str, NDArray] = {}
        self._warn_missing = WarnOnce(logger)
        root = Path(data_root) / "dataset" / "sequences"
        if not root.is_dir():
            raise InputError(
                f"{root} is no folder; data_root must hold dataset/sequences/SS/velodyne/*.bin; "
                f"{_WHERE_FROM}"
            )
        super().__init__(
            split=split, data_root=data_root, transform=transform, test_mode=test_mode,
            test_cfg=test_cfg, cache=cache, ignore_index=ignore_index, loop=loop,
        )  # fmt: skip

    def sequence_names(self) -> list[str]:
        """The sequences asked for, each once, in the order given."""
        asked = self.split if self.sequences is None else self.sequences
        asked = [asked] if isinstance(asked, (str, int)) else list(asked)
        names: list[str] = []
        for entry in asked:
            if self.sequences is not None:
                names.append(_sequence(entry, "sequences", "a number"))
            elif entry in SPLITS:
                names += SPLITS[entry]
            else:
                names.append(_sequence(entry, "split", "train, val, test or a sequence"))
        return list(dict.fromkeys(names))

    def get_data_list(self) -> list[str]:
        """Paths of the scans, by sequence and file number."""
        root, paths, names = Path(self.data_root) / "dataset" / "sequences", [], None
        names = self.sequence_names()
        for name in names:
            folder = root / name / "velodyne"
            found = sorted(e.name for e in os.scandir(folder)) if folder.is_dir() else []
            paths += [str(folder / n) for n in found if n.endswith(".bin") and n[0] != "."]
            if self.sequences is not None and not found:
                raise InputError(
                    f"{folder}: no scans; `sequences` asks for {name}, correct it or {_WHERE_FROM}"
                )
        if not paths:
            raise InputError(
                f"no velodyne/*.bin below {root} for sequences {', '.join(names) or 'none'} "
                f"(split {self.split!r}); correct the split or {_WHERE_FROM}"
            )
        if self.scans is not None:
            paths, _ = restrict(
                paths,
                self.scans,
                lambda path: _name(Path(path)),
                lambda name: name.partition("_")[0],
            )
        return paths

    def _path(self, idx: int) -> Path:
        return Path(self.data_list[idx % len(self.data_list)])

    def get_data_name(self, idx: int) -> str:
        """`SS_FFFFFF`."""
        return _name(self._path(idx))

    def label_path(self, idx: int) -> Path:
        """Where the labels of a scan are, or would be."""
        return _label_path(self._path(idx))

    def get_data(self, idx: int) -> dict[str, Any]:
        """One scan: coord (n, 3), strength (n, 1) float32, segment (n,) int32, name; or several, merged."""
        path = self._path(idx)
        if self.sweeps == 1:
            return self._read(path)
        number = _file_number(path)
        past = range(number - 1, max(number - self.sweeps, -1), -1)
        others = [path.with_name(f"{n:0{len(path.stem)}d}.bin") for n in past]
        paths = [path, *(other for other in others if other.is_file())]
        return aggregate(
            [self._read(p) for p in paths], [self._pose(p) for p in paths],
            labels=self.sweep_labels, ignore_index=self.ignore_index,
        )  # fmt: skip

    def _read(self, path: Path) -> dict[str, Any]:
        scan = read_scan(path)
        segment = self._segment(path, len(scan))
        kept = finite_rows(path, scan, drop=self.nonfinite == "drop")
        return {
            "coord": np.ascontiguousarray(scan[kept, :3]),
            "strength": np.ascontiguousarray(scan[kept, 3:]),
            "segment": segment[kept],
            "name": _name(path),
        }

    def _segment(self, scan_path: Path, points: int) -> NDArray:
        path = _label_path(scan_path)
        if path.parent.parent.name in self.unlabelled:
            return np.full(points, self.ignore_index, np.int32)
        if not path.is_file():
            if path.parent.parent.name not in SPLITS["test"]:
                text = "%s is missing: its points, and those of others like it, are ignored"
                self._warn_missing(text, path)
            return np.full(points, self.ignore_index, np.int32)
        with in_file(path):
            segment = map_labels(read_labels(path, points), self.ignore_index)
        keep_some_labels(segment, self.label_fraction, _name(scan_path), self.ignore_index)
        return segment

    def _image(self, idx: int) -> Path:
        path = self._path(idx)
        return path.parent.parent / "image_2" / f"{path.stem}.png"

    def cameras(self, idx: int) -> list[Camera]:
        """The left colour camera; its image tells the size.

        Raises:
            InputError: without the image, and without its rows in `calib.txt`.
        """
        calib = load_calib(self._path(idx).parent.parent / "calib.txt")
        return [kitti_camera(calib, "image_2", *image_size(self._image(idx)))]

    def images(self, idx: int) -> list[NDArray]:
        """The image (h, w, 3) uint8 of that camera, from the colour images of KITTI odometry."""
        return [read_rgb(self._image(idx))]

    def weak_label_files(self, idx: int) -> list[Path]:
        """`weak_labels/NNNNNN.png` of the sequence."""
        path = self._path(idx)
        return [path.parent.parent / "weak_labels" / f"{path.stem}.png"]

    def superpixel_files(self, idx: int, folder: str | None = None) -> list[Path]:
        """`superpixels/NNNNNN.png` of the sequence."""
        path = self._path(idx)
        return [path.parent.parent / (folder or "superpixels") / f"{path.stem}.png"]

    def weak_class_files(self) -> list[Path]:
        """`weak_labels/classes.json` of every sequence."""
        folders = dict.fromkeys(Path(path).parent.parent for path in self.data_list)
        return [folder / "weak_labels" / CLASSES_FILE for folder in folders]

    def write_submission(self, name: str, pred: NDArray, folder: str | os.PathLike[str]) -> None:
        """Write a scan's prediction, one train id per point, as the server takes it; see `submissions`.

        Raises:
            InputError: for a number of predictions that is not that of the scan's points.
        """
        path = self._path(index_of(self, name))
        dropped, merged = self.nonfinite == "drop", self.sweeps > 1
        rows = rows_of_file(pred, read_scan(path), path, dropped, merged, fill=-1)
        write_semantic_kitti(folder, name, rows, LEARNING_MAP_INV)

    def pose_of(self, idx: int) -> NDArray:
        """Velodyne pose (4, 4) float64 of a scan, looked up by its file number.

        Raises:
            InputError: when `poses.txt` has no row of that number.
        """
        return self._pose(self._path(idx))

    def _pose(self, path: Path) -> NDArray:
        folder = path.parent.parent
        if folder.name not in self._poses:
            self._poses[folder.name] = load_poses(folder)
        poses, number = self._poses[folder.name], _file_number(path)
        if number >= len(poses):
            raise InputError(
                f"{folder / 'poses.txt'}: {len(poses)} rows, none for scan {path.name}; "
                "row i belongs to scan i, use the complete file"
            )
        return poses[number]


def _name(path: Path) -> str:
    return f"{path.parent.parent.name}_{path.stem}"


def _label_path(path: Path) -> Path:
    return path.parent.parent / "labels" / f"{path.stem}.label"


def _file_number(path: Path) -> int:
    if not path.stem.isdigit():
        raise InputError(f"{path}: the file name should be a number such as 000012.bin")
    return int(path.stem)
