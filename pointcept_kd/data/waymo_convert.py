"""Waymo Open Dataset segments to the folders that `WaymoDataset` (and Pointcept's) reads.

    OUT/SPLIT/SEGMENT/TIMESTAMP/coord.npy     (n, 3) float32, vehicle frame, metres
                               /strength.npy  (n, 1) float32, tanh of the intensity
                               /segment.npy   (n,) int32, 0..21, -1 without label; labelled frames only
                               /instance.npy  (n,) int32, which object of its class, 0 without; beside segment.npy
                               /pose.npy      (4, 4) float64, vehicle to world
                               /mask.npy      not for training: the pixels that are points, of each return and laser
                                              (2, 5), by which predictions go back into range images;
                                              an object array, as Pointcept's submission tool takes it

Points are those of all lasers (TOP first), then their second returns, row by row. A pixel in column j of w and row i,
at range r, whose beam has inclination b_i (rows run downwards) lies at

    a = pi (2 (w - j - 1/2) / w - 1) - atan2(E_10, E_00)
    p = E r (cos a cos b_i, sin a cos b_i, sin b_i)             E: extrinsic, sensor to vehicle

While TOP turns, the vehicle moves, so each of its pixels has a vehicle pose of its own, Rz(yaw) Ry(pitch) Rx(roll) and
a translation, and its points are moved from there through the world into the frame's pose. Points in no-label zones
(which are about boxes) stay.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pointcept_kd.host import InputError

from .waymo_records import Frame, Laser, read_frames
from .workers import run

SPLITS = ("training", "validation", "testing")
CLASSES = 22
RETURNS = 2


def inclinations(laser: Laser, rows: int) -> NDArray:
    """Inclination of each row (rows,) in radians, the highest first.

    Raises:
        ValueError: when the calibration has another number of beams.
    """
    if laser.inclinations is None:
        low, high = laser.span
        beams = low + (np.arange(rows) + 0.5) / rows * (high - low)
    else:
        beams = laser.inclinations
    if len(beams) != rows:
        raise ValueError(f"{len(beams)} beam inclinations for {rows} rows")
    return beams[::-1]


def image_points(
    distance: NDArray,
    beams: NDArray,
    extrinsic: NDArray,
    pixel_pose: NDArray | None = None,
    frame_pose: NDArray | None = None,
) -> tuple[NDArray, NDArray]:
    """Points of a range image: those pixels whose range is above 0, row by row.

    Args:
        distance: (h, w) metres.
        beams: (h,) inclinations in radians, top row first.
        extrinsic: (4, 4) sensor to vehicle.
        pixel_pose: (h, w, 6) roll, pitch, yaw, x, y, z of the vehicle in the world at each pixel; needs `frame_pose`.
        frame_pose: (4, 4) vehicle to world; the points are in its frame.

    Returns:
        points (n, 3) float64 and the mask (h, w) of their pixels.
    """
    mask = distance > 0
    row, column = np.nonzero(mask)
    width = distance.shape[1]
    reach = distance[mask].astype(np.float64)
    correction = np.arctan2(extrinsic[1, 0], extrinsic[0, 0])
    azimuth = np.pi * (2 * (width - np.arange(width) - 0.5) / width - 1) - correction
    flat = reach * np.cos(beams)[row]
    x, y = flat * np.cos(azimuth)[column], flat * np.sin(azimuth)[column]
    points = np.stack([x, y, reach * np.sin(beams)[row]], axis=1)
    points = points @ extrinsic[:3, :3].T + extrinsic[:3, 3]
    if pixel_pose is not None and frame_pose is not None:
        back = np.linalg.inv(frame_pose)
        points = _to_world(points, pixel_pose[mask].astype(np.float64))
        points = points @ back[:3, :3].T + back[:3, 3]
    return points, mask


def _to_world(points: NDArray, poses: NDArray) -> NDArray:
    """Each point by its own roll, pitch, yaw (about x, then y, then z) and translation (n, 6)."""
    (x, y, z), (roll, pitch, yaw) = points.T, poses[:, :3].T
    cos, sin = np.cos(roll), np.sin(roll)
    y, z = cos * y - sin * z, sin * y + cos * z
    cos, sin = np.cos(pitch), np.sin(pitch)
    x, z = cos * x + sin * z, cos * z - sin * x
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.stack([cos * x - sin * y, sin * x + cos * y, z], axis=1) + poses[:, 3:]


def frame_arrays(frame: Frame) -> dict[str, NDArray]:
    """`coord`, `strength`, `pose`, `mask` and, of a labelled frame, `segment` and `instance`, as the files hold them.

    Raises:
        InputError: for a record that lacks something or whose parts do not fit together.
    """
    pose, lasers = frame.pose(), frame.lasers()
    if abs(np.linalg.det(pose)) < 1e-6:
        raise frame.fail("pose is singular")
    coord, strength, segment = [], [], []
    mask = np.empty((RETURNS, len(lasers)), object)
    for back in range(RETURNS):
        for place, laser in enumerate(lasers):
            if back >= len(laser.images):
                mask[back, place] = np.zeros_like(mask[0, place])
                continue
            what = f"the range image of laser {laser.name}, return {back + 1}"
            image = frame.image(laser.images[back], "<f4", what)
            if image.ndim != 3 or image.shape[2] < 2:
                raise frame.fail(f"{what} has shape {image.shape}, expected (rows, columns, 4)")
            pixels = None
            if laser.pixel_pose is not None:
                pixels = frame.image(laser.pixel_pose, "<f4", "range_image_pose of TOP")
                if pixels.shape != (*image.shape[:2], 6):
                    raise frame.fail(f"{pixels.shape} poses for {what} of shape {image.shape}")
            try:
                beams = inclinations(laser, len(image))
            except ValueError as error:
                raise frame.fail(f"{what}: {error}") from error
            points, valid = image_points(image[..., 0], beams, laser.extrinsic, pixels, pose)
            mask[back, place] = valid
            coord.append(points.astype(np.float32))
            strength.append(np.tanh(image[..., 1][valid])[:, None])
            segment.append(_labels(frame, laser, back, valid))
    arrays = {
        "coord": np.concatenate(coord),
        "strength": np.concatenate(strength),
        "pose": pose,
        "mask": mask,
    }
    if not len(arrays["coord"]):
        raise frame.fail("no range image has a point")
    if frame.labelled:
        arrays["instance"], arrays["segment"] = np.concatenate(segment).T.copy()
    return arrays


def _labels(frame: Frame, laser: Laser, back: int, valid: NDArray) -> NDArray:
    """Instance, 0, and class, -1 where there is none (n, 2): only TOP has labels, and not for every point."""
    compressed = laser.labels[back]
    if not len(compressed):
        return np.tile(np.int32([0, -1]), (int(valid.sum()), 1))
    what = f"segmentation_label of laser {laser.name}, return {back + 1}"
    labels = frame.image(compressed, "int", what)
    if labels.shape != (*valid.shape, 2):
        raise frame.fail(f"{what} has shape {labels.shape}, the range image {valid.shape}")
    found = labels[valid].astype(np.int32)
    classes = found[:, 1]
    bad = (classes < 0) | (classes > CLASSES)
    if bad.any():
        raise frame.fail(f"{what} has class {int(classes[bad][0])}, expected 0 to {CLASSES}")
    found[classes == 0, 0] = 0
    return found - np.int32([0, 1])


# ---- files


def write_frame(folder: Path, arrays: dict[str, NDArray]) -> None:
    """Write the `.npy` files of one frame; the folder appears when it is complete."""
    hidden = folder.with_name(f".{folder.name}.tmp")
    hidden.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(hidden / f"{name}.npy", array)
    if folder.exists():  # an incomplete one of another tool
        shutil.rmtree(folder)
    os.replace(hidden, folder)


@dataclass(frozen=True)
class Plan:
    """What to take from segment files. `frames`: pairs of context and timestamp, or None for all."""

    split: str
    labelled_only: bool = False
    frames: frozenset[tuple[str, int]] | None = None

    def wants(self, frame: Frame) -> bool:
        """Whether this frame is to be written."""
        if self.frames is not None and (frame.context, frame.timestamp) not in self.frames:
            return False
        return not self.labelled_only or frame.labelled

    def stamp(self) -> dict[str, Any]:
        """What a finished file is remembered by."""
        listed = None if self.frames is None else repr(sorted(self.frames)).encode()
        digest = None if listed is None else hashlib.sha256(listed).hexdigest()
        return {"labelled_only": self.labelled_only, "frames_sha256": digest, "instances": True}


@dataclass
class Report:
    """What a run did; `problems` has one line per file that could not be finished."""

    written: int = 0
    kept: int = 0
    points: int = 0
    files: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def convert_file(path: Path, out: Path, plan: Plan, report: Report | None = None) -> Report:
    """Write the frames of one segment file to `out/SEGMENT`; complete ones are kept. Counts into `report`.

    Raises:
        InputError: for a file that cannot be used or a folder that cannot be written; the frames before it stay.
    """
    report = Report() if report is None else report
    report.files, folder = 1, out / path.name.split(".")[0]
    note = out / ".done" / f"{folder.name}.json"
    try:
        stamp = {"bytes": path.stat().st_size, **plan.stamp()}
        report.kept = _finished(note, stamp, folder)
        if report.kept:
            return report
        frames = []
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):  # of an interrupted run: a segment has one writer
            shutil.rmtree(leftover)
        for frame in read_frames(path):
            if not plan.wants(frame):
                continue
            target = folder / str(frame.timestamp)
            frames.append(target.name)
            needed = ["coord", "strength", "pose"]
            needed += ["segment", "instance"] if frame.labelled and plan.split != "testing" else []
            needed += ["mask"] if plan.split != "training" else []
            if all((target / f"{name}.npy").is_file() for name in needed):
                report.kept += 1
                continue
            arrays = frame_arrays(frame)
            write_frame(target, {name: arrays[name] for name in needed})
            report.written += 1
            report.points += len(arrays["coord"])
        if not any(folder.iterdir()):
            folder.rmdir()
        note.parent.mkdir(exist_ok=True)
        hidden = note.with_name(f".{note.name}.{os.getpid()}.tmp")
        hidden.write_text(json.dumps({**stamp, "frames": frames}) + "\n", encoding="utf-8")
        os.replace(hidden, note)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); free space there or use another --out"
        ) from error
    return report


def _finished(note: Path, stamp: dict[str, Any], folder: Path) -> int:
    """How many frames an earlier run wrote from this file; 0 unless it finished it in the same way."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        frames = list(found.pop("frames"))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return 0
    there = all((folder / str(name) / "coord.npy").is_file() for name in frames)
    return len(frames) if found == stamp and there else 0


def _work(job: tuple[Path, Path, Plan]) -> Report:
    report = Report()
    try:
        convert_file(*job, report)
    except InputError as error:
        report.problems.append(str(error))
    return report


def segment_files(raw: str | os.PathLike[str], split: str) -> list[Path]:
    """The `*.tfrecord` files of `raw`, or of its subfolder `split`, by name.

    Raises:
        InputError: when there are none.
    """
    raw = Path(raw)
    for folder in (raw, raw / split):
        files = sorted(folder.glob("[!.]*.tfrecord")) if folder.is_dir() else []
        if files:
            return files
    raise InputError(
        f"--raw: no *.tfrecord in {raw} or {raw / split}; get the segments of the perception data set v1.4 "
        "from https://waymo.com/open"
    )


def shard_of(items: Sequence[Any], shard: str | None) -> list[Any]:
    """Part i of n, of a text "i/n" with i from 1 to n; the parts are disjoint and cover all items.

    Raises:
        InputError: for another text.
    """
    if shard is None:
        return list(items)
    number, _, count = shard.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise InputError(f"--shard: {shard!r}; use i/n with i from 1 to n, such as 1/8")
    return list(items)[int(number) - 1 :: int(count)]


def read_frame_list(path: str | os.PathLike[str]) -> frozenset[tuple[str, int]]:
    """Lines `context,timestamp`, as in the official list of frames that the test server scores.

    Raises:
        InputError: for a file that cannot be read or another line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--frames: {path} cannot be read ({error})") from error
    pairs = set()
    for row, line in enumerate(lines, 1):
        if line.strip():
            context, _, stamp = line.strip().rpartition(",")
            if not context or not stamp.isdigit():
                raise InputError(f"{path}: line {row} is {line[:60]!r}, expected context,timestamp")
            pairs.add((context, int(stamp)))
    return frozenset(pairs)


def convert(
    raw: str | os.PathLike[str],
    out: str | os.PathLike[str],
    plan: Plan,
    shard: str | None = None,
    workers: int = 1,
    tell: Callable[[str], None] | None = None,
    progress: bool = True,
) -> Report:
    """Write `out/SPLIT` from the segment files of `raw`, several files at a time.

    A file that cannot be used does not stop the others: it is told (to `tell`) and listed in the report. Running again
    writes what is missing.

    Raises:
        InputError: without segment files, or for a folder that cannot be written.
    """
    if plan.split not in SPLITS:
        raise InputError(f"--split: {plan.split!r}; use one of {', '.join(SPLITS)}")
    begin, total = time.perf_counter(), Report()
    target = Path(out) / plan.split
    jobs = [(path, target, plan) for path in shard_of(segment_files(raw, plan.split), shard)]
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: cannot create {target} ({error.strerror})") from error
    with tqdm(total=len(jobs), unit="file", desc="waymo", disable=not progress) as bar:
        for part in run(_work, jobs, workers):
            for name in ("written", "kept", "points", "files"):
                setattr(total, name, getattr(total, name) + getattr(part, name))
            total.problems += part.problems
            for line in part.problems if tell is not None else ():
                bar.clear()
                tell(line)
            bar.set_postfix(frames=total.written + total.kept)
            bar.update()
    total.seconds = time.perf_counter() - begin
    return total
