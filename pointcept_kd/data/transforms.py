"""Augmentation and sampling of one scan: dictionary of numpy arrays in, dictionary out.

The names, parameters and results are those of Pointcept's transforms. So are the random draws:
python's `random` opens the gates of rotation, dropout and distortion, numpy's global generator
gives everything else, in the same order, so that equal seeds give equal arrays. The differences are
fixes: no transform writes into an array it was given, one that leaves no points says so, and one
that would leave other arrays behind refuses.

Per-point arrays are those under the keys of `data["index_valid_keys"]`; transforms that drop or
reorder points index exactly these. A new per-point array must be added to that list with `Update`.

The file is long because it is a list: each class stands alone.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import interpolate, ndimage

from pointcept_kd.host import TRANSFORMS, InputError, kd, stand_in

Data = dict[str, Any]
Array = np.ndarray

INDEX_VALID_KEYS = ("coord", "color", "normal", "superpoint", "strength", "segment", "instance")


def valid_keys(data: Data) -> list[str]:
    """The sample's own, writable list of per-point keys; a list that came from a config is copied."""
    data["index_valid_keys"] = list(data.get("index_valid_keys", INDEX_VALID_KEYS))
    return data["index_valid_keys"]


def select(data: Data, index: Array, who: str) -> Data:
    """Index every per-point array of the sample.

    Args:
        index: rows (m,) or mask (n,).
        who: name of the transform, for messages.

    Raises:
        InputError: when no point is left, when a per-point array has another length than `coord`,
            or when the sample holds an `inverse`, whose rows would then be wrong.
    """
    if "inverse" in data:
        raise InputError(
            f"{who} drops or reorders points after GridSample made `inverse`, which then points to "
            "wrong rows; put it before that GridSample"
        )
    rows = _per_point(data, index, who)
    data.update(rows)
    return data


def _per_point(data: Data, index: Array, who: str) -> Data:
    total = len(data["coord"])
    is_mask = index.dtype == bool
    chosen = {}
    for key in valid_keys(data):
        if key in data:
            if len(data[key]) != total:
                raise InputError(
                    f"{who}: {key} of sample {data.get('name', '?')} has {len(data[key])} rows, "
                    f"coord {total}; every key of index_valid_keys needs one row per point"
                )
            chosen[key] = data[key][index] if is_mask else np.take(data[key], index, axis=0)
    if len(chosen.get("coord", data["coord"])) == 0:
        raise InputError(
            f"{who} leaves no point of sample {data.get('name', '?')} ({total} before); "
            "check its range or ratio against the units of the data"
        )
    return chosen


def _coord(data: Data, who: str) -> Array:
    coord = data.get("coord")
    if coord is None or coord.ndim != 2 or coord.shape[1] != 3 or len(coord) == 0:
        found = "no coord" if coord is None else f"coord of shape {coord.shape}"
        name = data.get("name", "?")
        raise InputError(f"{who}: sample {name} has {found}; expected (n, 3) with n > 0")
    return coord if np.issubdtype(coord.dtype, np.floating) else coord.astype(np.float32)


def _bounds(coord: Array) -> tuple[list[Any], list[Any]]:
    """Smallest and largest value per axis, by columns: several times faster than `axis=0` here."""
    columns = [coord[:, axis] for axis in range(3)]
    return [c.min() for c in columns], [c.max() for c in columns]


def _moved(coord: Array, shift: Any) -> Array:
    """`coord + shift` for a shift (3,), in the type of `coord`.

    Column by column in double precision: numpy is tens of times slower with a trailing axis of 3 and
    mixed types, and rounding a double sum to float32 is the same as adding in float32.
    """
    result = coord.astype(np.float64)
    for axis in range(3):
        if shift[axis] != 0:
            result[:, axis] += shift[axis]
    return result.astype(coord.dtype, copy=False)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


# ---- moving points
# ---------------------------------------------------------------------------------------------


def _rotate(data: Data, angle: float, center: Any, axis: str, who: str) -> Data:
    coord = _coord(data, who)
    c, s = np.cos(angle), np.sin(angle)
    matrix = {
        "x": [[1, 0, 0], [0, c, -s], [0, s, c]],
        "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
        "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]],
    }[axis]
    turn = np.array(matrix, dtype=np.float64).T
    if center is None:
        low, high = _bounds(coord)
        center = [(a + b) / 2 for a, b in zip(low, high)]
    center = np.asarray(center, dtype=np.float64)
    centred = _moved(coord, -center).astype(np.float64, copy=False)
    data["coord"] = _moved(np.dot(centred, turn), center)
    if "normal" in data:
        data["normal"] = np.dot(data["normal"].astype(np.float64, copy=False), turn)
    return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "RandomRotate")
class RandomRotate:
    """Turn `coord` and `normal` by a uniform angle; the result is float64.

    Args:
        angle: lower and upper bound in multiples of pi.
        center: of the rotation, in metres; None is the middle of the bounding box.
        axis: "x", "y" or "z".
        always_apply: the same as p=1.
        p: probability.
    """

    def __init__(
        self,
        angle: Sequence[float] | None = None,
        center: Sequence[float] | None = None,
        axis: str = "z",
        always_apply: bool = False,
        p: float = 0.5,
    ) -> None:
        _need(axis in ("x", "y", "z"), f"{type(self).__name__}: axis is x, y or z, got {axis!r}")
        self.angle = [-1, 1] if angle is None else angle
        self.center = center
        self.axis = axis
        self.p = 1 if always_apply else p

    def draw(self) -> float:
        """The angle in radians."""
        return np.random.uniform(self.angle[0], self.angle[1]) * np.pi

    def __call__(self, data: Data) -> Data:
        if random.random() > self.p:
            return data
        return _rotate(data, self.draw(), self.center, self.axis, type(self).__name__)


@stand_in(TRANSFORMS, kd.TRANSFORMS, "RandomRotateTargetAngle")
class RandomRotateTargetAngle(RandomRotate):
    """Turn by one of the listed angles (multiples of pi); otherwise as `RandomRotate`."""

    def __init__(
        self,
        angle: Sequence[float] = (1 / 2, 1, 3 / 2),
        center: Sequence[float] | None = None,
        axis: str = "z",
        always_apply: bool = False,
        p: float = 0.75,
    ) -> None:
        super().__init__(angle, center, axis, always_apply, p)

    def draw(self) -> float:
        """One of the angles, in radians."""
        return np.random.choice(self.angle) * np.pi


@stand_in(TRANSFORMS, kd.TRANSFORMS, "RandomScale")
class RandomScale:
    """Multiply by one uniform factor, or by one per axis if `anisotropic`."""

    def __init__(self, scale: Sequence[float] | None = None, anisotropic: bool = False) -> None:
        self.scale = [0.95, 1.05] if scale is None else scale
        self.anisotropic = anisotropic

    def __call__(self, data: Data) -> Data:
        coord = _coord(data, "RandomScale")
        factor = np.random.uniform(self.scale[0], self.scale[1], 3 if self.anisotropic else 1)
        scaled = coord.astype(np.float64)
        scaled *= factor
        data["coord"] = scaled.astype(coord.dtype, copy=False)
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "RandomFlip")
class RandomFlip:
    """Negate x with probability `p`, then independently y, of `coord` and `normal`."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, data: Data) -> Data:
        data["coord"] = _coord(data, "RandomFlip")
        axes = [axis for axis in (0, 1) if np.random.rand() < self.p]
        for key in ("coord", "normal"):
            if axes and key in data:
                data[key] = data[key].copy()
                for axis in axes:
                    np.negative(data[key][:, axis], out=data[key][:, axis])
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "RandomJitter")
class RandomJitter:
    """Add Gaussian noise of `sigma` metres, clipped to +-`clip`, to every coordinate."""

    def __init__(self, sigma: float = 0.01, clip: float = 0.05) -> None:
        _need(clip > 0, f"RandomJitter: clip must be positive, got {clip}")
        self.sigma = sigma
        self.clip = clip

    def __call__(self, data: Data) -> Data:
        coord = _coord(data, "RandomJitter")
        noise = np.random.randn(len(coord), 3)
        noise *= self.sigma
        np.clip(noise, -self.clip, self.clip, out=noise)
        noise += coord
        data["coord"] = noise.astype(coord.dtype, copy=False)
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "RandomShift")
class RandomShift:
    """Add one uniform shift per cloud; `shift` holds (low, high) in metres for x, y and z."""

    def __init__(
        self, shift: Sequence[Sequence[float]] = ((-0.2, 0.2), (-0.2, 0.2), (0, 0))
    ) -> None:
        ranges = np.asarray(shift, dtype=np.float64)
        _need(
            ranges.shape == (3, 2), f"RandomShift: shift is three (low, high) pairs, got {shift!r}"
        )
        self.shift = shift

    def __call__(self, data: Data) -> Data:
        coord = _coord(data, "RandomShift")
        data["coord"] = _moved(coord, [np.random.uniform(low, high) for low, high in self.shift])
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "CenterShift")
class CenterShift:
    """Subtract the middle of the bounding box in x and y and, with `apply_z`, the lowest z."""

    def __init__(self, apply_z: bool = True) -> None:
        self.apply_z = apply_z

    def __call__(self, data: Data) -> Data:
        coord = _coord(data, "CenterShift")
        low, high = _bounds(coord)
        middle = [(a + b) / 2 for a, b in zip(low, high)]
        data["coord"] = _moved(coord, [-middle[0], -middle[1], -low[2] if self.apply_z else 0])
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "PositiveShift")
class PositiveShift:
    """Subtract the smallest coordinate of each axis."""

    def __call__(self, data: Data) -> Data:
        coord = _coord(data, "PositiveShift")
        data["coord"] = _moved(coord, [-low for low in _bounds(coord)[0]])
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "NormalizeCoord")
class NormalizeCoord:
    """Centre on the mean and scale into the unit sphere; coinciding points are only centred."""

    def __call__(self, data: Data) -> Data:
        coord = _coord(data, "NormalizeCoord")
        coord = coord - np.mean(coord, axis=0)
        reach = np.max(np.sqrt(np.sum(coord**2, axis=1)))
        data["coord"] = coord / reach if reach > 0 else coord
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ElasticDistortion")
class ElasticDistortion:
    """Move points by a smooth random field, with probability 0.95.

    Args:
        distortion_params: (granularity, magnitude) pairs in metres, applied one after the other;
            None is [[0.2, 0.4], [0.8, 1.6]].

    Raises:
        InputError: when the noise grid would not fit into memory.
    """

    MAX_CELLS = 10**8

    def __init__(self, distortion_params: Sequence[Sequence[float]] | None = None) -> None:
        params = [[0.2, 0.4], [0.8, 1.6]] if distortion_params is None else distortion_params
        _need(
            all(len(pair) == 2 and pair[0] > 0 for pair in params),
            f"ElasticDistortion: expected (granularity > 0, magnitude) pairs, got {params!r}",
        )
        self.distortion_params = params

    def __call__(self, data: Data) -> Data:
        data["coord"] = _coord(data, "ElasticDistortion")
        if random.random() < 0.95:
            for granularity, magnitude in self.distortion_params:
                data["coord"] = self.distort(data["coord"], granularity, magnitude)
        return data

    def distort(self, coord: Array, granularity: float, magnitude: float) -> Array:
        """Add trilinearly read noise: Gaussian on a grid of cells `granularity` wide, blurred twice."""
        low = coord.min(axis=0)
        shape = ((coord - low).max(axis=0) // granularity).astype(int) + 3
        _need(
            int(np.prod(shape)) <= self.MAX_CELLS,
            f"ElasticDistortion: granularity {granularity} m gives a noise grid of "
            f"{shape.tolist()} cells for this scan; use a coarser one or crop first",
        )
        noise = np.random.randn(*shape, 3).astype(np.float32)
        box = np.full(3, np.float32(1) / np.float32(3), dtype=np.float32)
        for axis in (0, 1, 2) * 2:
            noise = ndimage.convolve1d(noise, box, axis=axis, mode="constant", cval=0)
        axes = [
            np.linspace(start, stop, steps)
            for start, stop, steps in zip(low - granularity, low + granularity * (shape - 2), shape)
        ]
        field = interpolate.RegularGridInterpolator(axes, noise, bounds_error=False, fill_value=0)
        return (coord + field(coord) * magnitude).astype(coord.dtype, copy=False)


@stand_in(TRANSFORMS, kd.TRANSFORMS, "PointClip")
class PointClip:
    """Clamp coordinates to a box; far points pile up on its faces. `kd.RangeCrop` removes them.

    Args:
        point_cloud_range: x, y, z minimum, then maximum, in metres.
    """

    def __init__(self, point_cloud_range: Sequence[float] = (-80, -80, -3, 80, 80, 1)) -> None:
        self.low, self.high = _box(point_cloud_range, "PointClip")

    def __call__(self, data: Data) -> Data:
        coord = _coord(data, "PointClip").astype(np.float64)
        for axis in range(3):
            column = coord[:, axis]
            np.clip(column, self.low[axis], self.high[axis], out=column)
        data["coord"] = coord
        return data


def _box(limits: Sequence[float], who: str) -> tuple[Array, Array]:
    box = np.asarray(limits, dtype=np.float64)
    _need(
        box.shape == (6,) and bool((box[:3] < box[3:]).all()),
        f"{who}: point_cloud_range is x, y, z minimum then maximum, got {limits!r}",
    )
    return box[:3], box[3:]


# ---- dropping and reordering points
# ----------------------------------------------------------------------------


@kd.TRANSFORMS.register_module()
class RangeCrop:
    """Remove the points outside a box (low <= coord < high); honours `index_valid_keys`.

    Args:
        point_cloud_range: x, y, z minimum, then maximum, in metres.
    """

    def __init__(self, point_cloud_range: Sequence[float]) -> None:
        self.low, self.high = _box(point_cloud_range, "RangeCrop")

    def __call__(self, data: Data) -> Data:
        coord = _coord(data, "RangeCrop")
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
        _need(
            0 <= dropout_ratio < 1,
            f"RandomDropout: dropout_ratio is in [0, 1), got {dropout_ratio}",
        )
        self.dropout_ratio = dropout_ratio
        self.dropout_application_ratio = dropout_application_ratio

    def __call__(self, data: Data) -> Data:
        if random.random() >= self.dropout_application_ratio:
            return data
        total = len(_coord(data, "RandomDropout"))
        left = max(1, int(total * (1 - self.dropout_ratio)))
        rows = np.random.choice(total, left, replace=False)
        return select(data, _keep_sampled(data, rows), "RandomDropout")


def _keep_sampled(data: Data, rows: Array) -> Array:
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
        _need(
            mode in ("random", "center", "given"),
            f"SphereCrop: mode is random, center or given, got {mode!r}",
        )
        self.point_max = point_max
        self.sample_rate = sample_rate
        self.mode = mode

    def __call__(self, data: Data) -> Data:
        coord = _coord(data, "SphereCrop")
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
        order = np.arange(len(_coord(data, "ShufflePoint")))
        np.random.shuffle(order)
        return select(data, order, "ShufflePoint")


@stand_in(TRANSFORMS, kd.TRANSFORMS, "CropBoundary")
class CropBoundary:
    """Remove the points of classes 0 and 1 (wall and floor indoors)."""

    def __call__(self, data: Data) -> Data:
        _need("segment" in data, "CropBoundary: the sample has no segment")
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
        _need(mode in ("train", "test"), f"GridSample: mode is train or test, got {mode!r}")
        _need(
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
        cells, scaled, corner = self.locate(_coord(data, "GridSample"), data.get("name", "?"))
        keys = self.keys(cells)
        # The default (unstable) sort on purpose: it decides which point of a voxel a draw means.
        order = np.argsort(keys)
        keys = keys[order]
        new = np.empty(len(keys), dtype=bool)
        new[0] = True
        np.not_equal(keys[1:], keys[:-1], out=new[1:])
        starts = np.flatnonzero(new)
        counts = np.diff(starts, append=len(keys))
        if self.mode == "train":
            pick = starts + np.random.randint(0, counts.max(), counts.size) % counts
            first = order[pick]
            rows = _keep_sampled(data, first)
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
            part = {**data, **_per_point(data, rows, "GridSample"), "index": rows}
            # A crop that follows must keep `index` in step.
            part["index_valid_keys"] = list(dict.fromkeys([*data["index_valid_keys"], "index"]))
            self._describe(part, rows, cells, scaled, corner)
            if inverse is not None:
                part["inverse"] = inverse.copy()
            parts.append(part)
        return parts

    def locate(self, coord: Array, name: str) -> tuple[list[Array], list[Array], Array]:
        """Cells and positions in voxels, both from 0 and as three columns, and the corner (3,)."""
        size = np.asarray(self.grid_size)
        cells, scaled, corner = [], [], []
        for axis in range(3):
            edge = size if size.size == 1 else size[axis : axis + 1]
            column = coord[:, axis] / edge
            if not (np.abs(column.min()) < 2.0**62 and np.abs(column.max()) < 2.0**62):
                raise InputError(
                    f"GridSample: sample {name} has coordinates that are not finite or too far out "
                    f"for voxels of {self.grid_size} m"
                )
            cell = np.floor(column).astype(np.int64)
            low = cell.min()
            cell -= low
            cells.append(cell)
            scaled.append(column - low)
            corner.append(low * edge.item())
        return cells, scaled, np.array(corner)

    def _describe(
        self, data: Data, rows: Array, cells: list[Array], scaled: list[Array], corner: Array
    ) -> None:
        """Write the optional outputs into `data`, whose per-point arrays hold `rows` already."""
        listed = valid_keys(data)
        if self.return_grid_coord:
            data["grid_coord"] = np.stack([cell[rows] for cell in cells], axis=1)
            listed.append("grid_coord")
        if self.return_min_coord:
            data["min_coord"] = corner.reshape(1, 3)
        if self.return_displacement:
            offsets = [column[rows] - cell[rows] - 0.5 for column, cell in zip(scaled, cells)]
            displacement = np.stack(offsets, axis=1)
            if self.project_displacement:
                normal = _lookup(data, "normal", "GridSample with project_displacement")
                displacement = np.sum(displacement * normal, axis=-1, keepdims=True)
            data["displacement"] = displacement
            listed.append("displacement")
        data["index_valid_keys"] = list(dict.fromkeys(listed))


def _spread(values: Array, counts: Array, order: Array) -> Array:
    """One value per voxel to one per point; voxel v has the next `counts[v]` rows of `order`."""
    inverse = np.empty(len(order), dtype=np.int64)
    inverse[order] = np.repeat(values, counts)
    return inverse


# ---- keys and values
# -------------------------------------------------------------------------------------------


@stand_in(TRANSFORMS, kd.TRANSFORMS, "Copy")
class Copy:
    """Copy values; `keys_dict` maps the key to read to the key to write."""

    def __init__(self, keys_dict: Mapping[str, str] | None = None) -> None:
        default = {"coord": "origin_coord", "segment": "origin_segment"}
        self.keys_dict = default if keys_dict is None else keys_dict

    def __call__(self, data: Data) -> Data:
        for source, target in self.keys_dict.items():
            value = _lookup(data, source, "Copy")
            is_tensor = isinstance(value, torch.Tensor)
            data[target] = value.detach().clone() if is_tensor else copy.deepcopy(value)
        return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "Update")
class Update:
    """Set literal values, for instance `index_valid_keys` or `grid_size`."""

    def __init__(self, keys_dict: Mapping[str, Any] | None = None) -> None:
        self.keys_dict = {} if keys_dict is None else keys_dict

    def __call__(self, data: Data) -> Data:
        data.update(copy.deepcopy(dict(self.keys_dict)))
        return data


def _lookup(data: Mapping[str, Any], key: str, who: str) -> Any:
    if key not in data:
        raise InputError(f"{who}: the sample has no {key!r}; it has {', '.join(sorted(data))}")
    return data[key]


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ToTensor")
class ToTensor:
    """Arrays to tensors, through dicts and lists: integers to int64, floats to float32, bool as it is.

    Strings stay; a python (or numpy) number becomes a tensor of one element.

    Raises:
        InputError: for a value of another type, with its key.
    """

    def __call__(self, data: Any) -> Any:
        return self.convert(data, "value")

    def convert(self, value: Any, key: str) -> Any:
        """`value` as a tensor; `key` is for the message."""
        if isinstance(value, (torch.Tensor, str)):
            return value
        if isinstance(value, (bool, int)):
            return torch.tensor([int(value)], dtype=torch.int64)
        if isinstance(value, float):
            return torch.tensor([value], dtype=torch.float32)
        if isinstance(value, np.generic):
            value = np.asarray([value])
        if isinstance(value, np.ndarray):
            for kind, dtype in (("b", np.bool_), ("iu", np.int64), ("f", np.float32)):
                if value.dtype.kind in kind:
                    array = np.ascontiguousarray(value, dtype=dtype)
                    return torch.from_numpy(array if array.flags.writeable else array.copy())
        if isinstance(value, Mapping):
            return {name: self.convert(item, name) for name, item in value.items()}
        if isinstance(value, Sequence):
            return [self.convert(item, key) for item in value]
        kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise InputError(
            f"ToTensor: {key} is a {kind}, which cannot become a tensor; drop it before"
        )


@stand_in(TRANSFORMS, kd.TRANSFORMS, "Collect")
class Collect:
    """Build the dictionary that goes into a batch.

    Args:
        keys: keys to take over.
        offset_keys_dict: name of an offset to the key whose rows it counts; the default is offset:
            coord.
        **groups: `NAME_keys=(...)` concatenates those keys (n, c_i) as float into NAME (n, sum
            c_i), in this order; `feat_keys` makes `feat`.

    Raises:
        InputError: for a missing key, or per-point arrays of different length.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        offset_keys_dict: Mapping[str, str] | None = None,
        **groups: Sequence[str],
    ) -> None:
        self.keys = [keys] if isinstance(keys, str) else list(keys)
        self.offset_keys = {"offset": "coord"} if offset_keys_dict is None else offset_keys_dict
        for name, members in groups.items():
            _need(
                name.endswith("_keys") and isinstance(members, (list, tuple)) and len(members) > 0,
                f"Collect: {name}={members!r}; expected NAME_keys=(key, ...), for instance feat_keys",
            )
        self.groups = {
            name.removesuffix("_keys"): list(members) for name, members in groups.items()
        }

    def __call__(self, data: Data) -> Data:
        result = {key: _lookup(data, key, "Collect") for key in self.keys}
        self._check_rows(data)
        for name, key in self.offset_keys.items():
            result[name] = torch.tensor([len(_lookup(data, key, "Collect"))])
        for name, members in self.groups.items():
            columns = [_lookup(data, key, "Collect") for key in members]
            for key, column in zip(members, columns):
                fits = column.ndim == 2 and len(column) == len(columns[0])
                _need(
                    fits,
                    f"Collect: {name} joins (n, c) arrays, {key} has shape {tuple(column.shape)} beside "
                    f"{len(columns[0])} rows of {members[0]}",
                )
            result[name] = torch.cat([column.float() for column in columns], dim=1)
        return result

    def _check_rows(self, data: Data) -> None:
        if "coord" not in data:
            return
        for key in set(self.keys) & set(data.get("index_valid_keys", INDEX_VALID_KEYS)):
            if len(data[key]) != len(data["coord"]):
                raise InputError(
                    f"Collect: {key} of sample {data.get('name', '?')} has {len(data[key])} rows, "
                    f"coord {len(data['coord'])}; a transform dropped points without knowing {key}: "
                    "set index_valid_keys with Update at the start"
                )


# ---- colour
# ----------------------------------------------------------------------------------------------------


@stand_in(TRANSFORMS, kd.TRANSFORMS, "NormalizeColor")
class NormalizeColor:
    """Colour from 0..255 to 0..1."""

    def __call__(self, data: Data) -> Data:
        if "color" in data:
            data["color"] = data["color"] / 255
        return data


def _recolor(data: Data, p: float, change: Callable[[Array], Array]) -> Data:
    """Change the first three columns of `color` (0..255) with probability `p`, in their type."""
    if "color" in data and np.random.rand() < p:
        color = data["color"].copy()
        color[:, :3] = change(color[:, :3])
        data["color"] = color
    return data


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ChromaticAutoContrast")
class ChromaticAutoContrast:
    """Blend with the colours stretched to 0..255 per channel; a random blend if `blend_factor` is None."""

    def __init__(self, p: float = 0.2, blend_factor: float | None = None) -> None:
        self.p = p
        self.blend_factor = blend_factor

    def __call__(self, data: Data) -> Data:
        return _recolor(data, self.p, self.change)

    def change(self, color: Array) -> Array:
        """Stretch; a channel of one value stays."""
        low, high = np.min(color, 0, keepdims=True), np.max(color, 0, keepdims=True)
        flat = high == low
        stretched = np.where(flat, color, (color - low) * (255 / np.where(flat, 1, high - low)))
        blend = np.random.rand() if self.blend_factor is None else self.blend_factor
        return (1 - blend) * color + blend * stretched


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ChromaticTranslation")
class ChromaticTranslation:
    """Add one shift per channel, up to `ratio` of the range either way."""

    def __init__(self, p: float = 0.95, ratio: float = 0.05) -> None:
        self.p = p
        self.ratio = ratio

    def __call__(self, data: Data) -> Data:
        return _recolor(data, self.p, self.change)

    def change(self, color: Array) -> Array:
        """Shift and clip to 0..255."""
        shift = (np.random.rand(1, 3) - 0.5) * 255 * 2 * self.ratio
        return np.clip(shift + color, 0, 255)


@stand_in(TRANSFORMS, kd.TRANSFORMS, "ChromaticJitter")
class ChromaticJitter:
    """Add Gaussian noise of `std` of the range to every value."""

    def __init__(self, p: float = 0.95, std: float = 0.005) -> None:
        self.p = p
        self.std = std

    def __call__(self, data: Data) -> Data:
        return _recolor(data, self.p, self.change)

    def change(self, color: Array) -> Array:
        """Add noise and clip to 0..255."""
        noise = np.random.randn(len(color), 3)
        noise *= self.std * 255
        return np.clip(noise + color, 0, 255)


# ---- instances
# -------------------------------------------------------------------------------------------------


@stand_in(TRANSFORMS, kd.TRANSFORMS, "InstanceParser")
class InstanceParser:
    """Number the instances from 0 and describe each of them.

    Writes `instance` (n,), `instance_centroid` (n, 3), the mean of each point's instance, and
    `bbox` (instances, 8): centre, size, heading 0, class. Points of ignored classes get
    `instance_ignore_index`; classes are counted without the ignored ones below them.
    """

    def __init__(
        self,
        segment_ignore_index: Sequence[int] = (-1, 0, 1),
        instance_ignore_index: int = -1,
    ) -> None:
        self.segment_ignore_index = list(segment_ignore_index)
        self.instance_ignore_index = instance_ignore_index

    def __call__(self, data: Data) -> Data:
        coord = _coord(data, "InstanceParser")
        segment = _lookup(data, "segment", "InstanceParser").reshape(-1)
        instance = np.array(_lookup(data, "instance", "InstanceParser").reshape(-1))
        kept = ~np.isin(segment, self.segment_ignore_index)
        instance[~kept] = self.instance_ignore_index
        _, number, counts = np.unique(instance[kept], return_inverse=True, return_counts=True)
        instance[kept] = number
        centroid = np.full((len(coord), 3), self.instance_ignore_index, dtype=np.float64)
        bbox = np.zeros((len(counts), 8))
        if len(counts):
            rows = np.flatnonzero(kept)
            order = rows[np.argsort(number, kind="stable")]
            starts = np.cumsum(counts) - counts
            points = coord[order].astype(np.float64)
            low = np.minimum.reduceat(points, starts)
            high = np.maximum.reduceat(points, starts)
            mean = np.add.reduceat(points, starts) / counts[:, None]
            centroid[rows] = mean[number]
            classes = segment[order[starts]]
            vacant = np.array([index for index in self.segment_ignore_index if index >= 0])
            bbox[:, :3] = (low + high) / 2
            bbox[:, 3:6] = high - low
            bbox[:, 7] = classes - (classes[:, None] > vacant[None]).sum(axis=1)
        data.update(instance=instance, instance_centroid=centroid, bbox=bbox)
        return data
