"""Farthest point sampling of a whole scan in a fraction of a second, without changing one row of its result.

The plain algorithm compares every point with every pick: n k distances, two thousand million for 18,000 of 119,000
points. Two observations save nearly all of them and keep the order of the picks:

* While the farthest of a few hundred candidates is at least as far as every other point was, it is the farthest of
  all: distances to the chosen set only fall. So picks are found among candidates, a batch at a time.
* A pick changes only points nearer to it than the farthest point is to the chosen set. So after a batch the others
  are updated from the picks in their own and the adjoining cells of a grid of that width.

Every distance that counts is computed as `ops.neighbors.farthest_point_sampling` does, in float32 and in the same
order, and the lowest row wins among equals: the rows are the same, not merely as good.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray

from pointcept_kd.ops.neighbors import farthest_point_sampling

_PLAIN = 1 << 21  # distances up to which the plain algorithm is as fast
_FIRST = 64  # picks that reach nearly all points anyway
_CANDIDATES = 768


def farthest_points(points: NDArray, count: int) -> NDArray:
    """Rows (count,) int64 of points (n, 3) float32, each farthest from those before; the first is row 0.

    Raises:
        ValueError: for a count outside 1..n, or coordinates that are not finite.
    """
    points = np.ascontiguousarray(points, np.float32)
    if len(points) * count <= _PLAIN or not 1 <= count <= len(points):
        return farthest_point_sampling(torch.from_numpy(points), count).numpy()
    first = min(_FIRST, count)
    picks = np.empty(count, np.int64)
    picks[:first] = farthest_point_sampling(torch.from_numpy(points), first).numpy()
    columns = tuple(np.ascontiguousarray(points[:, axis]) for axis in range(3))
    reach = np.full(len(points), np.inf, np.float32)
    for pick in picks[:first]:
        np.minimum(reach, _squared(columns, points[pick]), out=reach)
    grid, done = None, first
    while done < count:
        widest = float(np.sqrt(reach.max()))
        if (
            widest == 0
        ):  # every point coincides with a pick: the plain algorithm takes the lowest row
            picks[done:] = 0
            break
        if grid is None or widest < 0.6 * grid.width:
            # A margin for rounding: points exactly at the border of what a pick can change.
            grid = _Grid(points, widest * 1.001)
        batch = _picks_among(columns, reach, count - done)
        picks[done : done + len(batch)] = batch
        grid.update(reach, batch)
        done += len(batch)
    return picks


def _squared(columns: tuple[NDArray, NDArray, NDArray], point: NDArray) -> NDArray:
    square = columns[0] - point[0]
    square *= square
    for axis in (1, 2):
        term = columns[axis] - point[axis]
        term *= term
        square += term
    return square


def _picks_among(columns: tuple[NDArray, ...], reach: NDArray, most: int) -> list[int]:
    """The next picks, as many as the candidates can tell; at least one."""
    size = len(reach)
    level = np.partition(reach, size - min(_CANDIDATES, size))[size - min(_CANDIDATES, size)]
    rows = np.flatnonzero(reach >= level)  # ties included; all others are nearer than `level`
    x, y, z = (column[rows] for column in columns)
    left = reach[rows]
    square, term = np.empty_like(left), np.empty_like(left)
    found: list[int] = []
    while len(found) < most:
        best = left.argmax()  # the lowest row among equals: rows ascend
        if left[best] < level or (found and left[best] == 0):
            break
        found.append(int(rows[best]))
        np.subtract(x, x[best], out=square)
        np.multiply(square, square, out=square)
        for axis in (y, z):
            np.subtract(axis, axis[best], out=term)
            np.multiply(term, term, out=term)
            np.add(square, term, out=square)
        np.minimum(left, square, out=left)
    return found


class _Grid:
    """Points sorted by cell, to find those within `width` of a point in 27 cells."""

    def __init__(self, points: NDArray, width: float) -> None:
        self.width = width
        low = points.min(axis=0).astype(np.float64)
        cells = ((points.astype(np.float64) - low) / width).astype(np.int64) + 1
        # Two cells wider than the cloud, so that neighbours never wrap into another row of cells.
        shape = cells.max(axis=0) + 2
        self.strides = np.array([shape[1] * shape[2], shape[2], 1])
        keys = cells @ self.strides
        self.order = np.argsort(keys, kind="stable")
        self.key_of = keys
        self.keys = keys[self.order]
        self.columns = tuple(points[self.order, axis] for axis in range(3))
        self.points = points

    def update(self, reach: NDArray, picks: list[int]) -> None:
        """Lower `reach` to the squared distance to the picks, wherever they are within the width."""
        own = self.key_of[picks]
        # Cells along z have consecutive keys: nine runs of three cells instead of 27 cells.
        sides = np.array([a * self.strides[0] + b * self.strides[1] for a, b in _SIDES])
        middle = (own[:, None] + sides).reshape(-1)
        begin = np.searchsorted(self.keys, middle - 1, "left")
        length = np.searchsorted(self.keys, middle + 1, "right") - begin
        total = np.cumsum(length)
        at = np.arange(total[-1]) + np.repeat(begin - total + length, length)
        of = np.repeat(np.repeat(np.asarray(picks), len(_SIDES)), length)
        square = self.columns[0][at] - self.points[of, 0]
        square *= square
        for axis in (1, 2):
            term = self.columns[axis][at] - self.points[of, axis]
            term *= term
            square += term
        rows = self.order[at]
        lower = square < reach[rows]
        np.minimum.at(reach, rows[lower], square[lower])


_SIDES = tuple(itertools.product((-1, 0, 1), repeat=2))
