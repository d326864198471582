"""What a denoiser is told: cells of its points, features of the partial scan, which feature belongs to which cell.

A partial scan is encoded once. Every cell of the noisy cloud then takes the feature of the nearest cell of the scan it
belongs to; both are compared as whole numbers, so equal distances are equal, and of those the smallest cell in the
order (x, y, z) is taken on every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from pointcept_kd.host import InputError
from pointcept_kd.host.point import offset2batch
from pointcept_kd.ops.grid import CellKeys, unique_cells
from pointcept_kd.ops.sparse import SparseConvTensor

MATCHES = ("corner", "centre")
CONDITION_STRIDE = 16  # cells of the finest level along the edge of a condition's cell
# Within this many cells of the origin squared distances, also with a row number below them, are exact in both searches.
_FARTHEST = 2**20
# Distances that the blocked search holds at once.
_CHUNK = 2**25


class Voxels:
    """Points cut into cells, with what networks on the same cells share; make one with `voxelise`.

    tensor: `SparseConvTensor` on an unbounded grid, one row per occupied cell in ascending order (scan, x, y, z),
    features the mean coordinates (m, 3); inverse: int64 (n,), the row of every point; batch_size: number of scans;
    voxel_size: edge of a cell in metres.
    """

    def __init__(
        self, tensor: SparseConvTensor, inverse: Tensor, batch_size: int, voxel_size: float
    ) -> None:
        self.tensor = tensor
        self.inverse = inverse
        self.batch_size = batch_size
        self.voxel_size = voxel_size
        self._rows: WeakKeyDictionary[Condition, dict[tuple[str, int], Tensor]] = (
            WeakKeyDictionary()
        )

    def rows_of(self, condition: Condition, cells: Tensor, level: int, match: str) -> Tensor:
        """`condition.rows_of(cells, 2 ** level, match)`, searched once per level."""
        known = self._rows.setdefault(condition, {})
        if (match, level) not in known:
            known[match, level] = condition.rows_of(cells, 2**level, match)
        return known[match, level]


def voxelise(coord: Tensor, offset: Tensor, voxel_size: float, name: str = "coord") -> Voxels:
    """Cells round(p / voxel_size), half to even, of points in metres, and the mean of the points in each of them.

    Args:
        coord: float (n, 3), n >= 1.
        offset: int (b,), end of each scan; scans may be empty.
        name: of `coord`, for messages.

    Raises:
        InputError: for other shapes, no points, points that are not finite or farther away than 2 ** 20 cells.
    """
    if coord.dim() != 2 or coord.shape[1] != 3 or not coord.is_floating_point():
        raise InputError(
            f"{name} must be floating point of the shape (n, 3); got {coord.dtype} {tuple(coord.shape)}"
        )
    ends = offset.tolist() if offset.dim() == 1 else []
    if not ends or ends[-1] != len(coord) or ends != sorted(ends) or ends[0] < 0:
        raise InputError(
            f"offset must hold the ends of the scans in ascending order, the last one {len(coord)}, the number of "
            f"points in {name}; got {offset.tolist()}"
        )
    if not len(coord):
        raise InputError(f"{name} has no points")
    # Half precision would move points by more than a cell.
    coord = coord if coord.dtype == torch.float64 else coord.float()
    # By a tensor: CUDA multiplies by the rounded reciprocal of a plain number.
    places = (coord.detach() / coord.new_full((), voxel_size)).round_()
    near = places.abs() <= _FARTHEST  # False for NaN
    if not bool(near.all()):
        row = int((~near.all(1)).nonzero()[0])
        raise InputError(
            f"{name} is not finite or farther away than {_FARTHEST * voxel_size:.0f} m, first in row {row}: "
            f"{coord[row].tolist()}"
        )
    cells, scan = places.long(), offset2batch(offset)
    grid = CellKeys.fit(scan, cells)
    keys, inverse, counts = unique_cells(grid.pack(scan, cells))
    batch, cells = grid.unpack(keys)
    # In float64 the sum hardly ever depends on the order of the points.
    total = coord.new_zeros((len(keys), 3), dtype=torch.float64).index_add(
        0, inverse, coord.double()
    )
    mean = (total / counts[:, None]).to(coord.dtype)
    tensor = SparseConvTensor(mean, torch.cat((batch[:, None], cells), 1), None, len(offset))
    return Voxels(tensor, inverse, len(offset), voxel_size)


@dataclass(eq=False)
class Condition:
    """Encoded partial scans.

    Attributes:
        cells: int64 (v, 4), rows (scan, x, y, z): lower corners in cells of the finest level, multiples of 16.
        features: float (v, c).
        batch_size: number of scans.
        voxel_size: edge of a cell of the finest level in metres.
        null: float (c,), the feature that stands for "no scan", of the encoder that made this; None if there is none.
        dropped: bool (b,), scans that count as "no scan"; None for none of them.

    Raises:
        InputError: for shapes that do not fit together.
    """

    cells: Tensor
    features: Tensor
    batch_size: int
    voxel_size: float
    null: Tensor | None = None
    dropped: Tensor | None = None
    # What can be computed once per scan: the search's trees, and by network the part of its gates that knows no time.
    _scans: dict[int, tuple[Tensor, Tensor, cKDTree | None]] = field(
        default_factory=dict, repr=False
    )
    _projected: WeakKeyDictionary[Any, tuple[Any, Any]] = field(
        default_factory=WeakKeyDictionary, repr=False
    )

    def __post_init__(self) -> None:
        shape = tuple(self.cells.shape)
        if len(shape) != 2 or shape[1] != 4 or self.features.shape[:1] != shape[:1]:
            raise InputError(
                f"a condition needs cells (v, 4) and features (v, c); got {shape} and {tuple(self.features.shape)}"
            )
        if self.dropped is not None and tuple(self.dropped.shape) != (self.batch_size,):
            raise InputError(
                f"dropped must be bool ({self.batch_size},), one per scan; got {tuple(self.dropped.shape)}"
            )

    def drop(self, scans: Tensor | None = None) -> Condition:
        """The same with the scans marked True in `scans` (b,) counted as "no scan", all of them by default."""
        if scans is None:
            scans = torch.ones(self.batch_size, dtype=torch.bool, device=self.cells.device)
        return replace(self, dropped=scans.to(self.cells.device, torch.bool))

    def detach(self) -> Condition:
        """The same without a graph."""
        null = None if self.null is None else self.null.detach()
        return replace(
            self, features=self.features.detach(), null=null, _projected=WeakKeyDictionary()
        )

    def rows_of(self, cells: Tensor, stride: int, match: str) -> Tensor:
        """Row of the nearest cell of the same scan for every cell (n, 4) of a level, int64 (n,).

        Rows of dropped scans get v + scan. Of equally near cells the smallest in the order (x, y, z) is taken.

        Args:
            cells: rows (scan, x, y, z), counted in cells of their own level.
            stride: cells of the finest level along the edge of one of them.
            match: "corner" compares lower corners, as the released weights were trained; "centre" compares centres.

        Raises:
            InputError: for a scan of `cells` of which the condition has no cell.
        """
        scan = cells[:, 0].long()
        # In halves of a cell centres are whole numbers. The condition's own shift is taken off the other side.
        places = 2 * stride * cells[:, 1:].long()
        if match == "centre":
            places = places + (stride - CONDITION_STRIDE)
        rows = len(self.cells) + scan
        dropped = None if self.dropped is None else self.dropped.tolist()
        ends = torch.bincount(scan, minlength=self.batch_size).cumsum(0).tolist()
        begin = 0
        for number, end in enumerate(ends):
            # Rows of a level stand scan by scan.
            if end > begin and not (dropped and dropped[number]):
                rows[begin:end] = self._nearest(number, places[begin:end])
            begin = end
        return rows

    def _nearest(self, scan: int, places: Tensor) -> Tensor:
        if scan not in self._scans:
            of_scan = (self.cells[:, 0] == scan).nonzero()[:, 0]
            if not len(of_scan):
                raise InputError(f"the condition has no cell of scan {scan}")
            corners = self.cells[of_scan, 1:].long()
            grid = CellKeys.fit(torch.zeros_like(of_scan), corners)
            order = torch.argsort(grid.pack(torch.zeros_like(of_scan), corners), stable=True)
            of_scan, corners = of_scan[order], 2 * corners[order]
            on_cpu = corners.device.type == "cpu"
            tree = cKDTree(corners.double().numpy()) if on_cpu else None
            self._scans[scan] = (of_scan, corners, tree)
        of_scan, corners, tree = self._scans[scan]
        found = _in_blocks(places, corners) if tree is None else _in_tree(places, tree)
        return of_scan[found]


def _in_tree(query: Tensor, tree: cKDTree) -> Tensor:
    """Row of the nearest point for every query, the smallest among equals; whole numbers."""
    places = query.double().numpy()
    size, workers = tree.n, torch.get_num_threads()
    if size == 1:
        return torch.zeros(len(query), dtype=torch.int64)
    # Sums of squares of whole numbers are exact, and so unequal ones have unequal roots.
    near, rows = tree.query(places, k=2, workers=workers)
    best = rows[:, 0].astype(np.int64)
    tied, k = np.flatnonzero(near[:, 0] == near[:, 1]), 2
    while len(tied):
        k = min(4 * k, size)
        near, rows = tree.query(places[tied], k=k, workers=workers)
        same = near == near[:, :1]
        best[tied] = np.where(same, rows, size).min(axis=1)
        tied = tied[same[:, -1]] if k < size else tied[:0]
    return torch.from_numpy(best)


def _in_blocks(query: Tensor, support: Tensor) -> Tensor:
    """The same by all distances, block by block, without a tree."""
    size = len(support)
    row = torch.arange(size, device=query.device)
    best = []
    for part in query.split(max(1, _CHUNK // size)):
        squares = (part[:, 0, None] - support[:, 0]).square_()
        for axis in (1, 2):
            squares += (part[:, axis, None] - support[:, axis]).square_()
        # Distance and row in one number: the smallest is the nearest, and the first of those.
        best.append(squares.mul_(size).add_(row).amin(1).remainder_(size))
    return torch.cat(best)


def time_embedding(t: Tensor, channels: int) -> Tensor:
    """Sines, then cosines, of t f_k with f_k = exp(-k ln(10000) / (channels / 2 - 1)); float64 (b, channels).

    A column of zeros follows where `channels` is odd.
    """
    half = channels // 2
    k = torch.arange(half, dtype=torch.float64, device=t.device)
    angles = t.double()[:, None] * torch.exp(k * (-math.log(10000.0) / max(half - 1, 1)))
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    return torch.nn.functional.pad(waves, (0, channels - 2 * half))
