"""Ground truth for scene completion: all static points of a drive in one map, one point per 10 cm.

    for every scan, in order:  1 < label < 252,  |p| > 3.5 m,  m = T p,  kept if the cell floor(m / 0.1 m) is new

`T` is the scan's velodyne pose. Moving objects (252 to 259), unlabelled points and outliers stay out, and so does the
car that carries the sensor. The first point seen in a cell stands for it, whatever comes later, so a map does not
depend on anything but its scans. Points are rounded to float32 first, and cells are those of the rounded points.

A drive of thousands of scans is read scan by scan; what stays in memory is one bit for each cell near a surface (see
`CellSet`). Maps are stored in tiles; see `map_tiles`.

The recipe is that of LiDiff (Nunes et al., CVPR 2024, arXiv:2403.13470), whose range also counts the remission and
whose choice of a point per cell is not defined.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pointcept_kd.host import InputError

from .map_tiles import FOLDER, PLAIN, VERSION, Map, TileWriter
from .scans import NONFINITE, finite_rows, numbers_of_row, read_bytes, read_rows, require_choice
from .semantic_kitti import load_poses, read_labels, read_scan
from .workers import run

CELL = 0.1  # metres
NEAR = 3.5  # metres: the car itself
MOVING = 252  # the first of the moving classes
SOURCES = ("scans", "plain")

_RANGE = 1 << 20  # cells on either side of the origin that can be packed: 104 km
_SAMPLED = 4  # label files whose content is part of the digest


def static_rows(points: NDArray, labels: NDArray, near: float = NEAR) -> NDArray:
    """Mask (n,) of the points that belong into a map.

    Args:
        points: (n, 3 or more) in the sensor's frame; only x, y, z count.
        labels: (n,) as stored, instance ids allowed in the high 16 bits.
    """
    ids = labels & 0xFFFF
    return (ids > 1) & (ids < MOVING) & farther(points, near)


def farther(points: NDArray, reach: float) -> NDArray:
    """Mask (n,) of the points farther from the sensor than `reach` metres, over x, y and z."""
    return ranges(points) > reach * reach


def ranges(points: NDArray) -> NDArray:
    """Squared distances (n,) float32 of points (n, 3 or more) from the sensor."""
    x, y, z = (points[:, axis] for axis in range(3))
    total = x * x
    total += y * y
    total += z * z
    return total


def transformed(points: NDArray, pose: NDArray) -> NDArray:
    """Points (n, 3) moved by a pose (4, 4), computed in float64, float32."""
    moved = points[:, :3].astype(np.float64) @ pose[:3, :3].T
    for axis in range(3):
        moved[:, axis] += pose[axis, 3]
    return moved.astype(np.float32)


def cells_of(points: NDArray, cell: float) -> NDArray:
    """Cells (n, 3) int64 of points (n, 3): floor(p / cell).

    Raises:
        ValueError: for points more than a million cells from the origin.
    """
    cells = np.empty((len(points), 3), np.int64)
    for axis in range(3):
        cells[:, axis] = np.floor(points[:, axis].astype(np.float64) / cell)
    if len(cells) and not (cells.min() >= -_RANGE and cells.max() < _RANGE):
        raise ValueError(f"points lie more than {_RANGE * cell / 1000:.0f} km from the origin")
    return cells


def _pack(cells: NDArray) -> NDArray:
    shifted = cells + _RANGE
    return shifted[:, 0] << 42 | shifted[:, 1] << 21 | shifted[:, 2]


def first_of_cells(points: NDArray, cell: float = CELL) -> NDArray:
    """Rows (m,) int64, ascending, of the first point in each cell."""
    return np.sort(np.unique(_pack(cells_of(points, cell)), return_index=True)[1])


class CellSet:
    """A growing set of cells.

    Cells that exist share bricks of 8 x 8 x 8 with their neighbours, and a brick is 512 bits. Surfaces fill a brick
    to an eighth or more, so a cell costs about a byte; a lookup is a binary search among bricks and one bit.
    """

    def __init__(self) -> None:
        self._keys = np.empty(0, np.int64)  # of bricks, ascending
        self._slots = np.empty(0, np.int64)  # where the bits of each are
        self._bits = np.zeros((1024, 64), np.uint8)
        self.cells = 0

    def __len__(self) -> int:
        return self.cells

    @property
    def nbytes(self) -> int:
        """Memory that the set holds."""
        return self._keys.nbytes + self._slots.nbytes + self._bits.nbytes

    def add(self, cells: NDArray) -> NDArray:
        """Add cells (n, 3) int64; returns the rows (m,), ascending, that brought a cell first."""
        bricks = _pack(cells >> 3)
        within = (cells[:, 0] & 7) << 6 | (cells[:, 1] & 7) << 3 | cells[:, 2] & 7
        byte, bit = within >> 3, (1 << (within & 7)).astype(np.uint8)
        seen = np.zeros(len(cells), bool)
        if len(self._keys):
            place = np.minimum(np.searchsorted(self._keys, bricks), len(self._keys) - 1)
            known = np.flatnonzero(self._keys[place] == bricks)
            stored = self._bits[self._slots[place[known]], byte[known]]
            seen[known] = (stored & bit[known]) != 0
        fresh = np.flatnonzero(~seen)
        fresh = fresh[np.sort(np.unique(_pack(cells[fresh]), return_index=True)[1])]
        self._make_room(np.unique(bricks[fresh]))
        slots = self._slots[np.searchsorted(self._keys, bricks[fresh])]
        np.bitwise_or.at(self._bits.reshape(-1), slots * 64 + byte[fresh], bit[fresh])
        self.cells += len(fresh)
        return fresh

    def _make_room(self, bricks: NDArray) -> None:
        place = np.searchsorted(self._keys, bricks)
        if len(self._keys):
            there = self._keys[np.minimum(place, len(self._keys) - 1)] == bricks
            bricks, place = bricks[~there], place[~there]
        used = len(self._keys)
        need = used + len(bricks)
        if need > len(self._bits):
            grown = np.zeros((max(need, 2 * len(self._bits)), 64), np.uint8)
            grown[:used] = self._bits[:used]
            self._bits = grown
        self._slots = np.insert(self._slots, place, np.arange(used, need))
        self._keys = np.insert(self._keys, place, bricks)


class MapBuilder:
    """A map that grows scan by scan.

    Args:
        cell: metres; one point is kept in each cell.
        near: metres around the sensor that belong to the car.
    """

    def __init__(self, cell: float = CELL, near: float = NEAR) -> None:
        self.cell, self.near = cell, near
        self.seen = CellSet()

    def add(self, scan: NDArray, labels: NDArray, pose: NDArray) -> tuple[NDArray, NDArray]:
        """What a scan adds to the map.

        Args:
            scan: (n, 3 or more), sensor frame.
            labels: (n,) as stored.
            pose: (4, 4), sensor to world.

        Returns:
            points (m, 3) float32 in the world frame, and their classes (m,) uint16.
        """
        rows = np.flatnonzero(static_rows(scan, labels, self.near))
        points = transformed(scan[rows], pose)
        new = self.seen.add(cells_of(points, self.cell))
        return points[new], (labels[rows[new]] & 0xFFFF).astype(np.uint16)


# ------------------------------------------------------------------------------------------- a sequence


def sequence_poses(folder: str | os.PathLike[str]) -> NDArray:
    """Velodyne poses (n, 4, 4) float64 of a sequence: inv(Tr) Q_i Tr, or Q_i where there is no `calib.txt`.

    Raises:
        InputError: for files that are missing or malformed.
    """
    folder = Path(folder)
    if (folder / "calib.txt").is_file():
        return load_poses(folder)
    path = folder / "poses.txt"
    rows = [numbers_of_row(path, row, line, 12) for row, line in read_rows(path)]
    if not rows:
        raise InputError(f"{path}: no poses; copy the file again")
    poses = np.tile(np.eye(4), (len(rows), 1, 1))
    poses[:, :3] = np.stack(rows).reshape(-1, 3, 4)
    return poses


def scan_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The scans of a sequence by name."""
    return _files(Path(folder) / "velodyne", ".bin")


def _files(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        return []
    names = sorted(entry.name for entry in os.scandir(folder))
    return [folder / name for name in names if name.endswith(suffix) and name[0] != "."]


def posed_scans(
    folder: str | os.PathLike[str], incomplete: bool = False
) -> list[tuple[Path, Path, NDArray]]:
    """Scan, label file and pose (4, 4) of every scan of a sequence, in order.

    Args:
        incomplete: allow fewer scans than poses, as in an excerpt.

    Raises:
        InputError: without scans, for other numbers of scans, labels and poses, or a scan without a pose.
    """
    folder = Path(folder)
    scans, poses = scan_files(folder), sequence_poses(folder)
    if not scans:
        raise InputError(f"{folder / 'velodyne'}: no scans")
    if len(scans) > len(poses) or (len(scans) < len(poses) and not incomplete):
        raise InputError(
            f"{folder}: {len(scans)} scans and {len(poses)} poses; expected a pose for each scan"
            + ("" if len(scans) > len(poses) else ", or say that the sequence is --incomplete")
        )
    found = []
    for scan in scans:
        number = int(scan.stem) if scan.stem.isdigit() else -1
        if not 0 <= number < len(poses):
            raise InputError(
                f"{scan}: row i of poses.txt belongs to scan i, and it has {len(poses)} rows"
            )
        label = folder / "labels" / f"{scan.stem}.label"
        if not label.is_file():
            raise InputError(f"{label}: missing; a map needs the labels of all of its scans")
        found.append((scan, label, poses[number]))
    return found


def digest(folder: str | os.PathLike[str], source: str = "scans") -> str:
    """What a map of a sequence is made of, as one short text: another digest means a stale map.

    Of scans and labels, names and sizes count, and the content of a few label files; of poses and calibration the
    content. Times of change do not count: copying a data set does not make its maps stale.

    Raises:
        InputError: for files that cannot be read.
    """
    folder, found = Path(folder), hashlib.sha256(source.encode())
    if source == "plain":
        return _add_sizes(found, [folder / PLAIN]).hexdigest()[:32]
    labels = _files(folder / "labels", ".label")
    _add_sizes(found, [*scan_files(folder), *labels])
    for i in np.unique(np.linspace(0, max(len(labels) - 1, 0), _SAMPLED).astype(int)):
        for path in labels[i : i + 1]:
            found.update(read_bytes(path))
    for name in ("poses.txt", "calib.txt"):
        path = folder / name
        found.update(read_bytes(path) if path.is_file() else b"none")
    return found.hexdigest()[:32]


def _add_sizes(found: Any, paths: Sequence[Path]) -> Any:
    for path in paths:
        size = path.stat().st_size if path.is_file() else -1
        found.update(f"{path.parent.name}/{path.name} {size}\n".encode())
    return found


def open_map(
    sequence: str | os.PathLike[str],
    maps: str | os.PathLike[str] | None = None,
    check: bool = True,
) -> Map | None:
    """The map of a sequence; None where there is none.

    Args:
        sequence: the folder of its scans.
        maps: the folder of its map; None: the same. Tiles are preferred to a plain `map_clean.npy`.
        check: refuse tiles that were made of other scans, labels or poses than those that are there.

    Raises:
        InputError: for a map that is damaged or stale.
    """
    folder = Path(sequence if maps is None else maps)
    if (folder / FOLDER).is_dir():
        found = Map(folder / FOLDER)
        source = found.meta.get("source", "scans")
        if check and found.meta.get("digest") != digest(sequence, source):
            raise InputError(
                f"{found.path}: made of other files than those in {sequence}; build it again with: "
                "python tools/prepare_data.py maps"
            )
        return found
    return Map(folder / PLAIN) if (folder / PLAIN).is_file() else None


# ------------------------------------------------------------------------------------------- all sequences


@dataclass(frozen=True)
class Plan:
    """How maps are made; equal plans and scans give equal maps.

    Attributes:
        cell: metres, one point in each cell.
        near: metres around the sensor that are left out.
        labels: also store the class of each point.
        incomplete: allow fewer scans than poses.
        nonfinite: "error", or "drop" points that are not finite.
        source: "scans", or "plain": put the `map_clean.npy` that is there into tiles, as it is.
    """

    cell: float = CELL
    near: float = NEAR
    labels: bool = False
    incomplete: bool = False
    nonfinite: str = "error"
    source: str = "scans"

    def check(self) -> None:
        """Raise InputError for values that cannot be."""
        require_choice("nonfinite", self.nonfinite, NONFINITE)
        require_choice("source", self.source, SOURCES)
        for key, low in (("cell", 0.001), ("near", 0.0)):
            value = getattr(self, key)
            if not low <= value <= 100:
                raise InputError(f"--{key}: {value}; use metres from {low} to 100")
        if self.source == "plain" and self.labels:
            raise InputError("--labels: map_clean.npy has none; build the map from the scans")


Job = tuple[Path, Path, Plan]  # the scans, where the map goes, and how


@dataclass
class Report:
    """What a run did."""

    built: int = 0
    kept: int = 0
    scans: int = 0
    read: int = 0  # points of the scans
    points: int = 0  # of the maps, kept ones too
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def build_sequence(
    sequence: str | os.PathLike[str],
    out: str | os.PathLike[str],
    plan: Plan = Plan(),
    tick: Callable[[], object] | None = None,
) -> Report:
    """Write `out/map_tiles` from the scans of a sequence, unless it is there already.

    Args:
        tick: called after every scan.

    Raises:
        InputError: for files that cannot be used; the text names the file.
    """
    plan.check()
    sequence, out = Path(sequence), Path(out)
    meta = _description(sequence, plan)
    there = _finished(out / FOLDER, meta)
    if there is not None:
        return Report(kept=1, points=there)
    if plan.source == "scans":
        posed = posed_scans(sequence, plan.incomplete)
    elif not (sequence / PLAIN).is_file():
        raise InputError(f"{sequence / PLAIN}: missing")
    report = Report(built=1)
    try:
        with TileWriter(out, plan.labels) as writer:
            if plan.source == "scans":
                builder = MapBuilder(plan.cell, plan.near)
                for scan, labels, pose in posed:
                    report.read += _add_scan(builder, writer, plan, scan, labels, pose)
                    report.scans += 1
                    if tick is not None:
                        tick()
            else:
                for part in _plain_parts(sequence / PLAIN):
                    writer.add(part)
            writer.finish({**meta, "scans": report.scans})
            report.points = writer.points
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror or error}); free space there or use another --out"
        ) from error
    return report


def _add_scan(
    builder: MapBuilder, writer: TileWriter, plan: Plan, path: Path, label: Path, pose: NDArray
) -> int:
    scan = read_scan(path)
    labels = read_labels(label, len(scan))
    rows = finite_rows(path, scan[:, :3], drop=plan.nonfinite == "drop")
    try:
        points, classes = builder.add(scan[rows], labels[rows], pose)
    except ValueError as error:
        raise InputError(f"{path}: {error}; check poses.txt") from error
    if len(points):
        writer.add(points, classes)
    return len(scan)


def _plain_parts(path: Path, rows: int = 1 << 20) -> Iterator[NDArray]:
    points = Map(path).points
    for start in range(0, len(points), rows):
        part = np.asarray(points[start : start + rows], np.float32)
        if not np.isfinite(part).all():
            row = start + int(np.argmin(np.isfinite(part).all(1)))
            raise InputError(f"{path}: row {row} is not finite; repair the file")
        yield part


def _description(sequence: Path, plan: Plan) -> dict[str, Any]:
    # `incomplete` decides whether a map is made, not which.
    settings = {key: value for key, value in asdict(plan).items() if key != "incomplete"}
    return {**settings, "digest": digest(sequence, plan.source)}


def _finished(folder: Path, meta: dict[str, Any]) -> int | None:
    """Points of the map that is there, if it is whole and the one that would be made."""
    if not folder.is_dir():
        return None
    try:
        found = Map(folder).meta
    except InputError:
        return None
    same = all(found.get(key) == value for key, value in meta.items())
    return int(found["points"]) if same and found["version"] == VERSION else None


def sequences_of(root: Path, source: str = "scans") -> list[str]:
    """Names of the sequences below a data root that a map can be made of: with labels, or with a plain map."""
    folder = root / "dataset" / "sequences"
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no folder; --data-root must hold dataset/sequences/SS/velodyne/*.bin"
        )
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if source == "plain":
        return [name for name in names if (folder / name / PLAIN).is_file()]
    return [name for name in names if _files(folder / name / "labels", ".label")]


def build_maps(
    data_root: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    plan: Plan = Plan(),
    sequences: Sequence[str] | None = None,
    shard: str | None = None,
    workers: int | None = None,
    tell: Callable[[str], None] | None = None,
    progress: bool = True,
) -> Report:
    """Write `out/dataset/sequences/SS/map_tiles` of all sequences with labels, several at a time.

    A sequence that cannot be used does not stop the others: it is told (to `tell`) and listed in the report. Running
    again makes what is missing or stale.

    Args:
        out: None writes beside the scans.
        sequences: names; None: all that have labels.
        shard: "i/n": only this part of them.
        workers: processes; None: one per core.

    Raises:
        InputError: when there is nothing to build, and for arguments that cannot be.
    """
    from .waymo_convert import shard_of

    plan.check()
    root, target = Path(data_root), Path(data_root if out is None else out)
    there = sequences_of(root, plan.source)
    names = there if sequences is None else list(dict.fromkeys(_name(n) for n in sequences))
    if not names:
        what = PLAIN if plan.source == "plain" else "labels/*.label"
        raise InputError(
            f"no sequence with {what} below {root / 'dataset' / 'sequences'}; maps need labels"
        )
    parts = ("dataset", "sequences")
    jobs = [
        (root.joinpath(*parts, name), target.joinpath(*parts, name), plan)
        for name in shard_of(names, shard)
    ]
    # The longest first, so that no process is left with it at the end.
    sizes = {job[0]: len(scan_files(job[0])) for job in jobs}
    jobs.sort(key=lambda job: -sizes[job[0]])
    begin, total, done = time.perf_counter(), Report(), 0
    with tqdm(total=sum(sizes.values()), unit="scan", desc="maps", disable=not progress) as bar:
        for folder, part in _results(jobs, workers, bar.update):
            for name in ("built", "kept", "scans", "read", "points"):
                setattr(total, name, getattr(total, name) + getattr(part, name))
            total.problems += part.problems
            for line in part.problems if tell is not None else ():
                bar.clear()
                tell(line)
            done += sizes[folder]
            bar.n = done
            bar.set_postfix(sequences=total.built + total.kept)
    total.seconds = time.perf_counter() - begin
    return total


def _name(text: str) -> str:
    if not text.strip().isdigit():
        raise InputError(f"--sequences: {text!r}; use numbers such as 00,08")
    return text.strip().zfill(2)


def _results(
    jobs: list[Job], workers: int | None, tick: Callable[[], object]
) -> Iterator[tuple[Path, Report]]:
    """The folder of each sequence and what was done, finished ones first: they need no process."""
    missing = []
    for job in jobs:
        there = _finished(job[1] / FOLDER, _description(job[0], job[2]))
        if there is None:
            missing.append(job)
        else:
            yield job[0], Report(kept=1, points=there)
    if workers == 1 or len(missing) < 2:
        for job in missing:
            yield _work(job, tick)
        return
    yield from run(_work, missing, workers)


def _work(job: Job, tick: Callable[[], object] | None = None) -> tuple[Path, Report]:
    try:
        return job[0], build_sequence(*job, tick=tick)
    except InputError as error:
        return job[0], Report(problems=[str(error)])
