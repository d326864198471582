"""Simulated scenes as nuScenes stores its own: tables, LiDAR turns, six cameras, labels, boxes.

    OUT/raw/v1.0-sim/*.json                       the tables of nuScenes' schema; splits.json
           /samples/LIDAR_TOP/*.pcd.bin           key frames: float32 x, y, z, intensity, ring
           /sweeps/LIDAR_TOP/*.pcd.bin            turns between them
           /samples/CAM_*/*.png                   six images per key frame
           /lidarseg/v1.0-sim/*_lidarseg.bin      uint8 class per point of a key frame
           /camseg/CAM_*/*.png                    weak labels: uint8, 0 none, 1..13 (classes.json)
           /superpixels_slic/TOKEN.png            uint8 segment per pixel, by the image's token
           /maps/*.png                            where cars may drive and people walk

A scene is a sequence: 08 is validation, 11 to 21 are test. Frames of a scene that are complete are
kept, so an interrupted run goes on where it stopped; the tables are written at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from tqdm import tqdm

from pointcept_kd.host import InputError

from ..pictures import write_png
from ..superpixels import superpixels
from ..synthetic import UNSEEN, Plan, claim_folder, replace_with
from ..workers import run
from .ground import LANE, OTHER, PARKING, ROAD, SIDEWALK
from .lidar import DIFFICULTIES, embree
from .rig import (
    BETWEEN_KEYS,
    CAMERAS,
    CATEGORIES,
    CATEGORY_OF,
    LIDAR,
    LIDARSEG,
    SIMILAR,
    WEAK_CLASSES,
    WEAK_OF,
    Rig,
    quaternion,
)
from .weak_masks import Errors, weak_mask

GENERATOR = 1  # raised whenever the same parameters give other files
VERSION = "v1.0-sim"
CHUNK = 2  # key frames per unit of work
START = 1_600_000_000_000_000  # microseconds, of the first scene
VISIBILITIES = (("v0-40", 0.4), ("v40-60", 0.6), ("v60-80", 0.8), ("v80-100", 1.01))
ATTRIBUTES = (
    "vehicle.moving", "vehicle.stopped", "vehicle.parked", "cycle.with_rider", "cycle.without_rider",
    "pedestrian.sitting_lying_down", "pedestrian.standing", "pedestrian.moving",
)  # fmt: skip
_ATTRIBUTE_OF = {
    10: "vehicle.parked", 13: "vehicle.parked", 18: "vehicle.parked", 20: "vehicle.parked",
    400: "vehicle.parked", 252: "vehicle.moving", 257: "vehicle.moving", 258: "vehicle.moving",
    11: "cycle.without_rider", 15: "cycle.without_rider", 31: "cycle.with_rider",
    32: "cycle.with_rider", 253: "cycle.with_rider", 255: "cycle.with_rider",
    30: "pedestrian.standing", 254: "pedestrian.moving",
}  # fmt: skip

PRESETS: dict[str, Plan] = {
    "demo": Plan(dict.fromkeys(("00", "01", "02", "03", "08"), 6), 32, 512, spacing=4.0),
    "standard": Plan(
        dict.fromkeys((*(f"{i:02d}" for i in range(8)), "09", "10", "08"), 40),
        32,
        1090,
        spacing=4.0,
    ),
}
SWEEPS = {"demo": 4, "standard": 10}  # turns of the LiDAR per key frame
WIDTHS = {"demo": 400, "standard": 800}


@dataclass(frozen=True)
class RigPlan:
    """What joins the plan of the LiDAR.

    Attributes:
        sweeps: turns per key frame; 10 are nuScenes' 20 Hz.
        width: of the images, pixels; the height is 9/16 of it.
        segments: the most superpixels of an image.
        confusion: share of things and regions that weak labels give a similar class.
    """

    sweeps: int = 10
    width: int = 400
    segments: int = 150
    confusion: float = 0.08

    @property
    def height(self) -> int:
        return round(self.width * 9 / 16)

    def check(self) -> None:
        """Raise InputError for what cannot be simulated."""
        for key, option, low, high in (
            ("sweeps", "sweeps", 1, 10), ("width", "image-width", 32, 1600),
            ("segments", "superpixels", 1, 255), ("confusion", "confusion", 0.0, 1.0),
        ):  # fmt: skip
            value = getattr(self, key)
            if not low <= value <= high:
                raise InputError(f"--{option}: {value} is not in {low}..{high}")


@dataclass
class RigReport:
    """What a run did, and the share of each category among the points of key frames."""

    written: int
    kept: int
    images: int
    seconds: float
    shares: dict[str, float]


def token(*parts: object) -> str:
    """32 hexadecimal digits that name a record; equal parts give equal ones."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def scene_name(name: str) -> str:
    """The scene of a sequence."""
    return f"scene-{int(name):04d}"


@dataclass(frozen=True)
class _Scene:
    """Names, times and tokens of the records of one scene; nothing here needs the street."""

    plan: Plan
    rig: RigPlan
    name: str

    @property
    def title(self) -> str:
        return scene_name(self.name)

    @property
    def keys(self) -> int:
        return self.plan.scans[self.name]

    @property
    def turns(self) -> int:
        return (self.keys - 1) * self.rig.sweeps + 1

    def token(self, *parts: object) -> str:
        return token(self.plan.seed, self.title, *parts)

    def stamp(self, seconds: float) -> int:
        """Microseconds."""
        return START + int(self.name) * 600_000_000 + round(seconds * 1e6)

    def turn_stamp(self, turn: int) -> int:
        return self.stamp(turn * BETWEEN_KEYS / self.rig.sweeps)

    def is_key(self, turn: int) -> bool:
        return turn % self.rig.sweeps == 0

    def turn_token(self, turn: int) -> str:
        return self.token(LIDAR, turn)

    def turn_file(self, turn: int) -> str:
        folder = "samples" if self.is_key(turn) else "sweeps"
        return f"{folder}/{LIDAR}/{self.title}__{LIDAR}__{self.turn_stamp(turn)}.pcd.bin"

    def label_file(self, key: int) -> str:
        return f"lidarseg/{VERSION}/{self.turn_token(key * self.rig.sweeps)}_lidarseg.bin"

    def image_token(self, camera: str, key: int) -> str:
        return self.token(camera, key)

    def image_file(self, camera: str, key: int, stamp: int) -> str:
        return f"samples/{camera}/{self.title}__{camera}__{stamp}.png"

    def part_file(self, key: int) -> str:
        return f"{VERSION}/.parts/{self.title}_{key:06d}.json"


@lru_cache(maxsize=1)
def _rig(plan_text: str, rig_text: str, name: str) -> tuple[_Scene, Rig]:
    plan, rig = Plan(**json.loads(plan_text)), RigPlan(**json.loads(rig_text))
    scene = _Scene(plan, rig, name)
    made = Rig(
        (plan.seed, 100 + int(name)), scene.keys, rig.sweeps, plan.spacing, plan.beams, plan.columns,
        plan.max_range, (rig.width, rig.height), name in UNSEEN, DIFFICULTIES[plan.difficulty],
    )  # fmt: skip
    return scene, made


def _work(job: tuple[str, str, str, str, list[int]]) -> tuple[int, int]:
    plan_text, rig_text, raw, name, keys = job
    scene, rig = _rig(plan_text, rig_text, name)
    for key in keys:
        _write_key(Path(raw), scene, rig, key)
    return len(keys), 0


def _write_key(raw: Path, scene: _Scene, rig: Rig, key: int) -> None:
    """One key frame with the turns since the last one; its part of the tables comes last."""
    last = key * scene.rig.sweeps
    poses = {}
    for turn in range(max(last - scene.rig.sweeps + 1, 0), last + 1):
        points, label = rig.turn(turn)
        if not len(points):
            raise InputError(f"{scene.title}, turn {turn}: no returns; use more --columns")
        replace_with(raw / scene.turn_file(turn), points.astype("<f4").tobytes())
        poses[scene.turn_token(turn)] = _pose(
            rig, rig.car(turn * rig.turn_time), scene.turn_stamp(turn)
        )
    kinds = LIDARSEG[label & 0xFFFF]
    replace_with(raw / scene.label_file(key), kinds.tobytes())
    images = {}
    for number, (camera, sensor) in enumerate(rig.sensors.items()):
        if camera == LIDAR:
            continue
        seconds = key * BETWEEN_KEYS + sensor.delay
        stamp, name = scene.stamp(seconds), scene.image_token(camera, key)
        path = scene.image_file(camera, key, stamp)
        view = rig.photograph(camera, key)
        rng = np.random.default_rng([*rig.key, 10, key, number])
        errors = Errors(confusion=scene.rig.confusion)
        weak = weak_mask(view.label, WEAK_OF, 0, SIMILAR, rng, errors)
        write_png(raw / path.replace("samples/", "camseg/", 1), weak)
        segments = superpixels(view.image, scene.rig.segments).astype(np.uint8)
        write_png(raw / "superpixels_slic" / f"{name}.png", segments)
        write_png(raw / path, view.image)
        poses[name] = _pose(rig, rig.car(seconds), stamp)
        images[camera] = {"token": name, "filename": path, "timestamp": stamp}
    boxes = [
        {
            "instance": a.instance,
            "label": int(a.box.label),
            "translation": (a.box.centre - rig.origin).tolist(),
            "size": a.box.size[[1, 0, 2]].tolist(),  # width, length, height
            "rotation": [float(np.cos(a.box.yaw / 2)), 0.0, 0.0, float(np.sin(a.box.yaw / 2))],
            "points": a.points,
            "visible": a.visible,
        }
        for a in rig.annotations(key, points[:, :3])
    ]
    part: dict[str, Any] = {"boxes": boxes, "images": images, "poses": poses}
    part["counts"] = np.bincount(kinds, minlength=len(CATEGORIES)).tolist()
    if key == 0:
        part["sensors"] = {
            name: {
                "translation": s.on_car[:3, 3].tolist(),
                "rotation": quaternion(s.on_car[:3, :3]),
                "camera_intrinsic": s.intrinsics.tolist(),
            }
            for name, s in rig.sensors.items()
        }
        write_png(raw / "maps" / f"{scene.token('map')}.png", _map(rig))
    replace_with(raw / scene.part_file(key), json.dumps(part).encode())


def _pose(rig: Rig, car: NDArray, stamp: int) -> dict[str, Any]:
    pose = rig.in_world(car)
    return {
        "translation": pose[:3, 3].tolist(),
        "rotation": quaternion(pose[:3, :3]),
        "timestamp": stamp,
    }


def _map(rig: Rig) -> NDArray:
    """Road and pavement (255) from above, 0.1 m per pixel, north up, from the world's origin."""
    step = 0.5
    street, corners = rig.street, rig.corners() - rig.origin[:2]
    columns, rows = np.ceil((corners.max(0) + 5) / step).astype(int)
    x, y = np.meshgrid(np.arange(columns) + 0.5, np.arange(rows)[::-1] + 0.5)
    x, y = x.ravel() * step + rig.origin[0], y.ravel() * step + rig.origin[1]
    table, line_x, line_y, heading, _ = street.line
    away, nearest = cKDTree(np.stack([line_x, line_y], 1)).query(np.stack([x, y], 1))
    c, s = np.cos(heading[nearest]), np.sin(heading[nearest])
    dx, dy = x - line_x[nearest], y - line_y[nearest]
    flat = np.isin(street.classes_at(table[nearest] + c * dx + s * dy, c * dy - s * dx),
                   (ROAD, LANE, PARKING, SIDEWALK, OTHER))  # fmt: skip
    picture = np.where(flat & (away < 46), 255, 0).astype(np.uint8).reshape(rows, columns)
    return np.repeat(np.repeat(picture, 5, 0), 5, 1)


def _complete(raw: Path, scene: _Scene, key: int) -> bool:
    part = raw / scene.part_file(key)
    try:
        content = json.loads(part.read_bytes())
        images = [image["filename"] for image in content["images"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    last = key * scene.rig.sweeps
    names = [scene.turn_file(t) for t in range(max(last - scene.rig.sweeps + 1, 0), last + 1)]
    names += [*images, *(i.replace("samples/", "camseg/", 1) for i in images)]
    names += [f"superpixels_slic/{i['token']}.png" for i in content["images"].values()]
    names += [f"maps/{scene.token('map')}.png"] * (key == 0)
    paths = [raw / name for name in names]
    if not all(p.is_file() and p.stat().st_size > 0 for p in paths) or len(images) != len(CAMERAS):
        return False
    label, points = raw / scene.label_file(key), raw / scene.turn_file(last)
    return label.is_file() and 20 * label.stat().st_size == points.stat().st_size


def simulate_nuscenes(
    out: str | os.PathLike[str],
    plan: Plan,
    rig: RigPlan,
    workers: int | None = None,
    note: dict[str, Any] | None = None,
    progress: bool = True,
) -> RigReport:
    """Write `OUT/raw` as described above; `dataset.json` holds the plan and `note`.

    Raises:
        InputError: without Embree, for plans that cannot be, or a folder with something else.
    """
    plan.check()
    rig.check()
    embree()
    out = Path(out)
    more = {"version": GENERATOR, **asdict(rig)}
    claim_folder(out, plan, note or {}, "nuscenes", rig=more)
    begin, raw = time.perf_counter(), out / "raw"
    folders = [f"{top}/{name}" for name in CAMERAS for top in ("samples", "camseg")]
    folders += [f"samples/{LIDAR}", f"sweeps/{LIDAR}", f"lidarseg/{VERSION}", f"{VERSION}/.parts"]
    for folder in (*folders, "superpixels_slic", "maps"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    classes = {"classes": ["none", *WEAK_CLASSES], "unknown": 0, "model": "simulated", "prompt": None,
               "errors": asdict(Errors(confusion=rig.confusion))}  # fmt: skip
    _write_json(raw / "camseg" / "classes.json", classes)
    texts = json.dumps(asdict(plan)), json.dumps(asdict(rig))
    scenes, jobs, kept = [_Scene(plan, rig, name) for name in plan.scans], [], 0
    for scene in scenes:
        missing = [k for k in range(scene.keys) if not _complete(raw, scene, k)]
        kept += scene.keys - len(missing)
        for start in range(0, len(missing), CHUNK):
            jobs.append((*texts, str(raw), scene.name, missing[start : start + CHUNK]))
    written, total = 0, sum(len(job[4]) for job in jobs)
    with tqdm(total=total, unit="key frame", desc="simulate", disable=not progress) as bar:
        for done, _ in run(_work, jobs, workers):
            written += done
            bar.update(done)
    counts = _write_tables(raw, scenes)
    shares = {n: float(c / counts.sum()) for n, c in zip(CATEGORIES, counts, strict=True) if c}
    return RigReport(written, kept, written * len(CAMERAS), time.perf_counter() - begin, shares)


def _write_json(path: Path, content: Any) -> None:
    replace_with(path, (json.dumps(content, indent=1) + "\n").encode())


# Tables


def _write_tables(raw: Path, scenes: list[_Scene]) -> NDArray:
    """All tables and splits.json; returns how many points of key frames each category has."""
    tables: dict[str, list[dict[str, Any]]] = {
        name: []
        for name in (
            "scene", "sample", "sample_data", "ego_pose", "calibrated_sensor", "log", "instance",
            "sample_annotation", "lidarseg", "map",
        )
    }  # fmt: skip
    tables["sensor"] = [
        {"token": token("sensor", c), "channel": c, "modality": "lidar" if c == LIDAR else "camera"}
        for c in (LIDAR, *CAMERAS)
    ]
    tables["category"] = [
        {"token": token("category", name), "name": name, "description": "", "index": index}
        for index, name in enumerate(CATEGORIES)
    ]
    tables["attribute"] = [
        {"token": token("attribute", name), "name": name, "description": ""} for name in ATTRIBUTES
    ]
    tables["visibility"] = [
        {"token": str(i + 1), "level": level, "description": f"visibility of the object: {level} %"}
        for i, (level, _) in enumerate(VISIBILITIES)
    ]
    counts = np.zeros(len(CATEGORIES), np.int64)
    for scene in scenes:
        parts = [json.loads((raw / scene.part_file(k)).read_bytes()) for k in range(scene.keys)]
        counts += np.sum([part["counts"] for part in parts], axis=0)
        _add_scene(tables, scene, parts)
    for name, rows in tables.items():
        _write_json(raw / VERSION / f"{name}.json", rows)
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for scene in scenes:
        split = "val" if scene.name == "08" else "test" if scene.name in UNSEEN else "train"
        splits[split].append(scene.title)
    _write_json(raw / VERSION / "splits.json", {k: v for k, v in splits.items() if v})
    return counts


def _chain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give records that follow each other in time their `prev` and `next`."""
    for i, row in enumerate(rows):
        row["prev"] = rows[i - 1]["token"] if i else ""
        row["next"] = rows[i + 1]["token"] if i + 1 < len(rows) else ""
    return rows


def _add_scene(tables: dict[str, list], scene: _Scene, parts: list[dict[str, Any]]) -> None:
    samples = [scene.token("sample", k) for k in range(scene.keys)]
    log, sweeps = scene.token("log"), scene.rig.sweeps
    unseen = "another layout than in training" if scene.name in UNSEEN else "a simulated street"
    tables["scene"].append({
        "token": scene.token("scene"), "name": scene.title, "description": unseen, "log_token": log,
        "nbr_samples": scene.keys, "first_sample_token": samples[0], "last_sample_token": samples[-1],
    })  # fmt: skip
    tables["log"].append({
        "token": log, "logfile": scene.title, "vehicle": "sim", "date_captured": "2020-09-13",
        "location": f"simulated-{scene.plan.seed}-{scene.name}",
    })  # fmt: skip
    tables["map"].append({
        "token": scene.token("map"), "log_tokens": [log], "category": "semantic_prior",
        "filename": f"maps/{scene.token('map')}.png",
    })  # fmt: skip
    tables["sample"] += _chain([
        {"token": s, "timestamp": scene.turn_stamp(k * sweeps), "scene_token": scene.token("scene")}
        for k, s in enumerate(samples)
    ])  # fmt: skip
    for name, sensor in parts[0]["sensors"].items():
        row = {"token": scene.token("calibrated", name), "sensor_token": token("sensor", name)}
        tables["calibrated_sensor"].append(row | sensor)
    for part in parts:
        tables["ego_pose"] += [{"token": name} | pose for name, pose in part["poses"].items()]
    size = {"width": scene.rig.width, "height": scene.rig.height}

    def data(name: str, sample: int, channel: str, rest: dict[str, Any]) -> dict[str, Any]:
        return {
            "token": name, "sample_token": samples[sample], "ego_pose_token": name,
            "calibrated_sensor_token": scene.token("calibrated", channel), **rest,
        }  # fmt: skip

    tables["sample_data"] += _chain([
        data(scene.turn_token(t), -(-t // sweeps), LIDAR, {
            "filename": scene.turn_file(t), "fileformat": "pcd", "width": 0, "height": 0,
            "timestamp": scene.turn_stamp(t), "is_key_frame": scene.is_key(t),
        })
        for t in range(scene.turns)
    ])  # fmt: skip
    for camera in CAMERAS:
        tables["sample_data"] += _chain([
            data(part["images"][camera]["token"], k, camera, {
                **part["images"][camera], "fileformat": "png", **size, "is_key_frame": True,
            })
            for k, part in enumerate(parts)
        ])  # fmt: skip
    tables["lidarseg"] += [
        {"token": scene.turn_token(k * sweeps), "filename": scene.label_file(k),
         "sample_data_token": scene.turn_token(k * sweeps)}
        for k in range(scene.keys)
    ]  # fmt: skip
    _add_boxes(tables, scene, samples, parts)


def _add_boxes(
    tables: dict[str, list], scene: _Scene, samples: list[str], parts: list[dict[str, Any]]
) -> None:
    tracks: dict[int, list[dict[str, Any]]] = {}
    labels: dict[int, int] = {}
    for k, part in enumerate(parts):
        for box in part["boxes"]:
            labels[box["instance"]] = box["label"]
            attribute = _ATTRIBUTE_OF.get(box["label"])
            level = next(i for i, (_, most) in enumerate(VISIBILITIES) if box["visible"] < most)
            tracks.setdefault(box["instance"], []).append({
                "token": scene.token("box", box["instance"], k), "sample_token": samples[k],
                "instance_token": scene.token("instance", box["instance"]),
                "visibility_token": str(level + 1),
                "attribute_tokens": [token("attribute", attribute)] if attribute else [],
                "translation": box["translation"], "size": box["size"], "rotation": box["rotation"],
                "num_lidar_pts": box["points"], "num_radar_pts": 0,
            })  # fmt: skip
    for instance, rows in sorted(tracks.items()):
        tables["sample_annotation"] += _chain(rows)
        tables["instance"].append({
            "token": scene.token("instance", instance),
            "category_token": token("category", CATEGORY_OF[labels[instance]]),
            "nbr_annotations": len(rows), "first_annotation_token": rows[0]["token"],
            "last_annotation_token": rows[-1]["token"],
        })  # fmt: skip
