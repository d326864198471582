"""Simulated LiDAR drives through procedural streets, in SemanticKITTI's layout.

A spinning sensor is ray-cast (Embree) through a `Street` and its traffic. Range noise, weak and
missing returns, glass, leaves and a remission that depends on material, angle and range make the
scans untidy. Every file depends on the seed, the sequence and the scan only: the number of worker
processes changes nothing, and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pointcept_kd.host import InputError

from .streets.lidar import (
    DIFFICULTIES,
    Caster,
    embree,
    ray_directions,
    sense,
)
from .streets.street import Soup, Street
from .workers import run

GENERATOR = 1  # raised whenever the same parameters give other files
MAST = 1.73  # metres from the road to the sensor
SPEED = 8.0  # metres per second of the car that carries it
CHUNK = 5  # scans per unit of work
IMAGE_SIZE = (1242, 375)  # that P0..P3 belong to
UNSEEN = ("08", *(f"{i:02d}" for i in range(11, 22)))  # validation and test: other layouts

_TRAIN_DEMO = tuple(f"{i:02d}" for i in range(6))
_TRAIN = tuple(f"{i:02d}" for i in (0, 1, 2, 3, 4, 5, 6, 7, 9, 10))


@dataclass(frozen=True)
class Plan:
    """What to simulate; equal plans give equal files.

    Attributes:
        scans: number of scans of each sequence, by two-digit sequence name.
        beams: 64 has the elevations of an HDL-64E (+2 to -24.8 degrees, denser above -8.5), 32
            are spread evenly over +8 to -25 degrees, other numbers over +2 to -24.8.
        columns: azimuth steps of a turn.
        spacing: metres between scans.
        max_range: metres.
        seed: seed of everything.
        difficulty: how untidy scans are, a key of `DIFFICULTIES`.
    """

    scans: dict[str, int] = field(default_factory=dict)
    beams: int = 64
    columns: int = 2048
    spacing: float = 1.0
    max_range: float = 50.0
    seed: int = 0
    difficulty: str = "normal"

    def check(self) -> None:
        """Raise InputError for a plan that cannot be simulated."""
        if not self.scans:
            raise InputError("--sequences is empty; give two-digit numbers such as 00,01,08")
        for name, count in self.scans.items():
            if not (len(name) == 2 and name.isdigit() and int(name) <= 21):
                raise InputError(f"--sequences: {name!r} is no sequence; use 00 to 21")
            if count < 1:
                raise InputError(f"--scans: sequence {name} has {count}; use 1 or more")
        for key, low, high in (
            ("beams", 2, 256), ("columns", 16, 8192), ("spacing", 0.05, 20.0), ("max_range", 5, 60),
            ("seed", 0, 2**32 - 1),
        ):  # fmt: skip
            value = getattr(self, key)
            if not low <= value <= high:
                raise InputError(f"--{key.replace('_', '-')}: {value} is not in {low}..{high}")
        if self.difficulty not in DIFFICULTIES:
            raise InputError(
                f"--difficulty: {self.difficulty!r} is unknown; use {', '.join(DIFFICULTIES)}"
            )


PRESETS: dict[str, Plan] = {
    "demo": Plan({**dict.fromkeys(_TRAIN_DEMO, 20), "08": 24}, 32, 512, spacing=5.0),
    "standard": Plan({**dict.fromkeys(_TRAIN, 150), "08": 150}, 64, 2048, spacing=1.0),
}


def plan_from(
    preset: str,
    sequences: Sequence[str] | None,
    scans: int | None,
    presets: Mapping[str, Plan] = PRESETS,
    **changes: Any,
) -> Plan:
    """A preset with some of its values replaced; None keeps the preset's."""
    if preset not in presets:
        raise InputError(f"--preset: {preset!r} is unknown; use {' or '.join(presets)}")
    plan = presets[preset]
    names = list(plan.scans) if sequences is None else [s.strip().zfill(2) for s in sequences]
    usual = max(plan.scans.values())
    counts = {name: scans or plan.scans.get(name, usual) for name in names}
    if scans is not None and scans < 1:
        raise InputError(f"--scans: {scans}; use 1 or more")
    changes = {key: value for key, value in changes.items() if value is not None}
    plan = replace(plan, scans=counts, **changes)
    plan.check()
    return plan


class Simulator:
    """One sequence: its street and the sensor that drives through it."""

    def __init__(self, plan: Plan, name: str) -> None:
        self.plan, self.name, self.scans = plan, name, plan.scans[name]
        self.key = (plan.seed, int(name))
        self.step_time = plan.spacing / SPEED
        length = plan.spacing * (self.scans - 1)
        self.difficulty = DIFFICULTIES[plan.difficulty]
        self.street = Street(
            self.key, length, self.step_time, self.scans, name in UNSEEN, self.difficulty.crowd
        )
        self.directions = ray_directions(plan.beams, plan.columns)
        self._still = Caster(self.street.soup)

    def scan(self, index: int) -> tuple[NDArray, NDArray]:
        """Points (n, 4) float32 x, y, z, remission in the sensor's frame, and labels (n,) uint32."""
        pose = self.street.sensor_pose(index, MAST)
        moving = self.moving(index, self.plan.max_range + 8)
        points, label, _ = sense(
            self._still, moving, self.directions, pose, self.plan.max_range, self.difficulty,
            self.street.gain, (*self.key, 2, index),
        )  # fmt: skip
        return points, label

    @property
    def still(self) -> Caster:
        """What stands, ready for ray casting."""
        return self._still

    def moving(self, index: int, reach: float) -> Soup | None:
        """What moves within `reach` metres of the sensor at a scan's time."""
        return self.street.moving(index * self.step_time, self.plan.spacing * index, reach)

    def calibration(self, scale: float = 1.0) -> dict[str, NDArray]:
        """Camera matrices for images `scale` times `IMAGE_SIZE`; see `calibration`."""
        return calibration(self.key, scale)

    def camera_poses(self) -> NDArray:
        """Poses (scans, 3, 4) of camera 0 in the frame of camera 0 at the first scan."""
        to_camera = np.vstack([self.calibration()["Tr"], [0, 0, 0, 1]])
        poses = np.stack([self.street.sensor_pose(i, MAST) for i in range(self.scans)])
        return (to_camera @ np.linalg.inv(poses[0]) @ poses @ np.linalg.inv(to_camera))[:, :3]


def calibration(key: tuple[int, ...], scale: float = 1.0) -> dict[str, NDArray]:
    """Camera matrices P0..P3 and Tr (velodyne to camera 0), each (3, 4).

    Args:
        key: seeds the mounting.
        scale: of images, 1.0 for `IMAGE_SIZE`.
    """
    rng = np.random.default_rng([*key, 4])
    focal = rng.uniform(700, 722)
    camera = np.array([[focal, 0, 607.2], [0, focal, 185.2], [0, 0, 1.0]])
    table = {}
    for i, offset in enumerate((0.0, -0.537, 0.063, -0.47)):
        table[f"P{i}"] = camera @ np.column_stack([np.eye(3), [offset, 0, 0]])
    a, b, c = rng.normal(0, 0.008, 3)
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    axes = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])
    shift = np.array([-0.012, -0.058, -0.29]) + rng.normal(0, 0.01, 3)
    if scale != 1.0:
        table = {name: np.diag([scale, scale, 1.0]) @ matrix for name, matrix in table.items()}
    table["Tr"] = np.column_stack([x @ y @ z @ axes, shift])
    return table


# Writing


def replace_with(path: Path, data: bytes) -> None:
    """Write a file so that it is there completely or not at all."""
    hidden = path.with_name(f".{path.name}.tmp")
    hidden.write_bytes(data)
    os.replace(hidden, path)


def _rows(matrices: Iterable[NDArray], before: Iterable[str] | None = None) -> bytes:
    lines = [" ".join(f"{v:.12e}" for v in np.ravel(m)) for m in matrices]
    if before is not None:
        lines = [f"{name}: {line}" for name, line in zip(before, lines, strict=True)]
    return ("\n".join(lines) + "\n").encode()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _scan_files(folder: Path, index: int) -> tuple[Path, Path]:
    return folder / "velodyne" / f"{index:06d}.bin", folder / "labels" / f"{index:06d}.label"


def scan_complete(folder: Path, index: int) -> bool:
    scan, label = (_size(path) for path in _scan_files(folder, index))
    return scan > 0 and scan % 16 == 0 and label == scan // 4


@lru_cache(maxsize=1)
def simulator_of(plan_text: str, name: str) -> Simulator:
    return Simulator(Plan(**json.loads(plan_text)), name)


def _write_scans(plan_text: str, folder: str, name: str, indices: list[int]) -> tuple[int, int]:
    """Simulate some scans of one sequence; returns how many scans and points were written."""
    simulator, target, points = simulator_of(plan_text, name), Path(folder), 0
    for index in indices:
        scan, label = simulator.scan(index)
        if not len(scan):
            raise InputError(f"sequence {name}, scan {index}: no returns; use more --columns")
        scan_file, label_file = _scan_files(target, index)
        replace_with(label_file, label.astype("<u4").tobytes())
        replace_with(scan_file, scan.astype("<f4").tobytes())
        points += len(scan)
    return len(indices), points


def write_calibration(plan_text: str, folder: str, name: str, scale: float) -> None:
    """`calib.txt` for images `scale` times `IMAGE_SIZE`; cameras have to stand in it as they are."""
    table = calibration((json.loads(plan_text)["seed"], int(name)), scale)
    replace_with(Path(folder) / "calib.txt", _rows(table.values(), table))


def _write_tables(plan_text: str, folder: str, name: str, scale: float) -> None:
    simulator, target = simulator_of(plan_text, name), Path(folder)
    write_calibration(plan_text, folder, name, scale)
    replace_with(target / "poses.txt", _rows(simulator.camera_poses()))
    times = np.arange(simulator.scans) * simulator.step_time
    replace_with(target / "times.txt", _rows(times))


def _work(job: tuple[str, str, str, list[int], bool, float]) -> tuple[int, int]:
    plan_text, folder, name, indices, tables, scale = job
    if tables:
        _write_tables(plan_text, folder, name, scale)
    return _write_scans(plan_text, folder, name, indices)


def read_card(out: Path) -> dict[str, Any] | None:
    """What `dataset.json` says, or None where there is none."""
    card = out / "dataset.json"
    if not card.is_file():
        return None
    try:
        found = json.loads(card.read_text(encoding="utf-8"))
        # What was made before there were layouts and difficulties.
        found["plan"] = {"difficulty": "normal", **found["plan"]}
        found["generator"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{card}: not written by this tool; use another --out") from error
    return {"layout": "kitti", **found}


def write_card(out: Path, card: dict[str, Any]) -> None:
    """Replace `dataset.json`."""
    replace_with(out / "dataset.json", (json.dumps(card, indent=2) + "\n").encode())


def refuse_change(out: Path, what: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise InputError when something was made with other parameters."""
    for key, value in new.items():
        if old.get(key) != value:
            raise InputError(
                f"{out} holds {what} with {key}={old.get(key)}, asked for {key}={value}; use another "
                "--out or delete the folder"
            )


def claim_folder(
    out: Path, plan: Plan, note: dict[str, Any], layout: str = "kitti", **more: dict[str, Any]
) -> None:
    """Write the plan into the folder, or refuse a folder that holds something else."""
    card, wanted = out / "dataset.json", {"generator": GENERATOR, "plan": asdict(plan)}
    found = read_card(out)
    if found is not None:
        version = found["generator"]
        if version != GENERATOR:
            raise InputError(
                f"{card}: made by generator {version}, this is {GENERATOR}; use another --out"
            )
        refuse_change(out, "a data set", found, {"layout": layout})
        refuse_change(out, "scans", found["plan"], wanted["plan"])
        for name, parameters in more.items():
            refuse_change(out, "scans", dict(found.get(name) or {}), parameters)
        return
    for folder in ("dataset", "raw"):
        if (out / folder).exists():
            raise InputError(f"{out}/{folder} exists without dataset.json; use another --out")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file; give a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_card(out, {"layout": layout, **wanted, **more, **note})
    except OSError as error:
        raise InputError(f"--out: cannot write to {out} ({error.strerror})") from error


@dataclass
class Report:
    """What a run did, and what the folder holds now."""

    written: int
    kept: int
    points: int
    seconds: float
    shares: dict[int, float]  # raw class id to its share of all points, moving classes apart


def simulate(
    out: str | os.PathLike[str],
    plan: Plan,
    workers: int | None = None,
    note: dict[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """Write `OUT/dataset/sequences/SS/{velodyne,labels,calib.txt,poses.txt,times.txt}`.

    Complete scans that are there already are kept. `dataset.json` holds the plan and `note`.

    Raises:
        InputError: without Embree, for a plan that cannot be, or a folder with other scans.
    """
    plan.check()
    embree()
    out = Path(out)
    claim_folder(out, plan, note or {})
    scale = ((read_card(out) or {}).get("cameras") or {}).get("scale", 1.0)
    begin, plan_text = time.perf_counter(), json.dumps(asdict(plan))
    jobs, kept = [], 0
    for name, count in plan.scans.items():
        folder = out / "dataset" / "sequences" / name
        for part in ("velodyne", "labels"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        missing = [i for i in range(count) if not scan_complete(folder, i)]
        tables = any(_size(folder / f"{t}.txt") < 0 for t in ("calib", "poses", "times"))
        kept += count - len(missing)
        for start in range(0, max(len(missing), int(tables)), CHUNK):
            part = missing[start : start + CHUNK]
            jobs.append((plan_text, str(folder), name, part, tables and start == 0, scale))
    written = points = 0
    total = sum(len(job[3]) for job in jobs)
    with tqdm(total=total, unit="scan", desc="simulate", disable=not progress) as bar:
        for done, more in run(_work, jobs, workers):
            written, points = written + done, points + more
            bar.update(done)
    seconds = time.perf_counter() - begin
    return Report(written, kept, points, seconds, class_shares(out / "dataset" / "sequences"))


def class_shares(sequences: Path) -> dict[int, float]:
    """Share of each raw class id among all points of a folder of sequences."""
    counts = np.zeros(1 << 16, np.int64)
    for path in sorted(sequences.glob("*/labels/*.label")):
        counts += np.bincount(np.fromfile(path, "<u4") & 0xFFFF, minlength=1 << 16)
    total = max(int(counts.sum()), 1)
    return {int(i): float(counts[i] / total) for i in np.flatnonzero(counts)}
