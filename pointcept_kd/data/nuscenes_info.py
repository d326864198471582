"""nuScenes' tables as the info files that readers use: one entry per key frame, with all that belongs to it.

Entries have the keys and conventions that Pointcept reads:

    lidar_path, lidar_token, token, timestamp (s)          the key frame; paths relative to the data's folder
    scene_name, scene_token                                its scene; ours alone
    ref_from_car, car_from_global                          (4, 4), at the time of the LiDAR
    sweeps                                                 scans before it, newest first, `transform_matrix` (4, 4) into
                                                           its frame, `time_lag` (s); at the start of a scene the oldest
                                                           is repeated, a scene's first scan with a matrix None
    cam_front_path, cam_intrinsic                          the camera ahead
    cams                                                   by channel: `sensor2lidar_rotation` R and `_translation` t:
                                                           x_lidar = R x_camera + t; `camera_intrinsics` (3, 3)
    gt_boxes (m, 9)                                        x, y, z, l, w, h, yaw, vx, vy in the LiDAR's frame
    gt_boxes_velocity (m, 3), gt_names, gt_boxes_token, num_lidar_pts, num_radar_pts
    gt_segment_path                                        the lidarseg labels
"""

from __future__ import annotations

import json
import os
import pickle
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pointcept_kd.host import InputError

from .nuscenes_tables import CAMERAS, LIDAR, VERSIONS, Tables, official_scenes, rotations

# The ten classes of the detection task; all other categories are "ignore".
DETECTION_NAMES = {
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "movable_object.barrier": "barrier",
    "movable_object.trafficcone": "traffic_cone",
    "vehicle.bicycle": "bicycle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.car": "car",
    "vehicle.construction": "construction_vehicle",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.trailer": "trailer",
    "vehicle.truck": "truck",
}


@dataclass
class Report:
    """What was written, and what was left out."""

    files: dict[Path, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Writer:
    """Makes the entries of one version.

    Args:
        data_root: the folder with `samples`, `sweeps` and the folder of tables.
        version: that folder's name.
        sweeps: an entry knows `sweeps - 1` scans before its key frame.
        with_camera: add `cams`.
    """

    def __init__(self, data_root: Path, version: str, sweeps: int, with_camera: bool) -> None:
        root = data_root / version
        if not root.is_dir():
            there = sorted(p.name for p in data_root.glob("v*") if p.is_dir())
            raise InputError(
                f"{root} is no folder; below {data_root} there "
                f"{'are ' + ', '.join(there) if there else 'are no tables'}: correct --data-root or "
                "--version"
            )
        self.data_root, self.version = data_root, version
        self.sweeps, self.with_camera = sweeps, with_camera
        self.tables = tables = Tables(root)
        self.data: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        for record in tables.rows["sample_data"].values():
            if record["is_key_frame"]:
                self.data[record["sample_token"]][tables.channel(record)] = record
        self.boxes: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in tables.rows["sample_annotation"].values():
            self.boxes[record["sample_token"]].append(record)
        self.has_cameras = any(r["channel"] == CAMERAS[0] for r in tables.rows["sensor"].values())
        if with_camera and not self.has_cameras:
            raise InputError(
                f"{tables.path('sensor')}: no {CAMERAS[0]}; this version has no cameras, "
                "leave out --with-camera"
            )
        self._places: dict[tuple[str, str], NDArray] = {}

    def splits(self) -> tuple[dict[str, set[str]], list[str]]:
        """Tokens of the scenes of each info file, and remarks.

        Raises:
            InputError: for scenes of unknown names, or none whose scans are there.
        """
        scenes = {record["name"]: token for token, record in self.tables.rows["scene"].items()}
        names, notes = self._split_names(sorted(scenes)), []
        listed = {name for members in names.values() for name in members}
        left = sorted(set(scenes) - listed)
        if left and self.version in VERSIONS:
            raise InputError(
                f"{self.tables.path('scene')}: {left[0]!r} is no scene of {self.version} "
                f"({len(left)} such scenes); correct --version"
            )
        if left:
            notes.append(f"{len(left)} scenes are in no split, the first is {left[0]}")
        present = {name for name in scenes if name in listed and self._is_there(scenes[name])}
        absent = sorted(listed & set(scenes) - present)
        if not present:
            raise InputError(
                f"{self.data_root}: none of the {len(scenes)} scenes of {self.version} has its first "
                "LiDAR scan there; unpack the sensor files beside the tables"
            )
        if absent:
            notes.append(f"{len(absent)} scenes have no LiDAR scans here, the first is {absent[0]}")
        return {s: {scenes[n] for n in m if n in present} for s, m in names.items()}, notes

    def _split_names(self, scenes: list[str]) -> dict[str, list[str]]:
        if self.version in VERSIONS:
            return {name: official_scenes(split) for name, split in VERSIONS[self.version].items()}
        path = self.tables.root / "splits.json"
        if not path.is_file():
            return {"train": scenes}
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise InputError(f"{path}: not a JSON file ({error})") from error
        if not isinstance(content, dict) or not all(
            isinstance(members, list) for members in content.values()
        ):
            raise InputError(f"{path}: expected a dict of split to a list of scene names")
        seen: dict[str, str] = {}
        for split, members in content.items():
            if split not in ("train", "val", "test"):
                raise InputError(f"{path}: split {split!r}; use train, val and test")
            for name in members:
                if name not in scenes:
                    raise InputError(
                        f"{path}: {split} lists {name!r}, which is no scene of the tables"
                    )
                if name in seen:
                    raise InputError(f"{path}: {name!r} is in {seen[name]} and in {split}")
                seen[name] = split
        return content

    def _is_there(self, token: str) -> bool:
        scene = self.tables.rows["scene"][token]
        sample = self.tables.get("sample", scene["first_sample_token"], f"scene {token}")
        return (self.data_root / self._record(sample["token"], LIDAR)["filename"]).is_file()

    def _record(self, sample: str, channel: str) -> dict[str, Any]:
        try:
            return self.data[sample][channel]
        except KeyError:
            raise InputError(
                f"{self.tables.path('sample_data')}: sample {sample!r} has no key frame of {channel}; "
                "the tables are incomplete, copy them again"
            ) from None

    def _place(self, table: str, token: str, asked: str) -> NDArray:
        """A sensor on the car, or the car in the world: (4, 4). Kept, so that entries share it."""
        if (table, token) not in self._places:
            record, place = self.tables.get(table, token, asked), np.eye(4)
            try:
                place[:3, :3] = rotations(record["rotation"])
                place[:3, 3] = record["translation"]
                if not np.isfinite(place).all():
                    raise ValueError("a value is not finite")
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"{self.tables.path(table)}: record {token!r}: rotation {record['rotation']} and "
                    f"translation {record['translation']} cannot be used ({error})"
                ) from error
            self._places[table, token] = place
        return self._places[table, token]

    def _places_of(self, data: Mapping[str, Any]) -> tuple[NDArray, NDArray]:
        asked = f"sample_data {data['token']}"
        return (
            self._place("calibrated_sensor", data["calibrated_sensor_token"], asked),
            self._place("ego_pose", data["ego_pose_token"], asked),
        )

    def entries(self, bar: tqdm, splits: Mapping[str, set[str]]) -> Iterator[tuple[str, dict]]:
        """Every key frame of the scenes asked for, with the name of its split, in the order of the table."""
        split_of = {token: split for split, tokens in splits.items() for token in tokens}
        scene = None
        for sample in self.tables.rows["sample"].values():
            bar.update()
            if sample["scene_token"] in split_of:
                if scene != sample["scene_token"]:
                    scene = sample["scene_token"]
                    self._places.clear()
                split = split_of[scene]
                yield split, self.entry(sample["token"], labelled=split != "test")

    def entry(self, token: str, labelled: bool = True) -> dict[str, Any]:
        """The entry of a key frame.

        Args:
            token: of the sample.
            labelled: add boxes and the path of the labels.
        """
        reference = self._record(token, LIDAR)
        scene = self.tables.get(
            "scene", self.tables.rows["sample"][token]["scene_token"], f"sample {token}"
        )
        on_car, in_world = self._places_of(reference)
        ref_from_car, car_from_global = np.linalg.inv(on_car), np.linalg.inv(in_world)
        info: dict[str, Any] = {
            "lidar_path": reference["filename"],
            "lidar_token": reference["token"],
            "token": token,
            "scene_name": scene["name"],
            "scene_token": scene["token"],
            "timestamp": 1e-6 * reference["timestamp"],
            "ref_from_car": ref_from_car,
            "car_from_global": car_from_global,
            "sweeps": self._past(reference, ref_from_car @ car_from_global),
        }
        if self.has_cameras:
            front = self._record(token, CAMERAS[0])
            info["cam_front_path"] = front["filename"]
            info["cam_intrinsic"] = self._intrinsics(front)
        if self.with_camera:
            to_lidar = ref_from_car @ car_from_global
            info["cams"] = {name: self._cam(token, name, to_lidar) for name in CAMERAS}
        if labelled:
            info.update(self._objects(token, ref_from_car @ car_from_global))
            if "lidarseg" in self.tables.rows:
                asked = f"the key frame of sample {token}"
                label = self.tables.get("lidarseg", reference["token"], asked)
                info["gt_segment_path"] = label["filename"]
        return info

    def _past(self, reference: Mapping[str, Any], to_lidar: NDArray) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        record = reference
        while len(found) < self.sweeps - 1:
            if record["prev"] == "":
                start = {
                    "lidar_path": reference["filename"],
                    "sample_data_token": record["token"],
                    "transform_matrix": None,
                    "time_lag": 0,
                }
                oldest = found[-1] if found else start
                return found + [oldest] * (self.sweeps - 1 - len(found))
            record = self.tables.get(
                "sample_data", record["prev"], f"sample_data {record['token']}"
            )
            on_car, in_world = self._places_of(record)
            found.append(
                {
                    "lidar_path": record["filename"],
                    "sample_data_token": record["token"],
                    "transform_matrix": to_lidar @ in_world @ on_car,
                    "global_from_car": in_world,
                    "car_from_current": on_car,
                    "time_lag": 1e-6 * reference["timestamp"] - 1e-6 * record["timestamp"],
                }
            )
        return found

    def _intrinsics(self, data: Mapping[str, Any]) -> NDArray:
        token = data["calibrated_sensor_token"]
        record = self.tables.get("calibrated_sensor", token, f"sample_data {data['token']}")
        matrix = np.array(record["camera_intrinsic"], np.float64)
        if matrix.shape != (3, 3):
            raise InputError(
                f"{self.tables.path('calibrated_sensor')}: record {token!r}: camera_intrinsic should "
                f"be 3 x 3, got shape {matrix.shape}"
            )
        return matrix

    def _cam(self, sample: str, name: str, to_lidar: NDArray) -> dict[str, Any]:
        data = self._record(sample, name)
        on_car, in_world = self._places_of(data)
        calibration = self.tables.rows["calibrated_sensor"][data["calibrated_sensor_token"]]
        pose = self.tables.rows["ego_pose"][data["ego_pose_token"]]
        # The car moves between the times of camera and LiDAR: through the world, not the car.
        place = to_lidar @ in_world @ on_car
        return {
            "data_path": data["filename"],
            "type": name,
            "sample_data_token": data["token"],
            "sensor2ego_translation": calibration["translation"],
            "sensor2ego_rotation": calibration["rotation"],
            "ego2global_translation": pose["translation"],
            "ego2global_rotation": pose["rotation"],
            "timestamp": data["timestamp"],
            "sensor2lidar_rotation": place[:3, :3],
            "sensor2lidar_translation": place[:3, 3],
            "camera_intrinsics": self._intrinsics(data),
        }

    def _objects(self, sample: str, to_lidar: NDArray) -> dict[str, Any]:
        records = [r for r in self.boxes[sample] if r["num_lidar_pts"] + r["num_radar_pts"] > 0]
        count, rotation = len(records), to_lidar[:3, :3]
        try:
            centre = np.array([r["translation"] for r in records], np.float64).reshape(count, 3)
            size = np.array([r["size"] for r in records], np.float64).reshape(count, 3)
            turned = rotation @ rotations(
                np.array([r["rotation"] for r in records], np.float64).reshape(count, 4)
            )
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{self.tables.path('sample_annotation')}: sample {sample!r}: a translation, size or "
                f"rotation cannot be used ({error})"
            ) from error
        velocity = np.array([self._velocity(r) for r in records]).reshape(count, 3) @ rotation.T
        yaw = np.arctan2(turned[:, 1, 0], turned[:, 0, 0])
        columns = [
            centre @ rotation.T + to_lidar[:3, 3],
            size[:, [1, 0, 2]],  # width, length, height in the table
            yaw[:, None],
            velocity[:, :2],
        ]
        return {
            "gt_boxes": np.concatenate(columns, axis=1),
            "gt_boxes_velocity": velocity,
            "gt_names": np.array([self._name(r) for r in records], str),
            "gt_boxes_token": np.array([r["token"] for r in records], str),
            "num_lidar_pts": np.array([r["num_lidar_pts"] for r in records], np.int64),
            "num_radar_pts": np.array([r["num_radar_pts"] for r in records], np.int64),
        }

    def _name(self, record: Mapping[str, Any]) -> str:
        asked = f"sample_annotation {record['token']}"
        instance = self.tables.get("instance", record["instance_token"], asked)
        asked = f"instance {instance['token']}"
        category = self.tables.get("category", instance["category_token"], asked)
        return DETECTION_NAMES.get(category["name"], "ignore")

    def _velocity(self, record: Mapping[str, Any]) -> NDArray:
        """In the world, m/s, from the annotations before and after, as far as there are any; NaN for a lone one.

        Annotations more than 1.5 s apart (3 s where both exist) say too little and give NaN, as in the official kit.
        """
        ends = []
        for side in ("prev", "next"):
            asked = f"sample_annotation {record['token']}"
            token = record[side]
            ends.append(self.tables.get("sample_annotation", token, asked) if token else record)
        times = [
            1e-6
            * self.tables.get("sample", e["sample_token"], f"sample_annotation {e['token']}")[
                "timestamp"
            ]
            for e in ends
        ]
        limit = 1.5 * ((ends[0] is not record) + (ends[1] is not record))
        passed = times[1] - times[0]
        if not 0 < passed <= limit:
            return np.full(3, np.nan)
        return (np.array(ends[1]["translation"]) - np.array(ends[0]["translation"])) / passed


def write_infos(
    data_root: str | os.PathLike[str],
    version: str,
    out: str | os.PathLike[str],
    sweeps: int = 10,
    with_camera: bool = False,
) -> Report:
    """Write `out/info/nuscenes_infos_{sweeps}sweeps_{split}.pkl` for every split of a version.

    Where `out/raw`, at which readers look for the data, is missing, it becomes a link to `data_root`. Files appear
    complete or not at all.

    Raises:
        InputError: for tables that cannot be used; the text names table and token.
    """
    if sweeps < 1:
        raise InputError(f"sweeps={sweeps}: expected 1 or more")
    data_root, out = Path(data_root), Path(out)
    writer = Writer(data_root, version, sweeps, with_camera)
    splits, notes = writer.splits()
    report = Report(notes=notes)
    entries: dict[str, list[dict]] = {split: [] for split in splits}
    with tqdm(total=len(writer.tables.rows["sample"]), unit="key frame", desc=version) as bar:
        for split, entry in writer.entries(bar, splits):
            entries[split].append(entry)
    if "lidarseg" not in writer.tables.rows and set(splits) - {"test"}:
        report.notes.append(
            f"{writer.tables.path('lidarseg')} is missing: entries have no gt_segment_path, their "
            "points no labels; unpack the lidarseg download for semantic segmentation"
        )
    folder = out / "info"
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in entries.items():
        if not rows:
            report.notes.append(f"no scene of {split} is here: no info file for it")
            continue
        path = folder / f"nuscenes_infos_{sweeps}sweeps_{split}.pkl"
        hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(hidden, "wb") as file:
                pickle.dump(rows, file, protocol=4)
            os.replace(hidden, path)
        finally:
            hidden.unlink(missing_ok=True)
        report.files[path] = len(rows)
    raw = out / "raw"
    if not raw.exists():
        try:
            raw.symlink_to(data_root.resolve(), target_is_directory=True)
            report.notes.append(f"{raw} is a link to {data_root}")
        except OSError:
            report.notes.append(f"{raw} is missing: move or link {data_root} there for training")
    return report
