"""nuScenes: key frames with 16 classes, their cameras and boxes.

    data_root/info/nuscenes_infos_10sweeps_{train,val,test}.pkl   what belongs together (see `nuscenes_info`)
             /raw/samples/LIDAR_TOP/*.pcd.bin                     float32 x, y, z, intensity (0..255), ring
                 /sweeps/LIDAR_TOP/*.pcd.bin                      the scans between key frames
                 /samples/CAM_*/*.jpg; where they were made, /camseg/CAM_*/*.png and /camseg/classes.json, weak
                  labels (see `image_maps`), and /superpixels_slic/TOKEN.png, by the image's record
                 /lidarseg/v1.0-trainval/*_lidarseg.bin           uint8 class per point, 0..31

Caesar et al., "nuScenes", CVPR 2020; Fong et al., "Panoptic nuScenes", RA-L 2022; https://www.nuscenes.org.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import DATASETS, InputError, kd, stand_in
from pointcept_kd.host.loader import DefaultDataset

from .camera import Camera, image_size, read_rgb
from .fractions import restrict
from .image_maps import CLASSES_FILE, ImageMapReader
from .nuscenes_files import (
    CLASS_NAMES,
    COLORS,
    LEARNING_MAP,
    find_file,
    map_labels,
    read_infos,
    read_labels,
    read_scan,
)
from .scans import (
    NONFINITE,
    WarnOnce,
    finite_rows,
    in_file,
    keep_some_labels,
    nonfinite_problems,
    require_choice,
)
from .submission_writers import finish_nuscenes, index_of, rows_of_file, write_nuscenes
from .sweeps import aggregate

__all__ = ["CLASS_NAMES", "COLORS", "LEARNING_MAP", "NuScenesDataset", "problems"]

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
IMAGE_SIZE = (1600, 900)


@stand_in(DATASETS, kd.DATASETS, "NuScenesDataset")
class NuScenesDataset(ImageMapReader, DefaultDataset):
    """Key frames with 16 classes; strength is intensity / 255, a name is the token of the LiDAR record.

    Args:
        split: `train`, `val`, `test`, or a list of these.
        data_root: the folder that holds `info` and `raw`.
        sweeps: which info file to read: that prepared with so many sweeps.
        aggregate_sweeps: how many scans before the key frame are merged into it, as far as the info file knows them;
            their points have no labels. A sample then also has `sweep` (n,), 0 for the key frame, whose points come
            first, and `time` (n, 1), seconds before the key frame.
        remove_close: metres; points of the merged scans with |x| and |y| below it, in their own frame, are the car
            that carries the sensor, and left out. Those of the key frame stay: they have labels.
        nonfinite: what to do with NaN or infinite values: `error`, or `drop` those points.
        label_fraction: share of a key frame's points whose labels are kept, 0 to 1; the same points in every run.
        scenes: a file of the scenes to read, `scene-0001` a line (see `fractions`); all others are passed over, and so
            are names without a key frame in the info files, with a warning.
        transform, test_mode, test_cfg, cache, ignore_index, loop: see `DefaultDataset`.

    A scan without labels (all of `test`) is all `ignore_index`.

    Raises:
        InputError: for folders, files and labels that cannot be used; the text names the file.
    """

    def __init__(
        self,
        split: str | Sequence[str] = "train",
        data_root: str = "data/nuscenes",
        transform: Sequence[Mapping[str, Any]] | None = None,
        test_mode: bool = False,
        test_cfg: Mapping[str, Any] | None = None,
        cache: bool | str = False,
        ignore_index: int = -1,
        loop: int = 1,
        sweeps: int = 10,
        aggregate_sweeps: int = 0,
        remove_close: float = 0.0,
        nonfinite: str = "error",
        label_fraction: float = 1.0,
        scenes: str | None = None,
    ) -> None:
        require_choice("nonfinite", nonfinite, NONFINITE)
        for key, value, least in (("sweeps", sweeps, 1), ("aggregate_sweeps", aggregate_sweeps, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{key}={value!r}: expected a whole number, {least} or more")
        if aggregate_sweeps >= sweeps:
            raise InputError(
                f"aggregate_sweeps={aggregate_sweeps}: info files of {sweeps} sweeps know "
                f"{sweeps - 1} scans before a key frame; ask for fewer, or prepare more sweeps"
            )
        if isinstance(remove_close, bool) or not 0 <= remove_close < math.inf:
            raise InputError(f"remove_close={remove_close!r}: expected metres, 0 or more")
        if not 0 <= label_fraction <= 1:
            raise InputError(f"label_fraction={label_fraction}: expected a number from 0 to 1")
        self.sweeps = sweeps
        self.label_fraction = label_fraction
        self.remove_close = remove_close
        self.aggregate_sweeps = aggregate_sweeps
        self.nonfinite = nonfinite
        self.scenes = scenes
        self.raw = Path(data_root) / "raw"
        self._warn_missing = WarnOnce(logger)
        super().__init__(
            split=split, data_root=data_root, transform=transform, test_mode=test_mode,
            test_cfg=test_cfg, cache=cache, ignore_index=ignore_index, loop=loop,
        )  # fmt: skip

    def info_path(self, split: str) -> Path:
        """The info file of a split."""
        if split not in SPLITS:
            raise InputError(
                f"split {split!r} is unknown; use {', '.join(SPLITS)} or a list of these"
            )
        return Path(self.data_root) / "info" / f"nuscenes_infos_{self.sweeps}sweeps_{split}.pkl"

    def get_data_list(self) -> list[dict[str, Any]]:
        """The entries of the info files of all splits asked for."""
        entries: list[dict[str, Any]] = []
        for split in [self.split] if isinstance(self.split, str) else self.split:
            path = self.info_path(split)
            if not path.is_file():
                there = sorted(p.name for p in path.parent.glob("*.pkl"))
                raise InputError(
                    f"{path} is missing (there {'are ' + ', '.join(there) if there else 'is none'}); "
                    "set sweeps and split, or make it: python tools/prepare_data.py nuscenes-info "
                    f"--data-root {self.raw} --version v1.0-trainval --sweeps {self.sweeps} "
                    f"--out {self.data_root}"
                )
            entries += read_infos(path)
        if self.scenes is None:
            return entries
        unnamed = sum("scene_name" not in entry for entry in entries)
        if unnamed:
            raise InputError(
                f"scenes={self.scenes}: {unnamed} of {len(entries)} entries of {self.info_path('train').parent} do not "
                "say which scene they are of; make the info files again with tools/prepare_data.py nuscenes-info"
            )
        kept, absent = restrict(entries, self.scenes, lambda e: e["scene_name"], lambda name: name)
        if absent:
            logger.warning("%s: %d of its scenes are not in the info files", self.scenes, absent)
        return kept

    def info(self, idx: int) -> dict[str, Any]:
        """The info entry of a sample."""
        return self.data_list[idx % len(self.data_list)]

    def get_data_name(self, idx: int) -> str:
        """Token of the key frame's LiDAR record."""
        return self.info(idx)["lidar_token"]

    def scan_path(self, idx: int) -> Path:
        """Where the key frame's points are."""
        return find_file(self.raw, self.info(idx)["lidar_path"])

    def label_path(self, idx: int) -> Path | None:
        """Where the labels of a key frame are, or should be; None for one that has none."""
        path = self.info(idx).get("gt_segment_path")
        return None if path is None else find_file(self.raw, path)

    def get_data(self, idx: int) -> dict[str, Any]:
        """One key frame: coord (n, 3), strength (n, 1) float32, segment (n,) int32, name; or merged with past scans."""
        path = self.scan_path(idx)
        scan = read_scan(path)
        segment = self._segment(idx, len(scan))
        frame = self._cleaned(path, scan, segment)
        frame["name"] = self.get_data_name(idx)
        if not self.aggregate_sweeps:
            return frame
        parts, moves = [{**frame, "time": 0.0}], [np.eye(4)]
        for sweep in self._past(idx):
            path = find_file(self.raw, sweep["lidar_path"])
            scan = read_scan(path)
            scan = scan[~(np.abs(scan[:, :2]) < self.remove_close).all(1)]
            part = self._cleaned(path, scan, np.full(len(scan), self.ignore_index, np.int32))
            parts.append({**part, "time": float(sweep["time_lag"])})
            moves.append(np.asarray(sweep["transform_matrix"], np.float64))
        return aggregate(parts, moves, labels="reference", ignore_index=self.ignore_index)

    def _past(self, idx: int) -> list[dict[str, Any]]:
        """The scans to merge, newest first. Info files fill up the start of a scene with repetitions: none of these."""
        info = self.info(idx)
        found: dict[str, dict[str, Any]] = {}
        for row, sweep in enumerate(info.get("sweeps", ())):
            missing = {"lidar_path", "transform_matrix", "time_lag"} - set(sweep)
            if missing:
                raise InputError(
                    f"sweep {row} of {info['lidar_token']} has no {', '.join(sorted(missing))}; make "
                    "the info file again with tools/prepare_data.py nuscenes-info"
                )
            if sweep["transform_matrix"] is not None:
                found.setdefault(sweep["lidar_path"], sweep)
        return list(found.values())[: self.aggregate_sweeps]

    def _cleaned(self, path: Path, scan: NDArray, segment: NDArray) -> dict[str, Any]:
        kept = finite_rows(path, scan, drop=self.nonfinite == "drop")
        return {
            "coord": np.ascontiguousarray(scan[kept, :3]),
            "strength": scan[kept, 3:4] / np.float32(255),
            "segment": segment[kept],
        }

    def _segment(self, idx: int, points: int) -> NDArray:
        path = self.label_path(idx)
        if path is None or not path.is_file():
            if self.split != "test":
                text = "%s has no labels (%s): its points, and those of others like it, are ignored"
                self._warn_missing(text, self.get_data_name(idx), path or "no gt_segment_path")
            return np.full(points, self.ignore_index, np.int32)
        with in_file(path):
            segment = map_labels(read_labels(path, points), self.ignore_index)
        keep_some_labels(segment, self.label_fraction, self.get_data_name(idx), self.ignore_index)
        return segment

    def pose_of(self, idx: int) -> NDArray:
        """LiDAR to world (4, 4) float64 at the time of the key frame.

        Raises:
            InputError: when the info file has no poses.
        """
        info = self.info(idx)
        try:
            to_lidar = np.asarray(info["ref_from_car"], float) @ np.asarray(
                info["car_from_global"], float
            )
            return np.linalg.inv(to_lidar)
        except (KeyError, ValueError, np.linalg.LinAlgError) as error:
            raise InputError(
                f"{info['lidar_token']}: no usable ref_from_car and car_from_global in the info file "
                f"({error}); make it again with tools/prepare_data.py nuscenes-info"
            ) from error

    def write_submission(self, name: str, pred: NDArray, folder: str | os.PathLike[str]) -> None:
        """Write a key frame's prediction, one train id per point, as the server takes it; see `submissions`.

        Raises:
            InputError: for a number of predictions that is not that of the points, or a reader of several splits.
        """
        path = self.scan_path(index_of(self, name))
        # The format has no class for a point without a place: it gets the commonest of its scan.
        fill = int(np.bincount(pred).argmax()) if len(pred) and pred.min() >= 0 else 0
        dropped, merged = self.nonfinite == "drop", self.aggregate_sweeps > 0
        rows = rows_of_file(pred, read_scan(path), path, dropped, merged, fill)
        write_nuscenes(folder, self._one_split(), name, rows)

    def finish_submission(self, folder: str | os.PathLike[str], use_camera: bool = False) -> None:
        """Write the `submission.json` of a method that uses LiDAR, and cameras where it says so."""
        finish_nuscenes(folder, self._one_split(), {"use_camera": use_camera})

    def _one_split(self) -> str:
        if not isinstance(self.split, str):
            raise InputError(
                f"a submission is for one split, this reader has {list(self.split)}; test them one by one"
            )
        return self.split

    def _cams(self, idx: int) -> dict[str, Any]:
        info = self.info(idx)
        cams = info.get("cams")
        if not cams:
            raise InputError(
                f"{info['lidar_token']}: its info file was prepared without cameras; make it again "
                "with tools/prepare_data.py nuscenes-info --with-camera"
            )
        return cams

    def cameras(self, idx: int) -> list[Camera]:
        """The cameras of a key frame; the motion between the times of LiDAR and camera is part of their place."""
        cameras = []
        for name, cam in self._cams(idx).items():
            try:
                place = np.eye(4)
                place[:3, :3] = cam["sensor2lidar_rotation"]
                place[:3, 3] = cam["sensor2lidar_translation"]
                path, intrinsics = find_file(self.raw, cam["data_path"]), cam["camera_intrinsics"]
                place = np.linalg.inv(place)
            except (KeyError, TypeError, ValueError, np.linalg.LinAlgError) as error:
                raise InputError(
                    f"{name} of {self.get_data_name(idx)}: cannot be used ({error!r}); make the info "
                    "file again with tools/prepare_data.py nuscenes-info --with-camera"
                ) from error
            # All images of nuScenes are of one size: geometry alone needs no image files.
            size = image_size(path) if path.is_file() else IMAGE_SIZE
            cameras.append(Camera(name, intrinsics, place, *size))
        return cameras

    def images(self, idx: int) -> list[NDArray]:
        """The images (h, w, 3) uint8 of a key frame, in the order of `cameras`."""
        return [read_rgb(find_file(self.raw, cam["data_path"])) for cam in self._cams(idx).values()]

    def weak_label_files(self, idx: int) -> list[Path]:
        """The images' paths with `camseg` in place of `samples`, and `.png` at the end."""
        return [self._weak_file(cam["data_path"]) for cam in self._cams(idx).values()]

    def _weak_file(self, image: str) -> Path:
        # From the end: the folders above may have `samples` in their names too.
        parts = Path(image).parts
        starts = [row for row in range(len(parts) - 1) if parts[row] == "samples"]
        if not starts:
            raise InputError(f"{image}: weak labels are looked for where images are below samples/")
        return (self.raw / "camseg" / Path(*parts[starts[-1] + 1 :])).with_suffix(".png")

    def superpixel_files(self, idx: int, folder: str | None = None) -> list[Path]:
        """`superpixels_slic/TOKEN.png` with the tokens of the images' records."""
        tokens = {name: cam.get("sample_data_token") for name, cam in self._cams(idx).items()}
        for name, token in tokens.items():
            if not token:
                raise InputError(
                    f"{name} of {self.get_data_name(idx)}: no sample_data_token in the info file; make it "
                    "again with tools/prepare_data.py nuscenes-info --with-camera"
                )
        place = self.raw / (folder or "superpixels_slic")
        return [place / f"{token}.png" for token in tokens.values()]

    def weak_class_files(self) -> list[Path]:
        """`camseg/classes.json`."""
        return [self.raw / "camseg" / CLASSES_FILE]

    def weak_class_file(self, path: Path) -> Path:
        """`camseg/classes.json`."""
        return self.raw / "camseg" / CLASSES_FILE

    def boxes(self, idx: int) -> dict[str, Any]:
        """Objects of a key frame in the LiDAR's frame.

        Returns: boxes (m, 7) float64 x, y, z, l, w, h, yaw; names (m,) str; velocity (m, 3) float64 m/s, NaN where
            unknown; counts (m,) int64 of points, by the annotators. Objects without LiDAR and radar returns are not in.
        """
        info = self.info(idx)
        if "gt_boxes" not in info:
            raise InputError(
                f"{info['lidar_token']}: the info file has no gt_boxes; those of test have none"
            )
        boxes = np.asarray(info["gt_boxes"], np.float64).reshape(-1, 9)
        return {
            "boxes": boxes[:, :7],
            "names": np.asarray(info["gt_names"], str),
            "velocity": np.asarray(info["gt_boxes_velocity"], np.float64).reshape(-1, 3),
            "counts": np.asarray(info["num_lidar_pts"], np.int64).reshape(-1),
        }


def problems(data_root: str | os.PathLike[str]) -> Iterator[tuple[Path, list[str]]]:
    """Read every info file below `data_root/info` and every key frame that one names.

    Yields:
        each scan, then each info file, with its problems (one line each; none: an empty list). Images, and scans
        between key frames, are looked for only where their folder exists.

    Raises:
        InputError: when there is no info file.
    """
    root = Path(data_root)
    raw, paths = root / "raw", sorted((root / "info").glob("[!.]*.pkl"))
    if not paths:
        raise InputError(
            f"{root / 'info'}: no *.pkl; make them with python tools/prepare_data.py nuscenes-info"
        )
    seen: set[Path] = set()
    for path in paths:
        try:
            infos = read_infos(path)
        except InputError as error:
            yield path, [str(error)]
            continue
        missing: dict[str, dict[Path, None]] = {}
        for info in infos:
            scan = find_file(raw, info["lidar_path"])
            if scan not in seen:
                seen.add(scan)
                yield scan, _scan_problems(raw, scan, info, labelled="test" not in path.stem)
        for info in infos:
            for kind, file in _others(raw, info):
                if file not in seen and not file.is_file():
                    missing.setdefault(kind, {})[file] = None
        yield (
            path,
            [
                f"{path}: {len(files)} files of {kind} are missing, the first is {next(iter(files))}"
                for kind, files in missing.items()
            ],
        )


def _others(raw: Path, info: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    if (raw / "sweeps").is_dir():
        for sweep in info.get("sweeps", ()):
            yield "sweeps", find_file(raw, sweep["lidar_path"])
    for name, cam in info.get("cams", {}).items():
        if (raw / "samples" / name).is_dir():
            yield name, find_file(raw, cam["data_path"])


def _scan_problems(raw: Path, path: Path, info: Mapping[str, Any], labelled: bool) -> list[str]:
    found, points = [], None
    try:
        scan = read_scan(path)
        points = len(scan)
        found += nonfinite_problems(path, scan)
    except InputError as error:
        found.append(str(error))
    if "gt_segment_path" in info:
        label = find_file(raw, info["gt_segment_path"])
        try:
            with in_file(label):
                map_labels(read_labels(label, points))
        except InputError as error:
            found.append(str(error))
    elif labelled:
        found.append(f"{path}: its info entry has no gt_segment_path; its points would be ignored")
    return found
