"""A database of labelled objects, cut out of the training scans, from which scenes are filled up (`pasting`).

    DATA_ROOT/instances/index.json                what follows, one list per column
                       /CLASS/SCAN_ID.bin         float32 x, y, z, strength, as the reader gives them
                       /CLASS/SCAN_ID.npz         on demand its picture, see `image_patches.Patch`

An object is what has one class AND one instance id: other classes may use the same number. Its id in the file's name is
that of the data set: SemanticKITTI's whole label, nuScenes' category * 1000 + instance, Waymo's number, or 1 + the row
of the box where nuScenes has boxes but no panoptic labels. Objects are those of Sun et al. (TPAMI 46(12), 2024).
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pointcept_kd.host import InputError
from pointcept_kd.host.checkpoint import write_atomic

from . import nuscenes, semantic_kitti, waymo
from .boxes import box_of_points
from .camera_source import CameraSource
from .camera_views import read_images
from .image_patches import Patch, Sight, patch_bytes, read_patch
from .nuscenes_files import find_file
from .scans import read_points
from .workers import run

FOLDER, INDEX = "instances", "index.json"
COLUMNS = ("x", "y", "z", "strength")
_CHUNK = 50  # scans of one job


@dataclass(frozen=True)
class Layout:
    """What a data set calls objects.

    Attributes:
        names: of all train ids.
        things: train ids of objects.
        min_points: of an object.
        splits: that may be used: no scan of them is evaluated on.
    """

    names: tuple[str, ...]
    things: tuple[int, ...]
    min_points: int
    splits: tuple[str, ...]


LAYOUTS = {
    "semantic_kitti": Layout(
        semantic_kitti.CLASS_NAMES, tuple(range(8)), 40,
        ("train", *semantic_kitti.SPLITS["train"]),
    ),
    "nuscenes": Layout(nuscenes.CLASS_NAMES, tuple(range(10)), 10, ("train",)),
    "waymo": Layout(waymo.CLASS_NAMES, tuple(range(13)), 50, ("training",)),
}  # fmt: skip


def layout_of(data_root: str | os.PathLike[str]) -> str:
    """Which of `LAYOUTS` a folder has.

    Raises:
        InputError: for none of them.
    """
    root = Path(data_root)
    for name, inside in (
        ("semantic_kitti", Path("dataset") / "sequences"),
        ("nuscenes", Path("info")),
        ("waymo", Path("training")),
    ):
        if (root / inside).is_dir():
            return name
    raise InputError(
        f"--data-root {root}: holds neither dataset/sequences (SemanticKITTI), nor info (nuScenes), nor training "
        "(Waymo)"
    )


@lru_cache(maxsize=1)
def _reader(layout: str, data_root: str, splits: tuple[str, ...]) -> Any:
    if layout == "semantic_kitti":
        return semantic_kitti.SemanticKITTIDataset(list(splits), data_root)
    if layout == "waymo":
        return waymo.WaymoDataset(split=list(splits), data_root=data_root, labelled_only=True)
    found = sorted((Path(data_root) / "info").glob("nuscenes_infos_*sweeps_train.pkl"))
    counts = [path.name.split("_")[2].removesuffix("sweeps") for path in found]
    sweeps = [int(count) for count in counts if count.isdigit()]
    return nuscenes.NuScenesDataset(
        list(splits), data_root, sweeps=max(sweeps, default=10), nonfinite="error"
    )


def training_reader(
    layout: str, data_root: str | os.PathLike[str], splits: Sequence[str] | None = None
) -> Any:
    """The reader of a layout's training scans.

    Raises:
        InputError: for splits that are not training.
    """
    kind = LAYOUTS[layout]
    chosen = tuple(splits) if splits else kind.splits[:1]
    foreign = [split for split in chosen if split not in kind.splits]
    if foreign:
        raise InputError(
            f"--split {','.join(foreign)}: objects are cut out of training scans alone, {', '.join(kind.splits)}; "
            "others would show the network what it is evaluated on"
        )
    return _reader(layout, os.fspath(data_root), chosen)


def instance_ids(reader: Any, idx: int) -> NDArray:
    """Which object each point of a scan belongs to, (n,) int64; 0: none.

    Raises:
        InputError: for files that are missing or do not fit the scan.
    """
    if isinstance(reader, semantic_kitti.SemanticKITTIDataset):
        labels = semantic_kitti.read_labels(reader.label_path(idx)).astype(np.int64)
        return np.where(labels >> 16, labels, 0)
    if isinstance(reader, nuscenes.NuScenesDataset):
        return _nuscenes_ids(reader, idx)
    path = Path(reader.data_list[idx]) / "instance.npy"
    if not path.is_file():
        raise InputError(
            f"{path} is missing: without the instance id of every point (n,) there are no objects to cut out"
        )
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable .npy array ({error})") from error
    if values.dtype.kind not in "iu":
        raise InputError(f"{path}: {values.dtype}, expected whole numbers (n,)")
    # -1 and 0 both stand for no object.
    return np.maximum(values.reshape(-1).astype(np.int64), 0)


def _nuscenes_ids(reader: nuscenes.NuScenesDataset, idx: int) -> NDArray:
    info, raw = reader.info(idx), reader.raw
    if not (raw / "panoptic").is_dir():
        boxes = reader.boxes(idx)["boxes"]
        return box_of_points(reader.load(idx)["coord"], boxes) + 1
    token = info["lidar_token"]
    labels = find_file(raw, info.get("gt_segment_path", "lidarseg/v1.0-trainval/x"))
    path = raw / "panoptic" / labels.parent.name / f"{token}_panoptic.npz"
    try:
        with np.load(path, allow_pickle=False) as content:
            values = content["data"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: no panoptic labels can be read ({error}); copy nuScenes-panoptic again"
        ) from error
    values = values.reshape(-1).astype(np.int64)
    return np.where(values % 1000, values, 0)


@dataclass(frozen=True)
class Plan:
    """What to cut out, and where to."""

    layout: str
    data_root: str
    splits: tuple[str, ...]
    out: str
    min_points: int
    patches: bool = False


Seen = tuple[tuple[str, int], ...]  # camera, number of points it sees
# Class, scan, id, points, range, azimuth; by camera what it sees, the number of the one that sees most (-1: none does),
# and whether there is a picture.
Row = tuple[int, str, int, int, float, float, Seen, int, bool]


def _cut(job: tuple[Plan, list[int]]) -> list[Row]:
    plan, numbers = job
    reader = _reader(plan.layout, plan.data_root, plan.splits)
    return [row for idx in numbers for row in cut_scan(reader, idx, plan)]


def cut_scan(reader: Any, idx: int, plan: Plan) -> Iterator[Row]:
    """Write the objects of one scan; files that are there with the same content are left alone.

    Yields: class, scan, id, number of points, range (m) and azimuth (rad) of the mean of its x and y, and what cameras
        see of it.

    Raises:
        InputError: for files that cannot be used or written.
    """
    data, name = reader.load(idx), reader.get_data_name(idx)
    segment, ids = data["segment"], instance_ids(reader, idx)
    if len(ids) != len(segment):
        raise InputError(f"{name}: {len(ids)} instance ids for {len(segment)} points")
    layout = LAYOUTS[plan.layout]
    rows = np.flatnonzero((ids > 0) & np.isin(segment, layout.things))
    # One order of all pairs of class and id, and in each the points as they were.
    order = rows[np.lexsort((rows, ids[rows], segment[rows]))]
    change = (np.diff(ids[order]) != 0) | (np.diff(segment[order]) != 0)
    values = np.hstack([data["coord"], data["strength"][:, :1]]).astype("<f4")
    album = _Album(reader, idx, data["coord"]) if plan.patches else None
    for members in np.split(order, np.flatnonzero(change) + 1):
        if len(members) < max(plan.min_points, 1):
            continue
        thing, number = int(segment[members[0]]), int(ids[members[0]])
        path = Path(plan.out) / object_path(layout.names[thing], name, number)
        content = values[members].tobytes()
        _write(path, content)
        x, y = values[members, :2].astype(np.float64).mean(0)
        far, turn = round(float(np.hypot(x, y)), 4), round(float(np.arctan2(y, x)), 6)
        seen, best, patch = ((), -1, None) if album is None else album.of(members)
        if patch is not None:
            _write(path.with_suffix(".npz"), patch_bytes(patch))
        yield thing, name, number, len(members), far, turn, seen, best, patch is not None


class _Album:
    """The images of one scan, read when an object needs them."""

    def __init__(self, reader: Any, idx: int, coord: NDArray) -> None:
        self.reader, self.idx = reader, idx
        self.sights = [Sight(coord, camera) for camera in reader.cameras(idx)]
        self._images: dict[int, NDArray] = {}

    def of(self, members: NDArray) -> tuple[Seen, int, Patch | None]:
        """What each camera sees of an object, which sees most (the first of them; -1: none), and its picture."""
        counts = [int(sight.seen[members].sum()) for sight in self.sights]
        seen = tuple((s.camera.name, c) for s, c in zip(self.sights, counts, strict=True))
        if not any(counts):
            return seen, -1, None
        best = int(np.argmax(counts))
        sight = self.sights[best]
        return seen, best, sight.cut(members, self._image(best)) if sight.shows(members) else None

    def _image(self, number: int) -> NDArray:
        if number not in self._images:
            (image,) = read_images(self.reader, self.idx, [number])
            name = self.reader.get_data_name(self.idx)
            CameraSource.check_image(name, self.sights[number].camera, image)
            self._images[number] = image
        return self._images[number]


def _write(path: Path, content: bytes) -> None:
    try:
        if path.is_file() and path.read_bytes() == content:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not forced to the disk one by one: there are hundreds of thousands, and the index knows their sizes.
        hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        hidden.write_bytes(content)
        os.replace(hidden, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); free space there or use another --out"
        ) from error


def object_path(class_name: str, scan: str, number: int) -> Path:
    """Where an object is, relative to the database."""
    return Path(class_name.replace(" ", "_")) / f"{scan}_{number}.bin"


def build(
    data_root: str | os.PathLike[str],
    layout: str = "auto",
    splits: Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    min_points: int | None = None,
    workers: int | None = None,
    progress: bool = True,
    patches: bool = False,
) -> dict[str, int]:
    """Cut the objects out of all scans of training splits and write their index, which a second run leaves as it is.

    Args:
        data_root: as a config names it.
        layout: one of `LAYOUTS`, or "auto".
        splits: some of those of the layout; None: all of training.
        out: folder of the database; None: `instances` below data_root.
        min_points: of an object; None: the layout's.
        workers: processes; None: one per core.
        patches: also say what the cameras see of each object, and cut out its picture (for `PasteInstances` with
            image="patch") where the camera that sees most of it sees 90 % of its points and at most 10 % of them are
            behind other points.

    Returns: number of objects by class name.

    Raises:
        InputError: for splits that are not training, scans without instance ids, files that cannot be used, and for
            patches of scans without cameras.
    """
    name = layout_of(data_root) if layout == "auto" else layout
    if name not in LAYOUTS:
        raise InputError(f"--layout {name}: use {', '.join(LAYOUTS)} or auto")
    kind = LAYOUTS[name]
    least = kind.min_points if min_points is None else min_points
    if least < 1:
        raise InputError(f"--min-points: {least}; use 1 or more")
    target = Path(data_root) / FOLDER if out is None else Path(out)
    _reader.cache_clear()  # files may have come since
    reader = training_reader(name, data_root, splits)
    total = len(reader.data_list)
    if patches and not (hasattr(reader, "cameras") and hasattr(reader, "images")):
        raise InputError(
            f"--image-patches: {type(reader).__name__} reads no images; leave it out, or use SemanticKITTI or nuScenes"
        )
    chosen = tuple(splits) if splits else kind.splits[:1]
    plan = Plan(name, os.fspath(data_root), chosen, os.fspath(target), least, patches)
    jobs = [(plan, list(range(i, min(i + _CHUNK, total)))) for i in range(0, total, _CHUNK)]
    rows: list[Row] = []
    with tqdm(total=total, unit="scan", desc="instances", disable=not progress) as bar:
        for part, (_, numbers) in zip(run(_cut, jobs, workers), jobs, strict=True):
            rows += part
            bar.update(len(numbers))
    _write_index(target, plan, sorted(rows))
    counts = np.bincount([row[0] for row in rows], minlength=len(kind.names))
    return {kind.names[thing]: int(counts[thing]) for thing in kind.things}


def _write_index(target: Path, plan: Plan, rows: list[Row]) -> None:
    scans = sorted({row[1] for row in rows})
    place = {scan: number for number, scan in enumerate(scans)}
    classes, names, ids, points, ranges, turns, seen, best, pictures = (
        [list(c) for c in zip(*rows, strict=True)] if rows else [[]] * 9
    )
    note = {
        "layout": plan.layout,
        "splits": list(plan.splits),
        "min_points": plan.min_points,
        "columns": list(COLUMNS),
        "names": list(LAYOUTS[plan.layout].names),
        "scans": scans,
        "class": classes,
        "scan": [place[name] for name in names],
        "id": ids,
        "points": points,
        "range": ranges,
        "azimuth": turns,
    }
    if plan.patches:
        cameras = sorted({name for counts in seen for name, _ in counts})
        number = {name: i for i, name in enumerate(cameras)}
        note["cameras"] = cameras
        note["visible"] = [[dict(counts).get(name, 0) for name in cameras] for counts in seen]
        note["camera"] = [
            -1 if i < 0 else number[counts[i][0]] for i, counts in zip(best, seen, strict=True)
        ]
        note["patch"] = [int(there) for there in pictures]
    content = (json.dumps(note, separators=(",", ":")) + "\n").encode()
    target.mkdir(parents=True, exist_ok=True)
    write_atomic(target / INDEX, lambda file: file.write(content))


class InstanceDatabase:
    """The objects that `build` wrote.

    Attributes:
        layout, names: of the data set and its train ids.
        classes, points: (m,) int64, train id and number of points of each object.
        ranges, azimuths: (m,) float64, metres and radians.
        cameras: names of cameras; empty where the database was made without patches, as are the next three.
        visible: (m, cameras) int64, number of points that each camera sees.
        camera: (m,) int64, which of them sees most; -1: none does.
        patches: (m,) bool, objects with a picture; None for a database without patches.

    Raises:
        InputError: for a folder without a usable index.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX
        if not path.is_file():
            raise InputError(
                f"{path} is missing; make it: python tools/prepare_data.py instances --data-root FOLDER"
            )
        try:
            note = json.loads(path.read_bytes())
            self._scans = _texts(note["scans"])
            self.layout, self.names = str(note["layout"]), tuple(_texts(note["names"]))
            columns = [np.asarray(note[key], np.int64) for key in ("class", "scan", "id", "points")]
            self.classes, self._scan, self._ids, self.points = columns
            self.ranges, self.azimuths = (
                np.asarray(note[key], np.float64) for key in ("range", "azimuth")
            )
            every = (*columns, self.ranges, self.azimuths)
            if note["columns"] != list(COLUMNS) or {a.shape for a in every} != {(len(self._ids),)}:
                raise ValueError("columns of different length")
            for values, limit in ((self.classes, self.names), (self._scan, self._scans)):
                if len(values) and not 0 <= values.min() <= values.max() < len(limit):
                    raise ValueError("a number without a name")
            self._read_patches(note)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: no index of objects ({error!r}); make it again with tools/prepare_data.py instances"
            ) from error

    def _read_patches(self, note: Mapping[str, Any]) -> None:
        self.cameras: tuple[str, ...] = ()
        self.patches: NDArray | None = None
        self.visible, self.camera = np.empty((0, 0), np.int64), np.empty(0, np.int64)
        if "patch" not in note:
            return
        self.cameras = tuple(_texts(note["cameras"]))
        shape = len(self._ids), len(self.cameras)
        self.visible = np.asarray(note["visible"], np.int64).reshape(shape)
        self.camera = np.asarray(note["camera"], np.int64)
        self.patches = np.asarray(note["patch"], np.int64) > 0
        if {self.camera.shape, self.patches.shape} != {shape[:1]}:
            raise ValueError("columns of different length")
        least = np.where(self.patches, 0, -1)
        if ((self.camera < least) | (self.camera >= len(self.cameras))).any():
            raise ValueError("a camera without a name")

    def __len__(self) -> int:
        return len(self._ids)

    def path(self, row: int) -> Path:
        """The file of an object."""
        name, scan = self.names[self.classes[row]], self._scans[self._scan[row]]
        return self.folder / object_path(name, scan, int(self._ids[row]))

    def load(self, row: int) -> NDArray:
        """Points (k, 4) float32 of an object: x, y, z, strength.

        Raises:
            InputError: for a file that is missing or not as the index has it.
        """
        path = self.path(row)
        points = read_points(path, len(COLUMNS), "object")
        if len(points) != self.points[row] or not np.isfinite(points).all():
            raise InputError(
                f"{path}: {len(points)} points, the index has {int(self.points[row])}, or some are not finite; make "
                "the database again"
            )
        return points

    def patch(self, row: int) -> Patch:
        """The picture of an object that has one.

        Raises:
            InputError: for a file that is missing or not as the index has it, and an object without a picture.
        """
        path = self.path(row).with_suffix(".npz")
        if self.patches is None or not self.patches[row]:
            raise InputError(f"{path}: this object has no picture; ask for those of `patches`")
        return read_patch(path, self.cameras[self.camera[row]], int(self.points[row]))


def _texts(values: Any) -> list[str]:
    # A name that leads out of the folder is none of ours.
    if not isinstance(values, list) or not all(
        isinstance(v, str) and v not in ("", ".", "..") and not set(v) & set("/\\") for v in values
    ):
        raise ValueError("names are texts without slashes")
    return values


def counts_by_class(database: InstanceDatabase) -> Mapping[str, int]:
    """Number of objects by class name, the classes that have any."""
    found = np.bincount(database.classes, minlength=len(database.names))
    return {name: int(count) for name, count in zip(database.names, found, strict=True) if count}
