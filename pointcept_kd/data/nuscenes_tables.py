"""nuScenes' tables: JSON lists of records, joined by tokens, and the official lists of scenes.

https://www.nuscenes.org/nuscenes#data-format; nuscenes-devkit, docs/schema_nuscenes.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from pointcept_kd.host import InputError

LIDAR = "LIDAR_TOP"
CAMERAS = (
    "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT",
)  # fmt: skip

# Numbers of the scenes ("scene-0001" ...) of the official splits, 700, 150 and 150 of them, and of the mini version:
# nuscenes-devkit, python-sdk/nuscenes/utils/splits.py.
_SCENES = {
    "train": "1-2 4-11 19-34 41-76 120-135 138-139 149-152 154-155 157-168 170-185 187-188 190-196 199-200 202-204 "
    "206-214 218-220 222 224-264 283-306 315-318 321 323-324 328 347-386 388-403 405-408 410-459 461-465 467-469 "
    "471-472 474-480 499-502 504-515 517-518 525-539 541-546 566 568 570-578 580 582-600 639-679 681 683-689 695-698 "
    "700-701 703-719 726-728 730-731 733-741 744 746-747 749-752 757-765 767-769 786-787 789-792 803-806 808-813 "
    "815-817 819-822 847-856 858 860-866 868-873 875-878 880 882-903 945 947 949 952-953 955-961 975-984 988-992 "
    "994-1025 1044-1058 1074-1102 1104-1110",
    "val": "3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630 632-638 770-771 "
    "775 777-778 780-784 794-800 802 904-917 919-931 962-963 966-969 971-972 1059-1073",
    "test": "77-91 111-119 140 142-148 265-266 279-282 307-314 333-343 481-498 547-551 601-604 606-624 827-831 "
    "833-842 844-846 932-933 935-943 1026-1043",
    "mini_train": "61 553 655 757 796 1077 1094 1100",
    "mini_val": "103 916",
}

# The official versions: info file to split.
VERSIONS = {
    "v1.0-trainval": {"train": "train", "val": "val"},
    "v1.0-mini": {"train": "mini_train", "val": "mini_val"},
    "v1.0-test": {"test": "test"},
}


def official_scenes(split: str) -> list[str]:
    """Names of the scenes of `train`, `val`, `test`, `mini_train` or `mini_val`."""
    names = []
    for part in _SCENES[split].split():
        first, _, last = part.partition("-")
        names += [f"scene-{n:04d}" for n in range(int(first), int(last or first) + 1)]
    return names


def rotations(quaternions: ArrayLike) -> NDArray:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4) w, x, y, z, which need not be of length one.

    Raises:
        ValueError: for a quaternion of length zero.
    """
    q = np.asarray(quaternions, np.float64)
    length = np.linalg.norm(q, axis=-1, keepdims=True)
    if not (length > 0).all():
        raise ValueError("a quaternion of length zero is no rotation")
    w, x, y, z = np.moveaxis(q / length, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


class Tables:
    """The records of one version by token.

    Args:
        root: folder of the version's JSON files.

    Raises:
        InputError: for tables that are missing or malformed.
    """

    # In this order: what is kept of a table depends on those before it.
    REQUIRED: ClassVar[dict[str, tuple[str, ...]]] = {
        "scene": ("name", "first_sample_token"),
        "sample": ("scene_token", "timestamp"),
        "sensor": ("channel",),
        "calibrated_sensor": ("sensor_token", "translation", "rotation", "camera_intrinsic"),
        "sample_data": (
            "sample_token", "ego_pose_token", "calibrated_sensor_token", "filename", "timestamp",
            "is_key_frame", "prev",
        ),
        "ego_pose": ("translation", "rotation"),
        "sample_annotation": (
            "sample_token", "instance_token", "translation", "size", "rotation", "num_lidar_pts",
            "num_radar_pts", "prev", "next",
        ),
        "instance": ("category_token",),
        "category": ("name",),
    }  # fmt: skip

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows: dict[str, dict[str, dict[str, Any]]] = {}
        self._poses: set[str] = set()
        # Of the 2.6 million records of two tables a quarter is left: no radars, no images between key frames.
        kept = {"sample_data": self._is_of_use, "ego_pose": self._is_referred_to}
        names = tqdm(self.REQUIRED, desc="tables", unit="table")
        for name in names:
            names.set_postfix_str(name)
            self.rows[name] = self._read(name, self.REQUIRED[name], "token", kept.get(name))
        # Made by the lidarseg download; looked up by the scan that is labelled.
        if (root / "lidarseg.json").is_file():
            self.rows["lidarseg"] = self._read("lidarseg", ("filename",), "sample_data_token")

    def _is_of_use(self, data: Mapping[str, Any]) -> bool:
        channel = self.channel(data)
        return channel == LIDAR or (data["is_key_frame"] and channel in CAMERAS)

    def _is_referred_to(self, pose: Mapping[str, Any]) -> bool:
        if not self._poses:
            self._poses = {r["ego_pose_token"] for r in self.rows["sample_data"].values()}
        return pose["token"] in self._poses

    def _read(
        self,
        table: str,
        keys: Iterable[str],
        by: str,
        keep: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> dict[str, dict[str, Any]]:
        path = self.root / f"{table}.json"
        try:
            records = json.loads(path.read_bytes())
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror or error}); the tables are those of the "
                "meta data download"
            ) from error
        except ValueError as error:
            raise InputError(f"{path}: not a JSON file ({error}); copy it again") from error
        if not isinstance(records, list):
            raise InputError(f"{path}: expected a list of records, got a {type(records).__name__}")
        needed = {by, *keys}
        for row, record in enumerate(records):
            if not isinstance(record, dict) or not needed <= record.keys():
                missing = sorted(needed - set(record)) if isinstance(record, dict) else ["all"]
                raise InputError(f"{path}: record {row} has no {', '.join(missing)}; copy it again")
        return {record[by]: record for record in records if keep is None or keep(record)}

    def path(self, table: str) -> Path:
        """The file of a table."""
        return self.root / f"{table}.json"

    def get(self, table: str, token: str, asked: str) -> dict[str, Any]:
        """A record.

        Raises:
            InputError: when there is none; `asked` says who refers to it.
        """
        try:
            return self.rows[table][token]
        except KeyError:
            raise InputError(
                f"{self.path(table)}: no record {token!r}, to which {asked} refers; the tables are "
                "incomplete or of different versions, copy them again"
            ) from None

    def channel(self, data: Mapping[str, Any]) -> str:
        """The sensor that a `sample_data` record is of."""
        calibration = self.get(
            "calibrated_sensor", data["calibrated_sensor_token"], f"sample_data {data['token']}"
        )
        sensor = self.get(
            "sensor", calibration["sensor_token"], f"calibrated_sensor {calibration['token']}"
        )
        return sensor["channel"]
