"""Completion scores: Chamfer distance, F area, Jensen-Shannon distance, voxel IoU, earth mover's distance.

For a predicted cloud P and the true one G, in metres in the sensor's frame, |.| Euclidean:

    dist_pred2gt = mean_p min_g |p - g|        dist_gt2pred = mean_g min_p |g - p|
    cd           = (dist_pred2gt + dist_gt2pred) / 2                                     not squared
    precision(d) = share of P nearer than d to G      recall(d) = share of G nearer than d to P
    jsd          = sqrt((KL(p | m) + KL(q | m)) / 2),   m = (p + q) / 2,   natural logarithm
    iou          = tp / (tp + fn + fp), the three counts summed over all scans

The areas `precision`, `recall` and `f` (f(d) is the harmonic mean of both at d) are Simpson integrals over 100
distances d from 0.05 to 0.10 m, divided by that of a constant 1, so that all shares lie in 0..1. The histograms p and q
of `jsd_3d` count points per cell of 0.5 m; those of `jsd_bev`, the "JSD" of the papers' tables, occupied cells per
column. Cells fill the box [-50, 50]^3 with its right edge in the last cell; points outside count in no cell, but in
every distance.

Everything is exact and sparse: occupied cells are sorted 64-bit keys, never an array of all cells. No value depends on
the order of a cloud's points.

After LiDiff, Nunes et al., 2024, arXiv:2403.13470, whose corrected IoU is meant here; `iou_legacy` is the earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from pointcept_kd.host import InputError, comm

Cloud: TypeAlias = "NDArray | torch.Tensor"

HALF = 50.0  # metres from the sensor to every face of the box
CELLS = (0.5, 0.2, 0.1)
JSD_CELL = 0.5
EMD_POINTS = 2048
THRESHOLDS = np.linspace(0.05, 0.10, 100)
_LEGACY_REACH = 50  # the earlier IoU's limit, in cells where metres were meant


def points_of(cloud: Cloud, what: str = "cloud") -> NDArray:
    """The coordinates of a cloud as (n, 3) float64.

    Raises:
        InputError: for another shape, and for values that are not finite.
    """
    if isinstance(cloud, torch.Tensor):
        cloud = cloud.detach().cpu().numpy()
    points = np.asarray(cloud)
    if points.ndim != 2 or points.shape[1] != 3 or points.dtype.kind not in "fiu":
        raise InputError(
            f"{what}: expected (n, 3) coordinates, got {points.shape} {points.dtype}; cut off other columns"
        )
    points = points.astype(np.float64)
    if not np.isfinite(points).all():
        rows = int((~np.isfinite(points)).any(axis=1).sum())
        raise InputError(f"{what}: {rows} of {len(points)} points are not finite")
    return points


# --- distances ------------------------------------------------------------------------------------


def _street_order(points: NDArray) -> NDArray:
    """An order in which neighbours in the row are neighbours in space: searches then stay in the cache."""
    cells = np.clip(np.floor(points), -(2**20), 2**20 - 1).astype(np.int64) + 2**20
    return np.argsort((cells[:, 0] << 42) | (cells[:, 1] << 21) | cells[:, 2])


def _nearest(source: NDArray, target: NDArray) -> NDArray:
    if not len(source) or not len(target):
        return np.full(len(source), np.inf)
    # Noise between two surfaces is the case that costs; the plain tree answers it about twice as fast.
    tree = cKDTree(target[_street_order(target)], compact_nodes=False, balanced_tree=False)
    order = _street_order(source)
    found = np.empty(len(source))
    found[order] = tree.query(source[order])[0]
    return found


def nearest_distances(source: Cloud, target: Cloud) -> NDArray:
    """Distance from every point to the nearest one of another cloud.

    Args:
        source, target: (n, 3) and (m, 3) metres.

    Returns:
        (n,) float64 metres; infinite where `target` has no points.

    Raises:
        InputError: see `points_of`.
    """
    return _nearest(points_of(source, "source"), points_of(target, "target"))


def _mean(distances: NDArray) -> float:
    # Sorted, so that a cloud in another order has the same mean to the last bit.
    return float(np.sort(distances).mean()) if len(distances) else math.inf


def chamfer_distance(pred: Cloud, target: Cloud) -> float:
    """Mean of the two mean distances to the nearest point, metres; infinite if a cloud is empty.

    Args:
        pred, target: (n, 3) and (m, 3) metres.

    Raises:
        InputError: see `points_of`.
    """
    p, g = points_of(pred, "prediction"), points_of(target, "target")
    return 0.5 * (_mean(_nearest(p, g)) + _mean(_nearest(g, p)))


def f_areas(pred2gt: NDArray, gt2pred: NDArray) -> tuple[float, float, float]:
    """Areas below precision, recall and their harmonic mean, 0..1; all 0 if a cloud is empty.

    Args:
        pred2gt, gt2pred: (n,) and (m,) metres from every point to the nearest of the other cloud.
    """

    def shares(distances: NDArray) -> NDArray:
        below = np.searchsorted(np.sort(distances), THRESHOLDS, side="left")  # strictly nearer
        return below / max(1, len(distances))

    precision, recall = shares(pred2gt), shares(gt2pred)
    both = precision + recall
    f = 2 * precision * recall / np.where(both > 0, both, 1)
    areas = (min(1.0, float(_area_weights() @ curve)) for curve in (precision, recall, f))
    return next(areas), next(areas), next(areas)


@cache
def _area_weights() -> NDArray[np.float64]:
    """Simpson's rule over the thresholds, which is linear in the values: one row of weights does for all curves."""
    from scipy.integrate import simpson  # a second to import

    weights = simpson(np.eye(len(THRESHOLDS)), x=THRESHOLDS)
    return weights / weights.sum()


# --- cells ----------------------------------------------------------------------------------------


def _occupied(points: NDArray, cell: float) -> tuple[NDArray, NDArray]:
    """Sorted keys (k,) of the cells with points in the box, and the points in each."""
    side = round(2 * HALF / cell)
    axes = np.ascontiguousarray(points.T)  # rows of 3 are slow to reduce
    inside = np.logical_and.reduce(np.abs(axes) <= HALF)
    x, y, z = np.minimum(((np.clip(axes, -HALF, HALF) + HALF) / cell).astype(np.int64), side - 1)
    keys = ((x * side + y) * side + z)[inside]
    return np.unique(keys, return_counts=True)


def _columns(cells: NDArray, cell: float) -> tuple[NDArray, NDArray]:
    """Sorted keys of the columns over occupied cells, and the occupied cells in each."""
    return np.unique(cells // round(2 * HALF / cell), return_counts=True)


def _jensen_shannon(first: tuple[NDArray, NDArray], second: tuple[NDArray, NDArray]) -> float:
    """Of two histograms as (sorted keys, counts)."""
    (keys_p, p), (keys_q, q) = first, second
    if not len(p) or not len(q):
        return math.nan if len(p) == len(q) else math.sqrt(math.log(2))
    _, in_p, in_q = np.intersect1d(keys_p, keys_q, assume_unique=True, return_indices=True)
    total_p, total_q = int(p.sum()), int(q.sum())
    # What only one of them has is twice the mean there. In whole numbers: equal clouds are at exactly 0.
    alone_p = (total_p - int(p[in_p].sum())) / total_p
    alone_q = (total_q - int(q[in_q].sum())) / total_q
    shared_p, shared_q = p[in_p] / total_p, q[in_q] / total_q
    mean = (shared_p + shared_q) / 2
    divergence = (
        math.log(2) * (alone_p + alone_q)
        + float((shared_p * np.log(shared_p / mean)).sum())
        + float((shared_q * np.log(shared_q / mean)).sum())
    )
    return math.sqrt(max(0.0, divergence / 2))


def _check_cell(cell: float) -> None:
    if not (isinstance(cell, (int, float)) and 0 < cell <= 2 * HALF):
        raise InputError(f"cell={cell!r}: expected a size in metres, above 0 and up to {2 * HALF}")
    side = 2 * HALF / cell
    if abs(side - round(side)) > 1e-6 * side or round(side) >= 2**21:
        raise InputError(
            f"cell={cell}: cells must divide the {2 * HALF:.0f} m of the box, down to 0.1 mm"
        )


def jsd_3d(pred: Cloud, target: Cloud, cell: float = JSD_CELL) -> float:
    """Jensen-Shannon distance between the points' histograms over cells, 0..sqrt(ln 2).

    Args:
        pred, target: (n, 3) and (m, 3) metres.
        cell: side of a cell, metres.

    Returns:
        sqrt(ln 2) if one cloud has no point in the box, NaN if neither has.

    Raises:
        InputError: see `points_of`; for cells that do not fill the box.
    """
    _check_cell(cell)
    p, g = points_of(pred, "prediction"), points_of(target, "target")
    return _jensen_shannon(_occupied(p, cell), _occupied(g, cell))


def jsd_bev(pred: Cloud, target: Cloud, cell: float = JSD_CELL) -> float:
    """The same between the numbers of occupied cells per column: the "JSD" of the papers' tables.

    Args, returns and errors are those of `jsd_3d`.
    """
    _check_cell(cell)
    p, g = points_of(pred, "prediction"), points_of(target, "target")
    return _jensen_shannon(
        _columns(_occupied(p, cell)[0], cell), _columns(_occupied(g, cell)[0], cell)
    )


@dataclass(frozen=True)
class CellCounts:
    """Cells that both clouds, only the true one, and only the predicted one occupy; `+` joins scans."""

    tp: int = 0
    fn: int = 0
    fp: int = 0

    def __add__(self, other: CellCounts) -> CellCounts:
        return CellCounts(self.tp + other.tp, self.fn + other.fn, self.fp + other.fp)

    @property
    def iou(self) -> float:
        """Intersection over union, 0..1; NaN where no cell is occupied at all."""
        union = self.tp + self.fn + self.fp
        return self.tp / union if union else math.nan


def _compare(pred: NDArray, target: NDArray) -> CellCounts:
    """Of two sets of sorted keys."""
    both = len(np.intersect1d(pred, target, assume_unique=True))
    return CellCounts(both, len(target) - both, len(pred) - both)


def voxel_counts(pred: Cloud, target: Cloud, cell: float) -> CellCounts:
    """Occupied cells of one scan; the IoU of several is that of the sum of their counts.

    Args:
        pred, target: (n, 3) and (m, 3) metres.
        cell: side of a cell, metres.

    Raises:
        InputError: see `points_of`; for cells that do not fill the box.
    """
    _check_cell(cell)
    p, g = points_of(pred, "prediction"), points_of(target, "target")
    return _compare(_occupied(p, cell)[0], _occupied(g, cell)[0])


def _occupied_legacy(points: NDArray, cell: float) -> NDArray:
    index = np.rint(points / cell)
    index = index[(np.abs(index) <= _LEGACY_REACH).all(axis=1)].astype(np.int64) + _LEGACY_REACH
    side = 2 * _LEGACY_REACH + 1
    return np.unique((index[:, 0] * side + index[:, 1]) * side + index[:, 2])


def voxel_counts_legacy(pred: Cloud, target: Cloud, cell: float) -> CellCounts:
    """Occupied cells as the tables of older papers counted them: only the innermost ones.

    A cell is the rounded quotient (half to even), and the limit of 50 was applied to that index instead of to metres.
    What lies beyond 50 cells (25, 10 and 5 m at 0.5, 0.2 and 0.1 m) is ignored. Only for comparison with such tables.

    Args and errors are those of `voxel_counts`.
    """
    _check_cell(cell)
    p, g = points_of(pred, "prediction"), points_of(target, "target")
    return _compare(_occupied_legacy(p, cell), _occupied_legacy(g, cell))


def iou_legacy(pred: Cloud, target: Cloud, cell: float) -> float:
    """`voxel_counts_legacy(...).iou` of a single scan."""
    return voxel_counts_legacy(pred, target, cell).iou


# --- earth mover's distance -----------------------------------------------------------------------


def _subset(points: NDArray, count: int, seed: int) -> NDArray:
    # From a sorted cloud, so that the choice does not follow the order of the rows.
    points = points[np.lexsort(points.T[::-1])]
    if count == len(points):
        return points
    return points[np.random.default_rng(seed).permutation(len(points))[:count]]


def emd(pred: Cloud, target: Cloud, points: int = EMD_POINTS, seed: int = 0) -> tuple[float, int]:
    """Exact earth mover's distance between equally many points of each cloud.

    The mean length of the best one-to-one assignment. Its value depends on the number of points, so that is returned
    with it; the time grows with its cube (2048: well below a second).

    Args:
        pred, target: (n, 3) and (m, 3) metres.
        points: how many of each at most; fewer where a cloud is smaller.
        seed: of the choice, which is the same for the same cloud in any order.

    Returns:
        Metres and the number of points; (inf, 0) if a cloud is empty.

    Raises:
        InputError: see `points_of`; for `points` below 1.
    """
    if points < 1:
        raise InputError(f"emd: points={points}, expected 1 or more")
    p, g = points_of(pred, "prediction"), points_of(target, "target")
    count = min(points, len(p), len(g))
    if not count:
        return math.inf, 0
    # Imported here: together a second, and only this score needs them.
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    costs = cdist(_subset(p, count, seed), _subset(g, count, seed))
    rows, columns = linear_sum_assignment(costs)
    return float(costs[rows, columns].mean()), count


# --- all of them ----------------------------------------------------------------------------------

MEANS = ("cd", "dist_pred2gt", "dist_gt2pred", "precision", "recall", "f", "jsd_3d", "jsd_bev")


@dataclass(frozen=True)
class ScanScores:
    """The scores of one scan.

    Attributes:
        name: of the scan.
        points_pred, points_gt: of the two clouds.
        values: the scores of `MEANS`, and `emd` where it is asked for.
        cells, cells_legacy: counts of occupied cells by side in metres.
        emd_points: that `emd` is of; 0 without.
    """

    name: str
    points_pred: int
    points_gt: int
    values: Mapping[str, float]
    cells: Mapping[float, CellCounts]
    cells_legacy: Mapping[float, CellCounts] = field(default_factory=dict)
    emd_points: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file; what is not finite is None."""
        return {
            "name": self.name,
            "points_pred": self.points_pred,
            "points_gt": self.points_gt,
            **{key: _plain(value) for key, value in self.values.items()},
            **{f"iou_{cell:g}": _plain(counts.iou) for cell, counts in self.cells.items()},
            **{
                f"iou_legacy_{cell:g}": _plain(counts.iou)
                for cell, counts in self.cells_legacy.items()
            },
            **({"emd_points": self.emd_points} if "emd" in self.values else {}),
        }


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class Summary:
    """What a set of scans scores.

    Attributes:
        scans: their number.
        empty: scans whose prediction has no points; each makes the mean distances infinite.
        mean, std: of `ScanScores.values` over scans; std of the population.
        cells, cells_legacy: counts summed over scans by side in metres, whose `iou` is the score.
        emd_points: fewest and most points that `emd` is of, or None.
    """

    scans: int
    empty: int
    mean: Mapping[str, float]
    std: Mapping[str, float]
    cells: Mapping[float, CellCounts]
    cells_legacy: Mapping[float, CellCounts]
    emd_points: tuple[int, int] | None = None

    def values(self) -> dict[str, float]:
        """Every score under a name of its own: `cd`, ..., `iou_0.5`, ..., `iou_legacy_0.5`."""
        return {
            **self.mean,
            **{f"iou_{cell:g}": counts.iou for cell, counts in self.cells.items()},
            **{f"iou_legacy_{cell:g}": counts.iou for cell, counts in self.cells_legacy.items()},
        }

    @property
    def headline(self) -> str:
        """The numbers of the papers' tables."""
        cells = "/".join(f"{cell:g}" for cell in self.cells)
        ious = "/".join(f"{counts.iou:.4f}" for counts in self.cells.values())
        return (
            f"CD {self.mean['cd']:.4f} m, JSD-3D/BEV {self.mean['jsd_3d']:.4f}/{self.mean['jsd_bev']:.4f}, "
            f"IoU at {cells} m {ious}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file; what is not finite is None."""

        def counted(cells: Mapping[float, CellCounts]) -> dict[str, Any]:
            return {
                f"{cell:g}": {"iou": _plain(c.iou), "tp": c.tp, "fn": c.fn, "fp": c.fp}
                for cell, c in cells.items()
            }

        return {
            "scans": self.scans,
            "empty": self.empty,
            **{
                key: {"mean": _plain(self.mean[key]), "std": _plain(self.std[key])}
                for key in self.mean
            },
            "iou": counted(self.cells),
            **({"iou_legacy": counted(self.cells_legacy)} if self.cells_legacy else {}),
            **({"emd_points": list(self.emd_points)} if self.emd_points else {}),
        }


class CompletionScores:
    """Scores of many scans, added one by one and over processes; the order of adding never shows.

    Args:
        cells: sides of the IoU's cells, metres.
        legacy: also count the cells of `voxel_counts_legacy`.
        emd_points: points of the earth mover's distance; 0 leaves it out.
        seed: of its choice of points.

    Raises:
        InputError: for cells that do not fill the box, or none.
    """

    def __init__(
        self,
        cells: Sequence[float] = CELLS,
        legacy: bool = False,
        emd_points: int = 0,
        seed: int = 0,
    ) -> None:
        if not len(cells) or emd_points < 0:
            raise InputError(
                f"cells={cells!r}, emd_points={emd_points}: expected one cell or more, and 0 points or more"
            )
        for cell in cells:
            _check_cell(cell)
        self.cells, self.legacy = tuple(float(cell) for cell in cells), legacy
        self.emd_points, self.seed = emd_points, seed
        self.rows: list[ScanScores] = []

    def add(self, name: str, pred: Cloud, target: Cloud) -> ScanScores:
        """Score one scan.

        Args:
            name: said in errors and rows.
            pred: (n, 3) metres; without points, all distances are infinite, all shares 0 and both jsd sqrt(ln 2).
            target: (m, 3) metres.

        Raises:
            InputError: for clouds of another shape or with values that are not finite, and for a target without points
                in the box.
        """
        p, g = points_of(pred, f"{name}: prediction"), points_of(target, f"{name}: target")
        cells = {cell: (_occupied(p, cell), _occupied(g, cell)) for cell in {*self.cells, JSD_CELL}}
        cells_p, cells_g = cells[JSD_CELL]
        if not len(cells_g[0]):
            raise InputError(
                f"{name}: none of the target's {len(g)} points lies within {HALF:.0f} m of the sensor along each axis; "
                "is it in the sensor's frame?"
            )
        pred2gt, gt2pred = _nearest(p, g), _nearest(g, p)
        values = {"dist_pred2gt": _mean(pred2gt), "dist_gt2pred": _mean(gt2pred)}
        values = {"cd": 0.5 * (values["dist_pred2gt"] + values["dist_gt2pred"]), **values}
        values.update(zip(("precision", "recall", "f"), f_areas(pred2gt, gt2pred)))
        values["jsd_3d"] = _jensen_shannon(cells_p, cells_g)
        values["jsd_bev"] = _jensen_shannon(
            _columns(cells_p[0], JSD_CELL), _columns(cells_g[0], JSD_CELL)
        )
        used = 0
        if self.emd_points:
            values["emd"], used = emd(p, g, self.emd_points, self.seed)
        self.rows.append(
            ScanScores(
                name=str(name),
                points_pred=len(p),
                points_gt=len(g),
                values=values,
                cells={c: _compare(cells[c][0][0], cells[c][1][0]) for c in self.cells},
                cells_legacy={
                    c: _compare(_occupied_legacy(p, c), _occupied_legacy(g, c))
                    for c in (self.cells if self.legacy else ())
                },
                emd_points=used,
            )
        )
        return self.rows[-1]

    @property
    def settings(self) -> tuple[Any, ...]:
        """What two sets of scores must share to be joined."""
        return self.cells, self.legacy, self.emd_points, self.seed

    def merge(self, other: CompletionScores) -> None:
        """Take over the scans of another one.

        Raises:
            InputError: for other settings.
        """
        if other.settings != self.settings:
            raise InputError(f"scores of {other.settings} cannot join those of {self.settings}")
        self.rows += other.rows

    def gathered(self) -> CompletionScores:
        """On every process the scores of all processes; none of them changes its own."""
        joined = CompletionScores(self.cells, self.legacy, self.emd_points, self.seed)
        for rows in comm.all_gather(self.rows):
            joined.rows += rows
        return joined

    def summary(self) -> Summary:
        """Means and sums over all scans.

        Raises:
            InputError: without scans.
        """
        if not self.rows:
            raise InputError("no scan was scored: the validation or test set is empty")
        mean, std = {}, {}
        for key in self.rows[0].values:
            column = [row.values[key] for row in self.rows]
            mean[key] = math.fsum(column) / len(column)
            away = [value - mean[key] for value in column]
            std[key] = math.sqrt(math.fsum(a * a for a in away) / len(column))
        points = [row.emd_points for row in self.rows]
        return Summary(
            scans=len(self.rows),
            empty=sum(row.points_pred == 0 for row in self.rows),
            mean=mean,
            std=std,
            cells={c: sum((row.cells[c] for row in self.rows), CellCounts()) for c in self.cells},
            cells_legacy={
                c: sum((row.cells_legacy[c] for row in self.rows), CellCounts())
                for c in (self.cells if self.legacy else ())
            },
            emd_points=(min(points), max(points)) if self.emd_points else None,
        )

    def as_dict(self, rows: bool = True) -> dict[str, Any]:
        """The summary and, unless told otherwise, one row per scan by name, for a JSON file."""
        ordered = sorted(self.rows, key=lambda row: (row.name, *row.values.values()))
        content = self.summary().as_dict()
        return {**content, "rows": [row.as_dict() for row in ordered]} if rows else content
