"""Read all of a data set and name every broken file: what is wrong, what was expected, what to do.

Layouts: SemanticKITTI (also with camera images, as in KITTI odometry), nuScenes with its info files, Waymo frames, and
folders of `.npy` as `DefaultDataset` reads them.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointcept_kd.host import InputError

from . import semantic_kitti
from .check_folders import check_folders
from .findings import Problem, as_problem, coordinates, images, pictures, rotation, strengths
from .scans import finite_numbers

KINDS = ("auto", "semantic_kitti", "nuscenes", "waymo", "folders")


def check(
    data_root: str | os.PathLike[str],
    kind: str = "auto",
    workers: int | None = None,
    num_classes: int | None = None,
    ignore_index: int = -1,
) -> Iterator[tuple[Path, list[Problem]]]:
    """Read every file of a data set.

    Args:
        data_root: the folder that a config names `data_root`.
        kind: one of `KINDS`; `auto` looks at the folders.
        workers: threads that read; one per core by default. nuScenes and Waymo scans are read by one.
        num_classes, ignore_index: labels that a folder of `.npy` may hold; without `num_classes` only those below
            `ignore_index` are wrong.

    Yields:
        each file (each scan's folder where a scan is one) with its problems; for most the list is empty.

    Raises:
        InputError: for a folder with no such data.
    """
    root = Path(data_root)
    if kind not in KINDS:
        raise InputError(f"kind={kind!r}: use one of {', '.join(KINDS)}")
    if workers is not None and workers < 1:
        raise InputError(f"workers={workers}: use 1 or more")
    if not root.is_dir():
        raise InputError(
            f"{root} is no folder; give the folder that a config names data_root, or make a small one: "
            "python tools/prepare_data.py simulate --out FOLDER"
        )
    kind = detect(root) if kind == "auto" else kind
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        if kind == "semantic_kitti":
            yield from _semantic_kitti(root, pool)
        elif kind == "nuscenes":
            yield from _nuscenes(root, pool)
        elif kind == "waymo":
            yield from _waymo(root)
        else:
            yield from check_folders(root, pool, num_classes, ignore_index)


def detect(root: Path) -> str:
    """The layout of a folder.

    Raises:
        InputError: for none that is known.
    """
    if (root / "dataset" / "sequences").is_dir():
        return "semantic_kitti"
    if any((root / name).is_dir() for name in ("info", "raw")) or any(root.glob("v1.0-*")):
        return "nuscenes"
    splits = ("training", "validation", "testing")
    if any(True for split in splits for _ in (root / split).glob("*/*/coord.npy")):
        return "waymo"
    if any(name.endswith(".npy") for _, _, names in os.walk(root) for name in names):
        return "folders"
    for up, inside in ((root.parent, root / "sequences"), (root.parent.parent, root)):
        if inside.name == "sequences" and inside.is_dir():
            raise InputError(f"{root}: give the folder that holds dataset/sequences, {up}")
    raise InputError(
        f"{root}: no dataset/sequences (SemanticKITTI), no info/*.pkl (nuScenes), no training/*/*/coord.npy (Waymo), "
        "no *.npy; give the folder that a config names data_root"
    )


# ---- SemanticKITTI -------------------------------------------------------------------------------


def _semantic_kitti(root: Path, pool: ThreadPoolExecutor) -> Iterator[tuple[Path, list[Problem]]]:
    root = root / "dataset" / "sequences"
    if not root.is_dir():
        raise InputError(f"{root} is no folder; {semantic_kitti._WHERE_FROM}")
    folders = sorted(f for f in root.iterdir() if f.is_dir() and f.name[0] != ".")
    if not any(True for f in folders for _ in (f / "velodyne").glob("[!.]*.bin")):
        raise InputError(f"{root}: no SS/velodyne/*.bin; {semantic_kitti._WHERE_FROM}")
    for folder in folders:
        yield from _sequence(folder, pool)


def _sequence(folder: Path, pool: ThreadPoolExecutor) -> Iterator[tuple[Path, list[Problem]]]:
    if not re.fullmatch(r"\d\d", folder.name):
        line = f"{folder}: no reader finds this name, expected two digits such as 04; rename it"
        yield folder, [Problem(line, "name")]
    scans = sorted((folder / "velodyne").glob("[!.]*.bin"))
    labels = sorted((folder / "labels").glob("[!.]*.label"))
    if not scans:
        line = f"{folder / 'velodyne'}: no scans; copy them, or remove the folder {folder.name}"
        yield folder / "velodyne", [Problem(line, "missing")]
    withheld = folder.name in semantic_kitti.SPLITS["test"]
    if scans and not labels and not withheld:
        line = f"{folder / 'labels'}: no labels; all points are ignored, which only terms without labels can use"
        yield folder / "labels", [Problem(line, "no labels", hint=True)]
    for found in pool.map(partial(_scan, labelled=bool(labels) and not withheld), scans):
        yield from found
    stems = {scan.stem for scan in scans}
    for label in labels:
        if label.stem not in stems:
            line = f"{label}: no scan velodyne/{label.stem}.bin belongs to it; copy the scan or remove the labels"
            yield label, [Problem(line, "labels without scan")]
    last, numbers = -1, defaultdict(list)
    for scan in scans:
        if scan.stem.isdigit():
            numbers[int(scan.stem)].append(scan)
            last = max(last, int(scan.stem))
        else:
            line = f"{scan}: the file name is no number, expected one such as 000012.bin; rename it"
            yield scan, [Problem(line, "name")]
    for number, same in numbers.items():
        for scan in same[1:]:
            line = (
                f"{scan}: number {number} is taken by {same[0].name}, expected one scan per number as row "
                f"{number} of poses.txt has one pose; remove one of them"
            )
            yield scan, [Problem(line, "duplicate")]
    yield from _tables(folder, last)
    for pattern in ("image_[0-9]", "weak_labels", "superpixels"):
        for inner in sorted(folder.glob(pattern)):
            yield from images(pictures(inner), pool)


def _scan(path: Path, labelled: bool) -> list[tuple[Path, list[Problem]]]:
    """A scan and its labels."""
    points, found, wrong = None, [], []
    try:
        scan = semantic_kitti.read_scan(path)
        points = len(scan)
        found += coordinates(path, scan[:, :3]) + strengths(path, scan[:, 3], "problem")
    except InputError as error:
        found.append(as_problem(str(error)))
    label = path.parent.parent / "labels" / f"{path.stem}.label"
    if os.path.lexists(label):
        try:
            semantic_kitti.map_labels(semantic_kitti.read_labels(label, points))
        except InputError as error:
            wrong.append(as_problem(str(error)))
        except ValueError as error:
            line = f"{label}: {error}; the file is damaged or of another data set, copy it again"
            wrong.append(Problem(line, "unknown class"))
    elif labelled:
        line = f"{label}: missing; its points would be ignored, copy it or remove the scan"
        wrong.append(Problem(line, "missing"))
    return [(path, found), (label, wrong)]


def _tables(folder: Path, last: int) -> Iterator[tuple[Path, list[Problem]]]:
    """`calib.txt`, `poses.txt`, `times.txt`; `last` is the highest scan number."""
    calib, poses, times = (folder / f"{name}.txt" for name in ("calib", "poses", "times"))
    cameras = [i.name[-1] for i in sorted(folder.glob("image_[0-9]")) if pictures(i)]
    if not cameras and not os.path.lexists(calib) and not os.path.lexists(poses):
        if last >= 0:
            line = f"{folder}: no calib.txt and poses.txt; merged scans and cameras need them, single scans do not"
            yield folder, [Problem(line, "no poses", hint=True)]
    else:
        yield calib, _calibration_problems(calib, cameras)
        yield poses, _pose_problems(poses, last)
    if os.path.lexists(times):
        yield times, _time_problems(times, last)


def _calibration_problems(path: Path, cameras: list[str]) -> list[Problem]:
    try:
        table = semantic_kitti.load_calib(path)
    except InputError as error:
        return [as_problem(str(error))]
    lines = []
    for name, why in [("Tr", "poses"), *((f"P{n}", f"image_{n}") for n in cameras)]:
        if name not in table:
            text = f"{path}: no row {name}, which {why} needs; use the calib.txt of the SemanticKITTI download"
            lines.append(Problem(text, "calibration"))
        elif name != "Tr" and not (table[name][0, 0] > 0 and table[name][1, 1] > 0):
            text = f"{path}: {name} has a focal length of {table[name][0, 0]:g}, expected pixels above 0; copy it again"
            lines.append(Problem(text, "calibration"))
    if "Tr" in table and (text := rotation(table["Tr"][:3, :3])):
        lines.append(Problem(f"{path}: Tr {text}; copy the file again", "calibration"))
    return lines


def _numbers(path: Path, count: int) -> tuple[NDArray, list[Problem]]:
    """Rows of a text file, NaN for those that cannot be used, and what is wrong with them."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        text = f"{path}: missing; copy it, row i belongs to scan i"
        return np.empty((0, count)), [Problem(text, "missing")]
    except (OSError, UnicodeDecodeError) as error:
        text = (
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); copy it again"
        )
        return np.empty((0, count)), [Problem(text, "unreadable")]
    while lines and not lines[-1].strip():
        lines.pop()
    values, bad = np.full((len(lines), count), np.nan), []
    for row, line in enumerate(lines):
        numbers = finite_numbers(line.split(), count)
        if numbers is None:
            bad.append(row)
        else:
            values[row] = numbers
    if not lines:
        return values, [Problem(f"{path}: the file is empty; copy it again", "empty")]
    if bad:
        text = (
            f"{path}: row {bad[0]} should hold {count} finite numbers, got {lines[bad[0]].strip()[:60]!r} "
            f"({len(bad)} such rows); copy the file again"
        )
        return values, [Problem(text, "numbers")]
    return values, []


def _enough(path: Path, rows: int, last: int) -> list[Problem]:
    if rows > last:
        return []
    text = f"{path}: {rows} rows, but scans up to {last:06d}, expected {last + 1}; use the complete file"
    return [Problem(text, "too few rows")]


def _pose_problems(path: Path, last: int) -> list[Problem]:
    values, lines = _numbers(path, 12)
    if not len(values):
        return lines
    for row in np.flatnonzero(np.isfinite(values).all(1)):
        text = rotation(values[row].reshape(3, 4)[:, :3])
        if text:
            lines.append(Problem(f"{path}: row {row} {text}; use the original file", "no rotation"))
            break
    return lines + _enough(path, len(values), last)


def _time_problems(path: Path, last: int) -> list[Problem]:
    values, lines = _numbers(path, 1)
    if not len(values):
        return lines
    back = np.flatnonzero(np.diff(values[:, 0]) <= 0)
    if len(back):
        row = int(back[0]) + 1
        text = (
            f"{path}: row {row} is {values[row, 0]:g} s after {values[row - 1, 0]:g} s, expected rising times; "
            "use the original file"
        )
        lines.append(Problem(text, "times"))
    return lines + _enough(path, len(values), last)


# ---- nuScenes and Waymo --------------------------------------------------------------------------


def _nuscenes(root: Path, pool: ThreadPoolExecutor) -> Iterator[tuple[Path, list[Problem]]]:
    from .nuscenes import problems

    for path, lines in problems(root):
        found = [as_problem(line) for line in lines]
        if not found and path.suffix == ".bin":
            found = coordinates(path, np.fromfile(path, "<f4").reshape(-1, 5)[:, :3])
        yield path, found
    for pattern in ("samples/CAM_*", "camseg/CAM_*", "superpixels*"):
        for folder in sorted((root / "raw").glob(pattern)):
            yield from images(pictures(folder), pool)


def _waymo(root: Path) -> Iterator[tuple[Path, list[Problem]]]:
    from .waymo import problems

    for frame, lines in problems(root):
        found = [as_problem(line) for line in lines]
        if not found:
            path = frame / "coord.npy"
            found = coordinates(path, np.load(path, allow_pickle=False))
        yield frame, found


def survey(
    found: Iterable[tuple[Path, list[Problem]]], tell: Callable[[Problem], Any]
) -> tuple[int, list[dict[str, Any]]]:
    """Count scans and collect what `check` yields as plain values for JSON.

    Args:
        found: from `check`.
        tell: called with every line as it comes.

    Returns:
        scans, and one dict per line with `file`, `kind`, `hint` and `text`.
    """
    scans, entries = 0, []
    for path, lines in found:
        scans += path.suffix == ".bin" or (path / "coord.npy").is_file()
        for line in lines:
            entry = {"file": line.partition(": ")[0], "kind": line.kind, "hint": line.hint}
            entries.append({**entry, "text": str(line)})
            tell(line)
    return scans, entries


def summary(scans: int, found: list[dict[str, Any]]) -> str:
    """One line: how many scans, problems by kind, hints."""
    kinds = Counter(entry["kind"] for entry in found if not entry["hint"])
    problems, hints = kinds.total(), sum(entry["hint"] for entry in found)
    line = f"{scans} scans, {problems or 'no'} problem{'s' if problems != 1 else ''}"
    if problems:
        line += ": " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return line + (f"; {hints} hint{'s' if hints != 1 else ''}" if hints else "")


def write_report(path: Path, scans: int, found: list[dict[str, Any]]) -> None:
    """Write scans and lines as JSON, complete or not at all.

    Raises:
        InputError: where it cannot be written.
    """
    hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        hidden.write_text(json.dumps({"scans": scans, "found": found}, indent=2) + "\n")
        os.replace(hidden, path)
    except OSError as error:
        hidden.unlink(missing_ok=True)
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); choose another file"
        ) from error
