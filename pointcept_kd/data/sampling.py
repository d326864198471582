"""Sampling: transforms that drop or reorder points, and the voxel grid."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from pointcept_kd.host import TRANSFORMS, InputError, kd, stand_in

from .arrays import Array, Data, box_of, coord_of, lookup, need, per_point, select, valid_keys


@kd.TRANSFORMS.register_module()
class RangeCrop:
    """Remove the points outside a box (low <= coord < high); honours `index_valid_keys`.

    Args:
        point_cloud_range: x, y, z minimum, then maximum, in metres.
    """

    def __init__(self, point_cloud_range: Sequence[float]) -> None:
        self.low, self.high = box_of(point_cloud_range, "RangeCrop")

    def __call__(self, data: Data) -> Data:
        coord = coord_of(data, "RangeCrop")
        inside = np.ones(len(coord), dtype=bool)
        for axis in range(3):
            column = coord[:, axis]
            inside &= (column >= self.low[axis]) & (column < self.high[axis])
        return data if inside.all() else select(data, inside, "RangeCrop")


@stand_in(TRANSFORMS, kd.TRANSFORMS, "RandomDropout")
class RandomDropout:
    """Remove a random share of the points, with probability `dropout_application_ratio`.

    Points in `sampled_index` stay. One point is always left.
    """

    def __init__(self, dropout_ratio: float = 0.2, dropout_application_ratio: float = 0.5) -> None:
        need(
            0 <= dropout_ratio < 1,
            f"RandomDropout: dropout_ratio is in [0, 1), got {dropout_ratio}",
        )
        self.dropout_ratio = dropout_ratio
        self.dropout_application_ratio = dropout_application_ratio

    def __call__(self, data: Data) -> Data:
        if random.random() >= self.dropout_application_ratio:
            return data
        total = len(coord_of(data, "RandomDropout"))
        left = max(1, int(total * (1 - self.dropout_ratio)))
        rows = np.random.choice(total, left, replace=False)
        return select(data, keep_sampled(data, rows), "RandomDropout")


def keep_sampled(data: Data, rows: Array) -> Array:
    """Add to a selection the rows of `sampled_index`, the few labelled points of such data sets."""
    if "sampled_index" not in data:
        return rows
    sampled = np.unique(data["sampled_index"])
    rows = np.unique(np.append(rows, sampled))
    data["sampled_index"] = np.searchsorted(rows, sampled)
    return rows


@stand_in(TRANSFORMS, kd.TRANSFORMS, "SphereCrop")
class SphereCrop:
    """Keep the points nearest to a centre, nearest first; smaller clouds stay as they are.

    Args:
        point_max: how many points to keep.
        sample_rate: keep this share of the cloud instead (at least one point).
        mode: the centre: "random" (a point), "center" (the middle row) or "given" (mean of the
            points that have a match in every image of `correspondence`; a random point if none
            has).
    """

    def __init__(
        self, point_max: int = 80000, sample_rate: float | None = None, mode: str = "random"
    ) -> None:
        need(
            mode in ("random", "center", "given"),
            f"SphereCrop: mode is random, center or given, got {mode!r}",
        )
        self.point_max = point_max
        self.sample_rate = sample_rate
        self.mode = mode

    def __call__(self, data: Data) -> Data:
        coord = coord_of(data, "SphereCrop")
        limit = self.point_max
        if self.sample_rate is not None:
            limit = max(1, int(self.sample_rate * len(coord)))
        if len(coord) <= limit:
            return data
        distance = np.sum(np.square(coord - self.center(coord, data)), axis=1)
        return select(data, np.argsort(distance)[:limit], "SphereCrop")

    def center(self, coord: Array, data: Data) -> Array:
        """The centre (3,) of the crop."""
        if self.mode == "center":
            return coord[len(coord) // 2]
        if self.mode == "given":
            matches = data["correspondence"].reshape(len(data["correspondence"]), -1)
            matched = coord[np.all(matches != -1, axis=1)]
            if len(matched):
                return np.mean(matched, axis=0)
        return coord[np.random.randint(len(coord))]


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ShufflePoint")
class ShufflePoint:
    """Put the points into random order."""

    def __call__(self, data: Data) -> Data:
        order = np.arange(len(coord_of(data, "ShufflePoint")))
        np.random.shuffle(order)
        return select(data, order, "ShufflePoint")


@stand_in(TRANSFORMS, kd.TRANSFORMS, "CropBoundary")
class CropBoundary:
    """Remove the points of classes 0 and 1 (wall and floor indoors)."""

    def __call__(self, data: Data) -> Data:
        need("segment" in data, "CropBoundary: the sample has no segment")
        segment = data["segment"].reshape(-1)
        return select(data, (segment != 0) & (segment != 1), "CropBoundary")


FNV_BASIS = 14695981039346656037
FNV_PRIME = 1099511628211


def fnv_keys(cells: Sequence[Array]) -> Array:
    """64-bit FNV keys (n,) uint64 of cells, three int64 columns: per axis times the prime, then xor."""
    keys = np.full(len(cells[0]), FNV_BASIS, dtype=np.uint64)
    for cell in cells:
        keys *= np.uint64(FNV_PRIME)
        keys ^= cell.view(np.uint64)
    return keys


def ravel_keys(cells: Sequence[Array]) -> Array:
    """Row-major position (n,) uint64 of non-negative cells, three columns, in their bounding box."""
    keys = np.zeros(len(cells[0]), dtype=np.uint64)
    for cell in cells:
        keys *= np.uint64(cell.max() + 1)
        keys += cell.view(np.uint64)
    return keys


@stand_in(TRANSFORMS, kd.TRANSFORMS, "GridSample")
class GridSample:
    """One point per voxel; voxels are ordered by their key, not in space.

    mode "train" keeps one random point per voxel. mode "test" returns a list of clouds, as many as
    the fullest voxel has points: the i-th takes the (i mod count)-th point of every voxel, so that
    together they cover every point; `index` (m,) says which row of the input each one is.

    Args:
        grid_size: edge of a voxel in metres, or three edges.
        hash_type: "fnv"; anything else sorts by the ravelled cell.
        mode: "train" or "test".
        return_inverse: add `inverse` (n,) int64, the voxel row of every input point.
        return_grid_coord: add `grid_coord` (m, 3) int64, the cell, from 0 per axis.
        return_min_coord: add `min_coord` (1, 3), the corner of cell 0 in metres.
        return_displacement: add `displacement` (m, 3) in [-0.5, 0.5], from the middle of the voxel,
            in voxels.
        project_displacement: keep only its component (m, 1) along `normal`.

    Raises:
        InputError: for coordinates that are not finite or too far out for the grid.
    """

    def __init__(
        self,
        grid_size: float | Sequence[float] = 0.05,
        hash_type: str = "fnv",
        mode: str = "train",
        return_inverse: bool = False,
        return_grid_coord: bool = False,
        return_min_coord: bool = False,
        return_displacement: bool = False,
        project_displacement: bool = False,
    ) -> None:
        need(mode in ("train", "test"), f"GridSample: mode is train or test, got {mode!r}")
        need(
            bool(np.all(np.asarray(grid_size) > 0)) and np.size(grid_size) in (1, 3),
            f"GridSample: grid_size is one or three positive edges in metres, got {grid_size!r}",
        )
        self.grid_size = grid_size
        self.keys = fnv_keys if hash_type == "fnv" else ravel_keys
        self.mode = mode
        self.return_inverse = return_inverse
        self.return_grid_coord = return_grid_coord
        self.return_min_coord = return_min_coord
        self.return_displacement = return_displacement
        self.project_displacement = project_displacement

    def __call__(self, data: Data) -> Data | list[Data]:
        cells, scaled, corner = self.locate(coord_of(data, "GridSample"), data.get("name", "?"))
        keys = self.keys(cells)
        # The default (unstable) sort on purpose: it decides which point of a voxel a draw means.
        order = np.argsort(keys)
        keys = np.take(keys, order)
        new = np.empty(len(keys), dtype=bool)
        new[0] = True
        np.not_equal(keys[1:], keys[:-1], out=new[1:])
        starts = np.flatnonzero(new)
        counts = np.diff(starts, append=len(keys))
        if self.mode == "train":
            pick = starts + np.random.randint(0, counts.max(), counts.size) % counts
            first = order[pick]
            rows = keep_sampled(data, first)
            select(data, rows, "GridSample")
            self._describe(data, rows, cells, scaled, corner)
            if self.return_inverse:
                places = np.arange(len(first)) if rows is first else np.searchsorted(rows, first)
                data["inverse"] = _spread(places, counts, order)
            return data
        inverse = _spread(np.arange(len(starts)), counts, order) if self.return_inverse else None
        parts = []
        for i in range(int(counts.max())):
            rows = order[starts + i % counts]
            part = {**data, **per_point(data, rows, "GridSample"), "index": rows}
            # A crop that follows must keep `index` in step.
            part["index_valid_keys"] = list(dict.fromkeys([*data["index_valid_keys"], "index"]))
            self._describe(part, rows, cells, scaled, corner)
            if inverse is not None:
                part["inverse"] = inverse.copy()
            parts.append(part)
        return parts

    def locate(self, coord: Array, name: str) -> tuple[list[Array], list[Array], Array]:
        """Cells and positions in voxels, both from 0 and as three columns, and the corner (3,).

        The positions are left out (an empty list) unless the displacement needs them.
        """
        size = np.asarray(self.grid_size)
        cells, scaled, corner = [], [], []
        for axis in range(3):
            edge = size if size.size == 1 else size[axis : axis + 1]
            column = coord[:, axis] / edge
            # Fresh pages cost more than the arithmetic: one buffer serves where nothing is kept.
            floor = np.floor(column, out=None if self.return_displacement else column)
            if not (np.abs(floor.min()) < 2.0**62 and np.abs(floor.max()) < 2.0**62):
                raise InputError(
                    f"GridSample: sample {name} has coordinates that are not finite or too far out "
                    f"for voxels of {self.grid_size} m"
                )
            cell = floor.astype(np.int64)
            low = cell.min()
            cell -= low
            cells.append(cell)
            if self.return_displacement:
                scaled.append(column - low)
            corner.append(low * edge.item())
        return cells, scaled, np.array(corner)

    def _describe(
        self, data: Data, rows: Array, cells: list[Array], scaled: list[Array], corner: Array
    ) -> None:
        """Write the optional outputs into `data`, whose per-point arrays hold `rows` already."""
        listed = valid_keys(data)
        if self.return_grid_coord:
            data["grid_coord"] = np.empty((len(rows), 3), dtype=np.int64)
            for axis, cell in enumerate(cells):
                data["grid_coord"][:, axis] = cell[rows]
            listed.append("grid_coord")
        if self.return_min_coord:
            data["min_coord"] = corner.reshape(1, 3)
        if self.return_displacement:
            offsets = [column[rows] - cell[rows] - 0.5 for column, cell in zip(scaled, cells)]
            displacement = np.stack(offsets, axis=1)
            if self.project_displacement:
                normal = lookup(data, "normal", "GridSample with project_displacement")
                displacement = np.sum(displacement * normal, axis=-1, keepdims=True)
            data["displacement"] = displacement
            listed.append("displacement")
        data["index_valid_keys"] = list(dict.fromkeys(listed))


def _spread(values: Array, counts: Array, order: Array) -> Array:
    """One value per voxel to one per point; voxel v has the next `counts[v]` rows of `order`."""
    inverse = np.empty(len(order), dtype=np.int64)
    inverse[order] = np.repeat(values, counts)
    return inverse
