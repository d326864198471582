"""Waymo Open Dataset, 3D semantic segmentation: frames as folders of arrays, 22 classes.

    data_root/SPLIT/SEQUENCE/TIMESTAMP/coord.npy      (n, 3) metres, vehicle frame
                                      /strength.npy   (n, 1) tanh of the intensity
                                      /segment.npy    (n,) 0..21, -1 without label; not for every frame
                                      /instance.npy   (n,) which object of its class, 0 without; for `instances`
                                      /pose.npy       (4, 4) vehicle to world

SPLIT is training, validation or testing. `tools/prepare_data.py waymo` writes these folders from the official segment
files (see `waymo_convert`); so does Pointcept's preprocessing. Only the points of the TOP laser have labels.

Sun et al., "Scalability in Perception for Autonomous Driving: Waymo Open Dataset", CVPR 2020; https://waymo.com/open.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import DATASETS, InputError, kd, stand_in
from pointcept_kd.host.loader import DefaultDataset

from .scans import NONFINITE, WarnOnce, finite_rows, nonfinite_problems, require_choice
from .sweeps import aggregate

logger = logging.getLogger(__name__)

CLASS_NAMES = (
    "Car", "Truck", "Bus", "Other Vehicle", "Motorcyclist", "Bicyclist", "Pedestrian", "Sign",
    "Traffic Light", "Pole", "Construction Cone", "Bicycle", "Motorcycle", "Building", "Vegetation",
    "Tree Trunk", "Curb", "Road", "Lane Marker", "Other Ground", "Walkable", "Sidewalk",
)  # fmt: skip

# RGB of the train ids; the data set prescribes none. Kin classes look alike.
COLORS = np.array(
    [
        [100, 150, 245], [80, 30, 180], [60, 80, 220], [0, 0, 255], [150, 30, 90], [255, 40, 200],
        [255, 30, 30], [230, 60, 0], [255, 215, 80], [255, 240, 150], [255, 130, 20], [100, 230, 245],
        [30, 60, 150], [255, 200, 0], [0, 175, 0], [135, 60, 0], [200, 120, 200], [255, 0, 255],
        [255, 170, 255], [175, 0, 75], [150, 240, 80], [75, 0, 75],
    ],
    dtype=np.uint8,
)  # fmt: skip

SPLITS = ("training", "validation", "testing")

_WHERE_FROM = (
    "get the segments from https://waymo.com/open and run "
    "python tools/prepare_data.py waymo --raw FOLDER --out DATA_ROOT --split training"
)


def _load(path: Path) -> NDArray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(
            f"{path}: not a readable .npy array ({text}); prepare the frame again"
        ) from error


def _expect(path: Path, array: NDArray, fits: bool, what: str) -> None:
    if not fits:
        raise InputError(
            f"{path}: {array.dtype} of shape {array.shape}, expected {what}; prepare the frame again"
        )


def _is_number(array: NDArray) -> bool:
    return array.dtype.kind in "fiu"


def read_coord(folder: Path) -> NDArray:
    """Coordinates (n, 3) float32 of a frame.

    Raises:
        InputError: for a file that is missing, no array (n, 3) or without points.
    """
    path = folder / "coord.npy"
    array = _load(path)
    fits = array.ndim == 2 and array.shape[1:] == (3,) and len(array) > 0 and _is_number(array)
    _expect(path, array, fits, "numbers (n, 3) with n > 0")
    return array.astype(np.float32)


def read_strength(folder: Path, points: int) -> NDArray:
    """Strength (n, 1) float32 of a frame of `points` points.

    Raises:
        InputError: for a file that is missing or no array of one number per point.
    """
    path = folder / "strength.npy"
    array = _load(path)
    fits = array.shape in ((points,), (points, 1)) and _is_number(array)
    _expect(path, array, fits, f"numbers ({points}, 1) as coord has points")
    return array.astype(np.float32).reshape(-1, 1)


def read_segment(folder: Path, points: int) -> NDArray:
    """Labels (n,) int32 of a frame of `points` points, -1 without label.

    Raises:
        InputError: for a file that is missing, no array of one label per point, or holds other classes.
    """
    path = folder / "segment.npy"
    array = _load(path)
    fits = array.size == points and array.dtype.kind in "iu"
    _expect(path, array, fits, f"integers ({points},) as coord has points")
    array = array.reshape(-1)
    bad = (array < -1) | (array >= len(CLASS_NAMES))
    if bad.any():
        row = int(np.argmax(bad))
        raise InputError(
            f"{path}: class {int(array[row])} in row {row}, expected -1 to {len(CLASS_NAMES) - 1} "
            f"({int(bad.sum())} such points); prepare the frame again"
        )
    return array.astype(np.int32)


def read_pose(folder: Path) -> NDArray:
    """Vehicle pose (4, 4) float64 of a frame.

    Raises:
        InputError: for a file that is missing or no finite rigid motion.
    """
    path = folder / "pose.npy"
    array = _load(path)
    fits = array.shape == (4, 4) and _is_number(array)
    _expect(path, array, fits, "numbers (4, 4), vehicle to world")
    pose = array.astype(np.float64)
    turn = pose[:3, :3]
    rigid = np.isfinite(pose).all() and np.abs(turn @ turn.T - np.eye(3)).max() < 1e-3
    if not rigid or np.abs(pose[3] - [0, 0, 0, 1]).max() > 1e-6:
        raise InputError(f"{path}: no rotation and translation; prepare the frame again")
    return pose


@stand_in(DATASETS, kd.DATASETS, "WaymoDataset")
class WaymoDataset(DefaultDataset):
    """Frames with 22 classes, alone or several merged.

    Args:
        split: `training`, `validation`, `testing`, or a list of these (folders below `data_root`).
        data_root: see the head of this file.
        timestamp: frames to merge, counted from the frame itself among those of its sequence that are there: (0,) is
            the frame alone, (0, -1, -2) adds the two before. The first is 0; frames beyond the ends are left out. A
            merged sample also has `sweep` (n,), 0 for the frame itself, whose points come first.
        reference_label: keep the labels of merged frames; False makes them `ignore_index`, so that evaluation counts
            each point of a frame once (predictions cover all merged points).
        timing_embedding: add a second column to `strength`: the entry of `timestamp` that a point came with.
        labelled_only: take only frames with `segment.npy` as samples; the others are still merged into them.
        nonfinite: what to do with NaN or infinite values: `error`, or `drop` those points.
        transform, test_mode, test_cfg, cache, ignore_index, loop: see `DefaultDataset`.

    A frame without `segment.npy` is all `ignore_index`.

    Raises:
        InputError: for folders and files that cannot be used; the text names the file.
    """

    def __init__(
        self,
        timestamp: Sequence[int] = (0,),
        reference_label: bool = True,
        timing_embedding: bool = False,
        split: str | Sequence[str] = "training",
        data_root: str = "data/waymo",
        transform: Sequence[Mapping[str, Any]] | None = None,
        test_mode: bool = False,
        test_cfg: Mapping[str, Any] | None = None,
        cache: bool | str = False,
        ignore_index: int = -1,
        loop: int = 1,
        labelled_only: bool = False,
        nonfinite: str = "error",
    ) -> None:
        self.timestamp = _steps(timestamp)
        require_choice("nonfinite", nonfinite, NONFINITE)
        self.reference_label = reference_label
        self.timing_embedding = timing_embedding
        self.labelled_only = labelled_only
        self.nonfinite = nonfinite
        self._warn_missing = WarnOnce(logger)
        if not Path(data_root).is_dir():
            raise InputError(f"data_root {data_root} is no folder; {_WHERE_FROM}")
        super().__init__(
            split=split, data_root=data_root, transform=transform, test_mode=test_mode,
            test_cfg=test_cfg, cache=cache, ignore_index=ignore_index, loop=loop,
        )  # fmt: skip

    def get_data_list(self) -> list[str]:
        """Folders of the frames, by split, sequence and timestamp."""
        asked = [self.split] if isinstance(self.split, str) else list(self.split)
        self._frames: list[str] = []
        for split in dict.fromkeys(asked):
            folder = Path(self.data_root) / split
            if not folder.is_dir():
                raise InputError(
                    f"split {split!r}: {folder} is no folder; correct the split or {_WHERE_FROM}"
                )
            self._frames += [str(frame) for frame in _frame_folders(folder)]
        if not self._frames:
            raise InputError(
                f"no SEQUENCE/TIMESTAMP folders below {self.data_root} for split {self.split!r}; "
                f"{_WHERE_FROM}"
            )
        self._position = {frame: i for i, frame in enumerate(self._frames)}
        if not self.labelled_only:
            return list(self._frames)
        labelled = [f for f in self._frames if os.path.isfile(os.path.join(f, "segment.npy"))]
        if not labelled:
            raise InputError(
                f"labelled_only: none of {len(self._frames)} frames of split {self.split!r} has "
                "segment.npy; set labelled_only=False, or prepare frames that have labels"
            )
        return labelled

    def _path(self, idx: int) -> Path:
        return Path(self.data_list[idx % len(self.data_list)])

    def get_data_name(self, idx: int) -> str:
        """`SEQUENCE_TIMESTAMP`."""
        return _name(self._path(idx))

    def get_data(self, idx: int) -> dict[str, Any]:
        """One frame: coord (n, 3), strength (n, 1) float32, segment (n,) int32, name, pose; or several, merged."""
        frame = self._path(idx)
        if len(self.timestamp) == 1:
            return self._read(frame, 0)
        scans = [self._read(path, step) for step, path in self._neighbours(frame)]
        poses = [scan["pose"] for scan in scans]
        labels = "all" if self.reference_label else "reference"
        return aggregate(scans, poses, labels=labels, ignore_index=self.ignore_index)

    def _neighbours(self, frame: Path) -> Iterator[tuple[int, Path]]:
        position = self._position[str(frame)]
        for step in self.timestamp:
            there = position + step
            if 0 <= there < len(self._frames):
                other = Path(self._frames[there])
                if other.parent == frame.parent:
                    yield step, other

    def _read(self, folder: Path, step: int) -> dict[str, Any]:
        coord = read_coord(folder)
        strength, segment = read_strength(folder, len(coord)), self._segment(folder, len(coord))
        remedy = "prepare its coord.npy and strength.npy again or set nonfinite='drop'"
        values = np.hstack([coord, strength])
        kept = finite_rows(folder, values, drop=self.nonfinite == "drop", remedy=remedy)
        coord, strength, segment = coord[kept], strength[kept], segment[kept]
        if self.timing_embedding:
            strength = np.hstack([strength, np.full_like(strength, step)])
        data = {"coord": coord, "strength": strength, "segment": segment, "name": _name(folder)}
        # A frame that stands alone needs no pose.
        if len(self.timestamp) > 1 or (folder / "pose.npy").is_file():
            data["pose"] = read_pose(folder)
        return data

    def _segment(self, folder: Path, points: int) -> NDArray:
        path = folder / "segment.npy"
        if path.is_file():
            segment = read_segment(folder, points)
            segment[segment < 0] = self.ignore_index
            return segment
        if folder.parent.parent.name != "testing":
            text = "%s is missing: the points of this frame, and those of others like it, are ignored; %s"
            self._warn_missing(text, path, "labelled_only=True takes frames with labels only")
        return np.full(points, self.ignore_index, np.int32)


def _steps(timestamp: Sequence[int]) -> tuple[int, ...]:
    steps = tuple(timestamp) if isinstance(timestamp, Sequence) else ()
    whole = all(isinstance(step, int) and not isinstance(step, bool) for step in steps)
    if not steps or not whole or steps[0] != 0 or len(set(steps)) != len(steps):
        raise InputError(
            f"timestamp={timestamp!r}: expected different whole numbers, the first 0, such as (0, -1, -2)"
        )
    return steps


def _name(frame: Path) -> str:
    return f"{frame.parent.name}_{frame.name}"


def _subfolders(folder: Path) -> list[Path]:
    return sorted(Path(e.path) for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")


def _frame_folders(split: Path) -> list[Path]:
    return [frame for sequence in _subfolders(split) for frame in _subfolders(sequence)]


def problems(data_root: str | os.PathLike[str]) -> Iterator[tuple[Path, list[str]]]:
    """Read every frame below `data_root`.

    Yields:
        each frame's folder with its problems (one line each; none: an empty list).

    Raises:
        InputError: when there is none.
    """
    root, found = Path(data_root), False
    for split in SPLITS:
        folder = root / split
        for frame in _frame_folders(folder) if folder.is_dir() else ():
            found = True
            yield frame, _frame_problems(frame)
    if not found:
        raise InputError(f"{root}: no SPLIT/SEQUENCE/TIMESTAMP/coord.npy; {_WHERE_FROM}")


def _frame_problems(frame: Path) -> list[str]:
    try:
        coord = read_coord(frame)
    except InputError as error:
        return [str(error)]
    lines = nonfinite_problems(frame / "coord.npy", coord)
    try:
        lines += nonfinite_problems(frame / "strength.npy", read_strength(frame, len(coord)))
    except InputError as error:
        lines.append(str(error))
    try:
        # No labels is no problem: such frames are there to be merged into labelled ones.
        if (frame / "segment.npy").is_file():
            read_segment(frame, len(coord))
    except InputError as error:
        lines.append(str(error))
    try:
        read_pose(frame)
    except InputError as error:
        lines.append(str(error))
    return lines
