"""Scene completion: pairs of a partial scan and the full cloud around it.

    partial   the scan: static points, 3.5 m < |p| < 50 m, z > -4 m; M points by farthest point sampling
    full      the map of the drive (see `maps`) within 50 m of the sensor, in its frame, z > -4 m, where the partial
              cloud has been (see `viewpoint_mask`); P points

Points are metres in the sensor's frame, nothing is normalised. Training moves both clouds by one draw of rotation,
scale and reflection after they were cropped. Draws are of numpy's global generator, which the loader seeds for every
sample; so samples do not depend on the number of loading processes.

The recipe is that of LiDiff (Nunes et al., CVPR 2024, arXiv:2403.13470). Two things differ: ranges are over x, y and
z and not the remission too, and a full cloud of fewer than P points is repeated as a whole, so that none is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pointcept_kd.host import InputError, kd
from pointcept_kd.ops.neighbors import farthest_point_sampling

from .map_tiles import Map
from .maps import (
    CELL,
    MOVING,
    NEAR,
    farther,
    first_of_cells,
    open_map,
    ranges,
    sequence_poses,
    static_rows,
)
from .scans import WarnOnce, finite_rows, require_choice
from .semantic_kitti import SPLITS, SemanticKITTIDataset, read_labels, read_scan
from .sweeps import align

logger = logging.getLogger(__name__)

RADIUS = 50.0  # metres
FLOOR = -4.0  # metres: returns from below the road
CEILING = 4.4  # metres: of the ground truth that completions are compared with
VIEW_CELL = 10.0  # metres
JITTER, JITTER_MOST = 0.2, 0.3  # metres: noise of the refinement network's input
FRAMES = ("middle", "last")
WITHOUT_MAP = ("auto", "error", "input")


# ------------------------------------------------------------------------------------------- steps


def within(points: NDArray, near: float = NEAR, far: float = RADIUS) -> NDArray:
    """Mask (n,) of points (n, 3 or more) with near < |p| < far, over x, y and z."""
    square = ranges(points)
    return (square > near * near) & (square < far * far)


def tile_rows(count: int, wanted: int) -> NDArray:
    """Rows (wanted,) int64 of a cloud of `count` points, repeated as a whole: i mod count.

    Raises:
        ValueError: for a cloud without points.
    """
    if count < 1:
        raise ValueError("a cloud without points cannot be repeated")
    return np.arange(wanted) % count


def repeated(points: NDArray, least: int) -> NDArray:
    """A cloud (n, 3) as often as it takes to have at least so many points: itself where it has them."""
    if len(points) < 1:
        raise ValueError("a cloud without points cannot be repeated")
    return np.tile(points, (-(-least // len(points)), 1)) if len(points) < least else points


def viewpoint_mask(points: NDArray, seen: NDArray, cell: float = VIEW_CELL) -> NDArray:
    """Which points lie where a scan has been: in a cell that holds at least one of its points.

    Args:
        points: (n, 3), the full cloud.
        seen: (m, 3), the scan; the cells begin half a cell before its smallest x, y and z.
        cell: metres.

    Returns:
        mask (n,).

    Raises:
        ValueError: for a scan without points, or one that spreads over more than 10^8 cells.
    """
    if len(seen) < 1:
        raise ValueError("a scan without points has seen nothing")
    columns = [seen[:, axis].astype(np.float64) for axis in range(3)]
    origin = [column.min() - cell / 2 for column in columns]
    shape = [int((c.max() - o) // cell) + 1 for c, o in zip(columns, origin)]
    if np.prod(shape, dtype=np.float64) > 1e8:
        raise ValueError(f"a scan of {shape} cells of {cell} m; crop it first")
    occupied = np.zeros(shape, bool)
    occupied[tuple(((c - o) // cell).astype(np.int64) for c, o in zip(columns, origin))] = True
    inside = np.ones(len(points), bool)
    cells = []
    for axis in range(3):
        index = (points[:, axis].astype(np.float64) - origin[axis]) / cell
        inside &= (index >= 0) & (index < shape[axis])
        cells.append(index)
    rows = np.flatnonzero(inside)
    inside[rows] = occupied[tuple(index[rows].astype(np.int64) for index in cells)]
    return inside


def condition_points(points: NDArray, count: int, radius: float = RADIUS) -> NDArray:
    """A raw scan as the networks take it at inference: cropped, repeated if it is thin, farthest point sampled.

    Moving objects and points below the road stay, as no label is known.

    Args:
        points: (n, 3 or more), sensor frame, metres.
        count: M.
        radius: metres from the sensor; points beyond are left out.

    Returns:
        (M, 3) float32.

    Raises:
        InputError: when no point lies between 3.5 m and the radius.
    """
    cloud = np.ascontiguousarray(points[within(points, far=radius), :3], np.float32)
    if not len(cloud):
        raise InputError(
            f"none of {len(points)} points lies {NEAR} to {radius:g} m from the sensor"
        )
    cloud = repeated(cloud, count)
    return _spread_out(cloud, count)


def completion_target(around: NDArray, scan: NDArray, radius: float = RADIUS) -> NDArray:
    """The ground truth of an evaluation, as it is, unpadded.

    Args:
        around: (n, 3) map within the radius in the sensor's frame.
        scan: (m, 3 or more) the whole raw scan.
        radius: metres from the sensor.

    Returns:
        (k, 3): -4 m < z < 4.4 m, in the view-point cells of the scan's points within the radius.
    """
    z = around[:, 2]
    kept = around[(z > FLOOR) & (z < CEILING)]
    return kept[viewpoint_mask(kept, scan[ranges(scan) < radius * radius, :3])]


@dataclass(frozen=True)
class Augmentation:
    """How far training moves a pair of clouds.

    Attributes:
        yaw: radians; the rotation about z is uniform in 0..yaw.
        tilt, tilt_most: radians; three further angles, normal with this deviation, clipped.
        scale: the factor is uniform between these.
        flip: probability of y -> -y.
    """

    yaw: float = 2 * np.pi
    tilt: float = 0.06
    tilt_most: float = 0.18
    scale: tuple[float, float] = (0.95, 1.05)
    flip: float = 0.5

    def draw(self) -> NDArray:
        """One matrix (3, 3) float64 for rows: p' = p A."""
        yaw = np.random.uniform(0, self.yaw)
        tilt = np.clip(np.random.normal(0, self.tilt, 3), -self.tilt_most, self.tilt_most)
        scale = np.random.uniform(*self.scale)
        mirror = -1.0 if np.random.rand() < self.flip else 1.0
        return rotation(0, 0, yaw) @ rotation(*tilt) @ np.diag([scale, scale * mirror, scale])


def rotation(x: float, y: float, z: float) -> NDArray:
    """Rz(z) Ry(y) Rx(x) (3, 3), angles in radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos([x, y, z]), np.sin([x, y, z])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def moved_by(points: NDArray, matrix: NDArray) -> NDArray:
    """p A for points (n, 3) float32 and a matrix (3, 3), float32."""
    return points @ matrix.astype(np.float32)


def sample_pair(partial: NDArray, full: NDArray, points: int, condition: int) -> dict[str, NDArray]:
    """A training pair of fixed size from cropped (and augmented) clouds, in the order of the recipe.

    Repeats a thin partial cloud, keeps the full cloud where the partial one has been, samples the one to
    `condition` points, farthest first, and brings the other to `points` points in random order.

    Args:
        partial: (n, 3) float32.
        full: (m, 3) float32.
        points: P.
        condition: M.

    Returns:
        `coord` (M, 3) and `complete` (P, 3).

    Raises:
        ValueError: when one of the clouds is or becomes empty.
    """
    partial = repeated(partial, condition)
    full = full[viewpoint_mask(full, partial)]
    coord = _spread_out(partial, condition)
    return {"coord": coord, "complete": _shuffled(full, points)}


def _spread_out(cloud: NDArray, count: int) -> NDArray:
    """`count` points, each farthest from those before, beginning with the first."""
    points = torch.from_numpy(np.ascontiguousarray(cloud, np.float32))
    return cloud[farthest_point_sampling(points, count).numpy()]


def _shuffled(cloud: NDArray, wanted: int) -> NDArray:
    return cloud[np.random.permutation(len(cloud))[tile_rows(len(cloud), wanted)]]


# ------------------------------------------------------------------------------------------- data sets


class _Clouds(SemanticKITTIDataset):
    """What pairs and windows share: sizes, augmentation, poses without a calibration."""

    def __init__(
        self, points: int, augment: bool | Mapping[str, Any], radius: float, **others: Any
    ) -> None:
        if isinstance(points, bool) or not isinstance(points, int) or points < 1:
            raise InputError(f"points={points!r}: expected a whole number of points, 1 or more")
        if not NEAR < radius < float("inf"):
            raise InputError(f"radius={radius!r}: expected metres, more than {NEAR}")
        self.points, self.radius = points, float(radius)
        self.augmentation = _augmentation(augment)
        super().__init__(**others)

    def _identity(self) -> dict[str, Any]:
        # Testing reads other clouds than training; a shared cache must not mix them.
        return {**super()._identity(), "test_mode": self.test_mode}

    def _build_test_transforms(self) -> None:
        """Nothing to build: a completion is one cloud, not fragments."""

    def _pose(self, path: Path) -> NDArray:
        folder = path.parent.parent
        if folder.name not in self._poses:
            self._poses[folder.name] = sequence_poses(folder)
        return super()._pose(path)

    def _scan(self, path: Path) -> tuple[NDArray, NDArray | None]:
        """Points (n, 4) and raw labels (n,), None without a label file."""
        scan = read_scan(path)
        label = path.parent.parent / "labels" / f"{path.stem}.label"
        labels = read_labels(label, len(scan)) if label.is_file() else None
        kept = finite_rows(path, scan[:, :3], drop=self.nonfinite == "drop")
        return scan[kept], None if labels is None else labels[kept]

    def _cropped(self, path: Path, points: NDArray) -> NDArray:
        cloud = np.ascontiguousarray(
            points[within(points, far=self.radius) & (points[:, 2] > FLOOR), :3]
        )
        if not len(cloud):
            raise InputError(
                f"{path}: no labelled static point lies {NEAR} to {self.radius:g} m from the sensor; "
                "leave the scan out"
            )
        return cloud

    def prepare_test_data(self, idx: int) -> Any:
        """One sample through the transforms, not in fragments."""
        return self.transform(self.load(idx))


def _augmentation(augment: bool | Mapping[str, Any]) -> Augmentation | None:
    if not isinstance(augment, Mapping):
        return Augmentation() if augment else None
    known = [field.name for field in fields(Augmentation)]
    unknown = sorted(set(augment) - set(known))
    if unknown:
        raise InputError(f"augment does not take {', '.join(unknown)}; it takes {', '.join(known)}")
    return Augmentation(**augment)


@kd.DATASETS.register_module()
class CompletionDataset(_Clouds):
    """Partial and full clouds of SemanticKITTI-layout drives, whose maps were built before.

    A training or validation sample is `coord` (M, 3), `complete` (P, 3) float32 and `name`. In test mode it is
    `coord` (M, 3), the raw scan by `condition_points`; `target` (n, 3), see `completion_target`; and `name`: nothing
    in it is random. `Collect(keys=("coord", "complete", "name"), offset_keys_dict=dict(offset="coord",
    complete_offset="complete"))` makes batches of them.

    Args:
        split, data_root, sequences, nonfinite: see `SemanticKITTIDataset`.
        points: P.
        condition: M; None is P / 10.
        augment: whether to move the pairs, or other values for `Augmentation`; never in test mode.
        radius: metres from the sensor that scan and map are cropped to.
        maps: the data root that holds the maps; None: `data_root`.
        check_maps: refuse maps that were made of other files than those that are there.
        without_map: what to do with a sequence that has no map. "error"; "input": the partial cloud is the full one
            too, which is said once; "auto": "input" for the test split and in test mode, else "error".
        transform, test_mode, cache, loop: see `DefaultDataset`.

    Raises:
        InputError: for folders, files, labels and maps that cannot be used; the text names the file.
    """

    def __init__(
        self,
        split: str | Sequence[str] = "train",
        data_root: str = "data/semantic_kitti",
        transform: Sequence[Mapping[str, Any]] | None = None,
        test_mode: bool = False,
        test_cfg: Mapping[str, Any] | None = None,
        cache: bool | str = False,
        ignore_index: int = -1,
        loop: int = 1,
        sequences: Sequence[str | int] | None = None,
        nonfinite: str = "error",
        points: int = 180_000,
        condition: int | None = None,
        augment: bool | Mapping[str, Any] = False,
        radius: float = RADIUS,
        maps: str | None = None,
        check_maps: bool = True,
        without_map: str = "auto",
    ) -> None:
        require_choice("without_map", without_map, WITHOUT_MAP)
        super().__init__(
            points, augment, radius, split=split, data_root=data_root, transform=transform, test_mode=test_mode,
            test_cfg=test_cfg, cache=cache, ignore_index=ignore_index, loop=loop, sequences=sequences,
            nonfinite=nonfinite,
        )  # fmt: skip
        self.condition = max(points // 10, 1) if condition is None else condition
        if not isinstance(self.condition, int) or self.condition < 1:
            raise InputError(
                f"condition={condition!r}: expected a whole number of points, 1 or more"
            )
        self._warn_map = WarnOnce(logger)
        self._maps: dict[str, Map | None] = {}
        for path in self.data_list:
            folder = Path(path).parent.parent
            if folder.name not in self._maps:
                self._maps[folder.name] = self._open(folder, maps, check_maps, without_map)

    def _open(self, folder: Path, maps: str | None, check: bool, without: str) -> Map | None:
        place = None if maps is None else Path(maps) / "dataset" / "sequences" / folder.name
        found = open_map(folder, place, check)
        if found is None:
            text = "%s: no map of the drive; make it with: python tools/prepare_data.py maps"
            optional = self.test_mode or folder.name in SPLITS["test"]
            if without == "error" or (without == "auto" and not optional):
                raise InputError(text % (place or folder))
            self._warn_map(text + "; until then the scan itself is the target", place or folder)
        return found

    def get_data(self, idx: int) -> dict[str, Any]:
        """The cropped clouds of a scan: `coord` (n, 3), `complete` (m, 3); in test mode the finished sample."""
        path = self._path(idx)
        scan, labels = self._scan(path)
        drive = self._maps[path.parent.parent.name]
        name = self.get_data_name(idx)
        if self.test_mode:
            try:
                coord = condition_points(scan, self.condition, self.radius)
            except InputError as error:
                raise InputError(f"{path}: {error}") from error
            if drive is None:
                target = np.ascontiguousarray(scan[within(scan, far=self.radius), :3])
            else:
                around = drive.around(self._pose(path), self.radius)
                target = completion_target(around, scan, self.radius)
            return {"coord": coord, "target": target, "name": name}
        partial = scan if labels is None else scan[static_rows(scan, labels, 0.0)]
        coord = self._cropped(path, partial)
        if drive is None:
            return {"coord": coord, "complete": coord.copy(), "name": name}
        full = drive.around(self._pose(path), self.radius)
        return {"coord": coord, "complete": full[full[:, 2] > FLOOR], "name": name}

    def prepare_train_data(self, idx: int) -> Any:
        """One pair of fixed size, through the transforms; also used for validation."""
        data = self.load(idx)
        clouds = [data["coord"], data["complete"]]
        if self.augmentation is not None:
            matrix = self.augmentation.draw()
            clouds = [moved_by(cloud, matrix) for cloud in clouds]
        try:
            data.update(sample_pair(*clouds, self.points, self.condition))
        except ValueError as error:
            raise InputError(
                f"sample {data['name']}: {error}; is the map that of these scans and poses?"
            ) from error
        return self.transform(data)


@kd.DATASETS.register_module()
class RefinementDataset(_Clouds):
    """Windows of consecutive scans, sparse and noisy beside dense: what the refinement network learns from.

    The scans of a window are joined without moving objects (labels from 252) and without the car. A sample is
    `coord` (P, 3), points with Gaussian noise of 0.2 m clipped at 0.3 m in every coordinate; `complete` (2 P, 3), one
    point per 10 cm cell; both within the radius; and `name`, that of the scan whose frame it is in.

    Args:
        split, data_root, sequences, nonfinite: see `SemanticKITTIDataset`.
        points: P.
        window: scans of a window; one window starts at every scan that so many begin with. A shorter sequence is one.
        frame: "middle": the frame of the window's middle scan, which has seen the most of it; "last", as LiDiff has.
        augment, radius: as in `CompletionDataset`.
        transform, cache, loop: see `DefaultDataset`.

    Raises:
        InputError: for folders, files and labels that cannot be used; the text names the file.
    """

    def __init__(
        self,
        split: str | Sequence[str] = "train",
        data_root: str = "data/semantic_kitti",
        transform: Sequence[Mapping[str, Any]] | None = None,
        test_mode: bool = False,
        test_cfg: Mapping[str, Any] | None = None,
        cache: bool | str = False,
        ignore_index: int = -1,
        loop: int = 1,
        sequences: Sequence[str | int] | None = None,
        nonfinite: str = "error",
        points: int = 180_000,
        window: int = 40,
        frame: str = "middle",
        augment: bool | Mapping[str, Any] = False,
        radius: float = RADIUS,
    ) -> None:
        require_choice("frame", frame, FRAMES)
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise InputError(f"window={window!r}: expected a whole number of scans, 1 or more")
        if test_mode:
            raise InputError("RefinementDataset is for training; test with CompletionDataset")
        self.window, self.frame = window, frame
        super().__init__(
            points, augment, radius, split=split, data_root=data_root, transform=transform, test_mode=test_mode,
            test_cfg=test_cfg, cache=cache, ignore_index=ignore_index, loop=loop, sequences=sequences,
            nonfinite=nonfinite,
        )  # fmt: skip

    def get_data_list(self) -> list[str]:
        """Paths of the scans that give windows their frames."""
        drives: dict[Path, list[str]] = {}
        for path in super().get_data_list():
            drives.setdefault(Path(path).parent, []).append(path)
        self._windows = [
            paths[start : start + self.window]
            for paths in drives.values()
            for start in range(max(len(paths) - self.window, 0) + 1)
        ]
        return [w[len(w) // 2] if self.frame == "middle" else w[-1] for w in self._windows]

    def get_data(self, idx: int) -> dict[str, Any]:
        """The points of a window that any augmentation may bring within the radius: `coord` (n, 3)."""
        path = self._path(idx)
        reference, parts = self._pose(path), []
        shrink = 1.0 if self.augmentation is None else self.augmentation.scale[0]
        reach = (self.radius + JITTER_MOST * 2) / shrink
        for name in self._windows[idx % len(self.data_list)]:
            scan, labels = self._scan(Path(name))
            if labels is None:
                raise InputError(f"{name}: no labels; they tell what moves, leave the sequence out")
            kept = scan[((labels & 0xFFFF) < MOVING) & farther(scan, NEAR), :3]
            joined = align(kept, self._pose(Path(name)), reference)
            parts.append(joined[ranges(joined) < reach * reach])
        name, cloud = self.get_data_name(idx), np.concatenate(parts)
        if not len(cloud):
            raise InputError(
                f"window of {name}: no static point within {self.radius:g} m; leave the sequence out"
            )
        return {"coord": cloud, "name": name}

    def prepare_train_data(self, idx: int) -> Any:
        """One window, sparse with noise and dense, through the transforms."""
        data = self.load(idx)
        cloud = data["coord"]
        if self.augmentation is not None:
            cloud = moved_by(cloud, self.augmentation.draw())
        dense = cloud[first_of_cells(cloud, CELL)]
        dense = dense[ranges(dense) < self.radius**2]
        try:
            data["coord"] = self._noisy(cloud)
            data["complete"] = _shuffled(dense, 2 * self.points)
        except ValueError as error:
            raise InputError(
                f"window of {data['name']}: {error} after it was moved; lower the scale of augment"
            ) from error
        return self.transform(data)

    def _noisy(self, cloud: NDArray) -> NDArray:
        # In random order and only as many as are needed: windows have millions of points.
        order, found, count = np.random.permutation(len(cloud)), [], 0
        for start in range(0, len(order), self.points):
            part = cloud[order[start : start + self.points]]
            noise = np.random.normal(0, JITTER, part.shape)
            part = part + np.clip(noise, -JITTER_MOST, JITTER_MOST).astype(np.float32)
            found.append(part[ranges(part) < self.radius**2])
            count += len(found[-1])
            if count >= self.points:
                break
        points = np.concatenate(found)
        return points[tile_rows(len(points), self.points)]
