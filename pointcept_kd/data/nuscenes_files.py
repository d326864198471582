"""nuScenes' files: scans, lidarseg labels, info files; classes and colours."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import InputError

from .safe_pickle import load_plain
from .scans import class_table, map_classes, read_points, read_values

CLASS_NAMES = (
    "barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle", "pedestrian",
    "traffic_cone", "trailer", "truck", "driveable_surface", "other_flat", "sidewalk", "terrain",
    "manmade", "vegetation",
)  # fmt: skip

# Raw lidarseg class to train id; -1 is ignored.
LEARNING_MAP = {
    0: -1, 1: -1, 2: 6, 3: 6, 4: 6, 5: -1, 6: 6, 7: -1, 8: -1, 9: 0, 10: -1, 11: -1, 12: 7, 13: -1,
    14: 1, 15: 2, 16: 2, 17: 3, 18: 4, 19: -1, 20: -1, 21: 5, 22: 8, 23: 9, 24: 10, 25: 11, 26: 12,
    27: 13, 28: 14, 29: -1, 30: 15, 31: -1,
}  # fmt: skip

# RGB of the train ids, as the dataset's own tools paint them.
COLORS = np.array(
    [
        [112, 128, 144], [220, 20, 60], [255, 127, 80], [255, 158, 0], [233, 150, 70],
        [255, 61, 99], [0, 0, 230], [47, 79, 79], [255, 140, 0], [255, 99, 71], [0, 207, 191],
        [175, 0, 75], [75, 0, 75], [112, 180, 60], [222, 184, 135], [0, 175, 0],
    ],
    dtype=np.uint8,
)  # fmt: skip

_TABLE = class_table(LEARNING_MAP, 1 << 8)

# Folders below raw/: a path of another machine is found again by what begins with one of them.
_TOP = ("samples", "sweeps", "lidarseg")


def map_labels(raw: NDArray, ignore_index: int = -1) -> NDArray:
    """Raw lidarseg classes (n,) uint8 to train ids (n,) int32.

    Raises:
        ValueError: for class ids above 31; the text names the first.
    """
    ids = np.asarray(raw, np.uint8)
    return map_classes(ids, _TABLE, "one of nuScenes-lidarseg's 0 to 31", ignore_index)


def read_scan(path: str | os.PathLike[str]) -> NDArray:
    """Points (n, 5) float32: x, y, z in metres, intensity 0 to 255, ring. Non-finite values are left in.

    Raises:
        InputError: for a file that cannot be read, is cut off or holds no point.
    """
    return read_points(path, 5, "nuScenes scan")


def read_labels(path: str | os.PathLike[str], points: int | None = None) -> NDArray:
    """Raw lidarseg classes (n,) uint8.

    Raises:
        InputError: for a file that cannot be read, or whose length is not that of the scan.
    """
    return read_values(path, np.uint8, points)


def read_infos(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The entries of an info file: a list of dicts, or a dict whose `infos` is one.

    Raises:
        InputError: for a file that cannot be read, or entries without `lidar_path` and `lidar_token`.
    """
    content = load_plain(path)
    infos = content.get("infos") if isinstance(content, Mapping) else content
    if not isinstance(infos, (list, tuple)):
        kind = f"keys {', '.join(map(str, content))}" if isinstance(content, Mapping) else "content"
        raise InputError(
            f"{path}: expected a list of entries, or one below the key infos, got a "
            f"{type(content).__name__} ({kind}); make it with tools/prepare_data.py nuscenes-info"
        )
    for row, info in enumerate(infos):
        missing = [
            key
            for key in ("lidar_path", "lidar_token")
            if not (isinstance(info, Mapping) and isinstance(info.get(key), str))
        ]
        if missing:
            found = ", ".join(map(str, info)) if isinstance(info, Mapping) else repr(info)[:60]
            raise InputError(
                f"{path}: entry {row} has no {' and '.join(missing)} but {found}; it is an info file "
                "of another program, make one with tools/prepare_data.py nuscenes-info"
            )
    return list(infos)


def find_file(raw: Path, path: str) -> Path:
    """A file named by an info entry: absolute, or relative to `raw`.

    Paths of another machine or working folder are looked up below `raw` by their part from `samples`, `sweeps` or
    `lidarseg` on.
    """
    named = raw / path
    if not named.exists():
        parts = Path(path).parts
        for row in range(len(parts) - 1):
            if parts[row] in _TOP and (raw / Path(*parts[row:])).exists():
                return raw / Path(*parts[row:])
    return named
