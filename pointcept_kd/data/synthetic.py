"""Simulated LiDAR drives through procedural streets, in SemanticKITTI's layout.

A spinning sensor is ray-cast (Embree) through a `Street` and its traffic. Range noise, weak and
missing returns, glass, leaves and a remission that depends on material, angle and range make the
scans untidy. Every file depends on the seed, the sequence and the scan only: the number of worker
processes changes nothing, and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from tqdm import tqdm

from pointcept_kd.host import InputError

from .street import Soup, Street

GENERATOR = 1  # raised whenever the same parameters give other files
MAST = 1.73  # metres from the road to the sensor
SPEED = 8.0  # metres per second of the car that carries it
MIN_RANGE = 1.5
CHUNK = 5  # scans per unit of work
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
    """

    scans: dict[str, int] = field(default_factory=dict)
    beams: int = 64
    columns: int = 2048
    spacing: float = 1.0
    max_range: float = 50.0
    seed: int = 0

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


PRESETS: dict[str, Plan] = {
    "demo": Plan({**dict.fromkeys(_TRAIN_DEMO, 20), "08": 24}, 32, 512, spacing=5.0),
    "standard": Plan({**dict.fromkeys(_TRAIN, 150), "08": 150}, 64, 2048, spacing=1.0),
}


def plan_from(preset: str, sequences: Sequence[str] | None, scans: int | None, **changes) -> Plan:
    """A preset with some of its values replaced; None keeps the preset's."""
    if preset not in PRESETS:
        raise InputError(f"--preset: {preset!r} is unknown; use {' or '.join(PRESETS)}")
    plan = PRESETS[preset]
    names = list(plan.scans) if sequences is None else [s.strip().zfill(2) for s in sequences]
    usual = max(plan.scans.values())
    counts = {name: scans or plan.scans.get(name, usual) for name in names}
    if scans is not None and scans < 1:
        raise InputError(f"--scans: {scans}; use 1 or more")
    changes = {key: value for key, value in changes.items() if value is not None}
    plan = replace(plan, scans=counts, **changes)
    plan.check()
    return plan


def beam_elevations(beams: int) -> NDArray:
    """Elevations (beams,) in radians, highest first."""
    if beams == 64:
        degrees = np.concatenate([np.linspace(2.0, -8.33, 32), np.linspace(-8.83, -24.8, 32)])
    elif beams == 32:
        degrees = np.linspace(8.0, -25.0, 32)
    else:
        degrees = np.linspace(2.0, -24.8, beams)
    return np.deg2rad(degrees)


def ray_directions(beams: int, columns: int) -> NDArray:
    """Unit directions (beams * columns, 3) in the sensor's frame, beam by beam."""
    elevation = beam_elevations(beams)[:, None]
    # The half step keeps rays off the exact axes, where they run along walls and kerbs.
    azimuth = np.pi - (np.arange(columns)[None] + 0.5) * (2 * np.pi / columns)
    flat = np.cos(elevation)
    up = np.broadcast_to(np.sin(elevation), (beams, columns))
    return np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), up], -1).reshape(-1, 3)


def _embree() -> tuple[Any, Any]:
    try:
        scene = importlib.import_module("embreex.rtcore_scene")
        mesh = importlib.import_module("embreex.mesh_construction")
    except ImportError as error:
        raise InputError(
            f'simulating needs Embree ({error}); install it: pip install "pointcept_kd[sim]"'
        ) from error
    return scene.EmbreeScene, mesh.TriangleMesh


class Caster:
    """Triangles ready for ray casting."""

    def __init__(self, soup: Soup) -> None:
        new_scene, new_mesh = _embree()
        triangles, self.label, self.reflectivity, self.drop, self.scatter = soup.arrays()
        self.scene = new_scene(robust=True)
        new_mesh(self.scene, np.ascontiguousarray(triangles))

    def cast(self, origin: NDArray, directions: NDArray) -> tuple[NDArray, ...]:
        """First hits of rays from one origin.

        Returns:
            distance (r,) with inf for none, cosine of the incidence angle, label, reflectivity,
            drop, scatter.
        """
        count = len(directions)
        origins = np.broadcast_to(origin.astype(np.float32), (count, 3)).copy()
        directions = np.ascontiguousarray(directions, np.float32)
        hit = self.scene.run(origins, directions, output=True)
        triangle, normal = hit["primID"], hit["Ng"]
        found = triangle >= 0
        distance = np.where(found, hit["tfar"], np.float32(np.inf))
        length = np.maximum(np.linalg.norm(normal, axis=1), 1e-12)
        cosine = np.abs((normal * directions).sum(1)) / length
        rows = np.where(found, triangle, 0)
        materials = (self.reflectivity[rows], self.drop[rows], self.scatter[rows])
        return (distance, cosine, self.label[rows], *materials)


class Simulator:
    """One sequence: its street and the sensor that drives through it."""

    def __init__(self, plan: Plan, name: str) -> None:
        self.plan, self.name, self.scans = plan, name, plan.scans[name]
        self.key = (plan.seed, int(name))
        self.step_time = plan.spacing / SPEED
        length = plan.spacing * (self.scans - 1)
        self.street = Street(self.key, length, self.step_time, self.scans, name in UNSEEN)
        self.directions = ray_directions(plan.beams, plan.columns)
        self._still = Caster(self.street.soup)

    def scan(self, index: int) -> tuple[NDArray, NDArray]:
        """Points (n, 4) float32 x, y, z, remission in the sensor's frame, and labels (n,) uint32."""
        rng = np.random.default_rng([*self.key, 2, index])
        pose = self.street.sensor_pose(index, MAST)
        rays = self.directions @ pose[:3, :3].T
        hits = self._still.cast(pose[:3, 3], rays)
        place, reach = self.plan.spacing * index, self.plan.max_range + 8
        moving = self.street.moving(index * self.step_time, place, reach)
        if moving is not None:
            others = Caster(moving).cast(pose[:3, 3], rays)
            nearer = others[0] < hits[0]
            hits = tuple(np.where(nearer, a, b) for a, b in zip(others, hits, strict=True))
        distance, cosine, label, reflectivity, drop, scatter = hits
        keep = (distance >= MIN_RANGE) & (distance <= self.plan.max_range)
        keep &= ~_lost(rng, distance, cosine, reflectivity, drop)
        distance, cosine, label, reflectivity, scatter = (
            v[keep] for v in (distance, cosine, label, reflectivity, scatter)
        )
        noisy = (
            distance + rng.normal(0, 0.02, len(distance)) + scatter * rng.normal(size=len(distance))
        )
        remission = _remission(rng, distance, cosine, reflectivity, self.street.gain)
        points = np.column_stack([self.directions[keep] * noisy[:, None], remission])
        return points.astype(np.float32), label.astype(np.uint32)

    def calibration(self) -> dict[str, NDArray]:
        """Camera matrices P0..P3 and Tr (velodyne to camera 0), each (3, 4)."""
        rng = np.random.default_rng([*self.key, 4])
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
        table["Tr"] = np.column_stack([x @ y @ z @ axes, shift])
        return table

    def camera_poses(self) -> NDArray:
        """Poses (scans, 3, 4) of camera 0 in the frame of camera 0 at the first scan."""
        to_camera = np.vstack([self.calibration()["Tr"], [0, 0, 0, 1]])
        poses = np.stack([self.street.sensor_pose(i, MAST) for i in range(self.scans)])
        return (to_camera @ np.linalg.inv(poses[0]) @ poses @ np.linalg.inv(to_camera))[:, :3]


def _lost(
    rng: Generator, distance: NDArray, cosine: NDArray, reflectivity: NDArray, drop: NDArray
) -> NDArray:
    """Which rays do not come back: far, dark, grazing or through glass, and a few others."""
    reach = np.minimum(np.where(np.isfinite(distance), distance, 0) / 50, 1.5)
    weak = np.clip((0.05 - reflectivity * cosine) / 0.05, 0, 1)
    chance = 1 - (1 - drop) * (1 - 0.015) * (1 - 0.2 * reach**2) * (1 - 0.5 * weak * reach)
    return rng.random(len(distance)) < chance


def _remission(
    rng: Generator, distance: NDArray, cosine: NDArray, reflectivity: NDArray, gain: float
) -> NDArray:
    """Remission in 0..0.99 in steps of 0.01: material, angle, range, speckle."""
    speckle = rng.lognormal(0, 0.2, len(distance))
    signal = gain * reflectivity * (0.35 + 0.65 * cosine) * (1 - 0.35 * distance / 50) * speckle
    signal = signal + rng.normal(0, 0.02, len(distance))
    return np.round(np.clip(signal, 0, 0.99), 2)


# Writing


def _replace_with(path: Path, data: bytes) -> None:
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


def _complete(folder: Path, index: int) -> bool:
    scan, label = (_size(path) for path in _scan_files(folder, index))
    return scan > 0 and scan % 16 == 0 and label == scan // 4


@lru_cache(maxsize=1)
def _simulator(plan_text: str, name: str) -> Simulator:
    return Simulator(Plan(**json.loads(plan_text)), name)


def _write_scans(plan_text: str, folder: str, name: str, indices: list[int]) -> tuple[int, int]:
    """Simulate some scans of one sequence; returns how many scans and points were written."""
    simulator, target, points = _simulator(plan_text, name), Path(folder), 0
    for index in indices:
        scan, label = simulator.scan(index)
        if not len(scan):
            raise InputError(f"sequence {name}, scan {index}: no returns; use more --columns")
        scan_file, label_file = _scan_files(target, index)
        _replace_with(label_file, label.astype("<u4").tobytes())
        _replace_with(scan_file, scan.astype("<f4").tobytes())
        points += len(scan)
    return len(indices), points


def _write_tables(plan_text: str, folder: str, name: str) -> None:
    simulator, target = _simulator(plan_text, name), Path(folder)
    table = simulator.calibration()
    _replace_with(target / "calib.txt", _rows(table.values(), table))
    _replace_with(target / "poses.txt", _rows(simulator.camera_poses()))
    times = np.arange(simulator.scans) * simulator.step_time
    _replace_with(target / "times.txt", _rows(times))


def _work(job: tuple[str, str, str, list[int], bool]) -> tuple[int, int]:
    plan_text, folder, name, indices, tables = job
    if tables:
        _write_tables(plan_text, folder, name)
    return _write_scans(plan_text, folder, name, indices)


def _claim_folder(out: Path, plan: Plan, note: dict[str, Any]) -> None:
    """Write the plan into the folder, or refuse a folder that holds something else."""
    card, wanted = out / "dataset.json", {"generator": GENERATOR, "plan": asdict(plan)}
    if card.is_file():
        try:
            found = json.loads(card.read_text(encoding="utf-8"))
            old, version = dict(found["plan"]), found["generator"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{card}: not written by this tool; use another --out") from error
        if version != GENERATOR:
            raise InputError(
                f"{card}: made by generator {version}, this is {GENERATOR}; use another --out"
            )
        changed = [key for key, value in wanted["plan"].items() if old.get(key) != value]
        if changed:
            key = changed[0]
            raise InputError(
                f"{out} holds scans with {key}={old.get(key)}, asked for {key}="
                f"{wanted['plan'][key]}; use another --out or delete the folder"
            )
        return
    if (out / "dataset").exists():
        raise InputError(f"{out}/dataset exists without dataset.json; use another --out")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file; give a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        _replace_with(card, (json.dumps({**wanted, **note}, indent=2) + "\n").encode())
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
    _embree()
    out = Path(out)
    _claim_folder(out, plan, note or {})
    begin, plan_text = time.perf_counter(), json.dumps(asdict(plan))
    jobs, kept = [], 0
    for name, count in plan.scans.items():
        folder = out / "dataset" / "sequences" / name
        for part in ("velodyne", "labels"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        missing = [i for i in range(count) if not _complete(folder, i)]
        tables = any(_size(folder / f"{t}.txt") < 0 for t in ("calib", "poses", "times"))
        kept += count - len(missing)
        for start in range(0, max(len(missing), int(tables)), CHUNK):
            part = missing[start : start + CHUNK]
            jobs.append((plan_text, str(folder), name, part, tables and start == 0))
    workers = min(workers or usable_cores(), max(len(jobs), 1))
    written = points = 0
    total = sum(len(job[3]) for job in jobs)
    with tqdm(total=total, unit="scan", desc="simulate", disable=not progress) as bar:
        for done, more in _run(jobs, workers):
            written, points = written + done, points + more
            bar.update(done)
    seconds = time.perf_counter() - begin
    return Report(written, kept, points, seconds, class_shares(out / "dataset" / "sequences"))


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run(jobs: list[tuple], workers: int) -> Iterable[tuple[int, int]]:
    if workers < 2:
        yield from map(_work, jobs)
        return
    context = multiprocessing.get_context("spawn")
    # Ctrl-C reaches the whole process group; the parent alone should answer it.
    quiet = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    pool = ProcessPoolExecutor(workers, mp_context=context, **quiet)
    try:
        for future in as_completed([pool.submit(_work, job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def class_shares(sequences: Path) -> dict[int, float]:
    """Share of each raw class id among all points of a folder of sequences."""
    counts = np.zeros(1 << 16, np.int64)
    for path in sorted(sequences.glob("*/labels/*.label")):
        counts += np.bincount(np.fromfile(path, "<u4") & 0xFFFF, minlength=1 << 16)
    total = max(int(counts.sum()), 1)
    return {int(i): float(counts[i] / total) for i in np.flatnonzero(counts)}
